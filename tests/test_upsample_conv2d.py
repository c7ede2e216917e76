"""aeup.upsample_conv2d against torch's two operators and float64, and the fold against its definition."""

import itertools
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from map_cases import DRAWN, gradients_where, of_own_output, views_of
from upsample_conv_cases import ACTIVATIONS, CASES, DTYPES, LAYOUTS, MODES, Case, always_folded, by_torch, run

import aeup
from aeup.ops.interpolate import map_of
from aeup.ops.upsample_conv_cpu import fold_weight, unfold_gradient
from aeup.ops.upsample_conv_kernels import MAPS, W, X, Y
from aeup.ops.upsample_conv_shapes import fold, geometry_of_call, upsample_geometry_of

pytestmark = pytest.mark.usefixtures("poison")
BY_NAME = {case.name: case for case in CASES}
FOLDED = Case("folded", (8, 32, 16, 17), (32, 32, 3, 3), {"padding": 1})  # large enough
WAYS = {"auto": nullcontext, "folded": always_folded}


def check_all(case, tensors, got, theirs, activation=None):
    """Output and gradients: the error against float64 is at most twice torch's plus 4 ulps (64 in float64, where torch
    is the reference) of the size that the sums have without cancellation; for maps the same on the border alone.
    """
    exact = run(by_torch, case, [t.double() for t in tensors], activation)
    x, w, b, before = (t.double() for t in tensors)
    if activation:
        before = before.abs() * 1.2  # of the sums' size: no derivative is larger
    exact, theirs = of_own_output(case, tensors, got, exact, theirs, activation)
    squares = run(by_torch, case, (x.square(), w.square(), b.square(), before.square()))
    for mine, true, other, size in zip(got, exact, theirs, squares, strict=True):
        assert mine.shape == true.shape and torch.isfinite(mine).all(), "unwritten (poisoned) or non-finite"
        ulps = (64 if mine.dtype is torch.float64 else 4) * torch.finfo(mine.dtype).eps
        floor = ulps * max(size.max().clamp(min=0).sqrt(), true.abs().max())
        wrong, allowed = (mine.double() - true).abs(), 2 * (other.double() - true).abs()
        assert wrong.max() <= allowed.max() + floor
        if mine.dim() == 4:
            edge = torch.ones(mine.shape[2:], dtype=torch.bool)
            edge[1:-1, 1:-1] = False
            assert wrong[..., edge].max() <= allowed[..., edge].max() + floor


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_passes_within_budget(case, dtype, way):
    for layout in LAYOUTS:
        tensors = case.tensors(dtype, layout)
        theirs = run(by_torch, case, tensors)
        with WAYS[way]():
            got = run(aeup.upsample_conv2d, case, tensors)
        assert got[0].dtype == dtype and got[0].stride() == theirs[0].stride()
        assert [t.dtype for t in got[1:]] == [dtype] * 3
        check_all(case, tensors, got, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(activation, dtype, way):
    for name, layout in itertools.product(("x2-k3p1", "groups", "bilinear"), LAYOUTS):
        case = BY_NAME[name]
        tensors = case.tensors(dtype, layout)
        theirs = run(by_torch, case, tensors, activation)
        with WAYS[way]():
            got = run(aeup.upsample_conv2d, case, tensors, activation)
            with torch.no_grad():
                y = aeup.upsample_conv2d(*tensors[:3], **case.kwargs, activation=activation)
        check_all(case, tensors, got, theirs, activation)
        torch.testing.assert_close(y, got[0].detach(), rtol=2**-7, atol=2**-7)


scales, kernels, paddings = st.integers(2, 4), st.integers(1, 7), st.integers(0, 3)


@st.composite
def calls(draw):
    groups = draw(st.integers(1, 3))
    shape = draw(st.integers(0, 3)), groups * draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    scale, kernel, padding = (draw(st.tuples(s, s)) for s in (scales, kernels, paddings))
    enough = zip(shape[2:], scale, kernel, padding, strict=True)
    kernel = tuple(min(k, i * s + 2 * p) for i, s, k, p in enough)
    mode = draw(st.sampled_from(MODES))
    align = draw(st.sampled_from((None, True))) if mode.startswith("bi") else None
    kwargs = {"scale_factor": scale, "padding": padding, "groups": groups, "mode": mode, "align_corners": align}
    return Case("random", shape, (groups * draw(st.integers(1, 3)), shape[1] // groups, *kernel), kwargs)


@settings(max_examples=60, deadline=None)
@given(case=calls(), way=st.sampled_from(tuple(WAYS)), **DRAWN)
def test_any_call(case, dtype, layout, activation, way):
    tensors = case.tensors(dtype, layout)
    theirs = run(by_torch, case, tensors, activation)
    with WAYS[way]():
        got = run(aeup.upsample_conv2d, case, tensors, activation)
    assert got[0].shape == theirs[0].shape
    if got[0].numel():
        check_all(case, tensors, got, theirs, activation)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, theirs, strict=True))


@settings(max_examples=40, deadline=None)
@given(scale=st.tuples(scales, scales), kernel=st.tuples(kernels, kernels), padding=st.tuples(paddings, paddings))
def test_the_fold_is_exact_and_its_gradient_the_transposed_map(scale, kernel, padding):
    shape, w_shape = (1, 4, 4, 5), (6, 2, *kernel)
    kernel_fits = all(i * s + 2 * p >= k for i, s, p, k in zip(shape[2:], scale, padding, kernel, strict=True))
    if not kernel_fits:
        return
    g, _ = upsample_geometry_of(shape, w_shape, scale, "nearest", padding, 2)
    f = fold(g)
    assert f.g.stride == scale and min(f.g.padding) >= 0
    for k, folded, s, p, of_fold in zip(kernel, (f.g.kh, f.g.kw), scale, padding, f.g.padding, strict=True):
        assert folded == k + s - 1 + 2 * max(p - k + 1, 0) and of_fold == max(k - 1 - p, 0)
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64)
    big = fold_weight(w, g, f)
    y = F.conv_transpose2d(x, big, None, f.g.stride, f.g.padding, 0, 2)
    torch.testing.assert_close(y, by_torch(x, w, None, scale_factor=scale, padding=padding, groups=2))
    other = torch.randn_like(big)  # <F w, v> = <w, F* v>
    torch.testing.assert_close((big * other).sum(), (w * unfold_gradient(other, g, f)).sum())


