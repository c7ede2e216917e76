"""2-D resampling: torch.ops.aeup.interpolate and its adjoint, torch.ops.aeup.interpolate_backward.

Both are the same separable banded linear map, one the transpose of the other, so each is the gradient of the other
and gradients of any order come for free (design: the backward gathers; no atomics, the same bits on every run).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aeup import _native
from aeup.backends import Kernel, Op, choose, get_backend, note
from aeup.ops import compiled
from aeup.ops.eager import Plans, applied, exact, forward_ad_active, traced, transforms_active, unwatched

MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")
_MODE_NUMBER = {mode: i for i, mode in enumerate(MODES)}
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, np.generic)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Map(NamedTuple):
    """A resampling of [N, C, ih, iw] to [N, C, oh, ow]. scale_h and scale_w are the caller's scale factors where torch
    computes source positions with them, else None."""

    ih: int
    iw: int
    oh: int
    ow: int
    mode: str
    align_corners: bool
    antialias: bool
    scale_h: float | None
    scale_w: float | None


def map_of(spatial, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias) -> Map:
    """The map of :func:`aeup.interpolate`'s arguments. Raises its errors."""
    smooth = mode == "bilinear" or mode == "bicubic"
    if align_corners is not None and not smooth:
        raise ValueError(
            "align_corners option can only be set with the interpolating modes: "
            f"linear | bilinear | bicubic | trilinear; got align_corners={align_corners} with mode={mode!r}"
        )
    if antialias and not smooth:
        raise ValueError(
            "Anti-alias option is restricted to bilinear, bicubic, and lanczos modes and requires a 4-D tensor as "
            f"input; got antialias={antialias} with mode={mode!r}"
        )
    if align_corners is not None and not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be a bool or None, got {align_corners!r}")
    ih, iw = spatial
    scale_h = scale_w = None
    if size is not None:
        if scale_factor is not None:
            raise ValueError(
                f"only one of size or scale_factor should be defined; got size={size} and scale_factor={scale_factor}"
            )
        if recompute_scale_factor:
            raise ValueError("recompute_scale_factor is not meaningful with an explicit size.")
        oh, ow = _pair(size, "output size", "output size of {}", "output size in (o1, o2, ...,oK)", spatial)
        if not (type(oh) is type(ow) is int):
            oh, ow = _as_ints(oh, ow)
    elif scale_factor is not None:
        form = "scale_factor of shape {}"
        scale_h, scale_w = _pair(scale_factor, "scale_factor", form, "scale_factor in (s1, s2, ...,sK)", spatial)
        if not (type(scale_h) is type(scale_w) is float):
            scale_h, scale_w = _as_numbers(scale_h, scale_w, recompute_scale_factor)
        if not (0 < scale_h < math.inf and 0 < scale_w < math.inf):
            kind = RuntimeError
            if recompute_scale_factor:  # torch rounds before it looks
                both = (scale_h, scale_w)
                kind = (
                    ValueError if any(map(math.isnan, both)) else OverflowError if math.inf in map(abs, both) else kind
                )
            raise kind(
                f"scale_factor must be finite and greater than 0, got {scale_factor} (input sizes H: {ih}, W: {iw})"
            )
        oh, ow = torch.sym_int(ih * scale_h), torch.sym_int(iw * scale_w)
        if recompute_scale_factor:
            scale_h = scale_w = None
        else:
            scale_h, scale_w = float(scale_h), float(scale_w)
    else:
        raise ValueError("either size or scale_factor should be defined")
    if (recompute_scale_factor or size is not None) and any(type(o) is int and o >= 2**63 for o in (oh, ow)):
        raise TypeError(f"output size (H: {oh}, W: {ow}) must be less than 2^63; got {size=}, {scale_factor=}")
    if ih < 1 or iw < 1 or oh < 1 or ow < 1:
        raise RuntimeError(
            f"Input and output sizes should be greater than 0, but got input (H: {ih}, W: {iw}) output (H: {oh}, "
            f"W: {ow})"
        )
    return Map(ih, iw, oh, ow, mode, bool(align_corners), bool(antialias), scale_h, scale_w)


def _pair(value, name, given, form, spatial):
    if not isinstance(value, (list, tuple)):
        return value, value
    if len(value) != 2:
        what = "Input and output" if name == "output size" else "Input and scale_factor"
        raise ValueError(
            f"{what} must have the same number of spatial dimensions, but got input with spatial dimensions of "
            f"{list(spatial)} and {given.format(value)}. Please provide input tensor in (N, C, d1, d2, ...,dK) "
            f"format and {form} format."
        )
    return value


