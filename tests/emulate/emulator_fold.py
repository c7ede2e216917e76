"""Runs the emulated kernels of a convolution after nearest upsampling on CPU tensors (see emulator.py)."""

import ctypes

import torch

from .emulator import DTYPES
from .emulator_convolution import call, pointer, run_sizes


def _sizes(n, ci, ih, iw, co, kernel, scale, padding, groups):
    return n, ci, co, ih, iw, groups, *kernel, *scale, *padding


def run(emulated, family, which, result, *, shapes, scale, padding, groups, **how):
    """shapes: input, weight, output; how: see run_sizes."""
    input, (co, _, *kernel), _ = shapes
    sizes = _sizes(*input, co, kernel, scale, padding, groups)
    return run_sizes(emulated, "aeup_emulate_upsample_conv", family, which, result, sizes, **how)


def pack(
    emulated, kind, weight, elements, *, pixels, ci, co, kernel, scale, padding, folded, channels_last, strict=False
):
    """The packed weight, ``elements`` of the weight's dtype. kind: 0 [taps, ci, co], 1 phases as columns, 2 float32 for
    the forward, 3 the same with phases, 4 float32 for the input gradient. An axis of one input pixel has each tap as
    a phase."""
    result = torch.full((elements,), float("nan"), dtype=weight.dtype)
    how = (ctypes.c_int * 6)(0, DTYPES[weight.dtype], False, channels_last, False, 0)
    sizes = (ctypes.c_int64 * 12)(*_sizes(1, ci, *pixels, co, kernel, scale, padding, 1))
    tensors, size = map(pointer, (weight, result)), ctypes.c_int64(elements * weight.element_size())
    flags = ctypes.c_bool(strict), ctypes.c_bool(folded)
    call(emulated, "aeup_emulate_pack", kind, *flags, *tensors, size, sizes, how)
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
