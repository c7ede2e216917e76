"""The CUDA kernels' arithmetic without a GPU: csrc/cuda runs on the host (tests/emulate) and is compared with torch.

The emulator itself fails a run that reads outside the tensors, uses a misaligned vector, stores an element twice or
not at all, or waits at different barriers.
"""

import math

import numpy as np
import pytest
import torch
from emulate.emulator import emulated, tensor  # noqa: F401

F32, F64, F16, BF16, U8 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8
ULP = {F32: 2.0**-23, F64: 2.0**-52, F16: 2.0**-10, BF16: 2.0**-7}


def interpolate64(x, size, mode, align_corners=False, antialias=False, scale=None):
    """F.interpolate in float64 through the ATen op, which takes size and scales at once."""
    h, w = scale or (None, None)
    op = {"bilinear": "upsample_bilinear2d", "bicubic": "upsample_bicubic2d"}[mode]
    op = getattr(torch.ops.aten, f"_{op}_aa" if antialias else op).default
    return op(x, list(size), align_corners, h, w)


def check(emulated, x, size, mode, kernel=None, align_corners=False, antialias=False, scale=None):  # noqa: F811
    nhwc = x.stride(1) == 1 and x.shape[1] > 1
    dst = tensor((*x.shape[:2], *size), x.dtype, nhwc, offset=x.storage_offset(), fill=math.nan)
    how = dict(align_corners=align_corners, antialias=antialias, scale=scale)
    if kernel is not None:
        assert emulated.kernel(x, dst, mode, **how) == kernel
    emulated.run(x, dst, mode, **how)
    want = interpolate64(x.double(), size, mode, **how)
    compute = F32 if antialias and x.dtype in (F16, BF16) else x.dtype  # torch's CPU has no antialias in 16 bits
    torch_error = (interpolate64(x.to(compute), size, mode, **how).to(x.dtype).double() - want).abs().max().item()
    error = (dst.double() - want).abs().max().item()
    few_ulps = {F32: 4, F64: 32}.get(x.dtype, 0.5) * ULP[x.dtype] * x.double().abs().max().item()
    assert error <= 2 * torch_error + few_ulps
    return dst


