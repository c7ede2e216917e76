"""Upsampling by whole repetition with its convolution on the CPU: torch's transposed convolution (oneDNN) with the
folded weight, made once per call, in the passes where that is faster.

Along an axis the folded weight at t is the sum of the kernel's w[j] over the repetitions r with r - j + k - 1 = t; the
gradient of w is the transposed map of the folded weight's.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.backends import choose
from aeup.ops import conv_kernels as conv
from aeup.ops.compiled import FLOATS, either_last, is_last
from aeup.ops.conv_shapes import Geometry, W, X, Y
from aeup.ops.upsample_conv_plain import BY_AEUP, LABEL
from aeup.ops.upsample_conv_shapes import Fold, UpsampleGeometry, fold

_LAST = torch.channels_last
_LEAST_PIXELS, _LEAST_PIXELS_LAST = 256, 512
_LEAST_PRODUCTS, _LEAST_PRODUCTS_OF_HALF = 1 << 24, 1 << 19


def _axis(k: int, s: int, extra: int) -> Tensor:
    """[k, K]: 1 where the folded weight's entry takes the kernel's."""
    taken = torch.zeros(k, k + s - 1 + 2 * extra)
    for j in range(k):
        taken[j, k - 1 - j + extra : k - 1 - j + extra + s] = 1
    return taken


@lru_cache(256)
def _taken(kernel: tuple, stride: tuple, extra: tuple, dtype: torch.dtype) -> Tensor:
    """[kh * kw, Kh * Kw]."""
    with torch.inference_mode(False), torch.device("cpu"):
        rows, columns = (_axis(*axis) for axis in zip(kernel, stride, extra, strict=True))
        return torch.kron(rows, columns).to(dtype)


def fold_weight(w: Tensor, g: UpsampleGeometry, f: Fold) -> Tensor:
    """w [co, ci / groups, kh, kw] -> [ci, co / groups, Kh, Kw], in w's memory format; sums are float32 or float64."""
    exact = w.dtype if w.dtype is torch.float64 else torch.float32
    taps = w.reshape(g.groups, g.co // g.groups, g.ci // g.groups, g.kh * g.kw)
    folded = taps.to(exact) @ _taken(g.kernel_size, f.g.stride, f.extra, exact).to(w.device)
    folded = folded.transpose(1, 2).reshape(g.ci, g.co // g.groups, f.g.kh, f.g.kw)
    return folded.to(w.dtype, memory_format=_LAST if is_last(w) else torch.contiguous_format)


def unfold_gradient(folded: Tensor, g: UpsampleGeometry, f: Fold) -> Tensor:
    """The transposed map: [ci, co / groups, Kh, Kw] -> [co, ci / groups, kh, kw], a view; sums are rounded once."""
    exact = torch.float32 if folded.dtype is torch.float16 else folded.dtype  # half matrices are slow without AMX
    sums = folded.reshape(-1, f.g.kh * f.g.kw).to(exact) @ _taken(g.kernel_size, f.g.stride, f.extra, exact).T
    taps = sums.view(g.groups, g.ci // g.groups, g.co // g.groups, g.kh * g.kw).transpose(1, 2)
    return taps.reshape(g.weight_shape).to(folded.dtype)


# --- the kernels of the backend ---


def _chosen(kind: int, *args):
    return choose(conv.MAPS[kind], args[0], args, "auto")


def cpu_y(x, w, bias, g: UpsampleGeometry, activation, slope) -> Tensor:
    f = fold(g)
    if not _folds(Y, x, g, f.g):
        return BY_AEUP.y(x, w, bias, g, activation, slope)
    args = (x, fold_weight(w, g, f), bias, f.g, activation, slope)
    return _chosen(Y, *args).run(*args)


def cpu_x(grad, w, g: UpsampleGeometry) -> Tensor:
    f = fold(g)
    args = (grad, fold_weight(w, g, f), f.g)
    if _sums_in_a_row(grad, f.g):
        return _x_by_halves(*args)
    return _chosen(X, *args).run(*args)


def _sums_in_a_row(grad: Tensor, f: Geometry) -> bool:
    """In channels-last oneDNN adds all products of a result one after another: 16 taps where torch has four sums of 9.
    In float32 the error would be 1.3 times torch's, and its maximum beyond twice torch's now and then."""
    return grad.dtype is torch.float32 and is_last(grad) and f.groups == 1 and f.kh >= 2 * f.sh


def _x_by_halves(grad: Tensor, w: Tensor, f: Geometry) -> Tensor:
    """The input gradient with the upper and the lower rows of the kernel as channels of one convolution: the lower ones
    of input row i are at row i + rows / stride."""
    rows = f.kh // f.sh // 2 * f.sh
    upper, lower = w[:, :, :rows], w[:, :, rows:]
    upper = F.pad(upper, (0, 0, 0, lower.shape[2] - rows))
    both = F.conv2d(grad, torch.cat((upper, lower)), None, f.stride, f.padding)
    return both[:, : f.ci, : f.ih, : f.iw] + both[:, f.ci :, rows // f.sh :, : f.iw]


def cpu_w(grad, x, g: UpsampleGeometry, w) -> Tensor:
    f = fold(g)
    args = (grad, x, f.g, None)
    last = either_last(grad, x) if w is None else is_last(w)
    gradient = unfold_gradient(_chosen(W, *args).run(*args), g, f)
    return gradient.contiguous(memory_format=_LAST if last else torch.contiguous_format)


# --- which calls. Measured with oneDNN 3.12 on AVX-512 with bf16: ratios of processor time, both layouts. ---


def _folds(kind: int, t: Tensor, g: UpsampleGeometry, f: Geometry) -> bool:
    """Whether the folded weight is the faster way of a pass."""
    if kind == X or t.dtype is torch.float16:
        return True
    each, out = g.ci // g.groups, g.co // g.groups
    if each < (9 if g.groups == 1 else 8) or g.kh * g.kw * f.sh * f.sw < 2 * f.kh * f.kw:
        return False
    if kind == W:  # threads of oneDNN's bfloat16 kernel wait for each other: up to 8 times as long on a busy processor
        return t.dtype is not torch.bfloat16 or torch.get_num_threads() == 1
    return out <= 4 or out >= 32


def _refusal(kind: int, t: Tensor, g: UpsampleGeometry) -> str | None:
    if not t.is_cpu:
        return f"the tensor is on {t.device}"
    if t.dtype not in FLOATS:
        return f"dtype {t.dtype} is not one of float32, float64, float16, bfloat16"
    f = fold(g)
    if f is None:
        return "serves nearest by whole scales, as a transposed convolution"
    if f.g.stride == (1, 1):
        return "nothing is upsampled"
    pixels = t.shape[0] * g.m.ih * g.m.iw
    products = pixels * f.g.sh * f.g.sw * g.co * (g.ci // g.groups) * g.kh * g.kw
    least = _LEAST_PRODUCTS_OF_HALF if t.dtype is torch.float16 else _LEAST_PRODUCTS
    if pixels < (_LEAST_PIXELS_LAST if is_last(t) else _LEAST_PIXELS) or products < least:
        return f"{pixels} input pixels and {products} products are too few to fold the weight for"
    if not _folds(kind, t, g, f.g):
        return f"{LABEL} is faster for this dtype, channels and kernel"
    return None


def refuses_y(x, w, bias, g, activation, slope) -> str | None:
    return _refusal(X, x, g)  # what follows is the backward


def refuses_x(grad, w, g) -> str | None:
    return _refusal(X, grad, g)


def refuses_w(grad, x, g, w=None) -> str | None:
    return _refusal(W, grad, g)


def label_y(device, x, w, bias, g, *_) -> str:
    return _label(g) if _folds(Y, x, g, fold(g).g) else f"{LABEL}; gradients by the folded weight"


def label_gradient(device, a, b, g, *_) -> str:
    return _label(g)


def _label(g: UpsampleGeometry) -> str:
    f = fold(g).g
    return f"transposed convolution k{f.kh}x{f.kw}, s{f.sh}x{f.sw}, p{f.ph}x{f.pw} with the folded weight"
