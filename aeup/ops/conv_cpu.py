"""The cpu backend of the convolutions' maps: compositions of torch's operators, in part with kernels of the extension,
that are faster than torch's own kernel for the call. Which ones, and when, was measured with oneDNN 3.12 on AVX-512
with bf16: ratios of medians, 2 threads, both layouts.

The maps and their arguments are those of aeup/ops/conv_kernels.py.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.ops import conv_columns
from aeup.ops.compiled import memory_format
from aeup.ops.conv_columns import images_of, rows_of
from aeup.ops.conv_shapes import Geometry, W, X, Y
from aeup.ops.conv_torch import torch_w, torch_x, torch_y
from aeup.ops.epilogue import activate

_LAST = torch.channels_last


# --- which way ---


def way(kind: int, g: Geometry, n: int, dtype: torch.dtype, last: bool, bias: bool) -> str | None:
    """How a map is composed, or None: torch's own kernel is the fastest. `last`: channels-last, at least not NCHW."""
    if g.ih == 1 and _is_product(g, n, dtype):
        return "matrix product"
    if dtype is not torch.float32 and _by_float32(kind, g, n, dtype, last):
        return "through float32"
    if conv_columns.gains(kind, g, n, dtype, last):
        return "columns"
    if kind == Y:
        if g.co <= 4 and _merges(g, n, dtype):
            return "merged phases"
        if bias and _bias_after(g, dtype, last):
            return "bias after"
        return "in channels-last" if not last and _starves(g, n, dtype) else None
    return "in channels-last" if kind == X and not last and _fits_no_vector(g, dtype) else None


