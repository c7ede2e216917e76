"""aeup.conv_transpose2d and aeup.ConvTranspose2d against torch, float64 and the matrix of the convolution."""

import copy
import inspect
import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import check_budget
from conv_cases import (
    ACTIVATIONS,
    CASES,
    DTYPES,
    LARGE_DEPTHWISE,
    LARGE_FEW,
    LAYOUTS,
    Case,
    by_torch,
    run,
    transposed_by_matrix,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from map_cases import DRAWN, gradients_where, of_own_output, views_of

import aeup
from aeup.ops.conv_kernels import MAPS, W, X, Y
from aeup.ops.conv_shapes import transposed_of_call

pytestmark = pytest.mark.usefixtures("poison")


def check_all(got, exact, theirs):
    """Output and gradients within the budget; the bias gradient, a sum with cancellation, with a random walk more. In
    float64 the reference is such a sum itself: twice the walk, and twice its usual length for the worst channel."""
    for mine, true, other in zip(got[:3], exact[:3], theirs[:3], strict=True):
        check_budget(mine, true, other)
    mine, true, other = got[3], exact[3], theirs[3]
    eps = torch.finfo(torch.promote_types(mine.dtype, torch.float32)).eps
    walk = (4 if mine.dtype == torch.float64 else 1) * max(got[0].numel() / mine.numel(), 1) ** 0.5 * eps
    floor = 4 * torch.finfo(mine.dtype).eps * true.abs().max() + walk
    assert (mine.double() - true).abs().max() <= 2 * (other.double() - true).abs().max() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*CASES, LARGE_DEPTHWISE, *LARGE_FEW), ids=str)