# mode, dtype, channels-last, input shape, output size, kernel
LINEAR = [
    ("bilinear", F32, False, (2, 3, 9, 8), (18, 16), "polyphase_x2"),
    ("bicubic", F32, False, (1, 2, 17, 70), (34, 140), "polyphase_x2"),
    ("bilinear", BF16, False, (1, 3, 5, 12), (10, 24), "polyphase_x2"),
    ("bicubic", F16, False, (2, 1, 13, 4), (26, 8), "polyphase_x2"),
    ("bicubic", BF16, False, (1, 5, 7, 20), (13, 40), "polyphase_x2"),
    ("bilinear", F32, False, (1, 2, 7, 3), (28, 12), "polyphase_x4"),
    ("bicubic", BF16, False, (1, 2, 7, 6), (19, 24), "polyphase_x4"),
    ("bicubic", F32, False, (2, 2, 5, 3), (20, 12), "polyphase_x4"),
    ("bicubic", F32, False, (1, 2, 6, 5), (48, 40), "polyphase_x8"),
    ("bilinear", BF16, False, (1, 3, 4, 2), (32, 16), "polyphase_x8"),
    ("bicubic", F16, False, (1, 3, 4, 2), (32, 16), "polyphase_x8"),
    ("bilinear", F32, True, (1, 3, 5, 64), (10, 128), "rgb_x2"),
    ("bicubic", BF16, True, (2, 3, 9, 64), (18, 128), "rgb_x2"),
    ("bicubic", F32, True, (1, 3, 11, 64), (40, 128), "rgb_x2"),
    ("bilinear", F32, True, (2, 8, 5, 7), (11, 9), "channels_16"),
    ("bicubic", F32, True, (1, 12, 21, 2), (47, 5), "channels_16"),
    ("bicubic", BF16, True, (1, 16, 9, 3), (18, 6), "channels_16"),
    ("bilinear", F16, True, (2, 8, 6, 1), (3, 4), "channels_16"),
    ("bilinear", F32, True, (1, 2, 6, 5), (9, 13), "channels_8"),
    ("bicubic", BF16, True, (1, 4, 6, 5), (9, 13), "channels_8"),
    ("bicubic", F64, True, (1, 4, 6, 5), (9, 13), "channels_16"),
    ("bilinear", F32, False, (2, 3, 6, 7), (13, 20), "window_4"),
    ("bicubic", F32, False, (1, 3, 9, 11), (21, 28), "window_4"),
    ("bicubic", BF16, False, (1, 2, 30, 13), (71, 36), "window_4"),
    ("bilinear", BF16, False, (2, 2, 6, 13), (14, 40), "window_8"),
    ("bilinear", F16, False, (1, 2, 6, 12), (14, 40), "window_8"),
    ("bilinear", BF16, False, (1, 2, 6, 25), (14, 48), "window_4"),
    ("bilinear", F32, False, (2, 2, 6, 7), (6, 8), "gather_4"),
    ("bicubic", F32, False, (1, 2, 9, 16), (7, 12), "gather_4"),
    ("bicubic", BF16, False, (1, 2, 9, 15), (17, 16), "gather_4"),
    ("bilinear", F16, True, (1, 5, 4, 6), (9, 8), "gather_8"),
    ("bilinear", F32, True, (2, 3, 4, 6), (9, 8), "gather_4"),
    ("bicubic", BF16, True, (2, 3, 4, 6), (9, 8), "gather_4"),
    ("bicubic", F32, True, (1, 3, 7, 6), (5, 11), "gather_1"),
    ("bilinear", F32, False, (2, 2, 5, 7), (9, 13), "gather_1"),
    ("bilinear", BF16, False, (2, 2, 5, 7), (9, 13), "gather_1"),
    ("bicubic", F16, False, (2, 2, 5, 7), (9, 13), "gather_1"),
    ("bilinear", F64, False, (2, 2, 5, 7), (9, 13), "gather_1"),
    ("bicubic", F64, False, (1, 2, 6, 5), (12, 10), "gather_2"),
    ("bilinear", F32, False, (1, 2, 9, 7), (2, 3), "generic_direct"),
    ("bicubic", F32, False, (1, 2, 3, 3), (7, 5), "generic_direct"),
    ("bicubic", F64, False, (1, 2, 2, 1), (3, 2), "generic_direct"),
    ("bilinear", BF16, True, (1, 3, 3, 1), (7, 5), "generic_direct"),
    ("bicubic", F16, False, (1, 1, 2, 2), (1, 1), "generic_direct"),
]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "offset"])
@pytest.mark.parametrize(
    "case", LINEAR, ids=lambda c: f"{c[5]}-{c[0]}-{str(c[1])[6:]}-{'x'.join(map(str, c[3] + c[4]))}"
)
def test_linear(emulated, case, offset):  # noqa: F811
    mode, dtype, nhwc, shape, size, kernel = case
    torch.manual_seed(0)
    x = tensor(shape, dtype, nhwc, offset)
    check(emulated, x, size, mode, None if offset else kernel)
    if all(n > 1 for n in size):
        check(emulated, x, size, mode, align_corners=True)


def test_scale_given(emulated):  # noqa: F811
    torch.manual_seed(0)
    for mode in ("bilinear", "bicubic"):
        for scale in ((1.7, 2.3), (0.6, 1.1), (2.0, 2.0)):
            x = tensor((1, 4, 9, 10), F32, scale[0] > 1.5)
            size = [int(n * s) for n, s in zip(x.shape[2:], scale, strict=True)]
            check(emulated, x, size, mode, scale=scale)
            if scale[0] < 2:  # a size that the scale does not lead to: the source saturates at the edge
                check(emulated, x, [size[0] + 1, size[1] + 2], mode, scale=scale)