def test_the_fold_by_hand():
    """[w0, w1, w2] -> [w2, w1 + w2, w0 + w1, w0], kernel 4, stride 2, padding 1."""
    g, _ = upsample_geometry_of((1, 1, 1, 5), (1, 1, 1, 3), (1, 2), "nearest", (0, 1), 1)
    f = fold(g)
    assert (f.g.kh, f.g.kw, f.g.stride, f.g.padding) == (1, 4, (1, 2), (0, 1))
    w = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)
    assert fold_weight(w, g, f).flatten().tolist() == [100.0, 110.0, 11.0, 1.0]


def test_only_whole_repetitions_fold():
    """Where torch's float index repeats pixels unevenly, as for scale 41, there is no transposed convolution."""

    def folds(**kwargs):
        x = torch.randn(1, 3, kwargs.pop("height", 4), 6)
        w = torch.randn(3, 3, 3, 3)
        torch.testing.assert_close(aeup.upsample_conv2d(x, w, **kwargs), by_torch(x, w, None, **kwargs))
        kwargs = {"size": None, "scale_factor": 2, "mode": "nearest"} | kwargs
        m = map_of(
            x.shape[2:],
            kwargs["size"],
            None if kwargs["size"] else kwargs["scale_factor"],
            kwargs["mode"],
            None,
            None,
            0,
        )
        g = aeup.ops.upsample_conv_shapes.upsample_geometry("", m, 3, w.shape, 0, 0, 1)
        return fold(g) is not None

    assert folds() and folds(size=(8, 18)) and folds(mode="nearest-exact", scale_factor=3)
    assert not folds(size=(9, 12)) and not folds(mode="bilinear") and not folds(scale_factor=2.2)
    assert not folds(scale_factor=41, height=40)


