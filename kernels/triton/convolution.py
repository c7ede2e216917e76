"""2-D transposed convolution on Triton kernels: forward with bias and activation, its gradients, deterministic."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from .convolution_plans import (
    ACTIVATIONS,
    Axis,
    Convolution,
    epilogue_plan,
    gemm_plan,
    weight_plan,
)
from .interpolate import DTYPES, SCRATCH, _device, _has_triton, constants_of, interpreted, is_channels_last
from .plans import LIMIT32

FLOATS = {dtype: name for dtype, name in DTYPES.items() if dtype.is_floating_point}
TYPES = {name: dtype for dtype, name in DTYPES.items()} | SCRATCH
MOST_PROGRAMS = (1 << 31) - 1


@cache
def convolution_kernels() -> dict:
    """The jitted kernels by name. Imports Triton."""
    from . import convolution_kernels as module

    names = ("phase_gemm", "weight_gradient", "sum_partials", "epilogue_gradient", "transpose")
    return {name: getattr(module, name) for name in names}


def ready(plan, kernels: dict) -> tuple:
    """The plan, and its launches as they are called: (kernel, buffers, grid, scalars, options)."""
    launches = []
    for launch in plan.launches:
        options = constants_of(launch) | {"num_warps": launch.warps}
        scalars = tuple(launch.scalars.values())
        launches.append((kernels[launch.kernel], launch.buffers, (launch.grid, 1, 1), scalars, options))
    return plan, tuple(launches)


@lru_cache(maxsize=1024)
def prepared(make, *key) -> tuple:
    return ready(make(*key), convolution_kernels())


def run(plan, launches, like: torch.Tensor, tensors: dict) -> None:
    on_gpu = like.device.type == "cuda"
    if on_gpu and torch.cuda.current_device() != like.device.index:
        with torch.cuda.device(like.device):
            return run(plan, launches, like, tensors)
    for name, (elements, kind) in plan.scratch.items():
        tensors[name] = torch.empty(elements, dtype=TYPES[kind], device=like.device)
    for kernel, buffers, grid, scalars, options in launches:
        kernel[grid](*[tensors[name] for name in buffers], *scalars, **options)


# --- what these kernels serve ---


def tensor_refusal(**tensors) -> str | None:
    if not _has_triton():
        return "the package triton is not installed"
    first_name, first = next(iter(tensors.items()))
    if first.device.type == "cuda":
        name, capability = _device(first.device.index)
        if capability < (8, 0):
            return f"Triton kernels need compute capability 8.0 or newer; {name} has {capability[0]}.{capability[1]}"
    elif first.device.type != "cpu" or not interpreted():
        return f"Triton kernels need a CUDA tensor, got one on {first.device.type}"
    if first.dtype not in FLOATS:
        return f"dtype {first.dtype} has no Triton kernel"
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype != first.dtype:
            return f"{name} is {t.dtype} and {first_name} is {first.dtype}"
        if t.device != first.device:
            return f"{name} is on {t.device} and {first_name} on {first.device}"
        if t.ndim != (1 if name == "bias" else 4):
            return f"{name} must be {1 if name == 'bias' else 4}-D here, got {t.ndim}-D"
        if name != "weight" and t.ndim == 4 and t.shape[1] * t.shape[2] * t.shape[3] >= LIMIT32:
            return (
                f"one image of {name} has {t.shape[1] * t.shape[2] * t.shape[3]} elements, at most {LIMIT32} are served"
            )
    return None


def output_size(size, kernel, stride, padding, output_padding, dilation) -> int:
    """Dumoulin & Visin, relationship 14, with dilation."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def _geometry_refusal(size, made, weight_shape, stride, padding, groups, dilation) -> str | None:
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            return f"{name} must be two numbers of at least {least}, got {tuple(values)}"
    ci, co, *kernel = weight_shape
    if groups < 1 or ci % groups:
        return f"groups {groups} does not divide the {ci} input channels"
    if min(ci, *size, *kernel) < 1 or (made is not None and min(made) < 1):
        return f"sizes must be positive, got input {tuple(size)}, output {made}, kernel {tuple(kernel)}, {ci} channels"
    if ci * co * kernel[0] * kernel[1] >= LIMIT32:
        return f"a weight of {ci * co * kernel[0] * kernel[1]} elements, at most {LIMIT32} are served"
    return None


