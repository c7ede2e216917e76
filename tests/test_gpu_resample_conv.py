"""The raw CUDA operators of resampling and convolution on a real GPU, against float64 of F.interpolate and F.conv2d."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, check_budget

import aeup  # noqa: F401  loads the operators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")
SHAPES = {  # input, weight, padding, groups
    "odd": ((2, 5, 9, 13), (7, 5, 3, 3), (1, 1), 1),
    "tiles": ((2, 72, 19, 24), (136, 72, 3, 3), (1, 1), 1),
    "kernel": ((1, 16, 11, 8), (24, 16, 7, 2), (3, 0), 1),
    "pixel": ((3, 33, 5, 6), (40, 33, 1, 1), (0, 0), 1),
    "padded": ((1, 8, 6, 7), (8, 8, 2, 3), (4, 5), 1),
    "groups": ((1, 48, 10, 9), (33, 16, 3, 3), (1, 1), 3),
    "depthwise": ((2, 6, 9, 12), (6, 1, 3, 3), (1, 1), 6),
}
GEOMETRIES = (
    {"scale_factor": 2},
    {"scale_factor": 3},
    {"scale_factor": (4, 8)},
    {"scale_factor": (1.7, 2.3)},
    {"size": (23, 37)},
    {"size": (5, 4)},
    {"size": (9, 29), "align_corners": True},
    {"scale_factor": 2, "align_corners": True},
)
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")


def tensors(shape, dtype, layout, how, seed=0):
    size, weight, padding, groups = SHAPES[shape]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g, dtype=torch.float64)
    w = torch.randn(weight, generator=g, dtype=torch.float64) / weight[1] ** 0.5
    b = torch.randn(weight[0], generator=g, dtype=torch.float64)
    y = F.conv2d(F.interpolate(x, **how), w, b, padding=padding, groups=groups)
    grad = torch.randn(y.shape, generator=g, dtype=torch.float64)
    x, w, grad = (t.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for t in (x, w, grad))
    return tuple(t.cuda() for t in (x, w, b.to(dtype), grad))


def by_torch(shape, given, how, activation="none"):
    """On the CPU for nearest-exact: torch's CUDA gradient of it is wrong at some sizes, [5, 6] -> [23, 37] for one."""
    _, _, padding, groups = SHAPES[shape]
    x, w, b, grad = (t.cpu() for t in given) if how["mode"] == "nearest-exact" else given
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    torch.use_deterministic_algorithms(False)  # torch's own resampling has no deterministic backward
    try:
        y = F.conv2d(F.interpolate(x, **how), w, b, padding=padding, groups=groups)
        gx, gw = torch.autograd.grad(y, (x, w), grad)
    finally:
        torch.use_deterministic_algorithms(True)
    y = y.detach()
    functions = {"leaky_relu": lambda t: F.leaky_relu(t, 0.2), "tanh": torch.tanh, "none": lambda t: t}
    return functions.get(activation, getattr(F, activation, None))(y), gx, gw


def by_aeup(shape, given, how, activation="none", tf32=False):
    ops = torch.ops.aeup_native
    (_, _, ih, iw), _, padding, groups = SHAPES[shape]
    x, w, b, grad = given
    scale = how.get("scale_factor", 0.0)
    scales = scale if isinstance(scale, tuple) else (scale, scale)
    size = F.interpolate(torch.empty(1, 1, ih, iw, device="meta"), **how).shape[2:]
    map_of = (*size, MODES.index(how["mode"]), bool(how.get("align_corners")), *map(float, scales), *padding, groups)
    y = ops.resample_conv2d(x, w, b, *map_of, ACTIVATIONS.index(activation), 0.2, tf32)
    gx = ops.resample_conv2d_input_gradient(grad, w, ih, iw, *map_of, tf32)
    gw = ops.resample_conv2d_weight_gradient(grad, x, w, *map_of, tf32)
    return y, gx, gw