def test_all_passes_within_budget(case, dtype):
    for layout in LAYOUTS:
        tensors = case.tensors(dtype, layout)
        got, theirs = run(aeup.conv_transpose2d, case, tensors), run(by_torch, case, tensors)
        exact = run(by_torch, case, [t.double() for t in tensors])
        assert got[0].dtype == dtype and got[0].stride() == theirs[0].stride()
        assert [t.dtype for t in got[1:]] == [dtype] * 3
        check_all(got, exact, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(activation, dtype):
    for case, layout in itertools.product((CASES[2], CASES[14], LARGE_FEW[0]), LAYOUTS):
        tensors = case.tensors(dtype, layout)
        got, theirs = (run(fn, case, tensors, activation) for fn in (aeup.conv_transpose2d, by_torch))
        exact = run(by_torch, case, [t.double() for t in tensors], activation)
        check_all(got, exact, theirs)
        with torch.no_grad():
            y = aeup.conv_transpose2d(*tensors[:3], **case.kwargs, activation=activation)
        check_budget(y, exact[0], theirs[0])


ODD = Case("odd-output", (2, 4, 5, 3), (4, 3, 3, 3), {"stride": 2, "padding": 1})
NARROW = Case("narrower-than-the-stride", (2, 3, 1, 2), (3, 4, 3, 5), {"stride": 2, "padding": (1, 3)})
PIXEL = Case("one-pixel", (5, 12, 1, 1), (12, 7, 4, 3), {})
MANY_OF_PIXEL = Case("one-pixel-many", (16, 100, 1, 1), (100, 64, 4, 4), {})
DEEP = Case("deep", (1, 128, 4, 4), (128, 64, 4, 4), {"stride": 2, "padding": 1})
CLASSES = Case("a-channel-a-class", (1, 21, 6, 5), (21, 21, 4, 4), {"stride": 2, "padding": 1})
MANY_WEIGHTS = Case("many-weights", (1, 1024, 4, 4), (1024, 512, 4, 4), {"stride": 2, "padding": 1})
MANY_OF_FEW = Case("many-weights-more-pixels", (2, 1024, 4, 5), (1024, 512, 4, 4), {"stride": 2, "padding": 1})
LARGE_KERNEL = Case("large-kernel", (1, 21, 8, 9), (21, 21, 16, 16), {"stride": 8, "padding": 4})
BLOCKS = Case("kernel-of-the-stride", (2, 64, 4, 3), (64, 130, 2, 2), {"stride": 2})
DOUBLING = Case("doubling", (1, 70, 17, 16), (70, 40, 2, 2), {"stride": 2})
BEYOND = Case("a-row-no-tap-reaches", (1, 1024, 5, 4), (1024, 2048, 2, 2), {"stride": 2, "output_padding": (1, 0)})
DOUBLING_OF_TWO = Case("doubling-large-images", (2, 64, 64, 65), (64, 32, 2, 2), {"stride": 2})
COLUMNS = ("columns",) * 3
PRODUCT, BY_FLOAT32 = ("matrix product",) * 3, ("through float32",) * 3
WAYS = [  # of the op and its gradients by input and weight; "" is torch's own kernel
    (LARGE_FEW[0], torch.float32, "nchw", ("merged phases", "", "")),
    (LARGE_FEW[1], torch.bfloat16, "nchw", ("merged phases", "", "")),
    (LARGE_FEW[0], torch.float16, "nchw", BY_FLOAT32),
    (LARGE_DEPTHWISE, torch.bfloat16, "nchw", ("through float32", "", "")),
    (LARGE_DEPTHWISE, torch.bfloat16, "nhwc", ("through float32", "", "through float32")),
    (CASES[11], torch.float32, "nchw", ("bias after", "", "")),
    (CASES[17], torch.float32, "nchw", ("bias after", "", "")),
    (CASES[15], torch.bfloat16, "nchw", ("bias after", "", "")),
    (ODD, torch.float32, "nchw", ("bias after", "", "")),
    (NARROW, torch.bfloat16, "nchw", BY_FLOAT32),
    (PIXEL, torch.float32, "nchw", PRODUCT),
    (PIXEL, torch.bfloat16, "nhwc", PRODUCT),
    (PIXEL, torch.float64, "nhwc", ("", "", "")),
    (MANY_OF_PIXEL, torch.float64, "nchw", PRODUCT),
    (MANY_OF_PIXEL, torch.float16, "nchw", BY_FLOAT32),
    (DEEP, torch.bfloat16, "nchw", ("in channels-last", "", "columns")),
    (DEEP, torch.bfloat16, "nhwc", ("", "columns", "columns")),
    (MANY_WEIGHTS, torch.float32, "nchw", COLUMNS),
    (MANY_WEIGHTS, torch.float32, "nhwc", COLUMNS),
    (MANY_OF_FEW, torch.float32, "nchw", COLUMNS),
    (MANY_WEIGHTS, torch.bfloat16, "nchw", ("in channels-last", "columns", "columns")),
    (LARGE_KERNEL, torch.float32, "nhwc", ("", "", "columns")),
    (BLOCKS, torch.bfloat16, "nhwc", ("columns", "", "columns")),
    (DOUBLING, torch.float32, "nchw", ("columns", "", "")),
    (BEYOND, torch.float32, "nhwc", COLUMNS),
    (DOUBLING, torch.bfloat16, "nchw", ("columns", "", "columns")),
    (DOUBLING_OF_TWO, torch.bfloat16, "nchw", ("columns", "", "columns")),
    (CLASSES, torch.float32, "nchw", ("", "in channels-last", "")),
    (CLASSES, torch.bfloat16, "nchw", ("", "in channels-last", "")),
]


@pytest.mark.parametrize(("case", "dtype", "layout", "ways"), WAYS, ids=str)
def test_every_way_of_the_cpu_backend_is_taken_and_right(case, dtype, layout, ways):
    if dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this processor has half arithmetic")
    tensors = case.tensors(dtype, layout)
    choices = aeup.explain(aeup.conv_transpose2d, *tensors[:3], **case.kwargs)
    assert len(choices) == 3 and "gradient of input" in choices[1].call and "gradient of weight" in choices[2].call
    assert [(c.backend, c.kernel) for c in choices] == [("cpu", way) if way else ("torch", "") for way in ways]
    got, theirs = (run(fn, case, tensors) for fn in (aeup.conv_transpose2d, by_torch))
    check_all(got, run(by_torch, case, [t.double() for t in tensors]), theirs)
    assert [t.stride() for t in got] == [t.stride() for t in theirs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (ODD, NARROW), ids=str)
def test_where_onednn_is_slow_or_wrong(case, dtype):
    for layout, _ in itertools.product(LAYOUTS, range(3)):
        tensors = case.tensors(dtype, layout)
        got = run(aeup.conv_transpose2d, case, tensors)
        exact = run(by_torch, case, [t.double() for t in tensors])
        for mine, true in zip(got, exact, strict=True):
            tolerance = 8 * torch.finfo(dtype).eps * max(true.abs().max().item(), 1)
            torch.testing.assert_close(mine.double(), true, rtol=0, atol=tolerance)


def test_torch_serves_the_rest_and_explain_says_why():
    x, w, b, _ = CASES[0].tensors(torch.float32, "nhwc")
    (choice, *_) = aeup.explain(aeup.conv_transpose2d, x, w, b, stride=2, padding=1, activation="relu")
    assert choice.backend == "torch" and "fastest" in choice.others["cpu"] and "on cpu" in choice.others["cuda"]
    assert "k4x4, s2, p1, relu, float32" in choice.call
    with aeup.backend("cpu"), pytest.raises(aeup.BackendError, match="'cpu' cannot serve.*fastest"):
        aeup.conv_transpose2d(x, w, b, stride=2, padding=1)
    with aeup.backend("cuda"), pytest.raises(aeup.BackendError, match="aeup.conv_transpose2d.*'cuda' cannot serve"):
        aeup.conv_transpose2d(x, w, b)
    (choice,) = aeup.explain(aeup.conv_transpose2d, x.cfloat(), w.cfloat())
    assert choice.backend == "torch" and "float64, float32" in choice.others["cpu"]
    assert aeup.conv_transpose2d(x.long(), w.long(), activation="relu").dtype == torch.int64


def test_backend_asked_for_in_the_forward_serves_the_backward():
    x, w, b, grad = LARGE_FEW[0].tensors(torch.float32)
    leaf = x.requires_grad_()
    with aeup.backend("torch"):
        assert aeup.get_backend() == "torch"
        y = aeup.conv_transpose2d(leaf, w, b, stride=2, padding=1)
    assert y.grad_fn.name() == "ConvolutionBackward0"
    with aeup.backend("cpu"):
        y = aeup.conv_transpose2d(leaf, w, b, stride=2, padding=1)
    assert y.grad_fn.name() == "_ConvTranspose2dBackward"
    assert torch.autograd.grad(y, leaf, grad, create_graph=True)[0].shape == x.shape


sizes = st.integers(1, 5)
pair = st.tuples(sizes, sizes)


@st.composite
def calls(draw):
    groups = draw(st.integers(1, 3))
    shape = draw(st.integers(0, 3)), groups * draw(st.integers(1, 4)), *draw(pair)
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    extra = tuple(draw(st.integers(0, m)) for m in most)
    kwargs = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups, "dilation": dilation}
    axes = zip(shape[2:], kernel, stride, padding, dilation, extra, strict=True)
    assume(all((i - 1) * s - 2 * p + d * (k - 1) + 1 + e > 0 for i, k, s, p, d, e in axes))
    return Case("random", shape, (shape[1], draw(st.integers(1, 4)), *kernel), kwargs)