def test_backends_and_explain():
    x, w, b, grad = FOLDED.tensors(torch.float32)
    choices = aeup.explain(aeup.upsample_conv2d, x, w, b, padding=1, activation="relu")
    assert [c.backend for c in choices] == ["cpu"] * 3
    assert all("k4x4, s2x2, p1x1 with the folded" in c.kernel for c in choices)
    assert "nearest 32x34 -> 32, k3x3, p1, relu, float32" in choices[0].call
    assert "gradient of input" in choices[1].call and "gradient of weight" in choices[2].call
    (choice, *_) = aeup.explain(aeup.upsample_conv2d, x, w, b, mode="bilinear")
    assert choice.backend == "composed" and choice.kernel == "interpolate, then conv2d"
    assert "nearest by whole scales" in choice.others["cpu"] and "on cpu" in choice.others["cuda"]
    (choice, *_) = aeup.explain(aeup.upsample_conv2d, x, w, b, scale_factor=1)
    assert choice.backend == "composed" and "nothing is upsampled" in choice.others["cpu"]
    choices = aeup.explain(aeup.upsample_conv2d, x, w[:16], b[:16])  # the forward is not faster folded
    assert choices[0].kernel == "interpolate, then conv2d; gradients by the folded weight"
    choices = aeup.explain(aeup.upsample_conv2d, x[:, :8], w[:, :8], b)
    assert [c.backend for c in choices] == ["cpu", "cpu", "composed"] and "is faster for" in choices[2].others["cpu"]
    choices = aeup.explain(aeup.upsample_conv2d, x[:1, :, :9, :9], w, b)
    assert [c.backend for c in choices] == ["composed"] * 3 and "81 input pixels and" in choices[0].others["cpu"]
    for name, says in (("cpu", "nearest by whole scales"), ("cuda", "on cpu"), ("triton", "CUDA tensor")):
        with aeup.backend(name), pytest.raises(aeup.BackendError, match=f"{name}' cannot serve.*{says}"):
            aeup.upsample_conv2d(x, w, b, mode="bicubic")
    (choice,) = aeup.explain(aeup.upsample_conv2d, x.byte(), w.byte())
    assert choice.backend == "torch" and "float64, float32" in choice.others["cpu"]
    leaf = x.requires_grad_()
    with aeup.backend("torch"):
        y = aeup.upsample_conv2d(leaf, w, b, padding=1)
    assert y.grad_fn.name() == "ConvolutionBackward0"
    with aeup.backend("cpu"):
        y = aeup.upsample_conv2d(leaf, w, b, padding=1)
    assert y.grad_fn.name() == "_UpsampleConv2dBackward"
    assert torch.autograd.grad(y, leaf, grad, create_graph=True)[0].shape == x.shape


def test_the_kernels_of_every_backend_here():
    """Also where "auto" would not take them."""
    for case, layout in itertools.product(CASES, LAYOUTS):
        if case.kwargs.get("padding") in ("same", "valid"):
            continue
        x, w, b, grad = case.tensors(torch.float32, layout)
        g, _ = geometry_of_call(
            x.shape, w.shape, case.kwargs.get("size"), case.kwargs.get("scale_factor", 2),
            case.kwargs.get("mode", "nearest"), case.kwargs.get("align_corners"), case.kwargs.get("padding", 0),
            case.kwargs.get("groups", 1),
        )  # fmt: skip
        exact = run(by_torch, case, [t.double() for t in (x, w, b, grad)])
        for backend in ("torch", "composed", *(["cpu"] if fold(g) else [])):
            y = MAPS[Y].kernels[backend].run(x, w, b, g, None, 0.0)
            dx = MAPS[X].kernels[backend].run(grad, w, g)
            dw = MAPS[W].kernels[backend].run(grad, x, g, None)
            for got, true in zip((y, dx, dw), exact, strict=False):
                torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5 * true.abs().max().item())
            assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.fixture
