"""The CUDA kernels of resampling and convolution without a GPU: csrc/cuda runs on the host (tests/emulate), against
float64 of F.interpolate and F.conv2d.

The emulator itself fails a run that reads outside the tensors, uses a misaligned vector, or stores an element of the
result twice or not at all.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from emulate.emulator import emulated, tensor  # noqa: F401
from emulate.emulator_convolution import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from emulate.emulator_resample_conv import run

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ULP = {F32: 2.0**-23, F64: 2.0**-52, F16: 2.0**-10, BF16: 2.0**-7}
PASSES = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
SLOPE = 0.2  # between two numbers of any format


@dataclass(frozen=True)
class Case:
    """input [n, ci, h, w]; co output channels; the resampling by `how` as F.interpolate takes it."""

    input: tuple
    co: int
    mode: str = "bilinear"
    how: dict = field(default_factory=lambda: {"scale_factor": 2})
    kernel: tuple = (3, 3)
    padding: tuple = (1, 1)
    groups: int = 1

    def __str__(self):
        how = "-".join(f"{k}={v}" for k, v in self.how.items()).replace(" ", "")
        shape = "x".join(map(str, self.input))
        return f"{shape}-{self.co}-{self.mode}-{how}-{self.kernel}-{self.padding}-g{self.groups}".replace(" ", "")

    @property
    def weight(self):
        return (self.co, self.input[1] // self.groups, *self.kernel)

    def resample(self, x):
        return F.interpolate(x, mode=self.mode, **self.how)

    def convolve(self, u, w, bias=None):
        return F.conv2d(u, w, bias, padding=self.padding, groups=self.groups)

    @property
    def scales(self):
        given = self.how.get("scale_factor", 0.0)
        return given if isinstance(given, tuple) else (given, given)


def activate(y, activation):
    if activation == "none":
        return y
    if activation == "leaky_relu":
        return F.leaky_relu(y, SLOPE)
    return torch.tanh(y) if activation == "tanh" else getattr(F, activation)(y)


def budget(got, want, theirs, name, floor):
    """At most twice the error of rounding where torch rounds; the borders on their own."""
    assert torch.isfinite(got).all(), f"{name}: unwritten (poisoned) or not finite"
    ours, torchs = (got.double() - want).abs(), (theirs.double() - want).abs()
    views = [slice(None)] if got.dim() < 4 else [slice(None), (..., [0, -1], slice(None)), (..., [0, -1])]
    for view in views:
        scale = want[view].abs().max().item()
        bound = 2 * torchs[view].max().item() + floor * scale
        assert ours[view].max().item() <= bound, f"{name}: {ours[view].max().item():.3g} > {bound:.3g}"


def rounded(t, dtype, tf32=False):
    """float64 values as the dtype (tf32: what is multiplied in it) stores them."""
    if tf32:
        return ((t.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()
    return t.to(dtype).double()


def reference(case, x, w, bias, grad, dtype, tf32, activation):
    """float64 results, and those with every tensor rounded that torch writes (tf32: or multiplies)."""
    out = []
    for cut in (lambda t, tf32=False: t, lambda t, tf32=False: rounded(t, dtype, tf32)):
        xd, wd = x.double().requires_grad_(), cut(w.double(), tf32)
        up = case.resample(xd)
        u = cut(up.detach(), tf32).requires_grad_()
        wd = wd.requires_grad_()
        y = case.convolve(u, wd, None if bias is None else bias.double())
        g = cut(grad.double(), tf32)
        gu, gw = torch.autograd.grad(y, (u, wd), g)
        (gx,) = torch.autograd.grad(up, xd, cut(gu))
        out.append([cut(t.detach()) for t in (activate(y, activation), gx, gw)])
    return out


def check(
    emulated,  # noqa: F811
    case,
    dtype,
    nhwc,
    weight_nhwc=None,
    passes=PASSES,
    activation="none",
    bias=True,
    offset=0,
    tf32=False,
):
    torch.manual_seed(0)
    weight_nhwc = nhwc if weight_nhwc is None else weight_nhwc
    x, w = tensor(case.input, dtype, nhwc, offset), tensor(case.weight, dtype, weight_nhwc, offset)
    b = tensor((1, case.co, 1, 1), dtype).flatten() if bias else None
    with torch.no_grad():
        up = case.resample(x.double())
        shape = tuple(case.convolve(up, w.double()).shape)
    grad = tensor(shape, dtype, nhwc, offset)
    exact, theirs = reference(case, x, w, b, grad, dtype, tf32, activation)
    how = dict(
        shapes=(case.input, case.weight, shape),
        size=tuple(up.shape[2:]),
        mode=case.mode,
        align_corners=case.how.get("align_corners") or False,
        scales=case.scales,
        padding=case.padding,
        groups=case.groups,
        channels_last=nhwc,
        weight_channels_last=weight_nhwc,
        tf32=tf32,
    )
    sums = (math.prod(case.kernel) * case.weight[1], math.prod(case.kernel) * case.co, shape[0] * math.prod(shape[2:]))
    results = (shape, nhwc), (case.input, nhwc), (case.weight, weight_nhwc)
    for which in passes:
        got = tensor(results[which][0], dtype, results[which][1], offset, fill=math.nan)
        given = (
            dict(input=x, weight=w, bias=b, activation=activation, slope=SLOPE),
            dict(weight=w, grad=grad),
            dict(input=x, grad=grad),
        )[which]
        run(emulated, which, got, **given, **how)
        floor = 4 * math.sqrt(sums[which]) * ULP[F64 if dtype == F64 else F32] + 0.5 * ULP[dtype] * (
            dtype in (F16, BF16)
        )
        budget(got, exact[which], theirs[which], ("forward", "input gradient", "weight gradient")[which], floor)


SIZE = {"size": (7, 11)}
CASES = [
    Case((1, 5, 4, 5), 6),
    Case((2, 3, 3, 4), 9, "bicubic"),
    Case((1, 4, 5, 3), 3, "nearest", SIZE),
    Case((1, 4, 5, 3), 3, "nearest-exact", {"scale_factor": (1.5, 2.7)}),
    Case((1, 3, 6, 5), 7, "bilinear", {"size": (7, 11), "align_corners": True}, (2, 3), (0, 2)),
    Case((1, 3, 6, 5), 7, "bicubic", {"scale_factor": (1.4, 2.3), "align_corners": True}, (5, 1), (3, 0)),
    Case((1, 2, 9, 13), 4, "bicubic", {"size": (5, 6)}, (1, 1), (0, 0)),
    Case((2, 2, 1, 1), 4, "bilinear", {"size": (1, 3)}, (1, 3), (2, 4)),
]


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16(emulated, case, nhwc):  # noqa: F811
    check(emulated, case, BF16, nhwc)


TILES = [  # more than one tile of pixels, of channels, of a chunk of them
    Case((1, 40, 9, 5), 72, "bilinear"),
    Case((1, 34, 5, 4), 34, "bicubic", {"scale_factor": (4, 2)}),
    Case((2, 3, 19, 21), 33, "nearest", {"size": (20, 17)}, (2, 2), (1, 0)),
    Case((1, 16, 3, 3), 8, "bicubic", {"scale_factor": 8}),
    Case((1, 8, 4, 5), 8, "bilinear", {"scale_factor": 4}, (7, 7), (3, 3)),
    Case((1, 8, 7, 6), 16, "bilinear", {"scale_factor": 3}, (3, 3), (1, 1), 2),
]


@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles(emulated, case):  # noqa: F811
    check(emulated, case, BF16, TILES.index(case) % 2 == 0)


@pytest.mark.parametrize("tf32", [False, True], ids=["strict", "tf32"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_float32(emulated, nhwc, tf32):  # noqa: F811
    check(emulated, CASES[4], F32, nhwc, tf32=tf32)
    check(emulated, Case((1, 20, 3, 4), 36, "bicubic", kernel=(2, 3)), F32, nhwc, tf32=tf32)
    check(emulated, Case((1, 36, 4, 8), 66, "bilinear", kernel=(1, 1)), F32, nhwc, tf32=tf32, passes=(FORWARD,))


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_small_groups(emulated, dtype, nhwc):  # noqa: F811
    """Without tensor cores, as is float64."""
    check(emulated, Case((2, 6, 4, 5), 6, "bilinear", groups=6), dtype, nhwc)
    check(emulated, Case((1, 6, 3, 5), 9, "bicubic", {"size": (5, 8)}, (2, 3), (1, 0), 3), dtype, nhwc, not nhwc)
    check(emulated, Case((1, 4, 3, 5), 2, "nearest-exact", {"size": (8, 7)}, groups=2), dtype, nhwc)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_float64(emulated, case):  # noqa: F811
    check(emulated, case, F64, False)
    for activation in ("silu", "leaky_relu"):
        check(emulated, case, F64, True, passes=(FORWARD,), activation=activation)


def test_float16(emulated):  # noqa: F811
    for nhwc in (False, True):
        check(emulated, Case((1, 9, 4, 6), 10, "bicubic"), F16, nhwc)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_layouts_and_alignment(emulated, dtype):  # noqa: F811
    """A weight in the other layout, tensors off alignment, whole vectors."""
    for nhwc in (False, True):
        check(emulated, Case((1, 5, 2, 5), 6, kernel=(2, 1)), dtype, nhwc, not nhwc)
        check(emulated, Case((1, 8, 2, 8), 8, kernel=(1, 2)), dtype, nhwc, tf32=True)
        check(emulated, Case((1, 8, 3, 4), 8, kernel=(1, 2)), dtype, nhwc, offset=1, tf32=True)
        check(emulated, Case((1, 6, 2, 6), 6, "bicubic", kernel=(1, 1)), dtype, nhwc, offset=2, tf32=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_activations(emulated, activation):  # noqa: F811
    check(emulated, CASES[0], BF16, activation != "relu", passes=(FORWARD,), activation=activation, bias=False)
    check(emulated, CASES[0], F32, activation == "relu", passes=(FORWARD,), activation=activation)


def test_not_a_number_stays_where_torch_keeps_it(emulated):  # noqa: F811
    """Padded channels, clamped taps and tiles past the edge multiply nothing that is not in the sum."""
    case = Case((1, 3, 5, 18), 4, "bilinear")
    for nhwc in (False, True):
        x, w = tensor(case.input, BF16, nhwc), tensor(case.weight, BF16, nhwc)
        x[0, 1, 4, 17] = math.nan
        want = case.convolve(case.resample(x.double()), w.double())
        got = tensor(tuple(want.shape), BF16, nhwc, fill=0.0)
        how = dict(shapes=(case.input, case.weight, want.shape), size=(10, 36), mode=case.mode, scales=(2.0, 2.0))
        how |= dict(padding=(1, 1), groups=1, channels_last=nhwc, weight_channels_last=nhwc)
        run(emulated, FORWARD, got, input=x, weight=w, **how)
        assert torch.equal(got.isnan(), want.isnan())


def test_refusals(emulated):  # noqa: F811
    def refusal(case, dtype=BF16, which=FORWARD, capability=(9, 0)):
        up = case.resample(torch.empty(case.input, device="meta"))
        shape = case.convolve(up, torch.empty(case.weight, device="meta")).shape
        result = torch.empty(1, dtype=dtype)
        how = dict(padding=case.padding, groups=case.groups, channels_last=False, weight_channels_last=False)
        how |= dict(shapes=(case.input, case.weight, shape), size=up.shape[2:], mode=case.mode)
        with pytest.raises(RuntimeError, match="refused") as error:
            run(emulated, which, result, capability=capability, **how)
        return str(error.value)

    assert "7 pixels" in refusal(Case((1, 4, 4, 4), 4, kernel=(8, 1)))
    assert "below 8.0" in refusal(Case((1, 8, 4, 4), 8), capability=(7, 5))
    assert "2^22" in refusal(Case((1, 8, 1, 2**21), 8))
    shrink = Case((1, 8, 500, 500), 8, "bilinear", {"size": (50, 50)})
    assert "shared memory" in refusal(shrink)
    assert "shared memory" in refusal(shrink, which=WEIGHT_GRADIENT)