NEAR_ZERO = Case("near-zero", (1, 6, 2, 5), (6, 4, 1, 1), {"groups": 3})  # an output of 0.002, in bfloat16 0


@settings(max_examples=60, deadline=None)
@given(case=calls(), **DRAWN)
@example(case=NEAR_ZERO, dtype=torch.bfloat16, layout="nchw", activation="relu")
def test_any_call(case, dtype, layout, activation):
    tensors = case.tensors(dtype, layout)
    got, theirs = (run(fn, case, tensors, activation) for fn in (aeup.conv_transpose2d, by_torch))
    assert got[0].shape == theirs[0].shape
    if got[0].numel():
        # An activation that is not in place chooses strides of its own for dimensions of size 1.
        assert activation or got[0].stride() == theirs[0].stride()
        exact = run(by_torch, case, [t.double() for t in tensors], activation)
        check_all(got, *of_own_output(case, tensors, got, exact, theirs, activation))
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, theirs, strict=True))


@settings(max_examples=25, deadline=None)
@given(case=calls())
def test_any_call_against_the_matrix(case):
    x, w, b, _ = case.tensors(torch.float64)
    y = aeup.conv_transpose2d(x, w, b, **case.kwargs)
    torch.testing.assert_close(y, transposed_by_matrix(x, w, b, **case.kwargs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_strides_and_offsets(layout):
    x, w, b, _ = CASES[0].tensors(torch.float32, layout)
    for name, view in views_of(x).items():
        for weight in (w, w.transpose(2, 3), w.flip(0)[:, ::2]):
            bias = b[: weight.shape[1]]
            y = aeup.conv_transpose2d(view, weight, bias, stride=2, padding=1)
            theirs = F.conv_transpose2d(view, weight, bias, stride=2, padding=1)
            assert y.stride() == theirs.stride(), name
            torch.testing.assert_close(y, theirs, msg=name)
    expected = F.conv_transpose2d(x, w, b, 2, 1)
    for stride in (2, (2,), [2], [2, 2], torch.tensor(2)):
        assert torch.equal(aeup.conv_transpose2d(x, w, b, stride, [1, 1], (0,)), expected)


def test_rows_that_no_tap_reaches_are_the_bias():
    x, w, b = torch.randn(1, 2, 2, 2), torch.randn(2, 3, 1, 1), torch.tensor([1.0, 2.0, 3.0])
    y = aeup.conv_transpose2d(x, w, b, stride=3, output_padding=2)
    assert torch.equal(y[0, :, 1, 1], b) and torch.equal(y[0, :, -1, -1], b)


def test_empty_batch():
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        x, w, b, _ = LARGE_FEW[0].tensors(dtype, layout)
        for activation in (None, "tanh", "gelu"):
            leaves = [t.detach().requires_grad_() for t in (x[:0], w, b)]
            y = aeup.conv_transpose2d(*leaves, stride=2, padding=1, activation=activation)
            theirs = F.conv_transpose2d(*leaves, stride=2, padding=1)
            assert y.shape == theirs.shape and y.stride() == theirs.stride()
            y.sum().backward()
            assert leaves[0].grad.shape == x[:0].shape and leaves[1].grad.abs().max() == leaves[2].grad.abs().max() == 0


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("layouts", [*itertools.product(LAYOUTS.values(), LAYOUTS.values())], ids=str)
def test_strides_of_an_input_of_one_pixel(n, layouts):
    """A matrix product on a CPU. (Those of one pixel, as of the input's gradient, say nothing.)"""
    sizes = ((n, 3, 1, 1), (3, 4, 2, 2))
    x, w = (torch.randn(s).to(memory_format=f).requires_grad_() for s, f in zip(sizes, layouts, strict=True))
    strides = []
    for fn in (aeup.conv_transpose2d, F.conv_transpose2d):
        y = fn(x, w)
        strides.append((y.stride(), torch.autograd.grad(y.sum(), w)[0].stride()))
    assert strides[0] == strides[1]


def test_some_gradients_only():
    for case in (CASES[0], LARGE_FEW[0]):
        *tensors, grad = case.tensors(torch.float32)
        for needs in itertools.product((False, True), repeat=3):
            got, expected = (
                gradients_where(needs, partial(fn, **case.kwargs, activation="relu"), tensors, grad)
                for fn in (aeup.conv_transpose2d, by_torch)
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    y = aeup.conv_transpose2d(tensors[0].requires_grad_(), tensors[1], None, stride=2, padding=1)
    assert torch.autograd.grad(y, tensors[0], grad)[0].shape == tensors[0].shape


def test_a_changed_saved_tensor_is_an_error_as_in_torch():
    for fn in (by_torch, aeup.conv_transpose2d):
        x, w, b, grad = LARGE_FEW[0].tensors(torch.float32)
        y = fn(x.requires_grad_(), w, b, stride=2, padding=1)
        w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)


def test_same_bits_on_every_run():
    for case in (CASES[0], LARGE_FEW[0], CASES[11]):
        tensors = case.tensors(torch.float32)
        first = run(aeup.conv_transpose2d, case, tensors, "relu")
        for _ in range(2):
            again = run(aeup.conv_transpose2d, case, tensors, "relu")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_gradient_kernels_of_both_backends():
    """Also where `auto` would not take them."""
    for case, layout in itertools.product(CASES, LAYOUTS):
        x, w, b, grad = case.tensors(torch.float32, layout)
        g = transposed_of_call(
            x.shape, w.shape, *(case.kwargs.get(k, d) for k, d in ARGUMENTS), case.kwargs.get("groups", 1)
        )
        exact = run(by_torch, case, [t.double() for t in (x, w, b, grad)])
        for backend in ("torch", "cpu"):
            dx = MAPS[X].kernels[backend].run(grad, w, g)
            dw = MAPS[W].kernels[backend].run(grad, x, g, None)
            for got, true in ((dx, exact[1]), (dw, exact[2])):
                torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-4)
        y = MAPS[Y].kernels["cpu"].run(x, w, b, g, "relu", 0.0)
        torch.testing.assert_close(y.double(), exact[0].relu(), rtol=1e-4, atol=1e-4)


ARGUMENTS = (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))


