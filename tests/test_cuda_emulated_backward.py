"""The fast gathered backward kernels of csrc/cuda, run on the host (tests/emulate) and compared with autograd.

The emulator fails a run that reads outside the tensors, uses a misaligned vector, stores an element twice or not at
all, reads a cp.async slot too early, or waits at different barriers; the kernels' own host checks (AEUP_EXPECT) fail
one whose window or table is too small.
"""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulate.emulator import emulated, tensor  # noqa: F401

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ULP = {F32: 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}
ROW, PAIR, WINDOW = "backward_row_x2", "backward_pair_x2", "backward_window"
NCHW, NHWC, MATRIX = "backward_stream_nchw", "backward_stream_nhwc", "backward_matrix"


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def nearest_matrix(n_in, n_out, mode, scale, same):
    """[n_out, n_in], torch's CUDA rule: the source index in float32."""
    step = np.float32(1.0) if same else np.float32(1.0 / scale) if scale else np.float32(n_in) / np.float32(n_out)
    at = np.arange(n_out, dtype=np.float32) + np.float32(mode == "nearest-exact") / 2
    out = torch.zeros(n_out, n_in, dtype=F64)
    out[np.arange(n_out), np.minimum(np.floor(at * step).astype(int), n_in - 1)] = 1
    return out


def autograd(g, size, mode, align_corners=False, scale=None):
    """Gradient of F.interpolate for an input [n, c, *size] in g's dtype."""
    x = torch.zeros(*g.shape[:2], *size, dtype=g.dtype, requires_grad=True)
    target = dict(scale_factor=scale) if scale else dict(size=g.shape[2:])
    y = F.interpolate(x, **target, mode=mode, align_corners=None if "nearest" in mode else align_corners)
    assert y.shape == g.shape
    return torch.autograd.grad(y, x, g)[0]


def reference(g, size, mode, align_corners=False, scale=None):
    g = g.double()
    if "nearest" not in mode:
        return autograd(g, size, mode, align_corners, scale)
    same, (sh, sw) = tuple(size) == tuple(g.shape[2:]), scale or (None, None)
    rows = nearest_matrix(size[0], g.shape[2], mode, sh, same)
    return rows.T @ g @ nearest_matrix(size[1], g.shape[3], mode, sw, same)


def edges(t):
    """The outer two rows and columns."""
    inner = torch.ones(t.shape[2:], dtype=torch.bool)
    inner[2:-2, 2:-2] = False
    return t[..., inner]


def check(emulated, g, size, mode, kernel=None, dst_offset=0, align_corners=False, scale=None):  # noqa: F811
    """Run the backward of ``mode`` on g [n, c, oh, ow]; the error budget of the whole and of the edges alone."""
    nhwc = g.stride(1) == 1 and g.shape[1] > 1
    dst = tensor((*g.shape[:2], *size), g.dtype, nhwc, offset=dst_offset, fill=math.nan)
    how = dict(align_corners=align_corners, scale=scale, backward=True)
    refusal = emulated.refusal(g, dst, mode, **how)
    served = emulated.kernel(g, dst, mode, **how)
    if kernel is not None:
        assert (served, refusal) == (kernel, None)
    emulated.run(g, dst, mode, **how)
    want = reference(g, size, mode, align_corners, scale)
    if "nearest" in mode:  # a sum of exact terms: float32 sums, one rounding
        theirs = [want.float().to(g.dtype)]
    else:
        theirs = [autograd(g, size, mode, align_corners, scale), autograd(g.float(), size, mode, align_corners, scale)]
    for part in (lambda t: t, edges):
        largest = part(want).abs().max().item()
        few_ulps = (4 if g.dtype == F32 else 0.5) * ULP[g.dtype] * max(largest, g.abs().max().item())
        for t in theirs:
            budget = 2 * (part(t.to(g.dtype).double()) - part(want)).abs().max().item() + few_ulps
            assert (part(dst.double()) - part(want)).abs().max().item() <= budget
    return dst, served