def folded():
    with always_folded():
        yield


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ("nearest", "bilinear"))
def test_strides_and_offsets(layout, mode):
    x, w, b, _ = BY_NAME["x2-k3p1"].tensors(torch.float32, layout)
    for name, view in views_of(x).items():
        for weight in (w, w.transpose(2, 3), w.flip(0)[::2], w.to(memory_format=torch.channels_last)):
            bias = b[: weight.shape[0]]
            y = aeup.upsample_conv2d(view, weight, bias, mode=mode, padding=1)
            torch.testing.assert_close(y, by_torch(view, weight, bias, mode=mode, padding=1), msg=name)
    expected = by_torch(x, w, b, padding=(1, 0), mode=mode)
    for padding, scale in itertools.product(((1, 0), [1, 0]), (2, 2.0, (2, 2), [2.0, 2])):
        y = aeup.upsample_conv2d(x, w, b, padding=padding, scale_factor=scale, mode=mode)
        torch.testing.assert_close(y, expected)


@pytest.mark.usefixtures("folded")
def test_empty_batch():
    for dtype, layout, name in itertools.product(DTYPES, LAYOUTS, ("x2-k3p1", "bilinear", "same")):
        x, w, b, _ = BY_NAME[name].tensors(dtype, layout)
        for activation in (None, "tanh", "gelu"):
            leaves = [t.detach().requires_grad_() for t in (x[:0], w, b)]
            y = aeup.upsample_conv2d(*leaves, **BY_NAME[name].kwargs, activation=activation)
            assert y.shape == by_torch(*leaves, **BY_NAME[name].kwargs).shape
            y.sum().backward()
            assert leaves[0].grad.shape == x[:0].shape and leaves[1].grad.abs().max() == leaves[2].grad.abs().max() == 0


@pytest.mark.usefixtures("folded")
def test_some_gradients_only():
    for name in ("x2-k3p1", "bilinear", "one-axis"):
        *tensors, grad = BY_NAME[name].tensors(torch.float32)
        for needs in itertools.product((False, True), repeat=3):
            got, expected = (
                gradients_where(needs, partial(fn, **BY_NAME[name].kwargs, activation="relu"), tensors, grad)
                for fn in (aeup.upsample_conv2d, by_torch)
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("folded")
def test_a_changed_saved_tensor_is_an_error_as_in_torch():
    for fn in (by_torch, aeup.upsample_conv2d):
        x, w, b, grad = BY_NAME["x2-k3p1"].tensors(torch.float32)
        y = fn(x.requires_grad_(), w, b, padding=1)
        w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)


@pytest.mark.usefixtures("folded")
def test_same_bits_on_every_run():
    for name in ("x2-k3p1", "large-rgb", "bicubic"):
        tensors = BY_NAME[name].tensors(torch.float32)
        first = run(aeup.upsample_conv2d, BY_NAME[name], tensors, "relu")
        again = run(aeup.upsample_conv2d, BY_NAME[name], tensors, "relu")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("folded")
def test_inference_mode_and_no_grad():
    x, w, b, _ = BY_NAME["x2-k3p1"].tensors(torch.float32)
    w.requires_grad_()
    with torch.inference_mode():  # what is cached there must serve outside too
        assert aeup.upsample_conv2d(x, w, b, padding=2, scale_factor=(3, 5)).is_inference()
    with torch.no_grad():
        assert not aeup.upsample_conv2d(x, w, b, padding=1, activation="silu").requires_grad
    aeup.upsample_conv2d(x, w, b, padding=2, scale_factor=(3, 5)).sum().backward()


# --- bad input ---

