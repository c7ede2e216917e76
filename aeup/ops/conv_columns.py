"""The maps of the transposed convolution on a CPU as one matrix product each (torch's), with the matrix of the taps:
csrc/cpu/columns.h. Where weights are many and pixels few, oneDNN's time goes into packing the weights.

The maps and their arguments are those of aeup/ops/conv_kernels.py; float32 and bfloat16, one group.
"""

from functools import lru_cache

import torch
from torch import Tensor

from aeup import _native
from aeup.ops import compiled
from aeup.ops.compiled import memory_format
from aeup.ops.conv_shapes import Geometry, W, X, Y

_LAST = torch.channels_last
_MOST = 1 << 25  # elements of the matrix
_LARGE = 1 << 12  # pixels of an image


def gains(kind: int, g: Geometry, n: int, dtype: torch.dtype, last: bool) -> bool:
    """Whether a map is faster so than by oneDNN; measured as aeup/ops/conv_cpu.py says. Y of overlapping taps in
    bfloat16 would add rounded products, so it is not served."""
    pixels, weights = n * g.ih * g.iw, g.ci * g.co * g.kh * g.kw
    in_one = g.ih * g.iw if kind == Y and g.ih * g.iw >= _LARGE else pixels
    if _native.missing or g.groups > 1 or not 0 < in_one * g.co * g.kh * g.kw <= _MOST or n == 0:
        return False
    if dtype is not torch.float32 and (dtype is not torch.bfloat16 or _bfloat16_is_slow()):
        return False
    doubling = g.kw == 2 and _one_tap_each(g) and g.padding == (0, 0)  # as in a U-Net
    if doubling and not last and pixels >= 256:
        if kind == Y and n == 1:
            return True  # 1.1 to 3.7 times as fast
        if kind == Y and g.ih * g.iw >= _LARGE:  # 1.2 to 5
            return dtype is torch.bfloat16 or n * g.co * g.oh * g.ow >= 1 << 23
        if kind == W and dtype is torch.bfloat16 and weights >= 1 << 13:
            return True  # 1.0 to 2.9
    strided, large = g.sh * g.sw > 1, g.kh * g.kw >= 256 and weights >= 1 << 15
    if dtype is torch.float32:
        if weights >= 1 << 23 and 16 <= pixels <= 256:  # with fewer pixels the product's sums are not accurate
            return True  # 1.1 to 6
        if kind == W:  # 1.1 to 11
            many = last and weights >= 1 << 21 and 32 <= pixels <= (256 if strided else 64)
            return many or (large and (last or pixels >= 64))
        return False
    if weights < 1 << 15:
        return False
    even = strided and g.kh % g.sh == g.kw % g.sw == 0
    if kind == W:  # 1.0 to 34
        few = pixels <= 64 or (pixels <= 256 and (last or weights >= 1 << 21))
        return few or (large and (last or pixels >= 64))
    if kind == X and last:  # 1.0 to 11
        if pixels <= 64:
            return weights >= 1 << (17 if even else 20)
        return even and pixels <= 256 and weights >= 1 << 19
    if kind == X:  # 1.0 to 2.5; of several images the result would be transposed
        return n == 1 and strided and not large and pixels <= 64 and weights >= 1 << 18
    return last and _one_tap_each(g) and pixels <= (64 if n == 1 else 256)  # 1.0 to 2.5


@lru_cache(None)
def _bfloat16_is_slow() -> bool:
    """Without oneDNN's products of bfloat16 torch takes its plain loops."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _one_tap_each(g: Geometry) -> bool:
    """Whether every pixel of y is made by exactly one tap."""
    return (g.kh, g.kw) == (g.sh, g.sw) and g.dh == g.dw == 1 and g.output_padding == (0, 0)


def _options(g: Geometry, last: bool) -> tuple:
    return g.ih, g.iw, g.kh, g.kw, *g.stride, *g.padding, g.dh, g.dw, last


def _to_columns(grad: Tensor, g: Geometry, last: bool) -> Tensor:
    """[co * kh * kw, n * ih * iw], or [n * ih * iw, kh * kw * co]."""
    return compiled.call("to_columns", grad, *_options(g, last), device="cpu")


def _pixels(x: Tensor, last: bool) -> Tensor:
    """[ci, n * ih * iw], or [n * ih * iw, ci]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if last else x.transpose(0, 1).flatten(1)


def rows_of(t: Tensor, last: bool) -> Tensor:
    """A matrix of all that is not the first dimension, in the order of memory: weights as [ci, co * kh * kw], or
    [ci, kh * kw * co]."""
    n, c, h, w = t.shape
    return (t.permute(0, 2, 3, 1) if last else t).reshape(n, c * h * w)


def images_of(rows: Tensor, shape: tuple, last: bool) -> Tensor:
    """What :func:`rows_of` was made of; `shape`: (channels, h, w)."""
    c, h, w = shape
    if last:
        return rows.view(rows.shape[0], h, w, c).permute(0, 3, 1, 2)
    return rows.view(rows.shape[0], c, h, w)


def run_y(x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    layout, n = memory_format(x, w), x.shape[0]
    y = torch.empty((n, g.co, g.oh, g.ow), dtype=x.dtype, device=x.device, memory_format=layout)
    # Where images are large, one after another: the matrix stays in the caches, and x as it lies.
    at_once = 1 if g.ih * g.iw >= _LARGE else n
    for first in range(0, n, at_once):
        _add_images(y, x[first : first + at_once], w, bias, g, layout is _LAST, first)
    return y


def _add_images(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry, last: bool, at: int) -> None:
    """y[at:] of x."""
    pixels, weights = _pixels(x, last), rows_of(w, last)
    first, second = (pixels, weights) if last else (weights.t(), pixels)
    if bias is not None and _one_tap_each(g):  # the product's sums are the result's, which round once
        taps = g.kh * g.kw
        added = bias.repeat(taps) if last else bias.repeat_interleave(taps)[:, None]
        columns, bias = torch.addmm(added, first, second), None
    else:
        columns = torch.mm(first, second)
    compiled.call("from_columns", y, columns, bias, at, x.shape[0], *_options(g, last), device="cpu")


def run_x(grad: Tensor, w: Tensor, g: Geometry, bias: Tensor | None = None) -> Tensor:
    """`bias` [ci]: added, for the convolution whose result this is."""
    last, n = memory_format(grad, w) is _LAST, grad.shape[0]
    columns, weights = _to_columns(grad, g, last), rows_of(w, last)
    first, second = (columns, weights.t()) if last else (weights, columns)
    if bias is None:
        x = torch.mm(first, second)
    else:
        x = torch.addmm(bias if last else bias[:, None], first, second)
    if last:
        return x.view(n, g.ih, g.iw, g.ci).permute(0, 3, 1, 2)
    if n == 1:  # also in its strides
        return x.view(1, g.ci, g.ih, g.iw)
    return x.view(g.ci, n, g.ih, g.iw).transpose(0, 1).contiguous()


def run_w(grad: Tensor, x: Tensor, g: Geometry, w: Tensor | None) -> Tensor:
    """`w`: the tensor whose layout the result shall have; None: that of the operands."""
    last = memory_format(grad, x) is _LAST
    columns, pixels = _to_columns(grad, g, last), _pixels(x, last)
    rows = torch.mm(pixels.t(), columns) if last else torch.mm(pixels, columns.t())
    found = images_of(rows, (g.co, g.kh, g.kw), last)
    return found.contiguous(memory_format=memory_format(grad if w is None else w, x))
