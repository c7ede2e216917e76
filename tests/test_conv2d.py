"""aeup.conv2d and aeup.Conv2d with strides and dilations, against torch, float64 and the matrix of the convolution."""

import itertools
import re
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from cases import check_budget
from conv2d_cases import ACTIVATIONS, CASES, DTYPES, LAYOUTS, by_torch, run
from conv_cases import both, naive_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from map_cases import gradients_where, views_of
from test_conv_transpose2d import check_all
from torch._subclasses import FakeTensorMode

import aeup
from aeup import tuned
from aeup.ops import compiled
from aeup.ops.conv2d import CONV2D
from aeup.ops.conv_kernels import NUMBER
from aeup.ops.conv_shapes import convolution_of_call
from aeup.ops.epilogue import activate, reference

pytestmark = pytest.mark.usefixtures("one_thread", "poison")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_function(case, dtype):
    for layout, activation in zip(LAYOUTS, ("leaky_relu", None), strict=True):
        tensors = case.tensors(dtype, layout)
        got, theirs = run(aeup.conv2d, case, tensors, activation), run(by_torch, case, tensors, activation)
        assert got[0].stride() == theirs[0].stride() and [t.dtype for t in got] == [dtype] * 4
        check_all(got, run(by_torch, case, [t.double() for t in tensors], activation), theirs)


def geometry_of(case, x, w):
    given = ((case.kwargs.get(name, least)) for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return convolution_of_call(x.shape, w.shape, *given, case.kwargs.get("groups", 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_maps(case):
    """By their own operators, which for the gradients are those of the transposed convolution."""
    x, w, b, _ = case.tensors(torch.float64)
    g, crop = geometry_of(case, x, w)
    if crop != (0, 0):
        pytest.skip("one more row or column than torch's")
    assert (g.ih - 1) * g.sh - 2 * g.ph + g.dh * (g.kh - 1) + 1 + g.output_padding[0] == g.oh == x.shape[2]
    grad = torch.randn_like(by_torch(x, w, b, **case.kwargs))
    _, dx, dw, _ = run(by_torch, case, (x, w, b, grad))
    rest = g.stride, g.padding, g.dilation, g.groups
    torch.testing.assert_close(torch.ops.aeup.conv2d(x, w, b, *rest), by_torch(x, w, b, **case.kwargs))
    torch.testing.assert_close(torch.ops.aeup.conv2d_input_gradient(grad, w, x.shape[2:], *rest), dx)
    torch.testing.assert_close(torch.ops.aeup.conv2d_weight_gradient(grad, x, w.shape[2:], *rest), dw)


def by_matrix(x, w, bias, *, stride=1, padding=0, dilation=1, groups=1):
    s, p, d = both(stride), both(padding), both(dilation)
    matrices = [naive_matrix(part, x.shape[2:], s, p, d) for part in w.chunk(groups, 0)]
    parts = [part.flatten(1) @ c.T for part, c in zip(x.chunk(groups, 1), matrices, strict=True)]
    size = [
        (i + 2 * p_ - d_ * (k - 1) - 1) // s_ + 1
        for i, k, s_, p_, d_ in zip(x.shape[2:], w.shape[2:], s, p, d, strict=True)
    ]
    return torch.cat([y.view(len(x), -1, *size) for y in parts], 1) + bias.view(-1, 1, 1)


@pytest.mark.parametrize("case", [c for c in CASES if c.weight[0] < 10 and c.name != "same"], ids=str)
def test_the_matrix(case):
    x, w, b, _ = case.tensors(torch.float64)
    torch.testing.assert_close(aeup.conv2d(x, w, b, **case.kwargs), by_matrix(x, w, b, **case.kwargs))


sizes = st.integers(1, 5)
pair = st.tuples(sizes, sizes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_call(data):
    """The same results, or the same error."""
    groups, batch, height, width = data.draw(st.tuples(st.integers(1, 3), st.integers(0, 3), sizes, sizes))
    per_group, made, kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), pair))
    padding = data.draw(st.one_of(st.integers(0, 4), pair, st.sampled_from(("same", "valid"))))
    kwargs = {"stride": data.draw(pair), "padding": padding, "dilation": data.draw(pair), "groups": groups}
    x = torch.randn(batch, groups * per_group, height, width, dtype=torch.float64)
    w, b = torch.randn(groups * made, per_group, *kernel, dtype=torch.float64), torch.randn(groups * made).double()
    try:
        theirs = F.conv2d(x, w, b, **kwargs)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0])):
            aeup.conv2d(x, w, b, **kwargs)
        return
    ours = aeup.conv2d(x, w, b, **kwargs)
    assert ours.shape == theirs.shape and (ours.stride() == theirs.stride() or not ours.numel())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_strides_and_offsets(layout):
    x, w, b = torch.randn(2, 6, 5, 7).contiguous(memory_format=LAYOUTS[layout]), torch.randn(4, 6, 3, 3), torch.randn(4)
    for name, view in views_of(x).items():
        for weight in (w, w.transpose(2, 3), w.flip(1)[::2]):
            y, theirs = (fn(view, weight, b[: len(weight)], stride=2, padding=1) for fn in (aeup.conv2d, F.conv2d))
            assert y.stride() == theirs.stride(), name
            torch.testing.assert_close(y, theirs, msg=name)
    expected = F.conv2d(x, w, b, 2, 1)
    for stride in (2, (2,), [2], [2, 2], torch.tensor(2)):
        assert torch.equal(aeup.conv2d(x, w, b, stride, [1, 1], (1,)), expected)
    torch.testing.assert_close(aeup.conv2d(x[1], w, b, 2, 1, activation="tanh"), expected[1].tanh())


