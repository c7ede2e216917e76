"""Convolution of an upsampled map, the map never written, on Triton kernels: forward, its gradients, deterministic."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from .axis import TAPS
from .convolution import FLOATS, convolution_kernels, dense, device_name, ready, run, tensor_refusal
from .convolution_plans import ACTIVATIONS
from .interpolate import is_channels_last
from .plans import LIMIT32
from .upsample_conv_plans import UpsampleConv, axes_of, folded, map_plan, scales_of, weight_gradient_plan


@cache
def kernels() -> dict:
    """The jitted kernels by name. Imports Triton."""
    from . import upsample_conv_kernels as module

    names = ("fold", "transposed_table", "resample_gemm", "resample_weight_gradient")
    return convolution_kernels() | {name: getattr(module, name) for name in names}


@lru_cache(maxsize=1024)
def prepared(make, *key) -> tuple:
    return ready(make(*key), kernels())


# --- what these kernels serve ---


def _made(size, kernel, padding) -> tuple[int, int]:
    return tuple(u + 2 * p - k + 1 for u, k, p in zip(size, kernel, padding, strict=True))


def _refusal(u: UpsampleConv | str) -> str | None:
    if isinstance(u, str):
        return u
    taps = u.kernel[0] * u.kernel[1]
    if scales_of(u):
        c, _ = folded(u)
        taps = max(taps, c.vertical.kernel * c.horizontal.kernel)
    elements = u.channels_in * u.channels_out * u.groups * taps
    if elements >= LIMIT32:
        return f"a weight of {elements} elements, folded or not; at most {LIMIT32} are served"
    plane = u.made[0] * u.made[1]
    if max(u.channels_in * u.vertical.size_in * u.horizontal.size_in, u.channels_out * plane) * u.groups >= LIMIT32:
        return f"one image has {LIMIT32} elements or more"
    return None


def _problem(
    t, channels, weight_shape, groups, input_size, size, mode, align_corners, scales, padding, layouts, tf32
) -> UpsampleConv | str:
    """The geometry, or why there is none. `t` is [N, ..] in the call's type and device; `channels` are the input's and
    the result's, None where the call does not tell; `layouts`: whether maps and weight are channels-last."""
    if mode not in TAPS:
        return f"mode {mode!r} has no Triton kernel"
    co, ci, *kernel = weight_shape
    for name, values, least in (("size", size, 1), ("padding", padding, 0), ("kernel", kernel, 1)):
        if len(values) != 2 or min(values) < least:
            return f"{name} must be two numbers of at least {least}, got {tuple(values)}"
    made = _made(size, kernel, padding)
    if min(*input_size, *made, ci, co) < 1:
        return f"sizes must be positive, got input {tuple(input_size)}, result {made}, weight {tuple(weight_shape)}"
    if groups < 1 or co % groups:
        return f"groups {groups} does not divide the {co} output channels"
    for name, given, expected in zip(("input", "result"), channels, (ci * groups, co), strict=True):
        if given not in (None, expected):
            return f"the {name} has {given} channels, weight and groups say {expected}"
    axes = axes_of(tuple(input_size), tuple(size), mode, bool(align_corners), scales, t.dtype is torch.float64)
    device = device_name(t)
    cast = device == "interpreter" and t.dtype.itemsize == 2
    key = (t.shape[0], ci, co // groups, groups, *axes, tuple(kernel), tuple(padding), made, FLOATS[t.dtype], *layouts)
    return UpsampleConv(*key, tf32, device, cast)


def _forward_problem(
    input, weight, bias, size, mode, align_corners, scale_h, scale_w, padding, groups, activation, slope, tf32=False
) -> UpsampleConv | str:
    if reason := tensor_refusal(input=input, weight=weight, bias=bias):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation must be None or one of {', '.join(ACTIVATIONS[1:])}; got {activation!r}"
    if bias is not None and bias.shape[0] != weight.shape[0]:
        return f"bias has {bias.shape[0]} elements, the result {weight.shape[0]} channels"
    weight_nhwc = is_channels_last(weight)
    layouts = (weight_nhwc or is_channels_last(input), weight_nhwc)
    shape = ((input.shape[1], None), weight.shape, groups, input.shape[2:])
    return _problem(input, *shape, size, mode, align_corners, (scale_h, scale_w), padding, layouts, tf32)


def _input_problem(
    grad, weight, input_size, size, mode, align_corners, scale_h, scale_w, padding, groups, tf32=False
) -> UpsampleConv | str:
    if reason := tensor_refusal(grad=grad, weight=weight):
        return reason
    weight_nhwc = is_channels_last(weight)
    layouts = (weight_nhwc or is_channels_last(grad), weight_nhwc)
    shape = ((None, grad.shape[1]), weight.shape, groups, input_size)
    u = _problem(grad, *shape, size, mode, align_corners, (scale_h, scale_w), padding, layouts, tf32)
    return u if isinstance(u, str) else _checked_grad(grad, u)


def _weight_problem(
    grad, input, kernel_size, size, mode, align_corners, scale_h, scale_w, padding, groups, tf32=False
) -> UpsampleConv | str:
    if reason := tensor_refusal(grad=grad, input=input):
        return reason
    if grad.shape[0] != input.shape[0]:
        return f"grad has batch {grad.shape[0]} and input {input.shape[0]}"
    if groups < 1 or input.shape[1] % groups:
        return f"groups {groups} does not divide the {input.shape[1]} input channels"
    nhwc = is_channels_last(grad) or is_channels_last(input)
    weight_shape = (grad.shape[1], input.shape[1] // groups, *kernel_size)
    shape = ((None, None), weight_shape, groups, input.shape[2:])
    u = _problem(input, *shape, size, mode, align_corners, (scale_h, scale_w), padding, (nhwc, nhwc), tf32)
    return u if isinstance(u, str) else _checked_grad(grad, u)


def _checked_grad(grad, u: UpsampleConv) -> UpsampleConv | str:
    made = tuple(grad.shape[2:])
    return u if made == u.made else f"grad has {made} pixels, the arguments say {u.made}"


_PROBLEMS = {
    "upsample_conv2d": _forward_problem,
    "upsample_conv2d_input_gradient": _input_problem,
    "upsample_conv2d_weight_gradient": _weight_problem,
}


def refuses_upsample_conv2d(pass_name: str, *args, **kwargs) -> str | None:
    """Why the function `pass_name` of this module cannot serve the call with these arguments, or None."""
    return _refusal(_PROBLEMS[pass_name](*args, **kwargs))


def _checked(pass_name: str, *args) -> UpsampleConv:
    u = _PROBLEMS[pass_name](*args)
    if reason := _refusal(u):
        raise RuntimeError(f"aeup.kernels.{pass_name}: {reason}")
    return u


# --- the functions ---


def upsample_conv2d(
    input, weight, bias, size, mode, align_corners, scale_h, scale_w, padding, groups, activation, slope, tf32=False
) -> torch.Tensor:
    """activation(conv2d(interpolate(input, size), weight, bias, padding=padding)), in one pass over the input.

    Args:
        input: [N, C, H, W]; float64, float32, float16 or bfloat16. 16-bit types accumulate in float32.
        weight: [K, C / groups, kh, kw], contiguous or channels-last (read in place), else copied.
        bias: [K] or None.
        size: (UH, UW), the pixels of the upsampled map.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic" (Keys 1981, a = -0.75), clamped at the borders.
        align_corners: as in torch.nn.functional.interpolate.
        scale_h, scale_w: the scale factors that torch passes on to its operator, or None.
        padding: (h, w), zeros around the upsampled map.
        activation: None, "relu", "leaky_relu" (with `slope`), "silu", "gelu" (erf), "tanh" or "sigmoid".
        tf32: whether float32 may be multiplied in tf32; if not, three tf32 products give float32's accuracy.
    Returns:
        [N, K, UH + 2 ph - kh + 1, UW + 2 pw - kw + 1], channels-last where torch suggests that for input or weight.
    Raises:
        RuntimeError: where `refuses_upsample_conv2d` gives a reason.
    """
    args = (input, weight, bias, size, mode, align_corners, scale_h, scale_w, padding, groups, activation, slope, tf32)
    u = _checked("upsample_conv2d", *args)
    shape = (u.n, u.channels_out * u.groups, *u.made)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=dense(u.nhwc))
    if not out.numel():
        return out
    input, weight = input.contiguous(memory_format=dense(u.nhwc)), weight.contiguous(memory_format=dense(u.weight_nhwc))
    slope = float(slope) if activation == "leaky_relu" else 0.0
    plan = prepared(map_plan, u, False, bias is not None, ACTIVATIONS.index(activation), slope)
    bias = out if bias is None else bias.contiguous()
    run(*plan, input, {"x": input, "given": weight, "bias": bias, "y": out})
    return out


def upsample_conv2d_input_gradient(
    grad, weight, input_size, size, mode, align_corners, scale_h, scale_w, padding, groups, tf32=False
) -> torch.Tensor:
    """The gradient of upsample_conv2d's input, from that of its result.

    `input_size` is (H, W); the result is [N, C, H, W], channels-last where torch suggests that for grad or weight.
    Gathered: one write per element, the same bits each time. Raises RuntimeError where `refuses_upsample_conv2d` gives
    a reason.
    """
    args = (grad, weight, input_size, size, mode, align_corners, scale_h, scale_w, padding, groups, tf32)
    u = _checked("upsample_conv2d_input_gradient", *args)
    shape = (u.n, u.channels_in * u.groups, *input_size)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=dense(u.nhwc))
    if not out.numel():
        return out
    grad, weight = grad.contiguous(memory_format=dense(u.nhwc)), weight.contiguous(memory_format=dense(u.weight_nhwc))
    run(*prepared(map_plan, u, True), grad, {"x": grad, "given": weight, "bias": out, "y": out})
    return out


def upsample_conv2d_weight_gradient(
    grad, input, kernel_size, size, mode, align_corners, scale_h, scale_w, padding, groups, tf32=False
) -> torch.Tensor:
    """The gradient of upsample_conv2d's weight, [K, C / groups, kh, kw], channels-last where grad or input is.

    Sums are float32 (float64 for float64), in an order that depends on the sizes alone, and rounded once. Raises
    RuntimeError where `refuses_upsample_conv2d` gives a reason.
    """
    args = (grad, input, kernel_size, size, mode, align_corners, scale_h, scale_w, padding, groups, tf32)
    u = _checked("upsample_conv2d_weight_gradient", *args)
    shape = (u.channels_out * u.groups, u.channels_in, *kernel_size)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=dense(u.nhwc))
    if not u.n:
        return out.zero_()
    grad, input = (t.contiguous(memory_format=dense(u.nhwc)) for t in (grad, input))
    run(*prepared(weight_gradient_plan, u), input, {"x": input, "grad": grad, "dw": out})
    return out