def _as_ints(oh, ow):
    """Integer-like sizes (numpy integers, 0-d integer tensors) as ints."""
    for x in (oh, ow):
        if isinstance(x, (float, bool)) or not (hasattr(x, "__index__") or isinstance(x, torch.SymInt)):
            raise TypeError(
                "expected size to be one of int or Tuple[int] or Tuple[int, int] or Tuple[int, int, int], but got "
                f"size with types {[type(oh), type(ow)]}"
            )
    return tuple(x if isinstance(x, torch.SymInt) else x.__index__() for x in (oh, ow))


def _as_numbers(scale_h, scale_w, recompute_scale_factor):
    """Scale factors of the kinds that torch takes; more of them, as it rounds by `float`, where it recomputes."""
    given = scale_h, scale_w
    if all(isinstance(x, _NUMBERS) for x in given):
        return given
    if recompute_scale_factor and not any(isinstance(x, str) for x in given):
        return float(scale_h), float(scale_w)
    raise TypeError(
        "expected scale_factor to be one of float or Tuple[float, float], but got scale_factor with types "
        f"{[type(x) for x in given]}"
    )


# --- kernels. Each takes (src, map, backward): the input, or the gradient of the output; and gives the other side. ---


def reference(src: Tensor, m: Map, backward: bool) -> Tensor:
    """The map by torch's own operators."""
    aten = torch.ops.aten
    name = {"nearest": "upsample_nearest2d", "nearest-exact": "_upsample_nearest_exact2d"}.get(m.mode)
    if name is None:
        name = f"_upsample_{m.mode}2d_aa" if m.antialias else f"upsample_{m.mode}2d"
    align = (m.align_corners,) if m.mode.startswith("bi") else ()
    sizes = ([m.oh, m.ow], [*src.shape[:2], m.ih, m.iw]) if backward else ([m.oh, m.ow],)
    op = getattr(aten, name + "_backward" if backward else name)
    return op.default(src, *sizes, *align, m.scale_h, m.scale_w)


@lru_cache(4096)
def _native_args(m: Map, cpu: bool) -> tuple:
    scale_h, scale_w = m.scale_h or 0.0, m.scale_w or 0.0
    if cpu and m.antialias:  # torch on the CPU leaves an axis of unchanged size as it is; on a GPU the scale counts
        scale_h, scale_w = scale_h if m.ih != m.oh else 0.0, scale_w if m.iw != m.ow else 0.0
    return (*m[:4], _MODE_NUMBER[m.mode], m.align_corners, m.antialias, scale_h, scale_w)


def _native_run(src: Tensor, m: Map, backward: bool) -> Tensor:
    return compiled.call("interpolate", src, *_native_args(m, src.is_cpu), backward, device=src.device.type)


def _native_plan(src: Tensor, m: Map, backward: bool) -> Callable | None:
    """By the number under which the extension keeps the call: each argument of a call takes long to pass."""
    device = src.device.type
    number = compiled.call("interpolate_plan", src, *_native_args(m, src.is_cpu), backward, device=device)
    return None if number < 0 else compiled.by_number("interpolate_planned", device, number)


def _native_label(device: torch.device, src: Tensor, m: Map, backward: bool) -> str:
    return torch.ops.aeup_native.interpolate_kernel.default(
        src, *_native_args(m, device.type == "cpu"), backward, device.type == "cuda"
    )


def _native_refusal(src: Tensor, m: Map, backward: bool, byte_modes: tuple[str, ...]) -> str | None:
    if _native.missing:
        return _native.missing
    if max(m[:4]) >= 2**30:
        return "a spatial size is 2^30 or more"
    if src.dtype in _FLOATS:
        return None
    if src.dtype is not torch.uint8:
        return f"dtype {src.dtype} is not one of float32, float64, float16, bfloat16, uint8"
    if backward:
        return "uint8 has no gradient"
    served = " and ".join(byte_modes)
    return None if m.mode in byte_modes else f"uint8 is served in {served} only, got mode {m.mode!r}"


def _cpu_refuses(src: Tensor, m: Map, backward: bool) -> str | None:
    return _native_refusal(src, m, backward, MODES) if src.is_cpu else f"the tensor is on {src.device}"


def _cuda_refuses(src: Tensor, m: Map, backward: bool) -> str | None:
    if not src.is_cuda:
        return f"the tensor is on {src.device}"
    reason = _native_refusal(src, m, backward, MODES[:2])
    return reason if reason or _native.cuda else "the extension was built without CUDA"


