"""2-D interpolation on Triton kernels: forward and gathered backward (no atomics, one write per element)."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib.util import find_spec

import torch

from .axis import TAPS
from .plans import Plan, make_plan

DTYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
}
SCRATCH = {"fp32": torch.float32, "fp64": torch.float64, "i32": torch.int32}
LARGEST = (1 << 31) - (1 << 16)


@cache
def kernels() -> dict:
    """The jitted kernels by name. Imports Triton."""
    from . import antialias, poly, taps

    names = {poly: ("poly_forward", "poly_backward"), taps: ("taps_forward", "taps_backward")}
    names[antialias] = ("antialias_table", "banded")
    return {name: getattr(module, name) for module, found in names.items() for name in found}


@cache
def constant_types() -> dict:
    import triton.language as tl

    return {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16, "u8": tl.uint8}


def constants_of(launch) -> dict:
    """The launch's compile-time arguments as the kernels take them: types by value."""
    types = constant_types()
    return {k: types[v] if k in ("ACC", "S") else v for k, v in launch.constants.items()}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, which takes CPU tensors (the variable counts when it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _device(index: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


def is_channels_last(t: torch.Tensor) -> bool:
    """torch's suggest_memory_format for a 4-D tensor, from sizes and strides."""
    stride, size = t.stride(), t.shape
    least = 0
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d] if size[d] > 1 else stride[d]
    return True


def refuses(
    src, ih, iw, oh, ow, mode, align_corners=False, antialias=False, scale_h=None, scale_w=None, backward=False
) -> str | None:
    """Why these kernels cannot serve the call, or None. Arguments as in `interpolate`."""
    if not _has_triton():
        return "the package triton is not installed"
    if src.device.type == "cuda":
        name, capability = _device(src.device.index)
        if capability < (8, 0):
            return f"Triton kernels need compute capability 8.0 or newer; {name} has {capability[0]}.{capability[1]}"
    elif src.device.type != "cpu" or not interpreted():
        return f"Triton kernels need a CUDA tensor, got one on {src.device.type}"
    if src.dtype not in DTYPES:
        return f"dtype {src.dtype} has no Triton kernel"
    if mode not in TAPS:
        return f"mode {mode!r} has no Triton kernel"
    if src.dtype is torch.uint8 and (backward or TAPS[mode] > 1):
        return "uint8 has a Triton kernel only for the forward of nearest and nearest-exact"
    if antialias and TAPS[mode] == 1:
        return f"antialias has no meaning with mode {mode!r}"
    if src.ndim != 4:
        return f"Triton kernels need a 4-D tensor, got {src.ndim}-D"
    c = src.shape[1]
    if max(ih, oh, iw * max(c, 1), ow * max(c, 1)) > LARGEST:
        return f"a row of {max(iw, ow) * c} elements or a height of {max(ih, oh)} is more than {LARGEST}"
    return None


@lru_cache(maxsize=1024)
def _prepared(plan_key) -> tuple[Plan, list]:
    plan = make_plan(*plan_key)
    ready = [
        (
            kernels()[x.kernel],
            x.buffers,
            (x.grid, 1, 1),
            tuple(x.scalars.values()),
            constants_of(x) | {"num_warps": x.warps},
        )
        for x in plan.launches
    ]
    return plan, ready


def _launch(plan, ready, src, dst):
    tensors = {"src": src, "dst": dst}
    for name, (elements, kind) in plan.scratch.items():
        tensors[name] = torch.empty(elements, dtype=SCRATCH[kind], device=src.device)
    for kernel, buffers, grid, scalars, options in ready:
        kernel[grid](*[tensors[name] for name in buffers], *scalars, **options)


def interpolate(
    src, ih, iw, oh, ow, mode, align_corners=False, antialias=False, scale_h=None, scale_w=None, backward=False
) -> torch.Tensor:
    """Resample the two last axes of a 4-D tensor as torch's CUDA kernels do, or apply the transposed map.

    Args:
        src: forward [N, C, ih, iw]; backward the gradient of the output, [N, C, oh, ow]. float32, float64, float16,
            bfloat16; uint8 for the forward of the nearest modes. Strides that are neither contiguous nor channels-last
            are copied into the format that torch suggests for them.
        ih, iw, oh, ow: sizes of the forward's input and output, in pixels, all at least 1.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic" (Keys 1981, a = -0.75; with antialias a = -0.5).
        align_corners, antialias: as in torch.nn.functional.interpolate.
        scale_h, scale_w: the scale factors that torch passes on to its operator, or None.
    Returns:
        [N, C, oh, ow], or [N, C, ih, iw] for the backward: dtype of src, memory format that torch suggests for src.
        float16 and bfloat16 accumulate in float32.
    Raises:
        RuntimeError: where `refuses` gives a reason.
    """
    if reason := refuses(src, ih, iw, oh, ow, mode, align_corners, antialias, scale_h, scale_w, backward):
        raise RuntimeError(f"aeup.kernels.interpolate: {reason}")
    n, c, h, w = src.shape
    want, made = ((oh, ow), (ih, iw)) if backward else ((ih, iw), (oh, ow))
    if (h, w) != want:
        raise RuntimeError(f"aeup.kernels.interpolate: src has {h}x{w} pixels, the arguments say {want[0]}x{want[1]}")
    if min(ih, iw, oh, ow) < 1:
        raise RuntimeError(f"aeup.kernels.interpolate: sizes must be positive, got {ih}x{iw} and {oh}x{ow}")
    nhwc = is_channels_last(src)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    src = src.contiguous(memory_format=layout)
    dst = torch.empty((n, c, *made), dtype=src.dtype, device=src.device, memory_format=layout)
    if not dst.numel():
        return dst
    on_gpu = src.device.type == "cuda"
    name = _device(src.device.index)[0] if on_gpu else "interpreter"
    # With one channel both layouts are the same memory, and the planar kernels are the wider ones.
    key = (n, c, ih, iw, oh, ow, mode, bool(align_corners), bool(antialias), scale_h, scale_w, bool(backward))
    plan, ready = _prepared((*key, DTYPES[src.dtype], nhwc and c > 1, name))
    if not ready:
        dst.copy_(src)
    elif on_gpu and torch.cuda.current_device() != src.device.index:
        with torch.cuda.device(src.device):
            _launch(plan, ready, src, dst)
    else:
        _launch(plan, ready, src, dst)
    return dst
