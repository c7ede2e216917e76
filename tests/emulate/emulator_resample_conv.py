"""Runs the emulated kernels of resampling and convolution on CPU tensors (see emulator.py)."""

import ctypes

from .emulator import DTYPES, MODES
from .emulator_convolution import ACTIVATIONS, pointer


def run(
    emulated,
    which,
    result,
    *,
    input=None,
    weight=None,
    bias=None,
    grad=None,
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
):
    """Fill ``result``. shapes: input, weight, output; size: of the resampled image. Tensors are dense in the layouts
    named."""
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
    call = emulated.lib.aeup_emulate_resample_conv
    call.restype = ctypes.c_char_p
    tensors = map(pointer, (input, weight, bias, grad, result))
    error = call(*tensors, sizes, how, (ctypes.c_double * 3)(*scales, slope))
    if error is not None:
        raise RuntimeError(error.decode())
    return result
