"""The backends of upsampling with the convolution after it: for each of its maps the kernels, and why not.

Two forms serve a GPU. Where every pixel is repeated a whole number of times, the transposed convolution with the folded
weight ("fold"); else a tile of the upsampled map made on chip ("resample").
"""

import re
from functools import lru_cache

import torch
from torch import Tensor

from aeup.backends import Kernel, Op
from aeup.ops import compiled
from aeup.ops import upsample_conv_cpu as cpu
from aeup.ops import upsample_conv_plain as plain
from aeup.ops.conv_shapes import W, X, Y
from aeup.ops.epilogue import NUMBER
from aeup.ops.interpolate import MODES, Map
from aeup.ops.upsample_conv_shapes import UpsampleGeometry, fold

NAMES = {Y: "upsample_conv2d", X: "upsample_conv2d_input_gradient", W: "upsample_conv2d_weight_gradient"}
_PASSES = {Y: "forward", X: "input_gradient", W: "weight_gradient"}  # numbered in this order by the extension


# --- cuda ---


def _resample_args(m: Map) -> tuple:
    return m.oh, m.ow, MODES.index(m.mode), m.align_corners, m.scale_h or 0.0, m.scale_w or 0.0


def _cuda_y(x, w, bias, g: UpsampleGeometry, activation, slope) -> Tensor:
    f, rest = fold(g), (*g.padding, g.groups, NUMBER[activation], slope, compiled.tf32(x))
    if f:
        return compiled.call(NAMES[Y], x, w, bias, *f.g.stride, *rest, "")
    return compiled.call("resample_conv2d", x, w, bias, *_resample_args(g.m), *rest)


def _cuda_plan(x, w, bias, g: UpsampleGeometry, activation, slope):
    f, rest = fold(g), (*g.padding, g.groups, NUMBER[activation], slope, compiled.tf32(x))
    return compiled.planned(NAMES[Y], x, w, *f.g.stride, *rest) if f else None


def _cuda_x(grad, w, g: UpsampleGeometry) -> Tensor:
    f, rest = fold(g), (*g.padding, g.groups, compiled.tf32(grad))
    if f:
        return compiled.call(NAMES[X], grad, w, *g.input_size, *f.g.stride, *rest, "")
    return compiled.call("resample_conv2d_input_gradient", grad, w, *g.input_size, *_resample_args(g.m), *rest)