def test_inference_mode_and_no_grad():
    x, w, b, _ = LARGE_FEW[0].tensors(torch.float32)
    w.requires_grad_()
    with torch.no_grad():
        assert not aeup.conv_transpose2d(x, w, b, stride=2, padding=1, activation="silu").requires_grad
    with torch.inference_mode():
        assert aeup.conv_transpose2d(x, w, b, stride=2, padding=1).is_inference()


# --- the module ---

MODULES = (
    ((6, 5, 4), {"stride": 2, "padding": 1}),
    ((6, 4, (3, 2)), {"stride": (2, 1), "output_padding": (1, 0), "groups": 2, "bias": False, "dilation": (1, 2)}),
    ((6, 5, 3), {"dtype": torch.float64}),
)


def test_signatures_are_torchs_and_an_activation():
    for name, args in (
        ("ConvTranspose2d", (4, 6, 3)),
        ("Conv2d", (4, 6, 3)),
        ("BatchNorm2d", (4,)),
        ("GroupNorm", (2, 4)),
    ):
        ours, theirs = getattr(aeup, name), getattr(torch.nn, name)
        *same, last = inspect.signature(ours).parameters.values()
        assert same == list(inspect.signature(theirs).parameters.values()) and last.name == "activation"
        made = torch.nn.utils.skip_init(ours, *args, activation="relu")
        assert type(made) is ours and made.activation == "relu" and made.weight.device.type == "cpu"
        assert inspect.signature(type("Mine", (ours,), {"__init__": lambda self, c: None})).parameters.keys() == {"c"}