# mode, dtype, channels-last, shape of the input, size of the output, kernel
CASES = [
    ("nearest", F32, False, (2, 3, 5, 8), (10, 16), ROW),
    ("nearest-exact", BF16, False, (1, 2, 5, 12), (10, 24), ROW),
    ("nearest", F16, False, (1, 3, 4, 6), (8, 12), ROW),
    ("nearest", BF16, False, (2, 2, 3, 7), (6, 14), ROW),
    ("bilinear", F32, False, (2, 3, 9, 8), (18, 16), ROW),
    ("bilinear", F32, False, (1, 2, 40, 10), (80, 20), ROW),
    ("bilinear", BF16, False, (1, 3, 17, 24), (34, 48), ROW),
    ("bilinear", F16, False, (2, 2, 9, 12), (30, 24), ROW),
    ("bilinear", BF16, False, (1, 2, 5, 14), (10, 28), ROW),
    ("bilinear", F16, False, (3, 1, 5, 5), (10, 10), ROW),
    ("bicubic", F32, False, (2, 3, 9, 8), (18, 16), ROW),
    ("bicubic", F32, False, (1, 2, 61, 260), (122, 520), ROW),
    ("bicubic", F32, False, (2, 1, 4, 6), (8, 12), ROW),
    ("bicubic", F32, False, (1, 2, 5, 3), (13, 6), ROW),
    ("bicubic", BF16, False, (1, 3, 40, 16), (80, 32), ROW),
    ("bicubic", F16, False, (2, 2, 7, 12), (14, 24), ROW),
    ("bicubic", BF16, False, (1, 2, 3, 2), (6, 4), ROW),
    ("bicubic", F16, False, (2, 1, 2, 7), (4, 14), ROW),
    ("bicubic", F32, False, (1, 2, 1, 4), (2, 8), ROW),
    ("bicubic", F32, True, (2, 1, 5, 9), (10, 18), ROW),
    ("nearest", F32, True, (2, 3, 5, 6), (10, 12), ROW),
    ("bilinear", F32, True, (1, 3, 9, 14), (18, 28), ROW),
    ("bicubic", F32, True, (2, 3, 11, 6), (22, 12), ROW),
    ("nearest-exact", F16, True, (1, 3, 5, 8), (15, 16), ROW),
    ("bilinear", BF16, True, (2, 3, 9, 12), (18, 24), ROW),
    ("bicubic", F16, True, (1, 3, 30, 8), (60, 16), ROW),
    ("bicubic", BF16, True, (1, 3, 5, 4), (7, 8), ROW),
    ("nearest", F32, True, (2, 4, 5, 7), (10, 14), PAIR),
    ("nearest", BF16, True, (1, 12, 5, 6), (10, 12), PAIR),
    ("bilinear", F32, True, (2, 8, 9, 5), (18, 10), PAIR),
    ("bilinear", BF16, True, (1, 16, 33, 4), (66, 8), PAIR),
    ("bilinear", F16, True, (2, 4, 7, 3), (21, 6), PAIR),
    ("bicubic", F32, True, (1, 4, 35, 6), (70, 12), PAIR),
    ("bicubic", F32, True, (2, 12, 6, 5), (12, 10), PAIR),
    ("bicubic", BF16, True, (1, 8, 24, 7), (48, 14), PAIR),
    ("bicubic", F16, True, (1, 4, 3, 2), (6, 4), PAIR),
    ("bicubic", BF16, True, (2, 8, 2, 3), (3, 6), PAIR),
    ("bicubic", BF16, True, (1, 512, 5, 4), (10, 8), PAIR),
    ("bicubic", F16, True, (1, 516, 2, 8), (4, 16), PAIR),
    ("nearest", F32, True, (2, 4, 7, 9), (16, 25), WINDOW),
    ("nearest", BF16, True, (1, 8, 7, 9), (16, 36), WINDOW),
    ("nearest-exact", F16, True, (1, 12, 5, 9), (9, 13), WINDOW),
    ("bilinear", F32, True, (2, 4, 7, 9), (16, 25), WINDOW),
    ("bilinear", F32, True, (1, 8, 6, 5), (18, 15), WINDOW),
    ("bilinear", BF16, True, (1, 16, 7, 9), (16, 25), WINDOW),
    ("bilinear", F16, True, (2, 4, 7, 8), (11, 12), WINDOW),
    ("bicubic", F32, True, (2, 4, 7, 9), (16, 25), WINDOW),
    ("bicubic", F32, True, (1, 12, 30, 10), (44, 15), WINDOW),
    ("bicubic", BF16, True, (1, 8, 17, 12), (39, 33), WINDOW),
    ("bicubic", F16, True, (1, 4, 5, 6), (15, 18), WINDOW),
    ("bicubic", F32, True, (1, 4, 5, 20), (5, 20), WINDOW),
    ("nearest", F32, False, (3, 2, 7, 9), (16, 25), NCHW),
    ("nearest", BF16, False, (1, 3, 4, 6), (32, 48), NCHW),
    ("nearest-exact", F16, False, (1, 2, 5, 9), (12, 31), NCHW),
    ("bilinear", F32, False, (3, 2, 7, 9), (16, 25), NCHW),
    ("bilinear", F32, False, (1, 2, 6, 7), (48, 56), NCHW),
    ("bilinear", BF16, False, (2, 5, 7, 12), (16, 34), NCHW),
    ("bilinear", F16, False, (1, 2, 5, 20), (7, 21), NCHW),
    ("bicubic", F32, False, (3, 2, 7, 9), (16, 25), NCHW),
    ("bicubic", F32, False, (1, 2, 5, 12), (20, 48), NCHW),
    ("bicubic", F32, False, (1, 2, 6, 10), (48, 80), NCHW),
    ("bicubic", BF16, False, (2, 5, 61, 12), (140, 33), NCHW),
    ("bicubic", F16, False, (1, 3, 2, 9), (36, 176), NCHW),
    ("bicubic", BF16, False, (1, 1, 3, 3), (17, 41), NCHW),
    ("bicubic", F32, False, (1, 1, 1, 1), (3, 4), NCHW),
    ("bicubic", F32, False, (1, 1, 3, 450), (6, 1210), NCHW),
    ("bilinear", BF16, False, (1, 1, 2, 1100), (4, 1101), NCHW),
    ("bicubic", F32, False, (1, 1, 2, 300), (2, 1200), NCHW),
    ("nearest", BF16, False, (1, 5, 21, 12), (47, 32), MATRIX),
    ("nearest-exact", F16, False, (1, 5, 21, 13), (47, 32), MATRIX),
    ("bilinear", BF16, False, (3, 2, 7, 9), (16, 24), MATRIX),
    ("bilinear", F16, False, (1, 2, 40, 65), (41, 72), MATRIX),
    ("bicubic", BF16, False, (2, 3, 56, 9), (129, 24), MATRIX),
    ("bicubic", F16, False, (1, 3, 4, 9), (32, 72), MATRIX),
    ("bicubic", BF16, False, (1, 2, 9, 120), (11, 336), MATRIX),
    ("bicubic", F16, False, (1, 1, 1, 1), (3, 8), MATRIX),
    ("bicubic", BF16, False, (1, 1, 17, 40), (136, 320), MATRIX),
    ("nearest", F32, True, (2, 5, 7, 9), (16, 25), NHWC),
    ("nearest", BF16, True, (1, 21, 4, 8), (32, 64), NHWC),
    ("bilinear", F32, True, (1, 21, 4, 8), (32, 64), NHWC),
    ("bilinear", BF16, True, (2, 5, 7, 6), (14, 12), NHWC),
    ("bilinear", F16, True, (2, 3, 7, 9), (16, 25), NHWC),
    ("bicubic", F32, True, (1, 21, 4, 18), (16, 144), NHWC),
    ("bicubic", F32, True, (2, 2, 7, 9), (16, 25), NHWC),
    ("bicubic", BF16, True, (1, 21, 5, 9), (40, 72), NHWC),
    ("bicubic", F16, True, (1, 64, 3, 7), (12, 28), NHWC),
    ("bicubic", F32, True, (1, 40, 3, 7), (15, 35), NHWC),
    ("bicubic", F32, True, (1, 2, 1, 34), (1, 1156), NHWC),
    ("bilinear", F32, True, (1, 200, 3, 5), (5, 7), WINDOW),
    ("bilinear", F32, True, (1, 201, 3, 5), (5, 7), NHWC),
    ("bicubic", BF16, True, (1, 261, 2, 3), (5, 7), NHWC),
]