def _refuses_forward(
    input, weight, bias, stride, padding, output_padding, groups, dilation, activation=None, slope=0.01, *, tf32=False
):
    if reason := tensor_refusal(input=input, weight=weight, bias=bias):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation must be None or one of {', '.join(ACTIVATIONS[1:])}; got {activation!r}"
    if input.shape[1] != weight.shape[0]:
        return f"input has {input.shape[1]} channels and weight {weight.shape[0]}"
    if bias is not None and bias.shape[0] != weight.shape[1] * groups:
        return f"bias has {bias.shape[0]} elements, the result {weight.shape[1] * groups} channels"
    made = _made(input, weight, stride, padding, output_padding, dilation)
    if reason := _geometry_refusal(input.shape[2:], made, weight.shape, stride, padding, groups, dilation):
        return reason
    if weight.shape[1] * groups * made[0] * made[1] >= LIMIT32:
        return f"one image of the result has {LIMIT32} elements or more"
    return None


def _made(input, weight, stride, padding, output_padding, dilation) -> tuple[int, int]:
    of = zip(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, strict=True)
    return tuple(output_size(*axis) for axis in of)


def _refuses_input_gradient(grad_output, weight, input_size, stride, padding, groups, dilation, *, tf32=False):
    if reason := tensor_refusal(grad_output=grad_output, weight=weight):
        return reason
    if reason := _geometry_refusal(input_size, grad_output.shape[2:], weight.shape, stride, padding, groups, dilation):
        return reason
    if grad_output.shape[1] != weight.shape[1] * groups:
        return f"grad_output has {grad_output.shape[1]} channels, weight and groups say {weight.shape[1] * groups}"
    if weight.shape[0] * input_size[0] * input_size[1] >= LIMIT32:
        return f"one image of the result has {LIMIT32} elements or more"
    return None


def _refuses_conv2d(input, weight, bias, stride, padding, groups, dilation, activation=None, slope=0.01, *, tf32=False):
    if reason := tensor_refusal(input=input, weight=weight, bias=bias):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation must be None or one of {', '.join(ACTIVATIONS[1:])}; got {activation!r}"
    if bias is not None and bias.shape[0] != weight.shape[0]:
        return f"bias has {bias.shape[0]} elements, the result {weight.shape[0]} channels"
    if input.shape[1] != weight.shape[1] * groups:
        return f"input has {input.shape[1]} channels, weight and groups say {weight.shape[1] * groups}"
    if min(stride) < 1:
        return f"stride must be two numbers of at least 1, got {tuple(stride)}"
    size = _convolved(input, weight, stride, padding, dilation)
    return _refuses_input_gradient(input, weight, size, stride, padding, groups, dilation)


def _convolved(input, weight, stride, padding, dilation) -> tuple[int, int]:
    of = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in of)


