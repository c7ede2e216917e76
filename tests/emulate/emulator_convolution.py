"""Runs the emulated convolution kernels on CPU tensors (see emulator.py)."""

import ctypes

import torch

from .emulator import DTYPES, explained, tensor

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def pointers(result, input=None, weight=None, bias=None, grad=None):
    """The tensors of a pass, as every entry point of a convolution takes them."""
    return map(pointer, (input, weight, bias, grad, result))


def call(emulated, name, *arguments):
    """Calls an entry point of the emulator: it returns null or what went wrong."""
    entry = getattr(emulated.lib, name)
    entry.restype = ctypes.c_char_p
    error = entry(*arguments)
    if error is not None:
        raise explained(error, emulated.lib._name)


def run_sizes(
    emulated,
    name,
    family,
    which,
    result,
    sizes,
    *,
    channels_last,
    weight_channels_last,
    tf32=False,
    activation="none",
    slope=0.01,
    share=False,
    **tensors,
):
    """Fill ``result`` by entry point ``name``. sizes: its integers; tensors: what the pass reads of input, weight, bias
    and grad, dense in the layouts named. share: the gradient in the form that both gradients share."""
    flags = channels_last, weight_channels_last, tf32, ACTIVATIONS.index(activation), share
    how = (ctypes.c_int * 7)(which, DTYPES[result.dtype], *flags)
    size = (ctypes.c_int64 * len(sizes))(*sizes)
    call(emulated, name, family.encode(), *pointers(result, **tensors), size, how, ctypes.c_double(slope))
    return result


def run(emulated, family, which, result, *, shapes, stride, padding, dilation, groups, **how):
    """A transposed convolution. shapes: input, weight, output; how: see run_sizes."""
    (n, ci, ih, iw), (_, _, kh, kw), (_, co, oh, ow) = shapes
    sizes = (n, ci, co, ih, iw, oh, ow, kh, kw, *stride, *padding, *dilation, groups)
    return run_sizes(emulated, "aeup_emulate_convolution", family, which, result, sizes, **how)


def run_epilogue(emulated, grad, output, activation, slope=0.01, bias=True, channels_last=False, offset=0, pitch=0):
    """Returns the gradient before the activation (None without one) and the bias's. pitch: the gradient before the
    activation as rows of so many channels [n, pitch, h, w], whatever the activation."""
    n, c, h, w = grad.shape
    before = None
    if pitch or output is not None:
        shape, nhwc = ((n, pitch, h, w), True) if pitch else (grad.shape, channels_last)
        before = tensor(shape, grad.dtype, nhwc, offset, fill=float("nan"))
    total = torch.full((c,), float("nan"), dtype=grad.dtype) if bias else None
    size = (ctypes.c_int64 * 4)(n, c, h * w, pitch * grad.element_size())
    how = (ctypes.c_int * 3)(DTYPES[grad.dtype], channels_last, ACTIVATIONS.index(activation))
    tensors = map(pointer, (grad, output, before, total))
    call(emulated, "aeup_emulate_epilogue", *tensors, size, how, ctypes.c_double(slope))
    return before, total
