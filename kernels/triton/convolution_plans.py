"""From a transposed convolution to kernel launches. Plain numbers only: no GPU, no Triton; one plan per geometry."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .plans import ITEMSIZE, LIMIT32, WIDE, Launch, Plan, configuration, vector

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")
READ = 50  # multiply-adds that take as long as one byte from L2: chooses how many phases a program makes
MASKED = 1.25  # what products cost more where the weights have to be masked
PACKED = 1 << 14  # elements of a weight that is made channels-last before it is read many times
BLOCKS = 1024  # ranges of the epilogue's gradient at most


class Axis(NamedTuple):
    """Outputs o read inputs i through kernel indices k where o + padding = stride * i + dilation * k."""

    size_in: int
    size_out: int
    kernel: int
    stride: int
    padding: int
    dilation: int


class Convolution(NamedTuple):
    """`channels_in` and `channels_out` are per group. Memory is NHWC or NCHW for all tensors but the weight
    [ci, co, kh, kw], channels-last or contiguous. `dtype` as in plans.ITEMSIZE; `tf32`: float32 may be multiplied in
    tf32; `cast`: 16-bit operands must be cast before a product (Triton's interpreter)."""

    n: int
    channels_in: int
    channels_out: int
    groups: int
    vertical: Axis
    horizontal: Axis
    dtype: str
    nhwc: bool
    weight_nhwc: bool
    tf32: bool
    device: str
    cast: bool


def power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def count_taps(axis: Axis, first: int, together: int) -> int:
    """Shifts that the phases first, first + 1, .. of that many together need (with dilation: one alone)."""
    s, p, d, k = axis.stride, axis.padding, axis.dilation, axis.kernel
    if together == 1:
        return sum((first + p - d * index) % s == 0 for index in range(k))
    return (first + together - 1 + p) // s - ceil(first + p - k + 1, s) + 1


def counts(axis: Axis, together: int) -> list[int]:
    """Taps per group of phases, for the groups that have outputs."""
    return [count_taps(axis, a, together) for a in range(0, min(axis.stride, axis.size_out), together)]


def one_pixel(axis: Axis) -> Axis:
    """With one input pixel the stride has no meaning: one so large that every output is a phase with one tap."""
    if axis.size_in > 1:
        return axis
    d = axis.dilation
    return axis._replace(stride=ceil(max(axis.size_out + axis.padding, d * (axis.kernel - 1) + 1), d) * d)


def _divisors(axis: Axis, most: int) -> list[int]:
    if axis.dilation > 1:
        return [1]
    return [m for m in range(1, min(axis.stride, most) + 1) if axis.stride % m == 0]


def phases_together(v: Axis, h: Axis, channels: int, itemsize: int, widest: int) -> tuple[int, int]:
    """How many phases one program makes, per axis: side by side they share the reads of x and fill the columns, but
    where they have different taps some products are of zeros."""
    best, cheapest = (1, 1), None
    for mh in _divisors(v, 4096):
        for mw in _divisors(h, 4096):
            columns = mh * mw * channels
            block = min(max(power(columns), 16), widest)
            products = block * (MASKED if _partial(v, mh) or _partial(h, mw) else 1)
            work = sum(counts(v, mh)) * sum(counts(h, mw)) * ceil(columns, block) * (itemsize * READ + products)
            if cheapest is None or work < cheapest:
                best, cheapest = (mh, mw), work
    return best


def precision(c, config: dict) -> str:
    """Of tl.dot: only float32 has a choice."""
    return ("tf32" if c.tf32 else config.get("strict", "tf32x3")) if c.dtype == "fp32" else "ieee"


def accumulator(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def _config(c: Convolution, kernel: str, columns: int, pixels: int) -> dict:
    """Classes, most important first: kernel, type, layout, columns (a power of two), few or many rows of pixels."""
    dtype = "bf16" if c.dtype == "fp16" else c.dtype
    dtype = "strict" if c.dtype == "fp32" and not c.tf32 else dtype
    size = f"n{min(max(power(columns), 16), 256)}"
    many = "few" if pixels < 16384 else "many"
    return configuration(c.device, kernel, dtype, "nhwc" if c.nhwc else "nchw", size, many)


def _transposed(name: str, source: str, n: int, rows: int, columns: int, dtype: str) -> tuple[Launch, dict]:
    """[n, rows, columns] to [n, columns, rows] in the scratch buffer `name`."""
    bm, bn = min(power(rows), 64), min(power(columns), 64)
    scalars = {"rows": rows, "columns": columns, "row_blocks": ceil(rows, bm), "column_blocks": ceil(columns, bn)}
    constants = {"IDX64": n * rows * columns >= LIMIT32, "BM": bm, "BN": bn}
    grid = n * scalars["row_blocks"] * scalars["column_blocks"]
    return Launch("transpose", (source, name), grid, scalars, constants, 4), {name: (n * rows * columns, dtype)}


def _channels_innermost(c: Convolution, channels: int, pixels: int) -> bool:
    """Where both layouts are the same memory, the better one."""
    return pixels == 1 or (c.nhwc and channels > 1)


@lru_cache(maxsize=1024)
def gemm_plan(c: Convolution, back: bool, bias: bool = False, activation: int = 0, slope: float = 0.0) -> Plan:
    """Forward (x, w, bias) -> y, or the input gradient (grad, w) -> y, with `bias` or `activation` the convolution."""
    v, h = c.vertical, c.horizontal
    ck, cn = (c.channels_out, c.channels_in) if back else (c.channels_in, c.channels_out)
    x_size = (v.size_out, h.size_out) if back else (v.size_in, h.size_in)
    y_size = (v.size_in, h.size_in) if back else (v.size_out, h.size_out)
    yc = _channels_innermost(c, cn * c.groups, y_size[0] * y_size[1])
    if back:
        u_v, mh, mw, gh, gw, th, tw, partial, pair = y_size, 1, 1, 1, 1, 0, 0, False, False
        config = _config(c, "conv_input_gradient", cn, c.n * y_size[0] * y_size[1])
        columns = cn
    else:
        v, h = one_pixel(v), one_pixel(h)
        u_v = ceil(v.size_out, v.stride), ceil(h.size_out, h.stride)
        pixels = c.n * u_v[0] * u_v[1]
        widest = configuration(c.device, "conv_forward", "bf16" if c.dtype == "fp16" else c.dtype)["n"]
        mh, mw = phases_together(v, h, cn, ITEMSIZE[c.dtype], widest)
        config = _config(c, "conv_forward", mh * mw * cn, pixels)
        if "phases" in config and v.stride % config["phases"][0] == h.stride % config["phases"][1] == 0:
            if max(v.dilation, h.dilation) == 1:
                mh, mw = config["phases"]
        gh, gw = ceil(min(v.stride, v.size_out), mh), ceil(min(h.stride, h.size_out), mw)
        pair = not yc and mw == 1 and gw == h.stride == 2 and config.get("pair", ITEMSIZE[c.dtype] == 2)
        of_h, of_w = counts(v, mh), counts(h, mw)
        th = of_h[0] if len(set(of_h)) == 1 else 0
        tw = of_w[0] if len(set(of_w)) == 1 else 0
        partial = _partial(v, mh) or _partial(h, mw)
        columns = mh * mw * cn
        gw = 1 if pair else gw
    pixels = c.n * u_v[0] * u_v[1]
    xc = _channels_innermost(c, ck * c.groups, x_size[0] * x_size[1])
    launches, scratch, source = [], {}, "x"
    moved = (v.kernel, h.kernel) != (1, 1) or max(v.stride, h.stride) > 1 if back else _shifts(v) or _shifts(h)
    if not xc and moved and config.get("transpose", ITEMSIZE[c.dtype] == 2) and ck * c.groups >= 8:
        launch, scratch = _transposed("t", "x", c.n, ck * c.groups, x_size[0] * x_size[1], c.dtype)
        launches.append(launch)
        xc, source = True, "t"
    co, taps = c.channels_out, v.kernel * h.kernel
    weight, weight_nhwc, elements = "w", c.weight_nhwc or taps == 1, c.channels_in * c.groups * co * taps
    if not weight_nhwc and config.get("pack", elements >= PACKED):
        launch, packed = _transposed("p", "w", c.channels_in * c.groups, co, taps, c.dtype)
        launches.append(launch)
        scratch |= packed
        weight, weight_nhwc = "p", True

    bn = min(config["n"], max(power(columns), 16))
    bm = min(config["m"], max(power(pixels), 16))
    bk = min(config["k"], max(power(ck), 16))
    while bm > 64 and ceil(pixels, bm) * ceil(columns, bn) * gh * gw * c.groups < config.get("programs", 132):
        bm //= 2
    per_access = WIDE // ITEMSIZE[c.dtype]
    xv, yv = vector(ck, per_access), vector(cn, per_access)
    scalars = {"pixels": pixels, "u": u_v[0], "v": u_v[1], "ih": x_size[0], "iw": x_size[1]}
    scalars |= {"in_plane": x_size[0] * x_size[1], "oh": y_size[0], "ow": y_size[1], "out_plane": y_size[0] * y_size[1]}
    scalars |= {"ck": ck // xv, "cn": cn // yv, "groups": c.groups}
    scalars |= {"column_blocks": ceil(columns, bn), "pixel_blocks": ceil(pixels, bm)}
    constants = {"BACK": back, "SH": v.stride, "SW": h.stride, "PH": v.padding, "PW": h.padding}
    constants |= {"DH": v.dilation, "DW": h.dilation, "KH": v.kernel, "KW": h.kernel, "GH": gh, "GW": gw}
    constants |= {
        "MH": mh,
        "MW": mw,
        "TH": th,
        "TW": tw,
        "PARTIAL": partial,
        "PAIR": pair,
        "XC": xc,
        "YC": yc,
        "WC": weight_nhwc,
        "XV": xv,
        "YV": yv,
    }
    constants |= {"EVEN_K": ck % bk == 0, "EVEN_N": columns % bn == 0, "HAS_BIAS": bias}
    constants |= {"ACTIVATION": activation, "SLOPE": slope, "ACC": accumulator(c.dtype), "PREC": precision(c, config)}
    constants |= {
        "CAST": c.cast,
        "IDX64": c.n * c.groups * max(_elements(ck, x_size), _elements(cn, y_size)) >= LIMIT32,
    }
    constants |= {"BM": bm, "BN": bn, "BK": bk, "num_stages": config["stages"]}
    grid = gh * gw * scalars["column_blocks"] * scalars["pixel_blocks"] * c.groups
    buffers = (source, weight, "bias", "y")
    launches.append(Launch("phase_gemm", buffers, grid, scalars, constants, config["warps"]))
    return Plan(tuple(launches), scratch)


def _elements(channels: int, size: tuple[int, int]) -> int:
    return channels * size[0] * size[1]


def _partial(axis: Axis, together: int) -> bool:
    """Whether phases side by side differ in their taps."""
    if together == 1:
        return False
    groups = counts(axis, together)
    alone = [count_taps(axis, a, 1) for a in range(axis.stride)]
    return any(alone[a] != groups[a // together] for a in range(len(groups) * together))


def _shifts(axis: Axis) -> bool:
    """Whether some tap reads beside its own pixel: not where the kernel fits its stride."""
    return any((a + axis.padding - axis.dilation * k) % axis.stride == 0 and a + axis.padding != axis.dilation * k
               for a in range(axis.stride) for k in range(axis.kernel))  # fmt: skip


@lru_cache(maxsize=1024)
def weight_plan(c: Convolution) -> Plan:
    """(x, grad) -> y, the weight's gradient [ci, co, kh, kw], channels-last if c.weight_nhwc."""
    v, h = c.vertical, c.horizontal
    ci, co, taps = c.channels_in, c.channels_out, v.kernel * h.kernel
    in_size, out_size = (v.size_in, h.size_in), (v.size_out, h.size_out)
    pixels, columns = c.n * in_size[0] * in_size[1], co * taps
    xc = _channels_innermost(c, ci * c.groups, in_size[0] * in_size[1])
    yc = _channels_innermost(c, co * c.groups, out_size[0] * out_size[1])
    config = _config(c, "conv_weight_gradient", columns, pixels)
    launches, scratch, source = [], {}, "grad"
    moved = (v.kernel, h.kernel) != (1, 1) or max(v.stride, h.stride) > 1
    if not yc and moved and config.get("transpose", ITEMSIZE[c.dtype] == 2) and co * c.groups >= 8:
        launch, scratch = _transposed("t", "grad", c.n, co * c.groups, out_size[0] * out_size[1], c.dtype)
        launches.append(launch)
        yc, source = True, "t"
    bm = min(config["m"], max(power(ci), 16))
    bn = min(config["n"], max(power(columns), 16))
    bp = min(config["k"], max(power(pixels), 16))
    one_tap = co % bn == 0
    programs = ceil(ci, bm) * ceil(columns, bn) * c.groups
    blocks = ceil(pixels, bp)
    total = ci * c.groups * columns
    splits = min(ceil(config.get("programs", 264), programs), ceil(blocks, config.get("least", 4)))
    steps = ceil(blocks, splits)
    splits = ceil(blocks, steps)
    per_access = WIDE // ITEMSIZE[c.dtype]
    xv, yv = vector(ci, per_access), vector(co, per_access)
    planar = not c.weight_nhwc and taps > 1
    acc = accumulator(c.dtype)
    if splits > 1:
        scratch["part"] = (splits * total, acc)
        to_ci, to_co, to_tap = columns, 1, co
    else:
        to_ci, to_co, to_tap = columns, *((taps, 1) if planar else (1, co))
    scalars = {"pixels": pixels, "ih": in_size[0], "iw": in_size[1], "in_plane": in_size[0] * in_size[1]}
    scalars |= {"oh": out_size[0], "ow": out_size[1], "out_plane": out_size[0] * out_size[1]}
    scalars |= {"ci": ci // xv, "co": co // yv, "groups": c.groups, "row_blocks": ceil(ci, bm)}
    scalars |= {"column_blocks": ceil(columns, bn), "steps": steps, "total": total}
    scalars |= {"to_ci": to_ci, "to_co": to_co, "to_tap": to_tap}
    constants = {"SH": v.stride, "SW": h.stride, "PH": v.padding, "PW": h.padding, "DH": v.dilation, "DW": h.dilation}
    constants |= {"KH": v.kernel, "KW": h.kernel, "XC": xc, "YC": yc, "XV": xv, "YV": yv, "ONE_TAP": one_tap}
    wide = c.n * c.groups * max(_elements(ci, in_size), _elements(co, out_size)) >= LIMIT32
    constants |= {"ACC": acc, "PREC": precision(c, config), "CAST": c.cast, "IDX64": wide}
    constants |= {"BM": bm, "BN": bn, "BP": bp, "num_stages": config["stages"]}
    buffers = ("x", source, "part" if splits > 1 else "y")
    launches.append(Launch("weight_gradient", buffers, programs * splits, scalars, constants, config["warps"]))
    if splits > 1:
        launches.append(summed(total, splits, co, taps, planar, acc, config))
    return Plan(tuple(launches), scratch)


def summed(total: int, count: int, co: int, taps: int, planar: bool, acc: str, config: dict, to: str = "y") -> Launch:
    bs = min(power(count), 16)
    bn = min(power(total), config.get("sum", 128))
    scalars = {"total": total, "count": count, "co": co, "taps": taps}
    constants = {"PLANAR": planar, "ACC": acc, "BS": bs, "BN": bn}
    return Launch("sum_partials", ("part", to), ceil(total, bn), scalars, constants, 4)


@lru_cache(maxsize=1024)
def epilogue_plan(n, channels, plane, dtype, nhwc, activation, slope, bias, device) -> Plan:
    """(grad, output) -> y, and the bias gradient as the sum over n * plane pixels -> bias."""
    config = configuration(device, "conv_epilogue_gradient", "nhwc" if nhwc else "nchw", dtype)
    pixels, per_access = n * plane, WIDE // ITEMSIZE[dtype]
    cv = vector(channels, per_access)
    if nhwc:
        bc = min(power(channels), 128)
        bp = min(max(config["elements"] // bc, 1), power(pixels))
    else:
        bc, bp = 1, min(config["elements"], power(pixels))
    blocks = ceil(pixels, bp)
    steps = ceil(blocks, min(blocks, max(BLOCKS // ceil(channels, bc), 1)))
    ranges, acc = ceil(blocks, steps), accumulator(dtype)
    scalars = {
        "pixels": pixels,
        "plane": plane,
        "channels": channels // cv,
        "blocks": ceil(channels, bc),
        "steps": steps,
    }
    constants = {"YC": nhwc, "CV": cv, "ACTIVATION": activation, "SLOPE": slope, "HAS_BIAS": bias, "ACC": acc}
    constants |= {"IDX64": pixels * channels >= LIMIT32, "BP": bp, "BC": bc}
    buffers = ("grad", "output", "y", "part" if bias else "y")
    grid = ceil(channels, bc) * ranges
    launches = [Launch("epilogue_gradient", buffers, grid, scalars, constants, config["warps"])]
    scratch = {}
    if bias:
        scratch["part"] = (ranges * channels, acc)
        launches.append(summed(channels, ranges, 1, 1, False, acc, config, to="bias"))
    return Plan(tuple(launches), scratch)