def _refuses_weight_gradient(grad_output, input, kernel_size, stride, padding, groups, dilation, *, tf32=False):
    if reason := tensor_refusal(grad_output=grad_output, input=input):
        return reason
    if groups < 1 or grad_output.shape[1] % groups:
        return f"groups {groups} does not divide the {grad_output.shape[1]} output channels"
    if grad_output.shape[0] != input.shape[0]:
        return f"grad_output has batch {grad_output.shape[0]} and input {input.shape[0]}"
    shape = (input.shape[1], grad_output.shape[1] // groups, *kernel_size)
    return _geometry_refusal(input.shape[2:], grad_output.shape[2:], shape, stride, padding, groups, dilation)


def _refuses_epilogue(grad_output, output, activation, slope, bias):
    if reason := tensor_refusal(grad_output=grad_output, output=output):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation must be None or one of {', '.join(ACTIVATIONS[1:])}; got {activation!r}"
    if activation is not None and (output is None or output.shape != grad_output.shape):
        return f"activation {activation!r} needs `output` in the shape of grad_output {tuple(grad_output.shape)}"
    return None


_REFUSES = {
    "conv2d": _refuses_conv2d,
    "conv_transpose2d": _refuses_forward,
    "conv_transpose2d_input_gradient": _refuses_input_gradient,
    "conv_transpose2d_weight_gradient": _refuses_weight_gradient,
    "conv_epilogue_gradient": _refuses_epilogue,
}


def refuses_convolution(name: str, *args, **kwargs) -> str | None:
    """Why the function `name` of this module cannot serve the call with these arguments, or None."""
    return _REFUSES[name](*args, **kwargs)


def _check(name: str, *args, **kwargs) -> None:
    if reason := _REFUSES[name](*args, **kwargs):
        raise RuntimeError(f"aeup.kernels.{name}: {reason}")


# --- the functions ---


def device_name(t: torch.Tensor) -> str:
    return _device(t.device.index)[0] if t.device.type == "cuda" else "interpreter"


def dense(nhwc: bool) -> torch.memory_format:
    return torch.channels_last if nhwc else torch.contiguous_format


def _convolution(t, n, weight_shape, groups, size, made, stride, padding, dilation, nhwc, weight_nhwc, tf32):
    ci, co, kh, kw = weight_shape
    device = device_name(t)
    axes = (Axis(*a) for a in zip(size, made, (kh, kw), stride, padding, dilation, strict=True))
    cast = device == "interpreter" and t.dtype.itemsize == 2
    return Convolution(n, ci // groups, co, groups, *axes, FLOATS[t.dtype], nhwc, weight_nhwc, tf32, device, cast)


def conv_transpose2d(
    input, weight, bias, stride, padding, output_padding, groups, dilation, activation=None, slope=0.01, *, tf32=False
) -> torch.Tensor:
    """activation(conv_transpose2d(input, weight) + bias), torch's arguments as pairs (h, w).

    Args:
        input: [N, C, H, W]; float64, float32, float16 or bfloat16. 16-bit types accumulate in float32.
        weight: [C, K / groups, kh, kw], contiguous or channels-last (read in place), else copied.
        bias: [K] or None.
        activation: None, "relu", "leaky_relu" (with `slope`), "silu", "gelu" (erf), "tanh" or "sigmoid".
        tf32: whether float32 may be multiplied in tf32; if not, three tf32 products give float32's accuracy.
    Returns:
        [N, K, OH, OW], OH = (H - 1) * stride - 2 * padding + dilation * (kh - 1) + output_padding + 1; channels-last
        where torch suggests that for input or weight.
    Raises:
        RuntimeError: where `refuses_convolution` gives a reason.
    """
    args = (input, weight, bias, stride, padding, output_padding, groups, dilation, activation, slope)
    _check("conv_transpose2d", *args, tf32=tf32)
    n = input.shape[0]
    made = _made(input, weight, stride, padding, output_padding, dilation)
    weight_nhwc = is_channels_last(weight)
    nhwc = weight_nhwc or is_channels_last(input)
    input, weight = input.contiguous(memory_format=dense(nhwc)), weight.contiguous(memory_format=dense(weight_nhwc))
    shape = (n, weight.shape[1] * groups, *made)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=dense(nhwc))
    if not out.numel():
        return out
    size = input.shape[2:]
    c = _convolution(input, n, weight.shape, groups, size, made, stride, padding, dilation, nhwc, weight_nhwc, tf32)
    slope = float(slope) if activation == "leaky_relu" else 0.0
    plan = prepared(gemm_plan, c, False, bias is not None, ACTIVATIONS.index(activation), slope)
    bias = out if bias is None else bias.contiguous()
    run(*plan, input, {"x": input, "w": weight, "bias": bias, "y": out})
    return out


def conv_transpose2d_input_gradient(
    grad_output, weight, input_size, stride, padding, groups, dilation, *, tf32=False
) -> torch.Tensor:
    """The gradient of conv_transpose2d's input: a convolution of `grad_output` [N, K, OH, OW] with `stride`.

    `input_size` is (H, W); the result is [N, C, H, W], channels-last where torch suggests that for grad_output or
    weight. Raises RuntimeError where `refuses_convolution` gives a reason.
    """
    args = (grad_output, weight, input_size, stride, padding, groups, dilation)
    _check("conv_transpose2d_input_gradient", *args, tf32=tf32)
    return _back(*args, tf32)


def conv2d(
    input, weight, bias, stride, padding, groups, dilation, activation=None, slope=0.01, *, tf32=False
) -> torch.Tensor:
    """activation(conv2d(input, weight) + bias): the kernel of conv_transpose2d_input_gradient, with its epilogue.

    input [N, C, H, W], weight [K, C / groups, kh, kw], bias [K] or None; the result is [N, K, OH, OW]. The rest as in
    `conv_transpose2d`.
    """
    _check("conv2d", input, weight, bias, stride, padding, groups, dilation, activation, slope, tf32=tf32)
    size = _convolved(input, weight, stride, padding, dilation)
    return _back(input, weight, size, stride, padding, groups, dilation, tf32, bias, activation, slope)


def _back(
    grad_output, weight, input_size, stride, padding, groups, dilation, tf32, bias=None, activation=None, slope=0.01
) -> torch.Tensor:
    n, made = grad_output.shape[0], grad_output.shape[2:]
    weight_nhwc = is_channels_last(weight)
    nhwc = weight_nhwc or is_channels_last(grad_output)
    grad = grad_output.contiguous(memory_format=dense(nhwc))
    weight = weight.contiguous(memory_format=dense(weight_nhwc))
    shape = (n, weight.shape[0], *input_size)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=dense(nhwc))
    if not out.numel():
        return out
    if not grad.numel():
        return out.zero_()
    size = tuple(input_size)
    c = _convolution(grad, n, weight.shape, groups, size, made, stride, padding, dilation, nhwc, weight_nhwc, tf32)
    slope = float(slope) if activation == "leaky_relu" else 0.0
    plan = prepared(gemm_plan, c, True, bias is not None, ACTIVATIONS.index(activation), slope)
    bias = out if bias is None else bias.contiguous()
    run(*plan, grad, {"x": grad, "w": weight, "bias": bias, "y": out})
    return out


