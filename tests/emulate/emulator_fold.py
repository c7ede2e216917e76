"""Runs the emulated kernels of a convolution after nearest upsampling on CPU tensors (see emulator.py)."""

import ctypes

import torch

from .emulator import DTYPES
from .emulator_convolution import ACTIVATIONS, pointer


def _size(shape, co, kernel, scale, padding, groups):
    n, ci, h, w = shape
    return (ctypes.c_int64 * 12)(n, ci, co, h, w, groups, *kernel, *scale, *padding)


def run(
    emulated,
    family,
    which,
    result,
    *,
    input=None,
    weight=None,
    bias=None,
    grad=None,
    shape,
    co,
    kernel,
    scale,
    padding,
    groups,
    channels_last,
    weight_channels_last,
    tf32=False,
    activation="none",
    slope=0.01,
):
    """Fill ``result``. shape: that of the input; the weight is [co, ci / groups, *kernel]. Tensors are dense in the
    layouts named."""
    how = (ctypes.c_int * 6)(
        which, DTYPES[result.dtype], channels_last, weight_channels_last, tf32, ACTIVATIONS.index(activation)
    )
    call = emulated.lib.aeup_emulate_upsample_conv
    call.restype = ctypes.c_char_p
    tensors = map(pointer, (input, weight, bias, grad, result))
    error = call(
        family.encode(), *tensors, _size(shape, co, kernel, scale, padding, groups), how, ctypes.c_double(slope)
    )
    if error is not None:
        raise RuntimeError(error.decode())
    return result


def pack(
    emulated, kind, weight, elements, *, pixels, ci, co, kernel, scale, padding, folded, channels_last, strict=False
):
    """The packed weight, ``elements`` of the weight's dtype. kind: 0 [taps, ci, co], 1 phases as columns, 2 float32 for
    the forward, 3 the same with phases, 4 float32 for the input gradient. An axis of one input pixel has each tap as
    a phase."""
    result = torch.full((elements,), float("nan"), dtype=weight.dtype)
    how = (ctypes.c_int * 6)(0, DTYPES[weight.dtype], False, channels_last, False, 0)
    call = emulated.lib.aeup_emulate_pack
    call.restype = ctypes.c_char_p
    bytes_ = ctypes.c_int64(elements * weight.element_size())
    size = _size((1, ci, *pixels), co, kernel, scale, padding, 1)
    error = call(kind, ctypes.c_bool(strict), ctypes.c_bool(folded), *map(pointer, (weight, result)), bytes_, size, how)
    if error is not None:
        raise RuntimeError(error.decode())
    return result


def fold_map(emulated, kernel, scale, padding):
    """Folded taps, their padding, the range of kernel indices of each folded tap, the range of folded taps of each
    kernel index (ranges with both ends in)."""
    sizes, most = (ctypes.c_int * 2)(), 2 * (2 * kernel + scale + 2 * padding)
    to = (ctypes.c_int * most)()
    emulated.lib.aeup_fold_map.restype = None
    emulated.lib.aeup_fold_map(*(ctypes.c_int64(v) for v in (kernel, scale, padding)), sizes, to)
    taps, pairs = sizes[0], list(zip(to[::2], to[1::2], strict=True))
    return taps, sizes[1], pairs[:taps], pairs[taps : taps + kernel]