@pytest.mark.parametrize("mode,dtype,nhwc,shape,size,kernel", CASES)
def test_gradient(emulated, mode, dtype, nhwc, shape, size, kernel):  # noqa: F811
    torch.manual_seed(0)
    g = tensor((*shape[:2], *size), dtype, nhwc)
    first, _ = check(emulated, g, shape[2:], mode, kernel)
    again, _ = check(emulated, g, shape[2:], mode, kernel)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "mode,dtype,nhwc,shape,size,kernel", [c for c in CASES if c[0] in ("bilinear", "bicubic")][::3]
)
def test_align_corners(emulated, mode, dtype, nhwc, shape, size, kernel):  # noqa: F811
    if 1 in shape[2:]:
        pytest.skip("an axis of one pixel has scale 0")
    torch.manual_seed(1)
    g = tensor((*shape[:2], *size), dtype, nhwc)
    served = check(emulated, g, shape[2:], mode, align_corners=True)[1]
    assert served in (WINDOW, NCHW, NHWC, MATRIX)


# src and dst this many elements past a 16-byte address, and the kernel that is left
OFFSETS = [
    ("bicubic", F32, False, (2, 2, 5, 8), (10, 16), 4, 0, ROW),
    ("bicubic", F32, False, (2, 2, 5, 8), (10, 16), 2, 0, ROW),
    ("bicubic", F32, False, (2, 2, 5, 8), (10, 16), 1, 0, NCHW),
    ("bicubic", F32, False, (2, 2, 5, 8), (10, 16), 0, 1, ROW),
    ("bilinear", BF16, False, (2, 2, 5, 8), (10, 16), 4, 2, ROW),
    ("bilinear", BF16, False, (2, 2, 5, 8), (10, 16), 2, 1, ROW),
    ("bilinear", BF16, False, (2, 2, 5, 8), (10, 16), 1, 0, NCHW),
    ("bicubic", F16, False, (1, 2, 5, 9), (13, 20), 4, 3, NCHW),
    ("bicubic", F16, False, (1, 2, 5, 9), (13, 20), 2, 0, NCHW),
    ("nearest", BF16, True, (1, 3, 5, 8), (10, 16), 4, 0, NHWC),
    ("bilinear", F32, True, (1, 3, 5, 8), (10, 16), 2, 1, NHWC),
    ("bilinear", F32, True, (1, 8, 5, 7), (10, 14), 4, 8, PAIR),
    ("bilinear", F32, True, (1, 8, 5, 7), (10, 14), 2, 0, NHWC),
    ("bilinear", BF16, True, (1, 8, 5, 7), (10, 14), 4, 0, PAIR),
    ("bicubic", BF16, True, (1, 8, 5, 7), (10, 14), 3, 3, NHWC),
    ("bicubic", BF16, True, (1, 64, 5, 7), (20, 28), 4, 1, NHWC),
]