def conv_transpose2d_weight_gradient(
    grad_output, input, kernel_size, stride, padding, groups, dilation, *, tf32=False
) -> torch.Tensor:
    """The gradient of conv_transpose2d's weight: [C, K / groups, kh, kw] from grad_output [N, K, OH, OW] and input
    [N, C, H, W], channels-last where either is.

    The pixels are split in ranges, whose partial sums (float32; float64 for float64) are added in an order that depends
    on the sizes alone. Raises RuntimeError where `refuses_convolution` gives a reason.
    """
    args = (grad_output, input, kernel_size, stride, padding, groups, dilation)
    _check("conv_transpose2d_weight_gradient", *args, tf32=tf32)
    nhwc = is_channels_last(grad_output) or is_channels_last(input)
    grad, input = (t.contiguous(memory_format=dense(nhwc)) for t in (grad_output, input))
    shape = (input.shape[1], grad.shape[1] // groups, *kernel_size)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=dense(nhwc))
    if not out.numel():
        return out
    if not input.numel() or not grad.numel():
        return out.zero_()
    n, size, made = input.shape[0], input.shape[2:], grad.shape[2:]
    c = _convolution(input, n, shape, groups, size, made, stride, padding, dilation, nhwc, nhwc, tf32)
    plan = prepared(weight_plan, c)
    run(*plan, input, {"x": input, "grad": grad, "y": out})
    return out


def conv_epilogue_gradient(
    grad_output, output, activation=None, slope=0.01, bias=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient before the activation, and the bias gradient [K], in one pass over grad_output [N, K, OH, OW].

    `output` is what the activation gave; for silu and gelu, whose derivative it does not tell, what it got; None
    without an activation, where the first result is `grad_output` itself. Without `bias` the second is empty [0].
    Sums are float32 (float64 for float64), in an order that depends on the sizes alone. Raises RuntimeError where
    `refuses_convolution` gives a reason.
    """
    _check("conv_epilogue_gradient", grad_output, output, activation, slope, bias)
    n, channels, *plane = grad_output.shape
    nhwc = is_channels_last(grad_output)
    sums = torch.empty(channels if bias else 0, dtype=grad_output.dtype, device=grad_output.device)
    if activation is None and not bias:
        return grad_output, sums
    if not grad_output.numel():
        return grad_output if activation is None else torch.empty_like(grad_output), sums.zero_()
    grad = grad_output.contiguous(memory_format=dense(nhwc))
    result, output = grad_output, grad if activation is None else output.contiguous(memory_format=dense(nhwc))
    if activation is not None:
        result = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=dense(nhwc))
    slope = float(slope) if activation == "leaky_relu" else 0.0
    device = device_name(grad)
    innermost = channels > 1 and (nhwc or plane[0] * plane[1] == 1)
    key = (n, channels, plane[0] * plane[1], FLOATS[grad.dtype], innermost, ACTIVATIONS.index(activation), slope, bias)
    plan = prepared(epilogue_plan, *key, device)
    run(*plan, grad, {"grad": grad, "output": output, "y": result, "bias": sums})
    return result, sums