def test_many_strips_and_planes(emulated):  # noqa: F811
    """More strips than one, walking down and up, and several planes per thread."""
    torch.manual_seed(0)
    check(emulated, tensor((1, 1, 100, 8), F32), (200, 16), "bicubic", "polyphase_x2")
    check(emulated, tensor((1, 8, 90, 3), BF16, True), (200, 5), "bicubic", "channels_16")
    check(emulated, tensor((1501, 1, 6, 8), BF16), (13, 24), "bilinear", "window_8")
    check(emulated, tensor((701, 2, 20, 9), F32), (30, 12), "bilinear", "gather_4")


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_antialias(emulated, dtype, nhwc):  # noqa: F811
    torch.manual_seed(0)
    for mode in ("bilinear", "bicubic"):
        for size in ((5, 4), (21, 30), (1, 1), (11, 13)):
            x = tensor((2, 3, 11, 13), dtype, nhwc, offset=1)
            check(emulated, x, size, mode, "generic_two_pass_forward", antialias=True)
    check(emulated, tensor((1, 2, 64, 3), dtype, nhwc), (3, 2), "bicubic", antialias=True, align_corners=True)


# dtype, channels-last, input shape, output size, kernel
NEAREST = [
    (F32, False, (2, 3, 5, 6), (10, 12), "nearest_x2"),
    (BF16, False, (1, 3, 5, 4), (10, 8), "nearest_x2"),
    (U8, False, (1, 2, 5, 8), (9, 16), "nearest_x2"),
    (F64, False, (1, 2, 5, 3), (10, 6), "nearest_x2"),
    (F32, False, (1, 3, 5, 3), (20, 12), "nearest_x4"),
    (F16, False, (1, 3, 5, 2), (20, 8), "nearest_x4"),
    (U8, False, (1, 3, 5, 4), (20, 16), "nearest_x4"),
    (F64, False, (1, 3, 2, 3), (8, 12), "nearest_x4"),
    (F32, False, (1, 3, 3, 3), (24, 24), "nearest_x8"),
    (BF16, False, (1, 3, 3, 3), (24, 24), "nearest_x8"),
    (U8, False, (1, 3, 3, 2), (24, 16), "nearest_x8"),
    (F64, False, (1, 3, 3, 3), (24, 24), "nearest_x8"),
    (F32, True, (2, 8, 5, 3), (7, 4), "nearest_channels"),
    (F32, True, (2, 2, 5, 3), (7, 4), "nearest_channels"),
    (BF16, True, (1, 8, 5, 3), (9, 8), "nearest_channels"),
    (U8, True, (1, 24, 5, 3), (3, 8), "nearest_channels"),
    (F64, True, (1, 3, 5, 3), (3, 8), "nearest_channels"),
    (F32, False, (1, 3, 5, 7), (12, 16), "nearest_gather_16"),
    (F32, True, (1, 3, 5, 7), (12, 16), "nearest_gather_16"),
    (BF16, True, (1, 21, 2, 3), (5, 8), "nearest_gather_16"),
    (U8, False, (1, 3, 5, 7), (12, 48), "nearest_gather_16"),
    (F64, False, (1, 3, 5, 7), (3, 4), "nearest_gather_16"),
    (F16, False, (1, 3, 5, 7), (12, 10), "nearest_gather_4"),
    (U8, True, (1, 3, 5, 7), (12, 4), "nearest_gather_4"),
    (F32, False, (1, 3, 5, 7), (12, 15), "nearest_gather_1"),
    (BF16, False, (1, 3, 5, 7), (2, 3), "nearest_gather_1"),
    (U8, True, (1, 3, 1, 1), (3, 5), "nearest_gather_1"),
    (F64, False, (1, 3, 9, 9), (1, 1), "nearest_gather_1"),
]