@pytest.mark.parametrize("mode,dtype,nhwc,shape,size,src,dst,kernel", OFFSETS)
def test_misaligned(emulated, mode, dtype, nhwc, shape, size, src, dst, kernel):  # noqa: F811
    torch.manual_seed(2)
    g = tensor((*shape[:2], *size), dtype, nhwc, offset=src)
    check(emulated, g, shape[2:], mode, kernel, dst_offset=dst)


def random_case(rng):
    mode = rng.choice(["nearest", "nearest-exact", "bilinear", "bicubic"])
    nhwc = rng.random() < 0.5
    c = rng.choice([2, 3, 4, 5, 8, 16, 24, 40] if nhwc else [1, 2, 5])
    size = rng.choice([1, 2, 3, 5, 8, 13]), rng.choice([1, 2, 3, 4, 6, 7, 8, 12, 16, 33])
    kind = rng.random()
    sw = 2 if kind < 0.4 else rng.choice([3, 4, 8]) if kind < 0.6 else rng.uniform(1.1, 6)
    factors = (float(rng.choice([2, 3, rng.uniform(1.1, 3)])), float(sw))
    out = [int(i * s) for i, s in zip(size, factors, strict=True)]
    given = rng.random() < 0.3 and out[0] != size[0] and out[1] != size[1]  # else torch's CPU and CUDA rules differ
    align = "nearest" not in mode and not given and min(size) > 1 and rng.random() < 0.2
    return mode, nhwc, (rng.choice([1, 2, 3]), c, *size), out, factors if given else None, align


