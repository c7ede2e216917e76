"""Nearest upsampling and a convolution as one transposed convolution with folded weights: csrc/fold.h and the CUDA
kernels on it, run on the host (tests/emulate) against float64 torch and a matrix written out from the definition."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from emulate.emulator import emulated  # noqa: F401
from emulate.emulator_convolution import FORWARD
from emulate.emulator_fold import fold_map, pack, run
from test_conv_emulated import BF16, F16, F32, F64, LAYOUTS, check

from aeup import _native


@pytest.mark.parametrize("scale", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
def test_map_is_that_of_the_definition(emulated, kernel, scale):  # noqa: F811
    for padding, size in itertools.product(range(kernel + 3), (1, 2, 5)):
        out = size * scale + 2 * padding - kernel + 1
        if out < 1:
            continue
        taps, padded, of_folded, of_kernel = fold_map(emulated, kernel, scale, padding)
        want = torch.zeros(out, size, kernel)  # how often output o takes input i by kernel index j
        for o, j in itertools.product(range(out), range(kernel)):
            u = o + j - padding
            if 0 <= u < size * scale:
                want[o, u // scale, j] += 1
        got, back = torch.zeros_like(want), torch.zeros_like(want)
        for o, i in itertools.product(range(out), range(size)):
            t = o + padded - scale * i
            if 0 <= t < taps:
                first, last = of_folded[t]
                got[o, i, first : max(first, last + 1)] += 1
                for j, (low, high) in enumerate(of_kernel):
                    back[o, i, j] += low <= t <= high
        assert padded >= 0 and out == (size - 1) * scale - 2 * padded + taps
        assert torch.equal(got, want) and torch.equal(back, want)


@dataclass(frozen=True)
class Case:
    """input [n, ci, h, w]; weight [co, ci / groups, *kernel]; the rest per axis."""

    input: tuple
    co: int
    kernel: tuple = (3, 3)
    scale: tuple = (2, 2)
    padding: tuple = (1, 1)
    groups: int = 1

    def __str__(self):
        parts = ("".join(map(str, v)) for v in (self.kernel, self.scale, self.padding))
        return "-".join(("x".join(map(str, self.input)), str(self.co), *parts, f"g{self.groups}"))

    @property
    def weight(self):
        return (self.co, self.input[1] // self.groups, *self.kernel)

    @property
    def how(self):
        return dict(scale=self.scale, padding=self.padding, groups=self.groups)

    def forward(self, x, w, bias=None):
        up = x.repeat_interleave(self.scale[0], 2).repeat_interleave(self.scale[1], 3)
        return F.conv2d(up, w, bias, 1, self.padding, 1, self.groups)

    def folded(self, w):
        """[ci, co / groups, folded kernel], from the definition: tap t = r - j + k - 1 + margin, for all r and j."""
        maps, paddings = [], []
        for k, s, p in zip(self.kernel, self.scale, self.padding, strict=True):
            margin = max(p - (k - 1), 0)
            m = torch.zeros(k + s - 1 + 2 * margin, k, dtype=w.dtype)
            for r, j in itertools.product(range(s), range(k)):
                m[r - j + k - 1 + margin, j] += 1
            maps.append(m)
            paddings.append(k - 1 - p + margin)
        grouped = w.unflatten(0, (self.groups, -1))  # [groups, co / groups, ci / groups, ...]
        return torch.einsum("gcihw,yh,xw->gicyx", grouped, *maps).flatten(0, 1), paddings

    def transposed(self, x, folded, paddings, bias=None):
        return F.conv_transpose2d(x, folded, bias, self.scale, paddings, 0, self.groups)

    def results(self, x, w, bias, grad, dtype):
        """In float64: the output, the input's gradient and the weight's; the sums of weights are rounded to the dtype
        before anything is multiplied."""
        y = self.forward(x, w, bias)
        (gw,) = torch.autograd.grad(y, w, grad)
        folded, paddings = self.folded(w.detach())
        torch.testing.assert_close(self.transposed(x, folded, paddings, bias), y)
        y = self.transposed(x, folded.to(dtype).double(), paddings, bias)
        return y.detach(), *torch.autograd.grad(y, x, grad), gw

    def terms(self, output):
        """The products in a sum of each of them."""
        taps, (n, _, h, w) = math.prod(self.kernel), output
        return taps * self.input[1], taps * math.prod(self.scale) * self.co, n * h * w

    run = staticmethod(run)


GENERIC = [
    Case((2, 8, 5, 7), 12),
    Case((1, 33, 3, 4), 40, (5, 3), (2, 3), (2, 1)),
    Case((3, 5, 4, 3), 70, (2, 2), (2, 2), (0, 1)),
    Case((1, 3, 6, 5), 7, (3, 5), (1, 3), (2, 6)),
    Case((1, 10, 2, 4), 9, (1, 4), (4, 2), (0, 2)),
    Case((2, 9, 1, 1), 33, (3, 3), (4, 4), (1, 1)),
    Case((1, 32, 3, 5), 32, (3, 3), (2, 1), (1, 1), 2),
    Case((1, 6, 5, 6), 6, groups=6),
    Case((1, 6, 2, 3), 12, (3, 3), (3, 2), (4, 0), 3),
    Case((1, 4, 7, 150), 3, (5, 5), (2, 2), (2, 2)),
    Case((2, 24, 13, 21), 36),
    Case((1, 12, 21, 20), 6, groups=2),
]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", GENERIC, ids=str)
def test_generic(emulated, case, layout):  # noqa: F811
    check(emulated, case, F32, *LAYOUTS[layout], "generic")


@pytest.mark.parametrize("layout", ["mixed", "mixed2"])
def test_generic_layouts_of_the_weight(emulated, layout):  # noqa: F811
    for case in (GENERIC[0], GENERIC[6]):
        check(emulated, case, BF16, *LAYOUTS[layout], "generic")


@pytest.mark.parametrize("dtype", [F64, F16, BF16], ids=str)
@pytest.mark.parametrize("case", [GENERIC[1], GENERIC[3], GENERIC[7], GENERIC[8]], ids=str)
def test_generic_dtypes(emulated, case, dtype):  # noqa: F811
    for layout in ("nchw", "nhwc"):
        check(emulated, case, dtype, *LAYOUTS[layout], "generic", activation="silu", offset=1)


def test_generic_kernels_larger_than_shared_memory(emulated):  # noqa: F811
    """Where a tile of weights, or of their gradient's sums, does not fit, both are read from global memory."""
    for layout in LAYOUTS:
        check(emulated, Case((1, 2, 1, 2), 3, (20, 21), (2, 2), (10, 10)), F32, *LAYOUTS[layout], "generic")
    for layout in ("nchw", "nhwc"):
        check(emulated, Case((1, 1, 1, 2), 2, (120, 110), (2, 1), (60, 55)), BF16, *LAYOUTS[layout], "generic", (2,))