def nearest_index(n_in, n_out, mode, scale):
    """torch's CUDA rule, in float32."""
    step = np.float32(1.0 / scale) if scale else np.float32(n_in) / np.float32(n_out)
    at = np.arange(n_out).astype(np.float32) + np.float32(0.5 if mode == "nearest-exact" else 0)
    return torch.from_numpy(np.minimum(np.floor(at * step).astype(np.int64), n_in - 1))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("case", NEAREST, ids=lambda c: f"{c[4]}-{str(c[0])[6:]}-{'x'.join(map(str, c[2] + c[3]))}")
def test_nearest(emulated, case, mode):  # noqa: F811
    dtype, nhwc, shape, size, kernel = case
    torch.manual_seed(0)
    for offset, scale in ((0, None), (1, None), (0, (size[0] / shape[2] * 0.97, size[1] / shape[3] * 0.97))):
        x = tensor(shape, dtype, nhwc, offset)
        dst = tensor((*shape[:2], *size), dtype, nhwc, offset, fill=255 if dtype == U8 else math.nan)
        if offset == 0 and scale is None:
            assert emulated.kernel(x, dst, mode) == kernel
        emulated.run(x, dst, mode, scale=scale)
        rows, columns = (nearest_index(shape[i + 2], size[i], mode, scale and scale[i]) for i in (0, 1))
        assert torch.equal(dst, x[:, :, rows][:, :, :, columns])


def test_non_finite_values_spread_no_further_than_in_torch(emulated):  # noqa: F811
    torch.manual_seed(0)
    for mode, dtype, nhwc, shape, size, _ in LINEAR:
        if min(size) == 1 or shape[2] == size[0] or shape[3] == size[1]:
            continue  # torch's CPU kernels read one tap where an axis keeps its size, its CUDA kernels two
        x = tensor(shape, dtype, nhwc)
        for i, value in enumerate((math.inf, math.nan, -math.inf)):
            x[np.unravel_index(torch.randint(0, x.numel(), (1,)).item(), x.shape)] = value
            dst = tensor((*shape[:2], *size), dtype, nhwc, fill=math.nan)
            emulated.run(x, dst, mode)
            torch_finite = interpolate64(x, size, mode).isfinite()
            assert dst.isfinite()[torch_finite].all(), (mode, shape, size, i)
            assert torch_finite.all() or not dst.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_gradient_is_the_transpose(emulated, mode, nhwc, dtype):  # noqa: F811
    """Whatever kernel serves it, against the dense matrix of each axis that the forward gives."""
    torch.manual_seed(0)
    for shape, size in (((2, 3, 7, 5), (11, 13)), ((1, 2, 9, 12), (4, 5)), ((1, 2, 3, 1), (8, 1))):
        for how in GRADIENTS[mode]:
            g = tensor((*shape[:2], *size), dtype, nhwc, offset=1)
            dx = tensor(shape, dtype, nhwc, offset=1, fill=math.nan)
            emulated.run(g, dx, mode, backward=True, **how)
            rows, columns = (axis_matrix(emulated, shape[i + 2], size[i], mode, i, dtype, how) for i in (0, 1))
            want = torch.einsum("oi,ncop,pj->ncij", rows, g.double(), columns)
            scale = torch.einsum("oi,ncop,pj->ncij", rows.abs(), g.double().abs(), columns.abs())
            assert ((dx.double() - want).abs() <= 4 * ULP[dtype] * scale + 1e-30).all(), (shape, size, how)


GRADIENTS = {
    "nearest": [{}, {"scale": (1.3, 1.9)}],
    "nearest-exact": [{}],
    "bilinear": [{}, {"align_corners": True}, {"antialias": True}, {"scale": (1.3, 1.9)}],
    "bicubic": [{}, {"align_corners": True}, {"antialias": True}],
}