@pytest.mark.parametrize(("args", "kwargs"), MODULES, ids=str)
def test_module(args, kwargs):
    theirs = torch.nn.ConvTranspose2d(*args, **kwargs)
    ours = aeup.ConvTranspose2d(*args, **kwargs)
    assert isinstance(ours, torch.nn.ConvTranspose2d) and ours.extra_repr() == theirs.extra_repr()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 6, 5, 4, dtype=kwargs.get("dtype", torch.float32))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    active = aeup.ConvTranspose2d(*args, **kwargs, activation=("leaky_relu", 0.2))
    active.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(copy.deepcopy(active)(x), F.leaky_relu(theirs(x), 0.2))
    assert "activation=('leaky_relu', 0.2)" in repr(active)


def test_output_size():
    ours, theirs = (m(4, 3, 3, stride=2, padding=1) for m in (aeup.ConvTranspose2d, torch.nn.ConvTranspose2d))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 6)
    for size in ([10, 11], [9, 12], (2, 3, 10, 12), torch.Size((10, 11))):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    torch.testing.assert_close(ours(x[0], output_size=[10, 11]), theirs(x[0], output_size=[10, 11]))
    for size in ([11, 12], [8, 11], [10], [1, 2, 3]):
        with pytest.raises(ValueError) as expected:
            theirs(x, output_size=size)
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            ours(x, output_size=size)


def test_an_existing_module_can_take_the_class():
    module = torch.nn.ConvTranspose2d(4, 3, 3)
    x = torch.randn(1, 4, 5, 6)
    expected = module(x)
    module.__class__ = aeup.ConvTranspose2d
    torch.testing.assert_close(module(x), expected)


# --- bad input ---