FEW = [
    Case((1, 32, 6, 8), 3),
    Case((1, 40, 9, 36), 1),
    Case((1, 24, 3, 65), 4, (2, 2), (2, 2), (0, 0)),
    Case((3, 8, 7, 5), 2, (2, 3), (2, 2), (1, 1)),
    Case((1, 7, 4, 6), 3, (1, 1), (2, 2), (0, 0)),
    Case((1, 72, 3, 4), 3),
]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few(emulated, case, dtype):  # noqa: F811
    for layout in ("nchw", "nhwc") if dtype == F32 else LAYOUTS:
        check(emulated, case, dtype, *LAYOUTS[layout], "few", activation="relu")


def test_few_in_tf32(emulated):  # noqa: F811
    check(emulated, FEW[0], F32, True, False, "few", tf32=True)


@pytest.mark.parametrize(
    "case, why",
    [
        (Case((1, 8, 4, 4), 3, padding=(0, 1)), "a kernel outside"),
        (Case((1, 8, 4, 4), 3, scale=(2, 3)), "a stride other than 2"),
    ],
    ids=str,
)
def test_few_refuses(emulated, case, why):  # noqa: F811
    with pytest.raises(RuntimeError, match=f"refused: few: {why}"):
        check(emulated, case, F32, False, False, "few", (FORWARD,))


PACKED = [  # ci, co, kernel, scale, padding, input pixels
    (16, 32, (3, 3), (2, 2), (1, 1), (4, 4)),
    (33, 50, (3, 3), (2, 2), (0, 2), (4, 4)),
    (17, 19, (1, 3), (3, 2), (0, 1), (4, 4)),
    (70, 33, (3, 1), (2, 4), (3, 0), (4, 4)),
    (40, 130, (5, 2), (1, 3), (2, 1), (4, 4)),
    (18, 36, (15, 15), (2, 2), (7, 7), (4, 4)),
    (17, 21, (3, 3), (2, 3), (1, 0), (1, 4)),
    (34, 17, (2, 3), (2, 2), (1, 1), (1, 1)),
    (72, 40, (3, 3), (2, 2), (1, 1), (4, 4)),
    (24, 33, (3, 3), (2, 2), (2, 1), (1, 4)),
    (8, 136, (2, 2), (2, 2), (0, 0), (4, 4)),
]


def packed_sizes(kind, ci, co, taps, phases, strict):
    """Elements of a packed weight; the phases are columns in kinds 1 and 3."""
    if kind == 0:
        return taps * ci * math.ceil(co / 8) * 8
    if kind == 1:
        return taps // phases * ci * math.ceil(phases * co / 8) * 8
    rows, summed = (ci, co) if kind == 4 else (co, ci)
    return taps * rows * math.ceil(summed / 32) * 32 * (2 if strict else 1)