def _cuda_w(grad, x, g: UpsampleGeometry, w) -> Tensor:
    if w is None:
        layout = torch.channels_last if compiled.either_last(grad, x) else torch.contiguous_format
        w = torch.empty(g.weight_shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    f, rest = fold(g), (*g.padding, g.groups, compiled.tf32(grad))
    if f:
        return compiled.call(NAMES[W], grad, x, w, *f.g.stride, *rest, "")
    return compiled.call("resample_conv2d_weight_gradient", grad, x, w, *_resample_args(g.m), *rest)


def _cuda_backward(grad, x, w, y, g: UpsampleGeometry, activation, slope, needs) -> tuple:
    """The gradients of x, w and bias that `needs` asks for, else None, in one call of the extension."""
    args = (*fold(g).g.stride, *g.padding, g.groups, NUMBER[activation], slope, compiled.tf32(grad), *needs)
    found = compiled.call("upsample_conv2d_backward", grad, x, w, y if activation else None, *args)
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def _operator(kind: int, g: UpsampleGeometry) -> str:
    return NAMES[kind] if fold(g) else NAMES[kind].replace("upsample", "resample")


@lru_cache(4096)
def _family(kind: int, g: UpsampleGeometry, n: int, dtype: torch.dtype, tf32: bool, last: bool, device) -> str:
    """The family of kernels that would serve, and in brackets why the ones before it would not; or "refuses: why"."""
    layout = torch.channels_last if last else torch.contiguous_format
    x, w = (
        torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        for shape in ((n, g.ci, *g.input_size), g.weight_shape)
    )
    f, rest = fold(g), (*g.padding, g.groups, list(_PASSES).index(kind), tf32, *compiled.capability(device))
    if f:
        return compiled.raw("upsample_conv2d_kernel")(x, w, *f.g.stride, *rest)
    return compiled.raw("resample_conv2d_kernel")(x, w, *_resample_args(g.m), *rest)


def _family_of(kind: int, a: Tensor, b: Tensor, rest: tuple, device=None) -> str:
    g = rest[1] if kind == Y else rest[0]
    return _family(kind, g, a.shape[0], a.dtype, compiled.tf32(a), compiled.either_last(a, b), device or a.device)


def _cuda_refuses(kind: int):
    def refuses(a, b, *rest) -> str | None:
        g = rest[1] if kind == Y else rest[0]
        reason = compiled.refusal(a, _operator(kind, g))
        if reason:
            return reason
        if max(*g[1:], *g.m[:4]) >= 2**30:
            return "a size is 2^30 or more"
        family = _family_of(kind, a, b, rest)
        return family.removeprefix("refuses: ") if family.startswith("refuses") else None

    return refuses


# --- for the tuned tables ---


def _problem(kind: int):
    def problem(a, b, *rest) -> tuple:
        g = rest[1] if kind == Y else rest[0]
        last = not (a.is_contiguous() and b.is_contiguous()) and compiled.either_last(a, b)
        return g, a.shape[0], a.dtype, compiled.tf32(a), last

    return problem


def _features(kind: int):
    def features(problem: tuple, device: torch.device) -> dict:
        """`pixels`: of the input. `family`: on a GPU that of the extension's kernels, on a CPU "fold" or "tile"."""
        g, n, dtype, tf32, last = problem
        family = "fold" if fold(g) else "tile"
        if device.type != "cpu":
            has = not isinstance(compiled.raw(_operator(kind, g)), str) and dtype in compiled.FLOATS
            family = _family(kind, g, n, dtype, tf32, last, device) if has and max(*g[1:], *g.m[:4]) < 2**30 else ""
            family = "" if family.startswith("refuses") else re.split("[ ,]", family)[0]
        found = {"dtype": "tf32" if tf32 else str(dtype)[6:], "layout": "NHWC" if last else "NCHW"}
        return found | {"mode": g.m.mode, "family": family, "pixels": n * g.m.ih * g.m.iw}

    return features


# --- triton ---


def _options(g: UpsampleGeometry) -> tuple:
    return g.size, g.m.mode, g.m.align_corners, g.m.scale_h, g.m.scale_w, g.padding, g.groups


def _public_y(x, w, bias, g, activation, slope):
    return x, w, bias, *_options(g), activation, slope


def _public_x(grad, w, g):
    return grad, w, g.input_size, *_options(g)


def _public_w(grad, x, g, w=None):
    return grad, x, g.kernel_size, *_options(g)


# --- the ops ---


def _serves(*args) -> None:
    return None


def _composed_refuses(a, *args) -> str | None:
    return None if a.dtype in compiled.FLOATS else f"dtype {a.dtype} is not one of {compiled.FLOATS}"


def _composed_label(kind: int):
    def label(device, *args) -> str:
        if any(plain.alone(a) for a in args if isinstance(a, UpsampleGeometry)):
            return "conv2d"
        args = [plain.convolution(a) if isinstance(a, UpsampleGeometry) else a for a in args]
        rules = None if device.type == "cpu" else MAPS[kind].rules[device]
        decision = rules and rules.decision(tuple(args))
        by = f" by {_family_of(kind, *args[:2], args[2:], device)}" if decision and decision.backend == "cuda" else ""
        return plain.LABEL + by

    return label


def _map_op(kind: int, cuda, public, on_cpu, cpu_refuses, method: str) -> Op:
    kernels = {
        "cuda": Kernel(
            cuda,
            _cuda_refuses(kind),
            lambda device, a, b, *rest: _family_of(kind, a, b, rest, device),
            plan=_cuda_plan if kind == Y else None,
        ),
        "triton": compiled.triton_kernel(NAMES[kind], public, "refuses_upsample_conv2d"),
        "cpu": Kernel(on_cpu, cpu_refuses, cpu.label_y if kind == Y else cpu.label_gradient),
        "composed": Kernel(
            getattr(plain.BY_AEUP, method),
            _composed_refuses,
            _composed_label(kind),
            plan=plain.BY_AEUP.plan if kind == Y else None,
        ),
        "torch": Kernel(getattr(plain.BY_TORCH, method), _serves),
    }
    of_call = {"op": NAMES[Y], "pass": _PASSES[kind]}
    return Op(f"aeup.{NAMES[kind]}", kernels, of_call, _problem(kind), _features(kind))


MAPS = {
    Y: _map_op(Y, _cuda_y, _public_y, cpu.cpu_y, cpu.refuses_y, "y"),
    X: _map_op(X, _cuda_x, _public_x, cpu.cpu_x, cpu.refuses_x, "x"),
    W: _map_op(W, _cuda_w, _public_w, cpu.cpu_w, cpu.refuses_w, "w"),
}
_OF = {name: {kind: (None, MAPS[kind].kernels[name]) for kind in (X, W)} for name in MAPS[X].kernels}
_JOINT = (("composed", plain.BY_AEUP.backward), ("torch", plain.BY_TORCH.backward))


def joint(kernel_x: Kernel | None, kernel_w: Kernel | None, g: UpsampleGeometry):
    """The function (grad, x, w, y, g, activation, slope, needs) that gives all gradients in one call, or None."""
    if kernel_x in _OF["cuda"][X] and kernel_w in _OF["cuda"][W] and (kernel_x or kernel_w):
        return _cuda_backward if fold(g) else None
    for name, backward in _JOINT:
        if kernel_x in _OF[name][X] and kernel_w in _OF[name][W]:
            return backward if kernel_x or kernel_w else None
    return None