A, B, C = torch.zeros(2, 4, 5, 6), torch.zeros(4, 3, 3, 3), torch.zeros(3)
BAD = [  # torch's own words
    ((A[:, :3], B), {}),
    ((A[0, :3], B), {}),
    ((A, B), {"groups": 3}),
    ((A, B), {"groups": 0}),
    ((A, B), {"stride": 2, "output_padding": 2}),
    ((A, B), {"output_padding": (0, 1)}),
    ((A, B), {"output_padding": -1}),
    ((A, B.double()), {}),
    ((A, B, C.double()), {}),
    ((A.double(), B.bfloat16()), {}),
    ((A, B, torch.zeros(4)), {}),
    ((A, B, torch.zeros(3, 1)), {}),
    ((A[None], B), {}),
    ((A[0, 0], B), {}),
    ((A, B), {"stride": 0}),
    ((A, B), {"stride": (1, -1)}),
    ((A, B), {"dilation": -1}),
    ((A, B), {"padding": -1}),
    ((A, B), {"stride": (1, 2, 3)}),
    ((A, B), {"stride": 2.0}),
    ((A, B), {"stride": (2.0, 2)}),
    ((A, B), {"stride": True}),
    ((A, B), {"groups": 1.0}),
    ((A, B), {"padding": "same"}),
    ((A, B), {"dilation": None}),
    ((A[:, :0], B[:0]), {}),
    ((A[:, :, :0], B), {}),
    ((None, B), {}),
    ((A.numpy(), B), {}),
    ((A, None), {}),
    ((A, B, 3), {}),
    ((A.int(), B.int()), {}),
    ((A.to_sparse(), B), {}),
]
DOUBLE = [  # where float32 takes a path with a poorer message
    ((A[:, :, :1, :1], B), {"padding": 2}),
    ((A[:, :, :1], B), {"padding": (2, 1)}),
    ((A, B), {"dilation": 0}),
    ((A, B[:, :, :0]), {}),
    ((A, B[:, :0]), {}),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input_has_torchs_words(index):
    args, kwargs = BAD[index]
    aeup.conv_transpose2d(A, B, C, stride=(2, 2), padding=(1, 1))  # what equals it must not be taken for it
    with pytest.raises(Exception) as theirs:
        F.conv_transpose2d(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        aeup.conv_transpose2d(*args, **kwargs)
    first = str(theirs.value).splitlines()[0]
    if "greater than zero" in first:  # ours says which
        first = first.split(",")[0]
    assert first in str(ours.value)


@pytest.mark.parametrize("index", range(len(DOUBLE)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_bad_input_has_the_same_words_in_every_dtype(index, dtype):
    args, kwargs = DOUBLE[index]
    with pytest.raises(RuntimeError) as theirs:
        F.conv_transpose2d(*(t.double() for t in args), **kwargs)
    with pytest.raises(RuntimeError, match=re.escape(str(theirs.value).splitlines()[0])):
        aeup.conv_transpose2d(*(t.to(dtype) for t in args), **kwargs)


def test_bad_input_of_our_own():
    with pytest.raises(RuntimeError, match=r"Expected 4D weight.*\[3, 3, 3\]"):
        aeup.conv_transpose2d(A, B[0])
    with pytest.raises(RuntimeError, match="output padding must be smaller.*output_padding_height: 2"):
        aeup.conv_transpose2d(A[:0], B, stride=2, output_padding=2)  # torch forgets it for an empty batch
    with pytest.raises(RuntimeError, match="Output size is too small"):
        aeup.conv_transpose2d(A[:0, :, :1, :1], B, padding=2)
    for activation in ("swish", "", 3, ("relu", 0.1), ("leaky_relu", "a"), ("leaky_relu", True)):
        with pytest.raises(ValueError, match="activation must be None, 'relu'.*got"):
            aeup.conv_transpose2d(A, B, activation=activation)
        with pytest.raises(ValueError, match="activation must be None, 'relu'.*got"):
            aeup.ConvTranspose2d(4, 3, 3, activation=activation)
    for slope in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="slope of leaky_relu must be finite and at least 0"):
            aeup.conv_transpose2d(A, B, activation=("leaky_relu", slope))
    with pytest.raises(ValueError, match="padding mode"):
        aeup.ConvTranspose2d(4, 3, 3, padding_mode="reflect")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_an_input_of_one_pixel(layout):
    x, w, b, _ = (t.requires_grad_() for t in MANY_OF_PIXEL.tensors(torch.float64, layout))
    y = torch.randn(16, 64, 4, 4, dtype=torch.float64).to(memory_format=LAYOUTS[layout]).requires_grad_()
    more = {"check_forward_ad": True, "check_batched_grad": True}
    calls = ((aeup.conv_transpose2d, (x, w, b)), (aeup.conv2d, (y, w, torch.randn(100, dtype=torch.float64))))
    for fn, tensors in calls:
        assert [c.kernel for c in aeup.explain(fn, *tensors)] == ["matrix product"] * 3
        assert torch.autograd.gradcheck(fn, tensors, fast_mode=True, **more)
        assert torch.autograd.gradgradcheck(fn, tensors, fast_mode=True)