def folded_taps(kernel, scale, padding):
    return [k + s - 1 + 2 * max(p - (k - 1), 0) for k, s, p in zip(kernel, scale, padding, strict=True)]


def strides(kernel, scale, padding, pixels):
    taps = folded_taps(kernel, scale, padding)
    return [k if i == 1 else s for k, s, i in zip(taps, scale, pixels, strict=True)]


def packs(kind, ci, co, kernel, scale, padding, pixels):
    """Phases are columns only where all have as many taps, and of 16-bit weights only for few channels."""
    taps, steps = folded_taps(kernel, scale, padding), strides(kernel, scale, padding, pixels)
    return kind not in (1, 3) or (all(k % s == 0 for k, s in zip(taps, steps, strict=True)) and (kind == 3 or co < 64))


@pytest.mark.parametrize("shape, kind", [(s, k) for s in PACKED for k in range(5) if packs(k, *s)], ids=str)
def test_folded_while_packed(emulated, shape, kind):  # noqa: F811
    """Packing a convolution's weight folds it: the same bits as packing the transposed convolution's weight. Sums of
    these weights are exact in every dtype. Kinds: taps, phases as columns; float32: forward, with phases, gradient."""
    ci, co, kernel, scale, padding, pixels = shape
    dtypes = (F16, BF16) if kind < 2 else (F32,)
    taps, phases = math.prod(folded_taps(kernel, scale, padding)), math.prod(strides(kernel, scale, padding, pixels))
    torch.manual_seed(0)
    case = Case((1, ci, 4, 4), co, kernel, scale, padding)
    how = dict(pixels=pixels, ci=ci, co=co, kernel=kernel, scale=scale, padding=padding)
    for dtype, strict in itertools.product(dtypes, (False, True) if kind >= 2 else (False,)):
        w = torch.randint(-28, 29, case.weight) if kind < 2 else torch.randint(-(2**19), 2**19, case.weight) / 2**16
        w = w.double()
        folded = case.folded(w)[0].to(dtype)
        assert torch.equal(folded.double(), case.folded(w)[0]), "the sums must be exact here"
        elements = packed_sizes(kind, ci, co, taps, phases, strict)
        want = pack(
            emulated, kind, folded.contiguous(), elements, folded=False, channels_last=False, strict=strict, **how
        )
        assert torch.isfinite(want).all()
        for last in (False, True):
            given = w.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            got = pack(emulated, kind, given, elements, folded=True, channels_last=last, strict=strict, **how)
            assert torch.equal(got, want)


@pytest.mark.skipif(not _native.cuda, reason="the extension is built without CUDA")
def test_operators_describe_and_choose():
    """On meta tensors, as aeup.explain asks: which family serves on an H100, and what is refused before it."""

    def kernel(x, w, dtype=BF16, scale=(2, 2), padding=(1, 1), groups=1, which=0, tf32=False, major=9):
        x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in (x, w))
        return torch.ops.aeup_native.upsample_conv2d_kernel(x, w, *scale, *padding, groups, which, tf32, major, 0)

    x, w = (2, 64, 17, 19), (40, 64, 3, 3)
    assert kernel(x, w) == kernel(x, w, which=2) == "hopper"
    assert kernel(x, w, F32).split(" ")[0] == kernel(x, w, F32, which=2).split(" ")[0] == "hopper_float"
    assert kernel(x, (3, 64, 3, 3)).split(" ")[0] == "few"
    assert "hopper: made for compute capability 9" in kernel(x, w, major=8)
    assert kernel(x, (40, 32, 3, 3), groups=2).split(" ")[0] == "generic"
    for how, message in {
        "channels": (dict(w=(40, 63, 3, 3)), "weight has 63 input channels, the input 64"),
        "groups": (dict(w=(40, 21, 3, 3), groups=3), "weight has 63 input channels"),
        "odd groups": (dict(x=(1, 9, 4, 4), w=(40, 3, 3, 3), groups=3), "groups does not divide the channels"),
        "scale": (dict(scale=(0, 2)), "scale, groups and kernel size must be 1 to 2.24, got 0"),
        "padding": (dict(padding=(1, -1)), "padding must be 0 to 2.24, got -1"),
        "size": (dict(w=(40, 64, 60, 3)), "spatial sizes must be 1 to 2.30 - 1"),
        "kernel": (dict(scale=(5000, 5000)), "the folded kernel has more than 2.24 elements"),
    }.values():
        with pytest.raises(RuntimeError, match=f"aeup.upsample_conv2d: .*{message}"):
            kernel(**{"x": x, "w": w, **how})