@lru_cache(None)
def _half_is_slow() -> bool:
    """Without half arithmetic in oneDNN torch takes its plain loops: 1.3 to 58 times slower than by float32."""
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _products(g: Geometry, n: int) -> int:
    return n * g.ci * g.ih * g.iw * (g.co // g.groups) * g.kh * g.kw


def _is_product(g: Geometry, n: int, dtype: torch.dtype) -> bool:
    """An input of one pixel, as in a generator's first layer: x [n, ci] by w [ci, co * kh * kw] is y. 1 to 15 times as
    fast as a convolution; in float64 not where there is little to do."""
    return (
        g.ih == g.iw == g.groups == 1
        and g.padding == (0, 0)
        and (g.oh, g.ow) == (g.kh, g.kw)
        and dtype is not torch.float16
        and (dtype is not torch.float64 or _products(g, n) >= 1 << 20)
    )


def _by_float32(kind: int, g: Geometry, n: int, dtype: torch.dtype, last: bool) -> bool:
    if dtype is torch.bfloat16 and g.ow < g.sw:
        return True  # oneDNN reads past the end of a y that is narrower than the stride: in W, and in X of small groups
    if _products(g, n) < 1 << 18:
        return False  # so few that converting costs more
    if dtype is torch.float16:
        return _half_is_slow()
    strided_depthwise = 1 < g.groups == g.ci == g.co and g.sh * g.sw > 1
    return dtype is torch.bfloat16 and strided_depthwise and (kind == Y or (kind == W and last))


def _bias_after(g: Geometry, dtype: torch.dtype, last: bool) -> bool:
    """oneDNN's deconvolution takes its reference kernel for these with a bias, a fast one without."""
    if dtype is torch.float64:
        return False
    if g.sh * g.sw == 1:
        if not last:
            return True
    elif g.dh * g.dw > 1 or g.oh % g.sh or g.ow % g.sw:
        return True
    if g.groups == 1:
        return False
    each, out = g.ci // g.groups, g.co // g.groups
    if dtype is torch.bfloat16:
        return each == out == 1 or (each in (4, 8, 16) and out in (4, 8, 16))
    return each == out and each in (1, 8)


def _merges(g: Geometry, n: int, dtype: torch.dtype) -> bool:
    """Few output channels: one convolution that makes all phases of an output position fills the vectors."""
    return (
        g.co <= 4
        and g.groups == 1
        and g.dh * g.dw == 1
        and min(g.sh, g.sw) > 1
        and min(g.kh, g.kw) >= 4
        and g.kh % g.sh == g.kw % g.sw == 0
        and g.output_padding[0] <= g.ph
        and g.output_padding[1] <= g.pw
        and dtype is not torch.float64
        and n * g.ci * g.ih * g.iw >= 1 << 17
    )


def _starves(g: Geometry, n: int, dtype: torch.dtype) -> bool:
    """Small maps of many channels: with NCHW in bfloat16 oneDNN takes 1.1 to 2.1 times as long as with channels-last,
    conversions included."""
    return (
        dtype is torch.bfloat16
        and g.groups == 1
        and (g.kh, g.kw) == (2 * g.sh, 2 * g.sw)
        and g.ci * g.co * g.kh * g.kw >= 1 << 17
        and n * g.ih * g.iw <= 512
    )


def _fits_no_vector(g: Geometry, dtype: torch.dtype) -> bool:
    """Channels that are no multiples of 8, as one a class in a segmentation: NCHW takes 1.1 to 1.6 times as long as
    channels-last, conversions included."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and g.groups == 1
        and min(g.ci, g.co) > 8
        and g.ci % 8 > 0
        and g.co % 8 > 0
        and g.kh * g.kw > 1
    )


def _way_of(kind: int, a: Tensor, b: Tensor, g: Geometry, bias: bool = False) -> str | None:
    return way(kind, g, a.shape[0], a.dtype, not (a.is_contiguous() and b.is_contiguous()), bias)


def refusal(t: Tensor, found: str | None) -> str | None:
    if not t.is_cpu:
        return f"the tensor is on {t.device}"
    return None if found else "torch's own kernel is the fastest composition for this call"


def refuses_y(x, w, bias, g, activation, slope) -> str | None:
    return refusal(x, _way_of(Y, x, w, g, bias is not None) if x.is_cpu else None)


def refuses_x(grad, w, g) -> str | None:
    return refusal(grad, _way_of(X, grad, w, g) if grad.is_cpu else None)


def refuses_w(grad, x, g, w=None) -> str | None:
    return refusal(grad, _way_of(W, grad, x, g) if grad.is_cpu else None)


def label(kind: int):
    def of_call(device, a: Tensor, b: Tensor, *rest) -> str:
        g = next(r for r in rest if isinstance(r, Geometry))
        return _way_of(kind, a, b, g, kind == Y and rest[0] is not None)

    return of_call


# --- the maps ---


def run_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    found = _way_of(Y, x, w, g, bias is not None)
    if found == "through float32":
        y = run_y(x.float(), w.float(), None if bias is None else bias.float(), g, activation, slope)
        return y.to(x.dtype)
    if found == "matrix product":
        y = _product(x, w, bias, g)
    elif found == "columns":
        y = conv_columns.run_y(x, w, bias, g)
    elif found == "merged phases":
        y = _merged(x, w, bias, g)
    elif found == "bias after":
        y = torch_y(x, w, None, g, None, 0.0).add_(bias.view(-1, 1, 1))
    elif found == "in channels-last":
        y = torch_y(x.contiguous(memory_format=_LAST), w, bias, g, None, 0.0).contiguous()
    else:
        y = torch_y(x, w, bias, g, None, 0.0)
    return activate(y, activation, slope, inplace=True)


def run_x(grad, w, g: Geometry, bias=None) -> Tensor:
    """`bias` [ci]: added, for the convolution whose result this is."""
    found = _way_of(X, grad, w, g)
    if found == "through float32":
        return run_x(grad.float(), w.float(), g, None if bias is None else bias.float()).to(grad.dtype)
    if found == "matrix product":
        last = memory_format(grad, w) is _LAST
        rows, columns = rows_of(grad, last), rows_of(w, last).t()
        x = torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns)
        return images_of(x, (g.ci, 1, 1), last)
    if found == "columns":
        return conv_columns.run_x(grad, w, g, bias)
    if found == "in channels-last":
        return torch_x(grad.contiguous(memory_format=_LAST), w, g, bias).contiguous()
    return torch_x(grad, w, g, bias)


def run_w(grad, x, g: Geometry, w) -> Tensor:
    found = _way_of(W, grad, x, g)
    if found == "through float32":
        return run_w(grad.float(), x.float(), g, None).to(grad.dtype)
    if found == "matrix product":
        last = (memory_format(x, grad) if w is None else memory_format(w, x)) is _LAST
        return images_of(torch.mm(rows_of(x, False).t(), rows_of(grad, last)), (g.co, g.kh, g.kw), last)
    if found == "columns":
        return conv_columns.run_w(grad, x, g, w)
    return torch_w(grad, x, g, w)


def _product(x, w, bias, g: Geometry) -> Tensor:
    last = memory_format(x, w) is _LAST
    x, columns, taps = rows_of(x, False), rows_of(w, last), g.kh * g.kw
    if bias is None:
        y = torch.mm(x, columns)
    else:
        y = torch.addmm(bias.repeat(taps) if last else bias.repeat_interleave(taps), x, columns)
    return images_of(y, (g.co, g.kh, g.kw), last)


def _merged(x, w, bias, g: Geometry) -> Tensor:
    """One convolution of stride 1 with sh * sw * co outputs, whose kernel holds each phase's taps, then the phases
    interleaved: the outputs without padding, of which [ph, ph + oh) x [pw, pw + ow) are kept."""
    rows, columns = g.kh // g.sh, g.kw // g.sw
    taps = w.reshape(g.ci, g.co, rows, g.sh, columns, g.sw).flip(2, 4)
    pad = (rows - 1, columns - 1)
    if x.is_contiguous():
        taps = taps.permute(1, 3, 5, 0, 2, 4).reshape(-1, g.ci, rows, columns)
        bias = None if bias is None else bias.repeat_interleave(g.sh * g.sw)
        y = F.conv2d(x, taps, bias, 1, pad)
        n, _, h, v = y.shape
        y = y.view(n, g.co, g.sh, g.sw, h, v).permute(0, 1, 4, 2, 5, 3).reshape(n, g.co, h * g.sh, v * g.sw)
        y = y[:, :, g.ph : g.ph + g.oh, g.pw : g.pw + g.ow]
        return y.contiguous()
    taps = taps.permute(3, 5, 1, 0, 2, 4).reshape(-1, g.ci, rows, columns)
    bias = None if bias is None else bias.repeat(g.sh * g.sw)
    y = F.conv2d(x.contiguous(memory_format=_LAST), taps, bias, 1, pad)
    n, _, h, v = y.shape
    y = y.permute(0, 2, 3, 1).view(n, h, v, g.sh, g.sw, g.co).transpose(2, 3).reshape(n, h * g.sh, v * g.sw, g.co)
    y = y[:, g.ph : g.ph + g.oh, g.pw : g.pw + g.ow].permute(0, 3, 1, 2)
    return y.contiguous(memory_format=_LAST)
