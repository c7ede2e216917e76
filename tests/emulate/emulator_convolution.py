"""Runs the emulated convolution kernels on CPU tensors (see emulator.py)."""

import ctypes

import torch

from .emulator import DTYPES, tensor

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


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
    shapes,
    stride,
    padding,
    dilation,
    groups,
    channels_last,
    weight_channels_last,
    tf32=False,
    activation="none",
    slope=0.01,
):
    """Fill ``result``. shapes: input, weight, output. Tensors are dense in the layouts named."""
    (n, ci, ih, iw), (_, _, kh, kw), (_, co, oh, ow) = shapes
    size = (ctypes.c_int64 * 16)(n, ci, co, ih, iw, oh, ow, kh, kw, *stride, *padding, *dilation, groups)
    how = (ctypes.c_int * 6)(
        which, DTYPES[result.dtype], channels_last, weight_channels_last, tf32, ACTIVATIONS.index(activation)
    )
    call = emulated.lib.aeup_emulate_convolution
    call.restype = ctypes.c_char_p
    tensors = map(pointer, (input, weight, bias, grad, result))
    error = call(family.encode(), *tensors, size, how, ctypes.c_double(slope))
    if error is not None:
        raise RuntimeError(error.decode())
    return result


def run_epilogue(emulated, grad, output, activation, slope=0.01, bias=True, channels_last=False, offset=0):
    """Returns the gradient before the activation (None without one) and the bias's."""
    n, c, h, w = grad.shape
    before = None if output is None else tensor(grad.shape, grad.dtype, channels_last, offset, fill=float("nan"))
    total = torch.full((c,), float("nan"), dtype=grad.dtype) if bias else None
    size = (ctypes.c_int64 * 3)(n, c, h * w)
    how = (ctypes.c_int * 3)(DTYPES[grad.dtype], channels_last, ACTIVATIONS.index(activation))
    call = emulated.lib.aeup_emulate_epilogue
    call.restype = ctypes.c_char_p
    error = call(*map(pointer, (grad, output, before, total)), size, how, ctypes.c_double(slope))
    if error is not None:
        raise RuntimeError(error.decode())
    return before, total
