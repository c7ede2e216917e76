"""The Triton kernels of the convolution of an upsampled map against torch in float64: on a GPU for real, elsewhere in
Triton's interpreter (see triton_interpreter.py)."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from triton_cases import ConvCase, random
from triton_interpreter import DEVICE, INTERPRETED, MARKS, check_in_the_interpreter, poison, select_tests  # noqa: F401

pytestmark = MARKS

host = importlib.import_module("aeup.kernels.upsample_conv")
plans = importlib.import_module("aeup.kernels.upsample_conv_plans")
convolution_plans = importlib.import_module("aeup.kernels.convolution_plans")

# (n, ci, co), input size, upsampling, kernel, padding, groups
FOLDED = {
    "x2k3": ((2, 6, 5), (5, 7), {"scale_factor": 2}, (3, 3), (1, 1), 1),
    "x2k3-exact": ((1, 3, 4), (4, 5), {"scale_factor": 2, "mode": "nearest-exact"}, (3, 3), (1, 1), 1),
    "x2k3-rgb": ((1, 4, 3), (4, 6), {"scale_factor": 2}, (3, 3), (1, 1), 1),
    "x3k5": ((1, 3, 2), (3, 4), {"scale_factor": 3}, (5, 5), (2, 2), 1),
    "axes": ((2, 3, 4), (3, 5), {"scale_factor": (4, 3)}, (2, 4), (0, 1), 1),
    "one-axis": ((1, 3, 4), (3, 5), {"scale_factor": (1, 2)}, (3, 1), (1, 0), 1),
    "wide-padding": ((1, 2, 3), (3, 2), {"scale_factor": 2}, (1, 2), (3, 3), 1),
    "groups": ((2, 6, 9), (3, 4), {"scale_factor": 2}, (3, 3), (1, 1), 3),
    "depthwise": ((1, 4, 4), (4, 3), {"scale_factor": 2}, (3, 3), (1, 1), 4),
    "plain": ((2, 3, 4), (5, 6), {"size": (5, 6), "mode": "bicubic"}, (3, 3), (1, 1), 1),
    "one-pixel": ((2, 3, 4), (1, 1), {"scale_factor": 2}, (3, 3), (1, 1), 1),
}
CORNERS = {"align_corners": True}
RESAMPLED = {
    "nearest-size": ((1, 3, 4), (5, 7), {"size": (8, 17)}, (3, 3), (1, 1), 1),
    "nearest-exact-down": ((1, 3, 4), (9, 7), {"size": (4, 11), "mode": "nearest-exact"}, (3, 2), (1, 1), 1),
    "bilinear": ((2, 6, 5), (5, 4), {"scale_factor": 2, "mode": "bilinear"}, (3, 1), (1, 1), 1),
    "bilinear-corners": ((1, 3, 4), (4, 5), CORNERS | {"scale_factor": 2, "mode": "bilinear"}, (3, 1), (1, 1), 1),
    "bilinear-axes": ((1, 3, 2), (3, 5), {"scale_factor": (2.3, 1), "mode": "bilinear"}, (2, 5), (0, 3), 1),
    "bilinear-groups": ((2, 6, 9), (3, 4), {"size": (5, 7), "mode": "bilinear"}, (1, 2), (0, 1), 3),
    "bicubic": ((1, 4, 5), (4, 5), {"scale_factor": 2, "mode": "bicubic"}, (2, 1), (1, 0), 1),
    "bicubic-corners": ((1, 2, 3), (5, 3), CORNERS | {"size": (4, 7), "mode": "bicubic"}, (1, 3), (0, 1), 1),
    "bicubic-one-pixel": ((1, 3, 2), (1, 3), {"size": (3, 5), "mode": "bicubic"}, (1, 1), (1, 1), 1),
}
GEOMETRIES = FOLDED | RESAMPLED
FEW = ("x2k3", "groups", "bilinear", "bicubic")


class Case(ConvCase):
    """Tensors of one geometry, and torch's results in float64 and in the type itself."""

    def __init__(self, geometry, dtype, layout, weight_layout=None):
        (n, ci, co), self.size, self.upsampling, self.kernel, self.padding, self.groups = GEOMETRIES[geometry]
        self.layout, self.dtype = layout, dtype
        self.x = random((n, ci, *self.size), dtype, layout, 0)
        self.w = random((co, ci // self.groups, *self.kernel), dtype, weight_layout or layout, 1)
        self.b = random((co,), dtype, layout, 2) if self.groups != 3 else None
        self.reference = self.torch(torch.float64)
        self.grad = random(self.reference.shape, dtype, layout, 3)
        self.reference = self.reference, *self.gradients(torch.float64)
        self.own = self.torch(dtype), *self.gradients(dtype)

    def linear(self, x, w, b=None):
        return F.conv2d(F.interpolate(x, **self.upsampling), w, b, padding=self.padding, groups=self.groups)

    def torch(self, dtype):
        x, w, b = (None if t is None else t.to(dtype) for t in (self.x, self.w, self.b))
        return F.leaky_relu(self.linear(x, w, b), 0.3)

    def arguments(self):
        """size, mode, align_corners, scale_h, scale_w, padding, groups."""
        up = self.upsampling
        scales = up.get("scale_factor", (None, None))
        scales = scales if isinstance(scales, tuple) else (scales, scales)
        size = up.get("size") or tuple(int(i * s) for i, s in zip(self.size, scales, strict=True))
        corners = up.get("align_corners", False)
        return size, up.get("mode", "nearest"), corners, *scales, self.padding, self.groups

    def forward(self, tf32=False):
        x, w, b = (None if t is None else t.to(DEVICE) for t in (self.x, self.w, self.b))
        return host.upsample_conv2d(x, w, b, *self.arguments(), "leaky_relu", 0.3, tf32).cpu()

    def input_gradient(self, tf32=False):
        g, w = self.grad.to(DEVICE), self.w.to(DEVICE)
        return host.upsample_conv2d_input_gradient(g, w, self.size, *self.arguments(), tf32).cpu()

    def weight_gradient(self, tf32=False):
        g, x = self.grad.to(DEVICE), self.x.to(DEVICE)
        return host.upsample_conv2d_weight_gradient(g, x, self.kernel, *self.arguments(), tf32).cpu()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32(geometry):
    Case(geometry, torch.float32, list(LAYOUTS)[len(geometry) % 2]).check()


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("geometry", FEW)
def test_dtypes(geometry, dtype):
    Case(geometry, dtype, "nchw" if dtype is torch.bfloat16 else "nhwc").check()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies in float32")
@pytest.mark.parametrize("geometry", ("x2k3", "bilinear"))
def test_tf32(geometry):
    """tf32 keeps 10 bits of each factor."""
    case = Case(geometry, torch.float32, "nhwc")
    for a, reference in zip(case.results(tf32=True), case.reference, strict=True):
        assert (a - reference).abs().max() <= 4e-3 * reference.abs().max()


@pytest.mark.parametrize("geometry", ("x2k3", "bilinear"))
def test_mixed_layouts(geometry):
    """A contiguous weight with a channels-last input, and the reverse."""
    for layouts in (("nhwc", "nchw"), ("nchw", "nhwc")):
        Case(geometry, torch.float32, *layouts).check_mixed_layouts()


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block sizes of every kernel."""

    def clear():
        for cached in (host.prepared, plans.map_plan, plans.weight_gradient_plan):
            cached.cache_clear()
        for cached in (convolution_plans.gemm_plan, convolution_plans.weight_plan):
            cached.cache_clear()

    def use(**config):
        small = {"m": 16, "n": 16, "k": 16, "warps": 4, "stages": 2, "programs": 8, "least": 1, "sum": 64}
        for module in (plans, convolution_plans):
            monkeypatch.setattr(module, "configuration", lambda *_: small | config)
        clear()

    yield use
    clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks(blocks, layout, monkeypatch):
    """Several blocks of pixels and of both channels, the last ones part filled, and several ranges: the same result,
    with 64-bit offsets too, and each time the same bits."""
    monkeypatch.setitem(GEOMETRIES, "folded", ((1, 17, 18), (2, 3), {"scale_factor": 2}, (3, 2), (1, 1), 1))
    up = {"scale_factor": 2, "mode": "bilinear"}
    monkeypatch.setitem(GEOMETRIES, "resampled", ((1, 18, 17), (2, 3), up, (2, 1), (1, 0), 1))
    for geometry in ("folded", "resampled"):
        case = Case(geometry, torch.float32, layout)
        blocks()
        case.check()
        if geometry == "resampled" and layout == "nhwc":
            once = case.results()
            monkeypatch.setattr(plans, "LIMIT32", 500)
            blocks()
            assert all(map(torch.equal, case.results(), once))


def test_views():
    """Offset, strided and expanded tensors."""
    for geometry in ("x2k3", "bilinear"):
        case = Case(geometry, torch.float32, "nchw")
        want = case.results()
        n, c, h, w = case.x.shape
        wide = torch.zeros(n, c + 2, h + 1, w + 3)
        wide[:, 1:-1, :h, 2:-1] = case.x
        case.x = wide[:, 1:-1, :h, 2:-1]
        case.w = case.w.transpose(2, 3).contiguous().transpose(2, 3)
        case.b = torch.stack((case.b, case.b), 1)[:, 0]
        case.grad = torch.cat((case.grad, case.grad))[n:]
        for got, expected in zip(case.results(), want, strict=True):
            assert torch.equal(got, expected)
        case.grad = torch.ones(()).expand(case.grad.shape)
        got = case.weight_gradient()
        case.grad = case.grad.contiguous()
        assert torch.equal(got, case.weight_gradient())


def test_same_bits_as_the_upsampled_map():
    """A 1x1 kernel of one channel copies: the resampled operand is that of the interpolation's kernels, to the bit."""
    kernel = importlib.import_module("aeup.kernels.interpolate")
    x = random((1, 1, 5, 6), torch.float32, "nchw", 0)
    w = torch.ones(1, 1, 1, 1)
    for mode, corners in (("nearest", False), ("bilinear", False), ("bilinear", True), ("bicubic", False)):
        geometry = ((13, 17), mode, corners, None, None)
        got = host.upsample_conv2d(x.to(DEVICE), w.to(DEVICE), None, *geometry, (0, 0), 1, None, 0.0)
        want = kernel.interpolate(x.to(DEVICE), 5, 6, 13, 17, mode, corners)
        torch.testing.assert_close(got, want, rtol=3e-7, atol=3e-7)


def test_empty():
    x, w = torch.zeros(0, 3, 4, 5, device=DEVICE), torch.zeros(2, 3, 3, 3, device=DEVICE)
    for mode in ("nearest", "bilinear"):
        args = ((8, 10), mode, False, 2.0, 2.0, (1, 1), 1)
        y = host.upsample_conv2d(x, w, None, *args, "relu", 0.0)
        assert y.shape == (0, 2, 8, 10)
        assert host.upsample_conv2d_input_gradient(y, w, (4, 5), *args).shape == x.shape
        gradient = host.upsample_conv2d_weight_gradient(y, x, (3, 3), *args)
        assert gradient.shape == w.shape and not gradient.any()


def test_refusals():
    x, w, b = (torch.zeros(s, device=DEVICE) for s in ((1, 4, 3, 3), (2, 4, 3, 3), (2,)))
    up, rest = ((6, 6), "bilinear", False, 2.0, 2.0), ((1, 1), 1, None, 0.0)

    def why(*args, name="upsample_conv2d"):
        return host.refuses_upsample_conv2d(name, *args)

    assert why(x, w, b, *up, *rest) is None
    assert "meta" in why(x.to("meta"), w, b, *up, *rest)
    assert "int64" in why(x.long(), w, b, *up, *rest)
    assert "weight is torch.float64" in why(x, w.double(), b, *up, *rest)
    assert "bias has 1" in why(x, w, b[:1], *up, *rest)
    assert "elu" in why(x, w, b, *up, (1, 1), 1, "elu", 0.0)
    assert "area" in why(x, w, b, (6, 6), "area", *up[2:], *rest)
    assert "input has 4 channels" in why(x, w[:, :3], b, *up, *rest)
    assert "groups 3" in why(x, w, b, *up, (1, 1), 3, None, 0.0)
    assert "padding" in why(x, w, b, *up, (-1, 1), 1, None, 0.0)
    assert "positive" in why(x, w, b, (1, 1), *up[1:], (0, 0), 1, None, 0.0)
    assert "one image" in why(x, w, b, (1 << 15, 1 << 15), *up[1:], *rest)
    huge = torch.zeros(()).to(DEVICE).expand(1 << 15, 1 << 12, 3, 3)
    assert "folded" in why(torch.zeros(1, 1 << 12, 3, 3, device=DEVICE), huge, None, (6, 6), "nearest", *up[2:], *rest)
    grad, back = torch.zeros(1, 2, 6, 6, device=DEVICE), (*up, (1, 1), 1)
    assert why(grad, w, (3, 3), *back, name="upsample_conv2d_input_gradient") is None
    assert "pixels" in why(grad[..., 1:], w, (3, 3), *back, name="upsample_conv2d_input_gradient")
    assert "result has 1 channels" in why(grad[:, 1:], w, (3, 3), *back, name="upsample_conv2d_input_gradient")
    assert why(grad, x, (3, 3), *back, name="upsample_conv2d_weight_gradient") is None
    assert "batch" in why(grad, x[:0], (3, 3), *back, name="upsample_conv2d_weight_gradient")
    with pytest.raises(RuntimeError, match="aeup.kernels.upsample_conv2d: dtype torch.int64"):
        host.upsample_conv2d(x.long(), w, b, *up, *rest)


def test_nearest_scale_is_torchs():
    """The fold is taken exactly where torch's index of every output is o // s, also where 1 / s is no float32."""
    for s in range(1, 12):
        for i in (1, 2, 7, 60, 333):
            for mode in ("nearest", "nearest-exact"):
                for given in (None, float(s)):
                    axis = plans.axes_of((i, i), (i * s, i * s), mode, False, (given, given), False)[0]
                    where = F.interpolate(torch.arange(float(i))[None, None], size=i * s, mode=mode)[0, 0]
                    plain = torch.arange(i * s) // s
                    assert plans.nearest_scale(axis) in (0, s)
                    if plans.nearest_scale(axis) == 0:
                        assert not torch.equal(where.long(), plain)
    assert plans.nearest_scale(plans.axes_of((4, 4), (7, 8), "nearest", False, (None, None), False)[0]) == 0
    assert plans.nearest_scale(plans.axes_of((4, 4), (8, 8), "bilinear", False, (None, None), False)[0]) == 0


def test_in_the_interpreter():
    """Runs the tests above with TRITON_INTERPRET=1."""
    check_in_the_interpreter(__file__)


select_tests(globals())
