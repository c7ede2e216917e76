"""The backends of the transposed convolution: for each of its maps the kernels, why not, and torch's own operators.

The arguments of the maps' kernels: Y (x, w, bias, geometry, activation, slope), X (grad, w, geometry),
W (grad, x, geometry, w or None: the tensor whose layout the result shall have). The epilogue's: (grad, output,
activation, slope, bias).
"""

import torch
from torch import Tensor

from aeup.backends import Kernel, Op
from aeup.ops import compiled, conv_cpu, epilogue
from aeup.ops.conv_shapes import Geometry, W, X, Y
from aeup.ops.conv_torch import torch_w, torch_x, torch_y
from aeup.ops.epilogue import NUMBER

_LAST = torch.channels_last


# --- cuda: the compiled extension ---


def _forward_args(g: Geometry) -> tuple:
    return (*g.stride, *g.padding, *g.output_padding, g.groups, *g.dilation)


def _cuda_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    return compiled.call(
        "conv_transpose2d", x, w, bias, *_forward_args(g), NUMBER[activation], slope, compiled.tf32(x), ""
    )


def _cuda_plan(x, w, bias, g: Geometry, activation, slope):
    args = (*_forward_args(g), NUMBER[activation], slope, compiled.tf32(x))
    return compiled.planned("conv_transpose2d", x, w, *args)


def _cuda_x(grad, w, g: Geometry) -> Tensor:
    args = (g.ih, g.iw, g.sh, g.sw, g.ph, g.pw, g.groups, g.dh, g.dw, compiled.tf32(grad), "")
    return compiled.call("conv_transpose2d_input_gradient", grad, w, *args)