def test_empty_batch():
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        x, w, b, _ = CASES[0].tensors(dtype, layout)
        leaves = [t.detach().requires_grad_() for t in (x[:0], w, b)]
        y, theirs = aeup.conv2d(*leaves, stride=2, padding=1, activation="gelu"), F.conv2d(*leaves, stride=2, padding=1)
        assert y.shape == theirs.shape and y.stride() == theirs.stride()
        y.sum().backward()
        assert leaves[0].grad.shape == x[:0].shape and leaves[1].grad.abs().max() == leaves[2].grad.abs().max() == 0


def test_torch_serves_a_cpu_and_explain_says_so():
    x, w, b, _ = CASES[0].tensors(torch.float32)
    choices = aeup.explain(aeup.conv2d, x, w, b, stride=2, padding=1, activation="relu")
    assert [c.backend for c in choices] == ["torch"] * 3
    assert "torch's own kernel" in choices[0].others["cpu"] and "on cpu" in choices[0].others["cuda"]
    assert choices[0].call == "[2, 6, 10, 14] -> 5, k4x4, s2, p1, relu, float32"
    with aeup.backend("cpu"), pytest.raises(aeup.BackendError, match="aeup.conv2d: backend 'cpu' .*torch's own kernel"):
        aeup.conv2d(x, w, b, stride=2)
    (choice,) = aeup.explain(aeup.conv2d, x.cfloat(), w.cfloat())
    assert choice.backend == "torch" and choice.op == "aeup.conv2d" and "float64, float32" in choice.others["cuda"]
    y = aeup.conv2d(x.requires_grad_(), w, b, stride=2)
    assert y.grad_fn.name() == "ConvolutionBackward0"


# --- with the extension's operators as torch would compute them, by the names of their arguments ---


def by_name(name, *args):
    names = [a.name for a in getattr(torch.ops.aeup_native, name).default._schema.arguments]
    a = dict(zip(names, args, strict=True))
    if name == "conv_epilogue_gradient":
        return reference(a["grad"], a["output"], ACTIVATION[a["activation"]], a["slope"], a["want_bias"])
    stride, padding, dilation = ((a[f"{n}h"], a[f"{n}w"]) for n in "spd")
    rest, slope = (a["groups"], dilation), a.get("slope")
    if name == "conv2d":
        y = F.conv2d(a["input"], a["weight"], a["bias"], stride, padding, dilation, a["groups"])
        return activate(y, ACTIVATION[a["activation"]], slope)
    if name == "conv2d_backward":
        y = a["output"]
        grad, bias = reference(a["grad"], y, ACTIVATION[a["activation"]], slope, a["want_bias"])
        needs = (a["want_input"], a["want_weight"], False)
        found = torch.ops.aten.convolution_backward.default(
            grad, a["input"], a["weight"], None, stride, padding, dilation, False, (0, 0), a["groups"], needs
        )
        return *found[:2], bias
    if name == "conv_transpose2d":
        assert a["activation"] == 0
        y = F.conv_transpose2d(a["input"], a["weight"], a["bias"], stride, padding, (a["oph"], a["opw"]), *rest)
        return y
    assert name == "conv_transpose2d_weight_gradient"
    w = torch.zeros_like(a["weight_like"]).requires_grad_()
    with torch.enable_grad():
        out = a["grad"].shape
        least = F.conv_transpose2d(a["input"], w, None, stride, padding, 0, *rest).shape
        extra = [o - i for o, i in zip(out[2:], least[2:], strict=True)]
        y = F.conv_transpose2d(a["input"], w, None, stride, padding, extra, *rest)
    return torch.autograd.grad(y, w, a["grad"])[0]


ACTIVATION = {number: name for name, number in NUMBER.items()}


