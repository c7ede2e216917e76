"""Runs the emulated kernels of group normalisation on CPU tensors (see emulator.py)."""

import ctypes

import torch

from .emulator import DTYPES, tensor
from .emulator_convolution import ACTIVATIONS, call, pointer


def _call(emulated, name, read, written, x, of, groups, channels_last, activation, slope, eps, blocks):
    n, c, h, w = x.shape
    size = (ctypes.c_int64 * 5)(n, c, h * w, groups, blocks)
    narrow = of not in (torch.float32, torch.float64)
    how = (ctypes.c_int * 4)(DTYPES[x.dtype], channels_last, ACTIVATIONS.index(activation), narrow)
    pointers = [(ctypes.c_void_p * len(ts))(*map(pointer, ts)) for ts in (read, written)]
    call(emulated, name, *pointers, size, how, (ctypes.c_double * 2)(slope, eps))


def _nan(like, size):
    return torch.full((size,), float("nan"), dtype=like)


def run(
    emulated, x, weight, bias, groups, *, channels_last, activation="none", slope=0.01, eps=1e-5, blocks=0, offset=0
):
    """Returns output, mean and invstd."""
    of = torch.float64 if x.dtype is torch.float64 else torch.float32
    like = next((t.dtype for t in (weight, bias) if t is not None), of)
    y = tensor(x.shape, x.dtype, channels_last, offset, fill=float("nan"))
    written = y, *(_nan(of, x.shape[0] * groups) for _ in range(2))
    how = groups, channels_last, activation, slope, eps, blocks
    _call(emulated, "aeup_emulate_group_norm", (x, weight, bias), written, x, like, *how)
    return written


def run_backward(
    emulated, x, grad, mean, invstd, weight, bias, groups, *, channels_last, activation="none", slope=0.01,
    blocks=0, wanted=(True, True, True), offset=0,
):  # fmt: skip
    """Returns the gradients of input, weight and bias, None where they are not wanted."""
    dx = tensor(x.shape, x.dtype, channels_last, offset, fill=float("nan")) if wanted[0] else None
    like = next((t.dtype for t in (weight, bias) if t is not None), mean.dtype)
    written = dx, *(_nan(like, x.shape[1]) if want else None for want in wanted[1:])
    how = groups, channels_last, activation, slope, 0.0, blocks
    read = x, grad, mean, invstd, weight, bias
    _call(emulated, "aeup_emulate_group_norm_backward", read, written, x, like, *how)
    return written
