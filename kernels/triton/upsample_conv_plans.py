"""From a convolution of an upsampled map to kernel launches. Plain numbers only: no GPU, no Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from . import convolution_plans as phases
from .axis import TAPS, Axis, make_axis, starts, window
from .convolution_plans import Convolution, accumulator, ceil, gemm_plan, power, precision, summed, weight_plan
from .plans import LIMIT32, Launch, Plan, configuration


class UpsampleConv(NamedTuple):
    """`channels_in` and `channels_out` are per group; `made`: the result's pixels. Memory is NHWC or NCHW for the maps,
    channels-last or contiguous for the weight [co * groups, ci, kh, kw]. `tf32`, `cast`: as in Convolution."""

    n: int
    channels_in: int
    channels_out: int
    groups: int
    vertical: Axis
    horizontal: Axis
    kernel: tuple[int, int]
    padding: tuple[int, int]
    made: tuple[int, int]
    dtype: str
    nhwc: bool
    weight_nhwc: bool
    tf32: bool
    device: str
    cast: bool


@lru_cache(maxsize=1024)
def axes_of(
    input_size: tuple, size: tuple, mode: str, align_corners: bool, scales: tuple, double: bool
) -> tuple[Axis, Axis]:
    """Of the upsampling. Where no size changes, a copy, as in torch."""
    same = input_size == size
    mode = "nearest" if same else mode
    of = zip(input_size, size, scales, strict=True)
    return tuple(make_axis(i, o, mode, align_corners, False, given, double, same) for i, o, given in of)


@lru_cache(maxsize=1024)
def nearest_scale(axis: Axis) -> int:
    """s where output o is input o // s for every o, else 0."""
    s = axis.size_out // axis.size_in
    if TAPS[axis.mode] > 1 or axis.size_in * s != axis.size_out:
        return 0
    return s if np.array_equal(starts(axis), np.arange(axis.size_out) // s) else 0


def scales_of(u: UpsampleConv) -> tuple[int, int] | None:
    """The strides of the transposed convolution that is the same map, or None."""
    found = nearest_scale(u.vertical), nearest_scale(u.horizontal)
    return found if all(found) else None


def folded(u: UpsampleConv) -> tuple[Convolution, tuple[int, int]]:
    """That transposed convolution (channels-last weight), and how many zeros pad its kernel on each side: per axis
    kernel k + s - 1, stride s, padding k - 1 - p, made 0 by the zeros where it is negative."""
    axes, zeros = [], []
    of = zip((u.vertical, u.horizontal), scales_of(u), u.kernel, u.padding, u.made, strict=True)
    for axis, s, k, p, made in of:
        extra = max(p - (k - 1), 0)
        axes.append(phases.Axis(axis.size_in, made, k + s - 1 + 2 * extra, s, max(k - 1 - p, 0), 1))
        zeros.append(extra)
    key = (u.n, u.channels_in, u.channels_out, u.groups, *axes, u.dtype, u.nhwc, True, u.tf32, u.device, u.cast)
    return Convolution(*key), tuple(zeros)


def _fold(u: UpsampleConv, c: Convolution, zeros, back: bool) -> Launch:
    """given -> w, the folded weight [ci * groups, kh, kw, co]; or back: y (that shape, its gradient) -> dw."""
    ci, co, taps = u.channels_in, u.channels_out, u.kernel[0] * u.kernel[1]
    wide, many = (c.vertical.kernel, c.horizontal.kernel), c.vertical.kernel * c.horizontal.kernel
    # Strides for group, input channel, output channel and tap.
    plain = (co * ci * taps, *((1, ci * taps, ci) if u.weight_nhwc else (taps, ci * taps, 1)))
    whole = (ci * co * many, co * many, 1, co)
    first, second = (whole, plain) if back else (plain, whole)
    given, made = (wide, u.kernel) if back else (u.kernel, wide)
    ba, bb = min(power(ci), 32), min(power(co), 32)
    scalars = {"ca": ci, "cb": co, "row_blocks": ceil(ci, ba), "column_blocks": ceil(co, bb)}
    scalars |= {f"first_{a}": k - 1 + e for a, k, e in zip("hw", u.kernel, zeros, strict=True)}
    scalars |= {"kh": given[0], "kw": given[1], "mh": made[0], "mw": made[1]}
    for side, strides in (("src", first), ("dst", second)):
        scalars |= {f"{side}_{name}": stride for name, stride in zip(("group", "a", "b", "tap"), strides, strict=True)}
    constants = {"SH": c.vertical.stride, "SW": c.horizontal.stride, "ACC": accumulator(u.dtype), "BA": ba, "BB": bb}
    grid = made[0] * made[1] * scalars["row_blocks"] * scalars["column_blocks"] * u.groups
    return Launch("fold", ("y", "dw") if back else ("given", "w"), grid, scalars, constants, 4)


def _elements(c: Convolution) -> int:
    return c.channels_in * c.groups * c.channels_out * c.vertical.kernel * c.horizontal.kernel


@lru_cache(maxsize=1024)
def map_plan(u: UpsampleConv, back: bool, bias: bool = False, activation: int = 0, slope: float = 0.0) -> Plan:
    """Forward (x, given, bias) -> y, or the input gradient (x, given) -> y with x the gradient of the result; `given`
    is the weight."""
    if scales_of(u):
        c, zeros = folded(u)
        plan = gemm_plan(c, back, bias, activation, slope)
        return Plan((_fold(u, c, zeros, False), *plan.launches), plan.scratch | {"w": (_elements(c), u.dtype)})
    (kh, kw), taps = u.kernel, u.kernel[0] * u.kernel[1]
    ci, co = u.channels_in, u.channels_out
    ck, cn = (co, ci) if back else (ci, co)
    small = (u.vertical.size_in, u.horizontal.size_in)
    x_size, y_size = (u.made, small) if back else (small, u.made)
    pixels = u.n * y_size[0] * y_size[1]
    config = _config(u, "resample_input_gradient" if back else "resample_forward")
    bm, bn, bk = (min(config[m], max(power(n), 16)) for m, n in (("m", pixels), ("n", cn), ("k", ck)))
    scalars = {"pixels": pixels, **_sizes(u)}
    scalars |= {"width_h": window(u.vertical).width, "width_w": window(u.horizontal).width, "ck": ck, "cn": cn}
    scalars |= {"column_blocks": ceil(cn, bn), "pixel_blocks": ceil(pixels, bm)}
    scalars |= _strides(u, "x", ck * u.groups, x_size) | _strides(u, "y", cn * u.groups, y_size)
    row, column, tap = (ci * taps, 1, ci) if u.weight_nhwc else (ci * taps, taps, 1)
    to_k, to_n = (row, column) if back else (column, row)
    scalars |= {"w_group": co * row, "w_k": to_k, "w_n": to_n, "w_tap": tap}
    constants = {"BACK": back, "PH": u.padding[0], "PW": u.padding[1], "KH": kh, "KW": kw, **_taps(u)}
    constants |= {"HAS_BIAS": bias, "ACTIVATION": activation, "SLOPE": slope, **_arithmetic(u, config)}
    constants |= {"BM": bm, "BN": bn, "BK": bk, "num_stages": config["stages"]}
    grid = scalars["column_blocks"] * scalars["pixel_blocks"] * u.groups
    tables = ("first_h", "first_w", "table_h", "table_w") if back else ("y",) * 4
    buffers = ("x", "given", "bias", "y", *tables)
    launch = Launch("resample_gemm", buffers, grid, scalars, constants, config["warps"])
    if not back:
        return Plan((launch,))
    down, h = _table(u, u.vertical, "h")
    across, w = _table(u, u.horizontal, "w")
    return Plan((down, across, launch), h | w)


@lru_cache(maxsize=1024)
def weight_gradient_plan(u: UpsampleConv) -> Plan:
    """(x, grad) -> dw, channels-last if u.weight_nhwc. Sums are rounded once, after all of them."""
    acc = accumulator(u.dtype)
    if scales_of(u):
        c, zeros = folded(u)
        plan = weight_plan(c)
        return Plan((*plan.launches, _fold(u, c, zeros, True)), plan.scratch | {"y": (_elements(c), acc)})
    (kh, kw), taps = u.kernel, u.kernel[0] * u.kernel[1]
    ci, co = u.channels_in, u.channels_out
    pixels = u.n * u.made[0] * u.made[1]
    config = _config(u, "resample_weight_gradient")
    bm, bn, bp = (min(config[m], max(power(n), 16)) for m, n in (("m", co), ("n", ci), ("k", pixels)))
    programs = ceil(co, bm) * ceil(ci, bn) * u.groups * taps
    blocks, total = ceil(pixels, bp), co * u.groups * ci * taps
    splits = min(ceil(config.get("programs", 264), programs), ceil(blocks, config.get("least", 4)))
    steps = ceil(blocks, splits)
    splits = ceil(blocks, steps)
    planar = not u.weight_nhwc and taps > 1
    scalars = {"pixels": pixels, **_sizes(u), "ci": ci, "co": co, "groups": u.groups}
    scalars |= {"row_blocks": ceil(co, bm), "column_blocks": ceil(ci, bn), "steps": steps, "total": total}
    scalars |= _strides(u, "x", ci * u.groups, (u.vertical.size_in, u.horizontal.size_in))
    scalars |= _strides(u, "g", co * u.groups, u.made)
    direct = planar and splits == 1
    scalars |= {"to_row": ci * taps, "to_column": taps if direct else 1, "to_tap": 1 if direct else ci}
    constants = {"PH": u.padding[0], "PW": u.padding[1], "KH": kh, "KW": kw, **_taps(u), **_arithmetic(u, config)}
    constants |= {"BM": bm, "BN": bn, "BP": bp, "num_stages": config["stages"]}
    buffers = ("x", "grad", "part" if splits > 1 else "dw")
    first = Launch("resample_weight_gradient", buffers, programs * splits, scalars, constants, config["warps"])
    if splits == 1:
        return Plan((first,))
    last = summed(total, splits, ci, taps, planar, acc, config, to="dw")
    return Plan((first, last), {"part": (splits * total, acc)})


def _config(u: UpsampleConv, kernel: str) -> dict:
    dtype = "bf16" if u.dtype == "fp16" else u.dtype
    dtype = "strict" if u.dtype == "fp32" and not u.tf32 else dtype
    return configuration(u.device, kernel, u.vertical.mode, dtype, "nhwc" if u.nhwc else "nchw")


def _sizes(u: UpsampleConv) -> dict:
    v, h = u.vertical, u.horizontal
    sizes = {"ih": v.size_in, "iw": h.size_in, "uh": v.size_out, "uw": h.size_out, "oh": u.made[0], "ow": u.made[1]}
    return sizes | {"scale_h": v.bits, "scale_w": h.bits}


def _table(u: UpsampleConv, axis: Axis, name: str) -> tuple[Launch, dict]:
    w, block = window(axis), min(power(axis.size_in), 128)
    scalars = {"size_in": axis.size_in, "size_out": axis.size_out, "scale": axis.bits}
    scalars |= {"reach": w.reach, "inverse": w.inverse, "pad": w.pad, "width": w.width}
    scratch = {f"first_{name}": (axis.size_in, "i32"), f"table_{name}": (w.width * axis.size_in, accumulator(u.dtype))}
    constants = _taps(u) | {"BLOCK": block}
    return Launch("transposed_table", tuple(scratch), ceil(axis.size_in, block), scalars, constants, 4), scratch


def _strides(u: UpsampleConv, name: str, channels: int, size: tuple[int, int]) -> dict:
    plane = size[0] * size[1]
    pixel, channel = (channels, 1) if u.nhwc else (1, plane)
    return {f"{name}_image": channels * plane, f"{name}_pixel": pixel, f"{name}_channel": channel}


def _taps(u: UpsampleConv) -> dict:
    axis = u.vertical
    real = "fp64" if axis.real().itemsize == 8 else "fp32"
    return {"K": TAPS[axis.mode], "ALIGN": axis.align_corners, "EXACT": axis.mode == "nearest-exact", "S": real}


def _arithmetic(u: UpsampleConv, config: dict) -> dict:
    v, h = u.vertical, u.horizontal
    images = u.groups * max(u.channels_in * v.size_in * h.size_in, u.channels_out * u.made[0] * u.made[1])
    constants = {"ACC": accumulator(u.dtype), "PREC": precision(u, config), "CAST": u.cast}
    return constants | {"IDX64": u.n * images >= LIMIT32}
