"""Functions with the signatures of torch.nn.functional, on aeup's kernels."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from aeup.backends import note_torch
from aeup.ops.interpolate import MODES, Map, resample

__all__ = ["interpolate"]


def interpolate(
    input: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resamples `input` to `size`, or by `scale_factor`: :func:`torch.nn.functional.interpolate` on aeup's kernels.

    Signature, defaults, output shape, strides and errors are torch's. 4-D input [N, C, H, W] in the modes "nearest",
    "nearest-exact", "bilinear" and "bicubic" (the last two also with `antialias`) is served by aeup in float32,
    float64, float16, bfloat16 and (forward) uint8, NCHW or channels-last, and keeps its dtype and memory format, under
    autocast too. The gradient is a gather: deterministic, and differentiable again. Other ranks and modes go to torch;
    :func:`aeup.explain` says so.

    Args:
        input: [N, C, H, W]; N may be 0.
        size: output (oh, ow), or one int for both.
        scale_factor: multiplier(s) of the spatial size; output sizes are ``floor(input size * scale_factor)``.
        align_corners: "bilinear" and "bicubic" only: True maps corner pixel centres onto each other.
        recompute_scale_factor: True computes source positions from the sizes alone, as if `size` had been given.
        antialias: "bilinear" and "bicubic" only: widens the filter when shrinking.

    Returns:
        [N, C, oh, ow].

    Raises:
        ValueError: both or neither of `size` and `scale_factor`; a wrong number of values; `align_corners` or
            `antialias` with a mode that has none; `recompute_scale_factor` with `size`.
        TypeError: a `size` that is not made of ints.
        RuntimeError: an empty dimension other than the batch, an output without pixels, a scale factor that is not
            finite and positive.

    Source: bicubic: Keys, 1981, "Cubic convolution interpolation for digital image processing", a = -0.75 (-0.5 with
    antialias), as torch.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            interpolate, (input,), input, size=size, scale_factor=scale_factor, mode=mode, align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor, antialias=antialias,
        )  # fmt: skip
    if mode not in MODES or input.dim() != 4:
        note_torch("aeup.interpolate", f"{list(input.shape)}, {mode}", f"serves 4-D input in modes {', '.join(MODES)}")
        return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    shape = input.shape
    if shape[1] == 0:
        raise RuntimeError(f"Non-empty 4D data tensor expected but got a tensor with sizes {list(shape)}")
    spatial = (shape[2], shape[3])
    options = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if torch.compiler.is_compiling():
        return resample(input, _map(spatial, *options))
    try:
        m = _cached_map(spatial, type(size) is tuple and tuple(map(type, size)), *options)
    except TypeError:  # no hash (a list, a symbolic size), or a `size` that _map refuses
        m = _map(spatial, *options)
    return resample(input, m)


def _map(spatial, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias) -> Map:
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
        if not (isinstance(oh, (int, torch.SymInt)) and isinstance(ow, (int, torch.SymInt))):
            oh, ow = _as_ints(oh, ow)
    elif scale_factor is not None:
        form = "scale_factor of shape {}"
        scale_h, scale_w = _pair(scale_factor, "scale_factor", form, "scale_factor in (s1, s2, ...,sK)", spatial)
        if not (0 < scale_h < math.inf and 0 < scale_w < math.inf):
            raise RuntimeError(
                f"scale_factor must be finite and greater than 0, got {scale_factor} (input sizes H: {ih}, W: {iw})"
            )
        oh, ow = torch.sym_int(ih * scale_h), torch.sym_int(iw * scale_w)
        if recompute_scale_factor:
            scale_h = scale_w = None
        else:
            scale_h, scale_w = float(scale_h), float(scale_w)
    else:
        raise ValueError("either size or scale_factor should be defined")
    if ih < 1 or iw < 1 or oh < 1 or ow < 1:
        raise RuntimeError(
            f"Input and output sizes should be greater than 0, but got input (H: {ih}, W: {iw}) output (H: {oh}, "
            f"W: {ow})"
        )
    return Map(ih, iw, oh, ow, mode, bool(align_corners), antialias, scale_h, scale_w)


@lru_cache(1024, typed=True)
def _cached_map(spatial, size_types, *options) -> Map:
    """_map, once per geometry. `size_types` keeps (2, 2) and (2.0, 2), which are equal, apart."""
    return _map(spatial, *options)


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
        if isinstance(x, (float, bool)) or not hasattr(x, "__index__"):
            raise TypeError(
                "expected size to be one of int or Tuple[int] or Tuple[int, int] or Tuple[int, int, int], but got "
                f"size with types {[type(oh), type(ow)]}"
            )
    return oh.__index__(), ow.__index__()
