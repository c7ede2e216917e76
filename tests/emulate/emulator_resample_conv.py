"""Runs the emulated kernels of resampling and convolution on CPU tensors (see emulator.py)."""

import ctypes

from .emulator import DTYPES, MODES
from .emulator_convolution import ACTIVATIONS, call, pointers


def run(
    emulated,
    which,
    result,
    *,
    shapes,
    size,
    mode,
    align_corners=False,
    scales=(0.0, 0.0),
    padding,
    groups,
    channels_last,
    weight_channels_last,
    tf32=False,
    activation="none",
    slope=0.01,
    capability=(9, 0),
    **tensors,
):
    """Fill ``result``. shapes: input, weight, output; size: of the resampled image; tensors: those that the pass reads
    of input, weight, bias and grad, dense in the layouts named."""
    (n, ci, ih, iw), (_, _, kh, kw), (_, co, oh, ow) = shapes
    sizes = (ctypes.c_int64 * 14)(n, ci, co, ih, iw, *size, oh, ow, kh, kw, *padding, groups)
    layouts = channels_last, weight_channels_last
    how = (ctypes.c_int * 10)(
        which,
        MODES[mode],
        align_corners,
        DTYPES[result.dtype],
        *layouts,
        tf32,
        ACTIVATIONS.index(activation),
        *capability,
    )
    factors = (ctypes.c_double * 3)(*scales, slope)
    call(emulated, "aeup_emulate_resample_conv", *pointers(result, **tensors), sizes, how, factors)
    return result