@lru_cache(None)
def _triton():
    """The Triton kernels, or the reason why they cannot be imported."""
    try:
        from aeup import kernels
    except ImportError as error:
        return f"aeup.kernels cannot be imported: {error}"
    return kernels


def _triton_refuses(src: Tensor, m: Map, backward: bool) -> str | None:
    module = _triton()
    return module if isinstance(module, str) else module.refuses(src, *m, backward)


def _triton_run(src: Tensor, m: Map, backward: bool) -> Tensor:
    return _triton().interpolate(src, *m, backward)


def _problem(src: Tensor, m: Map, backward: bool) -> tuple:
    last = not src.is_contiguous() and src.is_contiguous(memory_format=torch.channels_last)
    return m, backward, src.numel(), src.dtype, last


def _features(problem: tuple, device: torch.device) -> dict:
    """For the tuned tables. `pixels`: of the larger map, all channels. `family`: "whole" for upsampling by whole scales
    whose taps are the same everywhere, else "up", or "down" where an axis shrinks."""
    m, backward, numel, dtype, last = problem
    here, there = (m.oh * m.ow, m.ih * m.iw) if backward else (m.ih * m.iw, m.oh * m.ow)
    whole = m.oh % m.ih == m.ow % m.iw == 0 and not m.align_corners
    family = "down" if m.oh < m.ih or m.ow < m.iw else "whole" if whole else "up"
    found = {"pass": "input_gradient" if backward else "forward", "dtype": str(dtype)[6:]}
    found |= {"layout": "NHWC" if last else "NCHW", "mode": m.mode + (" antialias" if m.antialias else "")}
    return found | {"family": family, "pixels": numel // here * max(here, there)}


OP = Op(
    "aeup.interpolate",
    {
        "cuda": Kernel(_native_run, _cuda_refuses, _native_label, plan=_native_plan),
        "triton": Kernel(_triton_run, _triton_refuses),
        "cpu": Kernel(_native_run, _cpu_refuses, _native_label, plan=_native_plan),
        "torch": Kernel(reference, lambda src, m, backward: None),
    },
    {"op": "interpolate"},
    _problem,
    _features,
)


# --- registration ---

_ARGS = "str mode, bool align_corners=False, bool antialias=False, float? scale_h=None, float? scale_w=None"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib = torch.library.Library("aeup", "FRAGMENT")
_lib.define(f"interpolate(Tensor input, SymInt[2] size, {_ARGS}) -> Tensor", tags=_TAGS)
_lib.define(f"interpolate_backward(Tensor grad_output, SymInt[2] input_size, {_ARGS}) -> Tensor", tags=_TAGS)


def _map_of(src: Tensor, size, backward: bool, mode, align_corners=False, antialias=False, scale_h=None, scale_w=None):
    if src.dim() != 4:
        raise ValueError(f"aeup.interpolate: expected a 4-D tensor [N, C, H, W], got shape {list(src.shape)}")
    if mode not in _MODE_NUMBER:
        raise ValueError(f"aeup.interpolate: mode must be one of {', '.join(MODES)}; got {mode!r}")
    here = src.shape[2:]
    sizes = (*size, *here) if backward else (*here, *size)
    return Map(*sizes, mode, align_corners, antialias, scale_h, scale_w)


def _register(name: str, adjoint: str, backward: bool):
    def run(src, size, *args):
        m = _map_of(src, size, backward, *args)
        return choose(OP, src, (src, m, backward)).run(src, m, backward)

    def fake(src, size, *args, **kwargs):
        m = _map_of(src, size, backward, *args, **kwargs)
        note_both(src, m, backward)
        shape = (src.shape[0], src.shape[1], *size)
        return torch.empty(shape, dtype=src.dtype, device=src.device, memory_format=suggest_memory_format(src))

    def setup_context(ctx, inputs, output):
        src, _, *ctx.args = inputs
        ctx.size = src.shape[2:]

    def gradient(ctx, grad):
        adjoint_op = getattr(torch.ops.aeup, adjoint).default
        return adjoint_op(grad, ctx.size, *ctx.args), *[None] * (1 + len(ctx.args))

    def vmap(info, in_dims, src, size, *args):
        src = src.movedim(in_dims[0], 0)
        out = getattr(torch.ops.aeup, name).default(src.flatten(0, 1), size, *args)
        return out.unflatten(0, src.shape[:2]), 0

    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aeup::{name}", fake, lib=_lib)
    torch.library.register_autograd(f"aeup::{name}", gradient, setup_context=setup_context, lib=_lib)
    torch.library.register_vmap(f"aeup::{name}", vmap, lib=_lib)


_register("interpolate", "interpolate_backward", False)
_register("interpolate_backward", "interpolate", True)
# Under autocast the dtype stays what it is, where torch would go to float32: no autocast kernel falls through to that.


# --- the short way of eager calls: no dispatcher where no transform, subclass or mode is active ---


def plan_key(src: Tensor, options: tuple) -> tuple | None:
    """All that an eager call depends on, to look its Plan up by. None for the calls that cannot have one."""
    if not unwatched(src) or src.layout is not torch.strided:
        return None
    given = exact(options)
    if given is None:
        return None
    return get_backend(), given, src.shape, src.stride(), src.dtype, src.device


class Plan:
    """The map and the kernels of a call, decided once."""

    __slots__ = ("backend", "backwards", "forward", "m")

    def __init__(self, backend: str, src: Tensor, m: Map) -> None:
        self.backend, self.m, self.backwards = backend, m, {}
        self.forward = self.chosen(src, False)

    def run(self, src: Tensor) -> Tensor:
        needs_grad = src.requires_grad and torch.is_grad_enabled()
        return _apply_planned(src, self) if needs_grad else self.forward(src)

    def chosen(self, src: Tensor, backward: bool) -> Callable:
        args = src, self.m, backward
        kernel = choose(OP, src, args, self.backend)
        planned = kernel.plan(*args) if kernel.plan else None
        return planned or (lambda t: kernel.run(t, self.m, backward))

    def gradient(self, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not unwatched(grad):
            return resample(grad, self.m, True, self.backend)
        key = grad.stride(), torch.get_num_threads()
        chosen = self.backwards.get(key)
        if chosen is None:
            chosen = self.backwards[key] = self.chosen(grad, True)
        return chosen(grad)


PLANS = Plans()


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, src, plan):
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return plan.forward(src)

    @staticmethod
    def backward(ctx, grad):
        return None if grad is None else ctx.plan.gradient(grad), None


_apply_planned = applied(_Planned)


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, src, m, backward, backend):
        ctx.m, ctx.adjoint, ctx.backend = m, backward, backend
        ctx.set_materialize_grads(False)
        return choose(OP, src, (src, m, backward), backend).run(src, m, backward)

    @staticmethod
    def backward(ctx, grad):
        out = None if grad is None else resample(grad, ctx.m, not ctx.adjoint, ctx.backend)
        return out, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return None if tangent is None else resample(tangent, ctx.m, ctx.adjoint, ctx.backend)