A, B, C = torch.zeros(2, 4, 5, 6), torch.zeros(3, 4, 3, 3), torch.zeros(3)
BAD = [
    ((A[:, :3], B), {}, RuntimeError, "weight of size [3, 4, 3, 3], expected input to have 4 channels, but got 3"),
    ((A, B), {"groups": 2}, RuntimeError, "expected input to have 8 channels, but got 4"),
    ((A, B[:, :2]), {"groups": 2}, RuntimeError, "first is divisible by groups=2, got size [3, 2, 3, 3]"),
    ((A, B), {"groups": 0}, RuntimeError, "groups must be at least 1, got 0"),
    ((A, B), {"groups": 1.0}, TypeError, "groups must be an int, got 1.0"),
    ((A, B), {"padding": -1}, RuntimeError, "negative padding is not supported, got (-1, -1)"),
    ((A, B), {"padding": 1.5}, TypeError, "padding must be an int, a pair of ints, 'same' or 'valid'; got 1.5"),
    ((A, B), {"padding": (1, 2, 3)}, TypeError, "padding must be"),
    ((A, B), {"padding": "full"}, ValueError, "'same' or 'valid'; got 'full'"),
    ((A, B.double()), {}, RuntimeError, "input and weight should be of one dtype and device"),
    ((A, B, C.double()), {}, RuntimeError, "input and bias should be of one dtype and device"),
    ((A, B, torch.zeros(4)), {}, RuntimeError, "expected bias to be [3], got [4]"),
    ((A, B, torch.zeros(3, 1)), {}, RuntimeError, "expected bias to be [3], got [3, 1]"),
    ((A[0], B), {}, RuntimeError, "4-D input [N, C, H, W], got shape [4, 5, 6]"),
    ((A, B[0]), {}, RuntimeError, "4-D weight [out_channels, in_channels / groups, kH, kW], got shape [4, 3, 3]"),
    ((A, B[:, :, :0]), {}, RuntimeError, "a weight without empty dimensions"),
    ((A, B[:0]), {}, RuntimeError, "a weight without empty dimensions"),
    ((A[:, :0], B[:, :0]), {}, RuntimeError, "with channels"),
    ((A[:, :, :0], B), {}, RuntimeError, "should be greater than 0"),
    ((A[:, :, :1], B), {"scale_factor": 1.0}, RuntimeError, "(1 x 6). Kernel size: (3 x 3)"),
    ((A, B), {"scale_factor": -1}, RuntimeError, "scale_factor must be finite and greater than 0"),
    ((A, B), {"scale_factor": None}, ValueError, "either size or scale_factor should be defined"),
    ((A, B), {"scale_factor": 3, "size": 8}, ValueError, "only one of size or scale_factor"),
    ((A, B), {"scale_factor": (1, 2, 3)}, ValueError, "same number of spatial dimensions"),
    ((A, B), {"size": 2.5}, TypeError, "expected size to be one of int"),
    ((A, B), {"mode": "area"}, ValueError, "mode must be one of nearest, nearest-exact, bilinear, bicubic; got 'area'"),
    ((A, B), {"align_corners": True}, ValueError, "align_corners option can only be set with"),
    ((A, B), {"activation": "swish"}, ValueError, "activation must be None, 'relu'"),
    ((A, B), {"activation": ("leaky_relu", -1.0)}, ValueError, "slope of leaky_relu"),
    ((None, B), {}, TypeError, "input must be a Tensor, got NoneType"),
    ((A, None), {}, TypeError, "weight must be a Tensor, got NoneType"),
    ((A, B, 3), {}, TypeError, "bias must be a Tensor, got int"),
    ((A.int(), B.int()), {}, NotImplementedError, "not implemented"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index):
    args, kwargs, error, says = BAD[index]
    aeup.upsample_conv2d(A, B, C, padding=(1, 2), size=(5, 2))  # what equals it must not be taken for it
    with pytest.raises(error, match=re.escape(says)):
        aeup.upsample_conv2d(*args, **kwargs)