def _cuda_w(grad, x, g: Geometry, w) -> Tensor:
    if w is None:
        layout = _LAST if compiled.either_last(grad, x) else torch.contiguous_format
        shape = (g.ci, g.co // g.groups, g.kh, g.kw)
        w = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    args = (g.sh, g.sw, g.ph, g.pw, g.groups, g.dh, g.dw, compiled.tf32(grad), "")
    return compiled.call("conv_transpose2d_weight_gradient", grad, x, w, *args)


def _cuda_epilogue(grad, output, activation, slope, bias):
    return compiled.call("conv_epilogue_gradient", grad, output, NUMBER[activation], slope, bias)


def cuda_backward(grad, x, w, y, g: Geometry, activation, slope, needs) -> tuple:
    """The gradients of x, w and bias that `needs` asks for, else None, in one call of the extension."""
    args = (*g.stride, *g.padding, g.groups, *g.dilation, NUMBER[activation], slope, compiled.tf32(grad), *needs)
    found = compiled.call("conv_transpose2d_backward", grad, x, w, y if activation else None, *args)
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def cuda_refusal(t: Tensor, name: str, g: Geometry | None = None) -> str | None:
    reason = compiled.refusal(t, name)
    return reason or ("a size is 2^30 or more" if g is not None and max(g[:15]) >= 2**30 else None)


_PASSES = {Y: "forward", X: "input_gradient", W: "weight_gradient"}  # numbered in this order by the extension


def _empty_operands(g: Geometry, n: int, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    """x and w on the meta device."""
    layout = _LAST if last else torch.contiguous_format
    shapes = (n, g.ci, g.ih, g.iw), (g.ci, g.co // g.groups, g.kh, g.kw)
    return tuple(torch.empty(shape, dtype=dtype, device="meta", memory_format=layout) for shape in shapes)


def _families(kind: int, x: Tensor, w: Tensor, g: Geometry, tf32: bool, device) -> str:
    """The family of kernels that would serve, and in brackets why the ones before it would not."""
    args = (list(_PASSES).index(kind), tf32, *compiled.capability(device))
    return torch.ops.aeup_native.conv_transpose2d_kernel.default(x, w, *_forward_args(g), *args)


def _label(kind: int):
    def label(device, a, b, *rest) -> str:
        g = next(r for r in rest if isinstance(r, Geometry))
        last = a.is_contiguous(memory_format=_LAST) and not a.is_contiguous()
        x, w = _empty_operands(g, a.shape[0], a.dtype, last)
        x, w = {Y: (a, b), X: (x, b), W: (b, w)}[kind]
        return _families(kind, x, w, g, compiled.tf32(a), device)

    return label


# --- for the tuned tables ---


def _problem(kind: int):
    def problem(a, b, *rest) -> tuple:
        g, bias = (rest[1], rest[0] is not None) if kind == Y else (rest[0], False)
        last = not (a.is_contiguous() and b.is_contiguous()) and compiled.either_last(a, b)
        return g, a.shape[0], a.dtype, compiled.tf32(a), last, bias

    return problem


def _features(kind: int):
    def features(problem: tuple, device: torch.device) -> dict:
        """`pixels`: of the input. `family`: of the extension's kernels; on a CPU, the cpu backend's way."""
        g, n, dtype, tf32, last, bias = problem
        family = ""
        if device.type == "cpu":
            family = conv_cpu.way(kind, g, n, dtype, last, bias) or ""
        elif not isinstance(compiled.raw(_NAMES[kind]), str) and dtype in compiled.FLOATS and max(g[:15]) < 2**30:
            family = _families(kind, *_empty_operands(g, n, dtype, last), g, tf32, device).split(" ")[0]
        found = {"dtype": "tf32" if tf32 else str(dtype)[6:], "layout": "NHWC" if last else "NCHW"}
        return found | {"family": family, "pixels": n * g.ih * g.iw}

    return features


# --- triton ---


def _public_y(x, w, bias, g, activation, slope):
    return x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation, activation, slope


def _public_x(grad, w, g):
    return grad, w, (g.ih, g.iw), g.stride, g.padding, g.groups, g.dilation


def _public_w(grad, x, g, w=None):
    return grad, x, (g.kh, g.kw), g.stride, g.padding, g.groups, g.dilation


def _public_epilogue(*args):
    return args


# --- the ops ---


def serves(*args) -> None:
    return None


def _map_op(kind: int, name: str, cuda, refuses, cpu, cpu_refuses, reference, public) -> Op:
    kernels = {
        "cuda": Kernel(cuda, refuses, _label(kind), plan=_cuda_plan if kind == Y else None),
        "triton": compiled.triton_kernel(name, public, "refuses_convolution"),
        "cpu": Kernel(cpu, cpu_refuses, conv_cpu.label(kind)),
        "torch": Kernel(reference, serves),
    }
    of_call = {"op": _NAMES[Y], "pass": _PASSES[kind]}
    return Op(f"aeup.{name}", kernels, of_call, _problem(kind), _features(kind))


_NAMES = {Y: "conv_transpose2d", X: "conv_transpose2d_input_gradient", W: "conv_transpose2d_weight_gradient"}
MAPS = {
    Y: _map_op(
        Y, _NAMES[Y], _cuda_y, lambda x, w, bias, g, *_: cuda_refusal(x, _NAMES[Y], g), conv_cpu.run_y,
        conv_cpu.refuses_y, torch_y, _public_y,
    ),
    X: _map_op(
        X, _NAMES[X], _cuda_x, lambda a, b, g: cuda_refusal(a, _NAMES[X], g), conv_cpu.run_x,
        conv_cpu.refuses_x, torch_x, _public_x,
    ),
    W: _map_op(
        W, _NAMES[W], _cuda_w, lambda a, b, g, w: cuda_refusal(a, _NAMES[W], g), conv_cpu.run_w,
        conv_cpu.refuses_w, torch_w, _public_w,
    ),
}  # fmt: skip
EPILOGUE = Op(
    "aeup.conv_epilogue_gradient",
    {
        "cuda": Kernel(_cuda_epilogue, lambda grad, *_: cuda_refusal(grad, "conv_epilogue_gradient")),
        "triton": compiled.triton_kernel("conv_epilogue_gradient", _public_epilogue, "refuses_convolution", False),
        "cpu": Kernel(epilogue.reference, lambda grad, *_: conv_cpu.refusal(grad, None)),
        "torch": Kernel(epilogue.reference, serves),
    },
)