@pytest.fixture
def native(monkeypatch):
    """The names of the operators that were called."""
    called = []
    monkeypatch.setattr(compiled, "refusal", lambda *_: None)
    monkeypatch.setattr(compiled, "planned", lambda *_: None)
    monkeypatch.setattr(compiled, "call", lambda name, *args: called.append(name) or by_name(name, *args))
    CONV2D.plans.clear()
    with aeup.backend("cuda"):
        yield called
    CONV2D.plans.clear()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_extension_is_asked_for(native, case, activation):
    tensors = case.tensors(torch.float64, "nhwc")
    got, theirs = (run(fn, case, tensors, activation) for fn in (aeup.conv2d, by_torch))
    torch.testing.assert_close(got, theirs)
    assert native == ["conv2d", "conv2d_backward"]


def test_what_the_extension_is_asked_for_map_by_map(native):
    """Where gradients are differentiable."""
    for case in CASES:
        tensors = case.tensors(torch.float64)
        leaves = [t.requires_grad_() for t in tensors[:3]]
        for fn in (aeup.conv2d, by_torch):
            y = fn(*leaves, **case.kwargs, activation="tanh")
            found = torch.autograd.grad(y, leaves, tensors[3], create_graph=True)
            second = torch.autograd.grad(sum(t.square().sum() for t in found), leaves)
            if fn is aeup.conv2d:
                ours = *found, *second
        torch.testing.assert_close(ours, (*found, *second))
    assert {"conv2d", "conv_transpose2d", "conv_transpose2d_weight_gradient"} <= set(native)


def test_some_gradients_only(native):
    *tensors, grad = CASES[0].tensors(torch.float64)
    for needs in itertools.product((False, True), repeat=3):
        got, expected = (
            gradients_where(needs, partial(fn, **CASES[0].kwargs, activation="relu"), tensors, grad)
            for fn in (aeup.conv2d, by_torch)
        )
        torch.testing.assert_close(got, expected)


def test_gradients_of_second_order(native):
    x, w, b, _ = (t.requires_grad_() for t in CASES[12].tensors(torch.float64))
    for activation in ("tanh", "silu"):
        call = lambda x, w, b: aeup.conv2d(x[:1, :, :7, :7], w, b, **CASES[12].kwargs, activation=activation)  # noqa: B023, E731
        assert torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)


# --- what would run on a GPU ---


@pytest.fixture
def h100():
    """What explain tells of fake tensors there."""
    kernels = pytest.importorskip("aeup.kernels.convolution")
    with (
        patch.object(tuned, "device_name", lambda device: "NVIDIA H100 80GB HBM3"),
        patch.object(compiled, "capability", lambda device: (9, 0)),
        patch.object(kernels, "_device", lambda index: ("NVIDIA H100 80GB HBM3", (9, 0))),
        tuned.ignoring_users(),
    ):
        if isinstance(compiled.raw("conv2d"), str):
            pytest.skip(compiled.raw("conv2d"))
        yield


def taken(x, w, *, layout="nhwc", dtype=torch.bfloat16, **kwargs):
    with FakeTensorMode():
        x = torch.empty(x, dtype=dtype, device="cuda", memory_format=LAYOUTS[layout])
        choices = aeup.explain(aeup.conv2d, x, torch.empty(w, dtype=dtype, device="cuda"), **kwargs)
    return [(c.backend, c.kernel.split(" ")[0]) for c in choices]


def test_what_is_taken_on_an_h100(h100):
    """The choice is that of the transposed convolution's maps in their other roles."""
    k4 = {"stride": 2, "padding": 1}
    for layout in LAYOUTS:
        assert taken((32, 64, 32, 32), (128, 64, 4, 4), layout=layout, **k4) == [("cuda", "hopper")] * 3
        assert taken((32, 3, 64, 64), (64, 3, 4, 4), layout=layout, **k4) == [("cuda", "few")] * 3
    assert taken((32, 64, 32, 32), (128, 64, 3, 3), padding=2, dilation=2)[0] == ("cuda", "hopper")
    many = partial(taken, (32, 64, 128, 128), (64, 64, 4, 4), dtype=torch.float32, **k4)
    with patch.object(compiled, "tf32", lambda t: True):  # the table's rule for many pixels
        assert many() == [("torch", ""), ("cuda", "hopper_float"), ("torch", "")]
    with patch.object(compiled, "tf32", lambda t: False):
        assert many() == [("cuda", "hopper_float")] * 3
        groups = taken((8, 64, 32, 32), (64, 32, 3, 3), dtype=torch.float32, groups=2, **k4)
        assert groups == [("torch", "")] * 3
        small = taken((32, 3, 64, 64), (64, 3, 4, 4), dtype=torch.float32, layout="nchw", **k4)
        assert [backend for backend, _ in small] == ["cuda", "torch", "cuda"]


