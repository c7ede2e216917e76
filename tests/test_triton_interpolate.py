"""The Triton resampling kernels against torch in float64: on a GPU for real, elsewhere in Triton's interpreter (see
triton_interpreter.py)."""

import importlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, MODES, SMOOTH, check_budget
from triton_cases import random
from triton_interpreter import DEVICE, INTERPRETED, MARKS, check_in_the_interpreter, poison, select_tests  # noqa: F401

pytestmark = MARKS
SHARDS = ("test_forward or test_dtypes", "not (test_forward or test_dtypes)")  # processes side by side

host = importlib.import_module("aeup.kernels.interpolate")
plans = importlib.import_module("aeup.kernels.plans")

# (n, c), input size, output size or None, scale factors or None
GEOMETRIES = {
    "x2": ((2, 4), (9, 8), None, (2, 2)),
    "x2-odd": ((1, 3), (5, 7), None, (2, 2)),
    "x2-one-pixel": ((2, 4), (1, 1), None, (2, 2)),
    "x1-x2": ((1, 4), (3, 6), (3, 12), None),
    "x4-x8": ((1, 2), (2, 3), None, (4, 8)),
    "any": ((2, 4), (5, 7), (9, 16), None),
    "given": ((1, 3), (6, 5), None, (1.7, 2.3)),
    "down": ((1, 4), (13, 11), (4, 5), None),
    "down-up": ((2, 3), (9, 4), None, (0.6, 1.3)),
    "wide-window": ((1, 2), (3, 2), (4, 40), None),
    "to-one-pixel": ((1, 4), (5, 4), (1, 1), None),
    "same": ((1, 4), (4, 5), (4, 5), None),
}
OPTIONS = {mode: ({}, {"align_corners": True}, {"antialias": True}) if mode in SMOOTH else ({},) for mode in MODES}
ALL = [(m, o, g) for m in MODES for o in OPTIONS[m] for g in GEOMETRIES]
FEW = [(m, o, g) for m in MODES for o in OPTIONS[m] for g in ("x2", "any", "down-up")]


def name_of(value):
    return "-".join(value) if isinstance(value, dict) else None


@pytest.fixture
def fresh_plans():
    host._prepared.cache_clear()
    plans.make_plan.cache_clear()
    yield
    host._prepared.cache_clear()
    plans.make_plan.cache_clear()


def setting(mode, option, geometry):
    (n, c), (ih, iw), size, given = GEOMETRIES[geometry]
    oh, ow = size or (int(ih * given[0]), int(iw * given[1]))
    align, aa = option.get("align_corners", False), option.get("antialias", False)
    args = (ih, iw, oh, ow, mode, align, aa, *(given or (None, None)))
    kwargs = {"size": size} if size else {"scale_factor": given}
    if mode in SMOOTH:
        kwargs |= {"align_corners": align, "antialias": aa}
    return (n, c, ih, iw), (n, c, oh, ow), args, kwargs | {"mode": mode}


def ours(src, args, backward=False):
    return host.interpolate(src.to(DEVICE), *args, backward).cpu()


def nearest_source(size_in, size_out, mode, given=None, same=False):
    """torch's CUDA rule, all of it in float32 (ATen/native/cuda/UpSample.cuh)."""
    f = np.float32
    scale = f(1) if same else (f(1.0 / given) if given else f(size_in) / f(size_out))
    o = np.arange(size_out, dtype=f)
    at = o * scale if mode == "nearest" else (o + f(0.5)) * scale
    return np.minimum(np.floor(at).astype(np.int64), size_in - 1)


def nearest_reference(x, args):
    ih, iw, oh, ow, mode, _, _, scale_h, scale_w = args
    same = (ih, iw) == (oh, ow)
    rows = torch.from_numpy(nearest_source(ih, oh, mode, scale_h, same))
    columns = torch.from_numpy(nearest_source(iw, ow, mode, scale_w, same))
    return x[:, :, rows][:, :, :, columns]


def check_forward(mode, option, geometry, dtype, layout):
    shape, _, args, kwargs = setting(mode, option, geometry)
    x = random(shape, dtype, layout)
    got = ours(x, args)
    half = dtype in (torch.float16, torch.bfloat16)
    by_torch = None if half and args[6] else F.interpolate(x, **kwargs)
    if by_torch is not None:
        assert got.shape == by_torch.shape and got.stride() == by_torch.stride()
    assert got.dtype == dtype
    if mode in SMOOTH:
        # 4 ulps: the positions' rounding; and the interpreter truncates where a GPU rounds to bfloat16 (1 ulp).
        check_budget(got, F.interpolate(x.double(), **kwargs), by_torch, floor_ulps=4)
    else:
        assert torch.equal(got, nearest_reference(x, args))


