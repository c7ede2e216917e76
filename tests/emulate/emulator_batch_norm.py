"""Runs the emulated kernels of batch normalisation on CPU tensors (see emulator.py)."""

import ctypes

import torch

from .emulator import DTYPES, tensor
from .emulator_convolution import ACTIVATIONS, call, pointer


def _call(emulated, name, read, written, x, of, channels_last, training, activation, slope, momentum, eps, blocks):
    n, c, h, w = x.shape
    size = (ctypes.c_int64 * 4)(n, c, h * w, blocks)
    narrow = of not in (torch.float32, torch.float64)
    how = (ctypes.c_int * 5)(DTYPES[x.dtype], channels_last, training, ACTIVATIONS.index(activation), narrow)
    pointers = [(ctypes.c_void_p * len(ts))(*map(pointer, ts)) for ts in (read, written)]
    call(emulated, name, *pointers, size, how, (ctypes.c_double * 3)(slope, momentum, eps))


def _nan(like, c):
    return torch.full((c,), float("nan"), dtype=like)


def run(
    emulated, x, weight, bias, mean, var, counter, *, channels_last, training=True, activation="none", slope=0.01,
    momentum=0.1, eps=1e-5, blocks=0, offset=0,
):  # fmt: skip
    """Returns output, mean, invstd and, as they are next, running mean, running variance and counter."""
    of = torch.float64 if x.dtype is torch.float64 else torch.float32
    like = next((t.dtype for t in (weight, bias, mean, var) if t is not None), of)
    next_ = [None if t is None or not training else _nan(like, x.shape[1]) for t in (mean, var)]
    next_counter = None if counter is None else torch.full_like(counter, -1)
    y = tensor(x.shape, x.dtype, channels_last, offset, fill=float("nan"))
    written = y, _nan(of, x.shape[1]), _nan(of, x.shape[1]), *next_, next_counter
    _call(
        emulated, "aeup_emulate_batch_norm", (x, weight, bias, mean, var, counter), written, x, like, channels_last,
        training, activation, slope, momentum, eps, blocks,
    )  # fmt: skip
    return written


def run_backward(
    emulated, x, grad, mean, invstd, weight, bias, *, channels_last, training=True, activation="none", slope=0.01,
    blocks=0, wanted=(True, True, True), offset=0,
):  # fmt: skip
    """Returns the gradients of input, weight and bias, None where they are not wanted."""
    dx = tensor(x.shape, x.dtype, channels_last, offset, fill=float("nan")) if wanted[0] else None
    like = next((t.dtype for t in (weight, bias) if t is not None), mean.dtype)
    written = dx, *(_nan(like, x.shape[1]) if want else None for want in wanted[1:])
    _call(
        emulated, "aeup_emulate_batch_norm_backward", (x, grad, mean, invstd, weight, bias), written, x, like,
        channels_last, training, activation, slope, 0.0, 0.0, blocks,
    )  # fmt: skip
    return written