def rounded_to_tf32(t):
    return ((t.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def check(shape, dtype, layout, how, activation="none", tf32=False):
    given = tensors(shape, dtype, layout, how)
    got = by_aeup(shape, given, how, activation, tf32)
    exact = by_torch(shape, [t.double() for t in given], how, activation)
    if how["mode"] == "nearest-exact" and dtype in (torch.float16, torch.bfloat16):  # slow on a CPU: its rounding alone
        theirs = [t.to(dtype) for t in exact]
    else:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            theirs = by_torch(shape, given, how, activation)
    if tf32:  # the budget is the error of rounding what is multiplied
        theirs = [t.float() for t in by_torch(shape, [rounded_to_tf32(t).double() for t in given], how, activation)]
    terms = (0, 0, got[0].numel() // got[0].shape[1])
    for mine, true, other, n in zip(got, exact, theirs, terms, strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape
        if min(mine.shape[1:]) > 1:
            assert mine.is_contiguous(memory_format=LAYOUTS[layout])
        check_budget(mine.cpu(), true.cpu(), other.cpu(), floor_ulps=4 if dtype is torch.float32 else 2, terms=n)
    return got


def geometries(mode):
    return [g for g in GEOMETRIES if "align_corners" not in g or mode in ("bilinear", "bicubic")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_passes_within_budget(shape, mode, dtype):
    for geometry in geometries(mode):
        for layout in LAYOUTS:
            check(shape, dtype, layout, {"mode": mode, **geometry})
            if dtype is torch.float32:
                check(shape, dtype, layout, {"mode": mode, **geometry}, tf32=True)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation):
    for layout in LAYOUTS:
        check("odd", dtype, layout, {"mode": "bilinear", "scale_factor": 2}, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(layout):
    how = {"mode": "bicubic", "scale_factor": 2}
    given = tensors("tiles", torch.bfloat16, layout, how)
    first = by_aeup("tiles", given, how)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, by_aeup("tiles", given, how), strict=True))


def test_strided_offset_and_empty_tensors():
    ops = torch.ops.aeup_native
    how = {"mode": "bilinear", "scale_factor": 2}
    x, w, b, grad = tensors("odd", torch.bfloat16, "nchw", how)
    want = by_aeup("odd", (x, w, b, grad), how)
    wide = torch.zeros(2, 5, 9, 14, dtype=x.dtype, device="cuda")
    wide[..., 1:] = x
    got = by_aeup("odd", (wide[..., 1:], w, b, grad.transpose(2, 3).contiguous().transpose(2, 3)), how)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ones = torch.ones((), dtype=x.dtype, device="cuda").expand(grad.shape)  # what .sum().backward() hands over
    got, want = by_aeup("odd", (x, w, b, ones), how), by_aeup("odd", (x, w, b, ones.contiguous()), how)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    map_of = (18, 26, MODES.index("bilinear"), False, 2.0, 2.0, 1, 1, 1)
    assert ops.resample_conv2d(x[:0], w, None, *map_of, 0, 0.0, False).shape == (0, 7, 18, 26)
    assert ops.resample_conv2d_input_gradient(grad[:0], w, 9, 13, *map_of, False).shape == (0, 5, 9, 13)
    assert (ops.resample_conv2d_weight_gradient(grad[:0], x[:0], w, *map_of, False) == 0).all()


def test_cuda_graph():
    how = {"mode": "bilinear", "scale_factor": 2}
    given = tensors("tiles", torch.bfloat16, "nhwc", how)
    want = by_aeup("tiles", given, how)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        by_aeup("tiles", given, how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = by_aeup("tiles", given, how)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_than_2_to_the_31_elements():
    """The last image of a tensor past 2^31 elements equals the same image alone."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    x = torch.randn(1, 16, 512, 512, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(16, 16, 3, 3, device="cuda", dtype=torch.bfloat16)
    for fmt in LAYOUTS.values():
        last, weight = x.contiguous(memory_format=fmt), w.contiguous(memory_format=fmt)
        many = last.expand(130, -1, -1, -1).contiguous(memory_format=fmt)  # the output has 2.2e9 elements
        map_of = (1024, 1024, MODES.index("bilinear"), False, 2.0, 2.0, 1, 1, 1, 0, 0.0, False)
        got = torch.ops.aeup_native.resample_conv2d(many, weight, None, *map_of)
        want = torch.ops.aeup_native.resample_conv2d(last, weight, None, *map_of)
        assert torch.equal(got[-1:], want) and torch.equal(got[:1], want)
        gx = torch.ops.aeup_native.resample_conv2d_input_gradient(got, weight, 512, 512, *map_of[:9], False)
        assert torch.equal(
            gx[-1:], torch.ops.aeup_native.resample_conv2d_input_gradient(want, weight, 512, 512, *map_of[:9], False)
        )
        del got, gx, many