def axis_matrix(emulated, n_in, n_out, mode, axis, dtype, how, made={}):  # noqa: F811, B006
    """The [n_out, n_in] matrix of one axis, by interpolating the unit vectors with the other axis of size 1."""
    dtype = F64 if dtype == F64 else F32
    how = {k: ((v[0], 2.0) if axis == 0 else (2.0, v[1])) if k == "scale" else v for k, v in how.items()}
    key = n_in, n_out, mode, axis, dtype, *how.items()
    if key not in made:
        x = torch.eye(n_in, dtype=dtype).reshape(n_in, 1, *((n_in, 1) if axis == 0 else (1, n_in)))
        size = (n_out, 2) if axis == 0 else (2, n_out)
        y = emulated.run(x, tensor((n_in, 1, *size), dtype, fill=math.nan), mode, **how)
        made[key] = (y[:, 0, :, 0] if axis == 0 else y[:, 0, 0]).T.double()
    return made[key]


@pytest.mark.parametrize(
    "mode, dtype, nhwc, shape, size, kernel",
    [
        ("nearest", BF16, False, (41, 256, 512, 256), (1024, 256), "nearest_gather_16"),
        ("nearest", U8, True, (35, 64, 512, 512), (1024, 1024), "nearest_channels"),
        ("bilinear", BF16, False, (33, 64, 512, 512), (1024, 1024), "polyphase_x2"),
        ("bicubic", F16, True, (33, 64, 512, 512), (1024, 1024), "channels_16"),
        ("bilinear", F16, False, (65, 32, 512, 260), (1040, 1025), "gather_1"),
        ("bilinear", BF16, False, (65, 32, 2100, 512), (1040, 512), "generic_direct"),
    ],
)
def test_past_2_31_elements(emulated, mode, dtype, nhwc, shape, size, kernel):  # noqa: F811
    """Only the end of the tensors is ever touched, so that they take little memory."""
    torch.manual_seed(0)
    n, c, (h, w), (oh, ow) = *shape[:2], shape[2:], size
    x, y = (torch.empty(n * c * a * b, dtype=dtype) for a, b in ((h, w), (oh, ow)))
    assert max(x.numel(), y.numel()) > 2**31
    x, y = (
        t.view(n, a, b, c).permute(0, 3, 1, 2) if nhwc else t.view(n, c, a, b) for t, a, b in ((x, h, w), (y, oh, ow))
    )
    plane = x[-1] if nhwc else x[-1, -1]
    plane.copy_(torch.randint(0, 100, plane.shape) if dtype == U8 else torch.randn(plane.shape))
    assert emulated.kernel(x, y, mode) == kernel
    emulated.run_end(x, y, mode, 3)  # at least the last 16 columns of the last row
    if mode == "nearest":
        want = x[-1, -1][nearest_index(h, oh, mode, None)][:, nearest_index(w, ow, mode, None)]
        assert torch.equal(y[-1, -1, -1, -16:], want[-1, -16:])
    else:
        want = interpolate64(x[-1:, -1:].double(), size, mode)[0, 0]
        torch.testing.assert_close(y[-1, -1, -1, -16:].double(), want[-1, -16:], rtol=ULP[dtype], atol=ULP[dtype])


def test_empty_tensors_launch_nothing(emulated):  # noqa: F811
    before = emulated.launches()
    x, y = torch.empty(0, 3, 4, 4), torch.empty(0, 3, 8, 8)
    assert emulated.kernel(x, y, "bilinear") == "none"
    emulated.run(x, y, "bilinear")
    emulated.run(y, x, "bilinear", backward=True)
    assert emulated.launches() == before


def test_refusals_name_the_reason(emulated):  # noqa: F811
    x, y = tensor((1, 1, 8, 8), U8), tensor((1, 1, 4, 4), U8)
    assert emulated.kernel(x, y, "bilinear") is None
    with pytest.raises(RuntimeError, match="uint8"):
        emulated.run(x, y, "bilinear")
    with pytest.raises(RuntimeError, match="antialias"):
        emulated.run(x.float(), y.float(), "nearest", antialias=True)
    assert "shrinks" in emulated.refusal(tensor((1, 1, 9, 8), F32), tensor((1, 1, 2, 8), F32), "bilinear")