def test_stride_and_dilation_1_on_a_gpu_is_an_upsampling_by_1(h100):
    shapes = (2, 16, 9, 8), (16, 16, 3, 3), (16,)
    # What is found out with tensors is kept.
    aeup.upsample_conv2d(*map(torch.empty, shapes), size=(9, 8), scale_factor=None)
    with FakeTensorMode():
        x, w, b = (torch.empty(shape, device="cuda") for shape in shapes)
        for padding in ("same", 1, "valid"):
            choices = aeup.explain(aeup.conv2d, x, w, b, padding=padding)
            assert [c.op.split("_")[0] for c in choices] == ["aeup.upsample"] * 3
            assert "-> nearest 9x8 -> 16, k3x3" in choices[0].call and choices[0].backend == "cuda"
            assert aeup.conv2d(x, w, b, padding=padding).shape == F.conv2d(x, w, b, padding=padding).shape


# --- bad input ---

A, B, C = torch.zeros(2, 4, 5, 6), torch.zeros(6, 4, 3, 3), torch.zeros(6)
BAD = [
    ((A[:, :3], B), {}),
    ((A[0, :3], B), {}),
    ((A, B), {"groups": 2}),
    ((A, B[:, :2]), {"groups": 4}),
    ((A, B), {"groups": 0}),
    ((A, B.double()), {}),
    ((A, B, C.double()), {}),
    ((A, B, torch.zeros(4)), {}),
    ((A, B, torch.zeros(6, 1)), {}),
    ((A[None], B), {}),
    ((A[0, 0], B), {}),
    ((A, B[0]), {}),
    ((A, B), {"stride": 0}),
    ((A, B), {"stride": (1, -1)}),
    ((A, B), {"dilation": 0}),
    ((A, B), {"dilation": 3}),
    ((A, B), {"padding": -1}),
    ((A, B), {"padding": "full"}),
    ((A, B), {"padding": "same", "stride": 2}),
    ((A, B), {"stride": (1, 2, 3)}),
    ((A, B), {"stride": 2.0}),
    ((A, B), {"groups": 1.0}),
    ((A, B), {"dilation": None}),
    ((A[:, :, :2], B), {}),
    ((None, B), {}),
    ((A.numpy(), B), {}),
    ((A, None), {}),
    ((A, B, 3), {}),
    ((A.to_sparse(), B), {}),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input_has_torchs_words(index):
    args, kwargs = BAD[index]
    with pytest.raises(Exception) as theirs:
        F.conv2d(*args, **kwargs)
    words = str(theirs.value).splitlines()[0].split(" - got")[0]  # how many were given: all that F.conv2d takes
    with pytest.raises(theirs.type, match=re.escape(words)):
        aeup.conv2d(*args, **kwargs)


def test_bad_activation():
    with pytest.raises(ValueError, match="activation must be None, 'relu'.*got 'swish'"):
        aeup.conv2d(A, B, C, 2, activation="swish")
    with pytest.raises(ValueError, match="slope of leaky_relu must be finite and at least 0"):
        aeup.conv2d(A, B, C, 2, activation=("leaky_relu", -1))


# --- the module ---


@pytest.mark.parametrize("on_gpu", (False, True))
def test_module(on_gpu, monkeypatch):
    if on_gpu:
        monkeypatch.setattr(aeup.Conv2d, "_refuses", lambda self, input: None)
    for kwargs in ({"stride": 2, "padding": 1}, {"stride": (1, 2), "groups": 2, "bias": False}, {"padding": "same"}):
        theirs, ours = torch.nn.Conv2d(6, 4, 3, **kwargs), aeup.Conv2d(6, 4, 3, **kwargs)
        ours.load_state_dict(theirs.state_dict())
        assert isinstance(ours, torch.nn.Conv2d) and ours.extra_repr() == theirs.extra_repr()
        x = torch.randn(2, 6, 9, 8)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x[0]), theirs(x[0]))
        (choice, *_) = aeup.explain(ours, x)
        assert (
            choice.op == "aeup.conv2d" and choice.backend == "torch" and ("on a GPU" in choice.others["cuda"]) != on_gpu
        )


def test_gradients_within_budget_in_low_precision():
    """Of the registered operators: torch's transposed convolution is the gradient of the input."""
    for case, layout in itertools.product((CASES[0], CASES[5], CASES[18]), LAYOUTS):
        x, w, b, grad = case.tensors(torch.float32, layout)
        g, _ = geometry_of(case, x, w)
        exact, theirs = (run(by_torch, case, [t.to(d) for t in (x, w, b, grad)]) for d in (torch.float64, x.dtype))
        rest = g.stride, g.padding, g.dilation, g.groups
        check_budget(torch.ops.aeup.conv2d_input_gradient(grad, w, x.shape[2:], *rest), exact[1], theirs[1])
        check_budget(torch.ops.aeup.conv2d_weight_gradient(grad, x, w.shape[2:], *rest), exact[2], theirs[2])