def test_random_problems(emulated):  # noqa: F811
    rng = random.Random(3)
    torch.manual_seed(3)
    served = set()
    for _ in range(250):
        mode, nhwc, shape, size, scale, align = random_case(rng)
        if shape[0] * shape[1] * size[0] * size[1] > 30_000:
            continue
        g = tensor((*shape[:2], *size), rng.choice([F32, F16, BF16]), nhwc, offset=rng.choice([0, 0, 0, 1, 2, 4, 8]))
        try:
            _, kernel = check(
                emulated, g, shape[2:], mode, dst_offset=rng.choice([0, 0, 1, 2]), align_corners=align, scale=scale
            )
        except Exception as e:
            raise AssertionError(f"{mode} {g.dtype} {nhwc=} {shape} {size} {scale=} {align=}") from e
        served.add(kernel)
    assert served >= {ROW, PAIR, WINDOW, NCHW, NHWC, MATRIX}


@pytest.mark.parametrize("mode,dtype,nhwc,shape,size,kernel", [c for c in CASES if c[1] == F32])
def test_inf_and_nan_stay_where_torch_leaves_them(emulated, mode, dtype, nhwc, shape, size, kernel):  # noqa: F811
    torch.manual_seed(4)
    g = tensor((*shape[:2], *size), dtype, nhwc)
    clean, _ = check(emulated, g, shape[2:], mode, kernel)
    for value in (math.inf, math.nan):
        for row, column in ((0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, size[1] - 1), (size[0] // 3, 1)):
            bad = g.clone(memory_format=torch.preserve_format)
            bad[0, 0, row, column] = value
            if bad.stride() != g.stride():
                continue
            dst = tensor((*shape[:2], *shape[2:]), dtype, nhwc, fill=math.nan)
            emulated.run(bad, dst, mode, backward=True)
            theirs = autograd(bad, shape[2:], mode)
            finite = theirs.isfinite()
            assert torch.equal(dst[finite], clean[finite])
            assert dst.isfinite().logical_not().any() or finite.all()


@pytest.mark.parametrize(
    "mode,dtype,nhwc,shape,size,kernel", [c for c in CASES if c[-1] == MATRIX and math.prod(c[4]) < 5000]
)
def test_inf_and_nan_beside_zeros_of_a_matrix(emulated, mode, dtype, nhwc, shape, size, kernel):  # noqa: F811
    """A product of matrices multiplies an Inf by weights that are zero: those results are computed again."""
    torch.manual_seed(7)
    g = tensor((*shape[:2], *size), dtype)
    want = reference(g, shape[2:], mode)
    bound = ULP[dtype] * max(want.abs().max().item(), g.abs().max().item())
    for value in (math.inf, math.nan):
        for row, column in ((0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, size[1] - 1), (size[0] // 3, 1)):
            bad, one = g.clone(), torch.zeros_like(g, dtype=F32)
            bad[0, 0, row, column], one[0, 0, row, column] = value, 1
            reached = (reference if "nearest" in mode else autograd)(one, shape[2:], mode) != 0
            dst = emulated.run(bad, tensor(shape, dtype, fill=math.nan), mode, backward=True)
            assert torch.equal(dst.isfinite(), ~reached)
            assert ((dst.double() - want).abs()[~reached] <= bound).all()


@pytest.mark.parametrize("mode,dtype,nhwc,shape,size,kernel", [c for c in CASES if c[1] == F32][::2])
def test_adjoint_of_the_forward(emulated, mode, dtype, nhwc, shape, size, kernel):  # noqa: F811
    """<A x, g> = <x, A' g> for the emulated forward A and backward A'."""
    torch.manual_seed(5)
    x, g = tensor(shape, dtype, nhwc), tensor((*shape[:2], *size), dtype, nhwc)
    y = emulated.run(x, tensor(g.shape, dtype, nhwc, fill=math.nan), mode)
    d = emulated.run(g, tensor(shape, dtype, nhwc, fill=math.nan), mode, backward=True)
    left, right = (y.double() * g.double()).sum().item(), (x.double() * d.double()).sum().item()
    size_of = (y.double() * g.double()).abs().sum().item()
    assert abs(left - right) <= 1e-5 * size_of * max(1, max(size) / 100)


@pytest.mark.parametrize(
    "nhwc,c,kernel", [(False, 3, ROW), (True, 8, PAIR), (True, 12, WINDOW), (False, 5, NCHW), (True, 5, NHWC)]
)
def test_more_planes_than_a_launch_takes(emulated, nhwc, c, kernel):  # noqa: F811
    torch.manual_seed(6)
    size = (6, 12) if kernel in (ROW, PAIR) else (7, 15)
    g = tensor((40, c, *size), F32, nhwc)
    whole, _ = check(emulated, g, (3, 6), "bicubic", kernel)
    emulated.lib.aeup_backward_limit(10)
    try:
        before = emulated.launches()
        parts, _ = check(emulated, g, (3, 6), "bicubic", kernel)
        assert emulated.launches() - before > 1
    finally:
        emulated.lib.aeup_backward_limit(0)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_past_2_31_elements_on_tensor_cores(emulated):  # noqa: F811
    """Only the last corner of each plane is ever touched, so that they take little memory."""
    torch.manual_seed(8)
    size, out = (14_000, 12_001), (32_768, 32_768)
    g, dst = torch.empty(3, 1, *out, dtype=BF16), torch.empty(3, 1, *size, dtype=BF16)
    corner = g[:, :, -64:, -400:]
    corner.copy_(torch.randn(corner.shape))
    assert g.numel() > 2**31 and emulated.kernel(g, dst, "nearest", backward=True) == MATRIX
    emulated.run_end(g, dst, "nearest", 1, backward=True)
    matrices = []
    for n, full, kept in ((size[0], out[0], 64), (size[1], out[1], 400)):
        at = np.arange(full - kept, full, dtype=np.float32) * (np.float32(n) / np.float32(full))
        matrices.append(F.one_hot(torch.from_numpy(np.floor(at).astype(int)) - n + 4 + kept, kept + 4).double()[:, -4:])
    want = matrices[0].T @ corner.double() @ matrices[1]
    assert (dst[:, :, -4:, -4:].double() - want).abs().max() <= ULP[BF16] * want.abs().max()


REFUSED = [
    (dict(mode="bicubic"), F64, (4, 4), (8, 8), "float32, float16 and bfloat16"),
    (dict(mode="bicubic", antialias=True), F32, (4, 4), (8, 8), "antialias"),
    (dict(mode="bilinear"), F32, (8, 8), (4, 16), "enlargement"),
    (dict(mode="bilinear", align_corners=True), F32, (1, 4), (2, 8), "scale 0"),
    (dict(mode="bilinear", scale=(0.5, 2.0)), F32, (4, 4), (8, 8), "scale factor"),
    (dict(mode="nearest"), F32, (2, 2), (4, 300), "more than 64"),
]


@pytest.mark.parametrize("how,dtype,size,out,why", REFUSED)
def test_refusals_give_the_reason(emulated, how, dtype, size, out, why):  # noqa: F811
    g, dst = tensor((1, 2, *out), dtype), tensor((1, 2, *size), dtype, fill=math.nan)
    assert why in emulated.refusal(g, dst, **how, backward=True)
    assert emulated.kernel(g, dst, **how, backward=True).startswith("generic")


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty(emulated, shape):  # noqa: F811
    before = emulated.launches()
    emulated.run(torch.empty(*shape[:2], 8, 8), torch.empty(shape), "bicubic", backward=True)
    assert emulated.launches() == before