def check_backward(mode, option, geometry, dtype, layout):
    shape, made, args, kwargs = setting(mode, option, geometry)
    grad = random(made, dtype, layout, seed=1)

    def gradient(dtype):
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        y = F.interpolate(x, **kwargs) if mode in SMOOTH else nearest_reference(x, args)
        return torch.autograd.grad(y, x, grad.to(dtype))[0]

    got = ours(grad, args, backward=True)
    half = dtype in (torch.float16, torch.bfloat16)
    assert got.dtype == dtype and got.shape == shape
    if min(made[2:]) > 1:  # a gradient of one pixel has no layout to keep
        assert got.is_contiguous(memory_format=LAYOUTS[layout])
    check_budget(got, gradient(torch.float64), None if half else gradient(dtype), floor_ulps=4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode,option,geometry", ALL, ids=name_of)
def test_forward(mode, option, geometry, layout):
    check_forward(mode, option, geometry, torch.float32, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode,option,geometry", ALL, ids=name_of)
def test_backward(mode, option, geometry, layout):
    check_backward(mode, option, geometry, torch.float32, layout)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("mode,option,geometry", FEW, ids=name_of)
def test_dtypes(mode, option, geometry, dtype):
    for layout in {torch.float64: ("nchw",), torch.float16: ("nhwc",)}.get(dtype, LAYOUTS):
        check_forward(mode, option, geometry, dtype, layout)
        check_backward(mode, option, geometry, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES[:2])
def test_uint8(mode, layout):
    for geometry in ("x2", "x4-x8", "any", "down-up"):
        shape, _, args, _ = setting(mode, {}, geometry)
        x = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=LAYOUTS[layout])
        assert torch.equal(ours(x, args), nearest_reference(x, args))


@pytest.mark.parametrize("mode", MODES[:2])
def test_nearest_index(mode):
    """Every pixel carries its own number. Pairs whose quotient is rounded in float32, and given scales."""
    pairs = [(3, 7), (7, 3), (10, 29), (41, 123), (49, 98), (61, 255), (255, 61), (1, 9), (9, 1), (100, 999)]
    for size, out in pairs:
        x = torch.arange(size, dtype=torch.float64).reshape(1, 1, 1, size)
        assert torch.equal(
            ours(x, args := (1, size, 1, out, mode, False, False, None, None)), nearest_reference(x, args)
        )
    for size, given in itertools.product((7, 61), (0.3, 1.1, 2.9, 3.0, 4.0)):
        args = (1, size, 1, int(size * given), mode, False, False, 1.0, given)
        x = torch.arange(size, dtype=torch.float64).reshape(1, 1, 1, size)
        assert torch.equal(ours(x, args), nearest_reference(x, args))


@pytest.mark.parametrize("mode,option", [(m, o) for m in MODES for o in OPTIONS[m]], ids=name_of)
def test_windows_hold_every_reader(mode, option):
    """The candidate window of each input covers, with an output to spare, all outputs whose taps include it."""
    axis = importlib.import_module("aeup.kernels.axis")
    align, aa = option.get("align_corners", False), option.get("antialias", False)
    for size, out, given in itertools.product((1, 2, 7, 50, 333), (1, 3, 8, 77, 1000), (None, 0.37, 1.0, 2.6)):
        a = axis.make_axis(size, out, mode, align, aa, given, False, False)
        w, i = axis.window(a), np.arange(size)
        first, last = axis.antialias_ranges(a) if aa else (axis.starts(a), axis.starts(a) + axis.TAPS[mode])
        reads = (np.clip(first, 0, size - 1)[:, None] <= i) & (i <= np.clip(last - 1, 0, size - 1)[:, None])
        reads &= (last > first)[:, None]
        guess = np.clip((i - w.reach).astype(np.float32) * np.float32(w.inverse), 0, out).astype(int)
        lo = guess - w.pad
        o, column = np.nonzero(reads)
        assert (lo[column] < o).all() and (o < np.maximum(lo, 0)[column] + w.width).all(), (size, out, given)


@pytest.mark.parametrize("mode,option", [(m, o) for m in MODES for o in OPTIONS[m]], ids=name_of)
def test_backward_is_the_transpose(mode, option):
    """The matrices of the forward and of the backward, entry by entry: the same pattern, weights within an ulp of 1."""
    for size, out in ((7, 14), (5, 13), (13, 5), (3, 29), (6, 1)):
        align, aa = option.get("align_corners", False), option.get("antialias", False)
        args = (1, size, 1, out, mode, align, aa, None, None)
        forward = ours(torch.eye(size).reshape(size, 1, 1, size), args).reshape(size, out)
        backward = ours(torch.eye(out).reshape(out, 1, 1, out), args, backward=True).reshape(out, size)
        # Compiled, an axis of one pixel makes other fused multiply-adds in the two kernels.
        assert (forward - backward.T).abs().max() <= 4 * torch.finfo(torch.float32).eps
        assert torch.equal(forward.abs() > 1e-5, backward.T.abs() > 1e-5)


@pytest.mark.parametrize("geometry", ("x2", "x2-odd", "any", "down-up"))
@pytest.mark.parametrize("mode,option", [(m, o) for m in MODES for o in OPTIONS[m]], ids=name_of)
def test_infinities_stay_where_they_are_read(mode, option, geometry):
    """An infinity in one channel's gradient, a NaN in another's."""
    shape, made, args, kwargs = setting(mode, option, geometry)
    probe = torch.zeros(made, dtype=torch.float64)
    probe[-1, -1, 1, -2] = probe[0, 0, -1, 0] = 1
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = F.interpolate(x, **kwargs) if mode in SMOOTH else nearest_reference(x, args)
    touched = torch.autograd.grad(y, x, probe)[0] != 0
    grad = torch.ones(made)
    grad[-1, -1, 1, -2], grad[0, 0, -1, 0] = torch.inf, torch.nan
    for layout in LAYOUTS:
        got = ours(grad.contiguous(memory_format=LAYOUTS[layout]), args, backward=True)
        assert torch.equal(got.isfinite(), ~touched)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ("nearest", "bicubic"))