class _TransformedResample(_Resample):
    """For torch.func, which wants the context apart; torch binds its arguments by inspection, which costs 10 us."""

    @staticmethod
    def forward(src, m, backward, backend):
        return choose(OP, src, (src, m, backward), backend).run(src, m, backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.m, ctx.adjoint, ctx.backend = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info, in_dims, src, *args):
        src = src.movedim(in_dims[0], 0)
        return resample(src.flatten(0, 1), *args).unflatten(0, src.shape[:2]), 0


def resample(src: Tensor, m: Map, backward: bool = False, backend: str | None = None) -> Tensor:
    """The map `m` of `src` [N, C, ih, iw], or its adjoint (`backward`) of [N, C, oh, ow], differentiable, in the dtype
    and memory format of `src`. `backend` None: that of the context."""
    if traced(src):
        op = torch.ops.aeup.interpolate_backward if backward else torch.ops.aeup.interpolate
        size = (m.ih, m.iw) if backward else (m.oh, m.ow)
        return op.default(src, size, *m[4:])
    backend = backend or get_backend()
    if transforms_active():
        return _TransformedResample.apply(src, m, backward, backend)
    if (src.requires_grad and torch.is_grad_enabled()) or forward_ad_active():
        return _Resample.apply(src, m, backward, backend)
    return choose(OP, src, (src, m, backward), backend).run(src, m, backward)


def note_both(src: Tensor, m: Map, backward: bool) -> None:
    """For explain: this call, and its gradient where there is one."""
    shape = f"{list(src.shape)}, {m.mode}" + (", align_corners" if m.align_corners else "")
    shape += (", antialias" if m.antialias else "") + f", {str(src.dtype)[6:]}"
    note(OP, src.device, (src, m, backward), shape)
    if not backward and src.is_floating_point():
        size = (*src.shape[:2], m.oh, m.ow)
        grad = torch.empty(size, dtype=src.dtype, device=src.device, memory_format=suggest_memory_format(src))
        note(OP, src.device, (grad, m, True), "gradient of " + shape)
