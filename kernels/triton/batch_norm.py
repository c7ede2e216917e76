"""Batch normalisation and the activation after it on Triton kernels: forward and gradients, deterministic."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from .convolution import FLOATS, TYPES, dense, device_name, ready, run, tensor_refusal
from .convolution_plans import ACTIVATIONS, accumulator, ceil, power
from .interpolate import is_channels_last
from .plans import ITEMSIZE, LIMIT32, WIDE, Launch, Plan, configuration, vector

# Where a configuration names no other numbers: bytes that lie together for a program at least; programs, two for each
# multiprocessor of an H100.
SEGMENT, PROGRAMS = 64, 264
SMALLEST = 4096  # bytes of a tile: as long as programs are missing, tiles become smaller down to this
AT_ONCE = 4096  # partial results that are read at once


@cache
def kernels() -> dict:
    """The jitted kernels by name. Imports Triton."""
    from . import batch_norm_kernels as module

    names = ("statistics", "normalise", "sum_gradients", "input_gradient")
    return {name: getattr(module, name) for name in names}


@lru_cache(maxsize=1024)
def prepared(make, *key) -> tuple:
    return ready(make(*key), kernels())


# --- from a geometry to kernel launches: plain numbers only ---


class Norm(NamedTuple):
    """Of tensors [n, channels, plane], `nhwc`: channels innermost. `dtype` as in plans.ITEMSIZE; `weight`, `bias`:
    whether there is one; `activation`: its number."""

    n: int
    channels: int
    plane: int
    dtype: str
    nhwc: bool
    training: bool
    weight: bool
    bias: bool
    activation: int
    slope: float
    device: str


def _launch(kernel: str, p: Norm, buffers: tuple[str, ...], scalars: dict, constants: dict) -> Launch:
    """The kernel's way through the tensors: blocks of channels times ranges of positions, `steps` tiles long."""
    config = configuration(p.device, "batch_norm", kernel, "nhwc" if p.nhwc else "nchw", p.dtype)
    pixels, programs, item = p.n * p.plane, config.get("programs", PROGRAMS), ITEMSIZE[p.dtype]
    bc = min(power(ceil(config.get("segment", SEGMENT), item * (1 if p.nhwc else p.plane))), power(p.channels))
    bm = min(max(config["lanes"] * WIDE // (bc * item), 1), power(pixels))
    blocks = ceil(p.channels, bc)
    while bm * bc * item > SMALLEST and blocks * ceil(pixels, bm) < programs:
        bm //= 2
    ranges = max(programs // blocks, 1)
    if ranges * blocks * 8 < programs * 7:
        ranges = max(4 * programs // blocks, 1)  # where they do not fill the GPU at once: many, in turn
    steps = ceil(ceil(pixels, bm), ranges)
    v = vector(p.channels if p.nhwc else p.plane, WIDE // item)
    pv, cv = (1, v) if p.nhwc else (v, 1)
    way = {"pixels": pixels // pv, "plane": p.plane // pv, "channels": p.channels // cv, "blocks": blocks}
    constants = constants | {"PV": pv, "CV": cv, "NHWC": p.nhwc, "ACC": accumulator(p.dtype)}
    constants |= {"IDX64": pixels * p.channels >= LIMIT32, "BM": bm, "BC": bc}
    constants["STAGES"] = config["stages"]
    warps = min(config["warps"], max(bm * bc // (32 * v), 1))
    grid = blocks * ceil(pixels, bm * steps)
    return Launch(kernel, buffers, grid, way | {"steps": steps} | scalars, constants, warps)


def _partial(first: Launch, p: Norm) -> tuple[int, int, dict]:
    """How many partial results of a channel a launch writes, how many of them are read at once; and their buffer."""
    splits = first.grid // first.scalars["blocks"]
    rows = min(power(splits), max(AT_ONCE // first.constants["BC"], 1))
    return splits, rows, {"part": (2 * splits * p.channels, accumulator(p.dtype))}


def _of_channels(p: Norm) -> dict:
    return {"HAS_WEIGHT": p.weight, "HAS_BIAS": p.bias, "ACTIVATION": p.activation, "SLOPE": p.slope}


def forward_plan(p: Norm, tracks: bool, counts: bool, momentum: float, eps: float) -> Plan:
    """x -> y, mean, invstd; in training also the running statistics and the counter."""
    launches, splits, each, rows, scratch = [], 0, 0, 1, {}
    if p.training:
        first = _launch("statistics", p, ("x", "part"), {}, {})
        splits, rows, scratch = _partial(first, p)
        each = first.constants["BM"] * first.scalars["steps"]
        launches.append(first)
    if p.dtype == "fp64":  # as bits: a float argument of a kernel is float32
        momentum, eps = (int(np.float64(value).view(np.int64)) for value in (momentum, eps))
    buffers = ("x", "y", "weight", "bias", "running_mean", "running_var", "counter", "mean", "invstd")
    buffers += ("part" if p.training else "x",)
    scalars = {"splits": splits, "each": each, "momentum": momentum, "eps": eps}
    constants = {"TRAINING": p.training, "TRACKS": tracks, "COUNTS": counts, "BS": rows} | _of_channels(p)
    return Plan((*launches, _launch("normalise", p, buffers, scalars, constants)), scratch)


def backward_plan(p: Norm, of_input: bool, of_weight: bool, of_bias: bool) -> Plan:
    """(grad, x, mean, invstd) -> those of dx, dweight and dbias that are wanted."""
    launches, splits, rows, scratch = [], 0, 1, {}
    buffers, sums = ("grad", "x", "mean", "invstd", "weight", "bias"), p.training or of_weight or of_bias
    if sums:
        launches.append(_launch("sum_gradients", p, (*buffers, "part"), {}, _of_channels(p)))
        splits, rows, scratch = _partial(launches[0], p)
    buffers += ("dx", "dweight", "dbias", "part" if sums else "x")
    constants = {"SUMS": sums, "TRAINING": p.training, "BS": rows} | _of_channels(p)
    constants |= {"OF_INPUT": of_input, "OF_WEIGHT": of_weight, "OF_BIAS": of_bias}
    last = _launch("input_gradient", p, buffers, {"splits": splits}, constants)
    if not of_input:
        last = replace(last, grid=last.scalars["blocks"])
    return Plan((*launches, last), scratch)


# --- what these kernels serve ---


def _refusal(x, activation, **by_channel) -> str | None:
    if reason := tensor_refusal(x=x):
        return reason
    if not x.numel():
        return f"x has no elements, {tuple(x.shape)}"
    if activation not in ACTIVATIONS:
        return f"activation must be None or one of {', '.join(ACTIVATIONS[1:])}; got {activation!r}"
    arithmetic = TYPES[accumulator(FLOATS[x.dtype])]
    for name, t in by_channel.items():
        if t is None:
            continue
        served = (arithmetic,) if name in ("mean", "invstd") else dict.fromkeys((arithmetic, x.dtype))
        if t.dtype not in served:
            return f"{name} is {t.dtype}, for x of {x.dtype} it must be {' or '.join(map(str, served))}"
        if tuple(t.shape) != (x.shape[1],) or not t.is_contiguous() or t.device != x.device:
            return f"{name} must have {x.shape[1]} adjacent elements beside x, got {tuple(t.shape)} on {t.device}"
    return None


def _refuses_forward(
    x, weight, bias, running_mean, running_var, counter, training, momentum, eps, activation=None, slope=0.01
):
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    if reason := _refusal(x, activation, **given):
        return reason
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return "running_mean and running_var belong together, and are needed outside training"
    if training and x.numel() == x.shape[1]:
        return "one value per channel has no variance"
    if counter is not None and (counter.dtype is not torch.int64 or counter.numel() != 1 or counter.device != x.device):
        return f"counter must be one int64 beside x, got {tuple(counter.shape)}, {counter.dtype} on {counter.device}"
    return None


def _refuses_backward(grad, x, mean, invstd, weight, bias, training, activation, slope, wanted):
    if reason := _refusal(x, activation, mean=mean, invstd=invstd, weight=weight, bias=bias):
        return reason
    if grad.shape != x.shape or grad.device != x.device or grad.dtype is not x.dtype:
        given = f"{tuple(grad.shape)}, {grad.dtype} on {grad.device}"
        return f"grad must be like x, {tuple(x.shape)}, {x.dtype} on {x.device}; got {given}"
    return None


_REFUSES = {"batch_norm": _refuses_forward, "batch_norm_backward": _refuses_backward}


def refuses_batch_norm(name: str, *args) -> str | None:
    """Why the function `name` of this module cannot serve the call with these arguments, or None."""
    return _REFUSES[name](*args)


def _check(name: str, *args) -> None:
    if reason := refuses_batch_norm(name, *args):
        raise RuntimeError(f"aeup.kernels.{name}: {reason}")


# --- the functions ---


def _problem(x, training, weight, bias, activation, slope) -> tuple[Norm, torch.memory_format]:
    n, channels, h, w = x.shape
    plane, last = h * w, is_channels_last(x)
    nhwc = channels > 1 and (last or plane == 1)
    if channels == 1 and n * plane < LIMIT32:
        n, plane = 1, n * plane  # longer vectors
    slope = float(slope) if activation == "leaky_relu" else 0.0
    given = weight is not None, bias is not None
    key = n, channels, plane, FLOATS[x.dtype], nhwc, training, *given, ACTIVATIONS.index(activation), slope
    return Norm(*key, device_name(x)), dense(last)


def batch_norm(
    x, weight, bias, running_mean, running_var, counter, training, momentum, eps, activation=None, slope=0.01
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """activation(weight * (x - mean) / sqrt(var + eps) + bias): Ioffe & Szegedy, 2015, and the activation after it.

    Args:
        x: [N, C, H, W], not empty; float64, float32, float16 or bfloat16. Strides that are neither contiguous nor
            channels-last are copied into the format that torch suggests for them.
        weight, bias: [C] or None, of x's dtype or of the arithmetic: float64 for float64, else float32.
        running_mean, running_var: likewise; needed outside training, where they are the statistics. In `training` those
            of the batch are, and the running ones follow in place: running += momentum * (batch - running), with the
            unbiased variance.
        counter: one int64, to which training adds 1, or None.
        activation: None, "relu", "leaky_relu" (with `slope`), "silu", "gelu" (erf), "tanh" or "sigmoid".
    Returns:
        The result, of x's dtype and format; mean and 1 / sqrt(var + eps), [C], in the arithmetic's dtype. The same bits
        on every run.
    Raises:
        RuntimeError: where `refuses_batch_norm` gives a reason.
    """
    _check(
        "batch_norm", x, weight, bias, running_mean, running_var, counter, training, momentum, eps, activation, slope
    )
    p, layout = _problem(x, training, weight, bias, activation, slope)
    x = x.contiguous(memory_format=layout)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    mean, invstd = (torch.empty(x.shape[1], dtype=TYPES[accumulator(p.dtype)], device=x.device) for _ in range(2))
    in_place = {"running_mean": running_mean, "running_var": running_var, "counter": counter}
    tensors = {"x": x, "y": y, "weight": weight, "bias": bias, **in_place, "mean": mean, "invstd": invstd}
    tracks, counts = training and running_mean is not None, training and counter is not None
    plan = prepared(forward_plan, p, tracks, counts, float(momentum), float(eps))
    run(*plan, x, {name: x if t is None else t for name, t in tensors.items()})
    if counts:  # not of the running statistics, as torch: a norm may be in a graph more than once
        torch.autograd.graph.increment_version(counter)
    return y, mean, invstd


def batch_norm_backward(
    grad, x, mean, invstd, weight, bias, training, activation, slope, wanted
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of batch_norm's x, weight and bias from that of its result, [N, C, H, W].

    `mean` and `invstd` are those that batch_norm gave; `wanted` says which of the three are made, the others are empty.
    Each has the dtype of its tensor, x's also the format. Sums are float32 (float64 for float64), in an order that
    depends on the sizes alone. Raises RuntimeError where `refuses_batch_norm` gives a reason.
    """
    _check("batch_norm_backward", grad, x, mean, invstd, weight, bias, training, activation, slope, wanted)
    p, layout = _problem(x, training, weight, bias, activation, slope)
    grad, x = (t.contiguous(memory_format=layout) for t in (grad, x))
    made = {"dx": torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if wanted[0] else None}
    for name, of, want in (("dweight", weight, wanted[1]), ("dbias", bias, wanted[2])):
        dtype = mean.dtype if of is None else of.dtype
        made[name] = torch.empty(x.shape[1], dtype=dtype, device=x.device) if want else None
    if any(wanted):
        tensors = {"grad": grad, "x": x, "mean": mean, "invstd": invstd, "weight": weight, "bias": bias} | made
        plan = prepared(backward_plan, p, *map(bool, wanted))
        run(*plan, x, {name: x if t is None else t for name, t in tensors.items()})
    return tuple(x.new_empty(0) if t is None else t for t in made.values())