def test_blocks_strips_and_64_bit_offsets(mode, layout, monkeypatch, fresh_plans):
    """Short and long strips, many blocks with a ragged last one, 32- and 64-bit offsets: the same bits."""
    for geometry, dtype in (("x2", torch.float32), ("any", torch.bfloat16)):
        shape, made, args, _ = setting(mode, {}, geometry)
        x, grad = random(shape, dtype, layout), random(made, dtype, layout)
        expected = ours(x, args), ours(grad, args, backward=True)
        for lanes, rows, limit in ((64, 1, 1 << 31), (1024, 16, 0)):
            monkeypatch.setattr(plans, "LIMIT32", limit)
            config = {"lanes": lanes, "rows": rows, "warps": 1, "programs": 1}
            monkeypatch.setattr(plans, "configuration", lambda *_, config=config: config)
            host._prepared.cache_clear()
            plans.make_plan.cache_clear()
            assert torch.equal(ours(x, args), expected[0])
            assert torch.equal(ours(grad, args, backward=True), expected[1])
        monkeypatch.undo()
        host._prepared.cache_clear()
        plans.make_plan.cache_clear()


@pytest.mark.parametrize("mode", ("nearest", "bilinear"))
def test_strides_and_alignment(mode):
    _, _, args, kwargs = setting(mode, {}, "x2")
    wide = random((2, 8, 12, 10), torch.float32, "nchw")
    last = random((2, 8, 12, 10), torch.float32, "nhwc")
    views = {
        "sliced": wide[:, ::2, 1:10, 2:],
        "channels sliced": last[:, 1:5, 1:10, :8],
        "transposed": wide.transpose(2, 3)[:, :4, :9, :8],
        "expanded": wide[:1, :1, :9, :8].expand(2, 4, 9, 8),
        "offset": torch.as_strided(wide, (2, 4, 9, 8), (288, 72, 8, 1), 1),
        "offset nhwc": torch.as_strided(last, (2, 4, 9, 8), (288, 1, 32, 4), 3),
        "one channel": random((3, 1, 9, 8), torch.float32, "nhwc"),
    }
    for name, x in views.items():
        got, by_torch = host.interpolate(x.to(DEVICE), *args), F.interpolate(x, **kwargs)
        if INTERPRETED:  # .to keeps strides only where it copies nothing
            assert got.stride() == by_torch.stride(), name
        torch.testing.assert_close(got.cpu(), by_torch, atol=1e-6, rtol=0, msg=name)


def test_empty():
    for layout, backward in itertools.product(LAYOUTS, (False, True)):
        for n, c in ((0, 3), (2, 0)):
            src = torch.zeros(n, c, 8, 6) if backward else torch.zeros(n, c, 4, 3)
            out = ours(
                src.contiguous(memory_format=LAYOUTS[layout]),
                (4, 3, 8, 6, "bilinear", False, False, 2.0, 2.0),
                backward,
            )
            assert out.shape == ((n, c, 4, 3) if backward else (n, c, 8, 6))


def test_refusals():
    x = torch.zeros(1, 1, 4, 4, device=DEVICE)
    serve = (4, 4, 8, 8, "nearest", False, False, None, None)
    assert host.refuses(x, *serve, False) is None
    assert "meta" in host.refuses(x.to("meta"), *serve, False)
    assert "int64" in host.refuses(x.long(), *serve, False)
    assert "uint8" in host.refuses(x.byte(), *serve, True)
    assert "uint8" in host.refuses(x.byte(), 4, 4, 8, 8, "bilinear", False, False, None, None, False)
    assert "area" in host.refuses(x, 4, 4, 8, 8, "area", False, False, None, None, False)
    assert "antialias" in host.refuses(x, 4, 4, 8, 8, "nearest", False, True, None, None, False)
    assert "4-D" in host.refuses(x[0], *serve, False)
    assert str(1 << 31) in host.refuses(x, 4, 4, 8, 1 << 31, "nearest", False, False, None, None, False)
    with pytest.raises(RuntimeError, match="int64"):
        host.interpolate(x.long(), *serve)
    with pytest.raises(RuntimeError, match="4x4 pixels"):
        host.interpolate(x, 5, 4, 8, 8, "nearest")


def test_in_the_interpreter():
    """Runs the tests above with TRITON_INTERPRET=1."""
    check_in_the_interpreter(__file__, SHARDS)


select_tests(globals())
