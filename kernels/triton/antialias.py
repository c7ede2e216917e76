"""Antialiased resampling: per-axis tables made on the device, then one banded product per axis.

The tables are made anew in every call, on the stream of the call: a cached table would be a hidden dependency between
streams and CUDA graphs.
"""

import triton
import triton.language as tl

from .taps import first_candidate, real_scale


@triton.jit
def stretched(x, CUBIC: tl.constexpr):
    """The filter at distance x in units of its stretch: a tent, or Keys' cubic with a = -0.5."""
    x = tl.abs(x)
    if CUBIC:
        near = ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        return tl.where(x < 1, 1 - x, 0.0)


@triton.jit
def quotient(a, b, S: tl.constexpr):
    return tl.div_rn(a, b) if S == tl.float32 else a / b  # `/` is not correctly rounded in float32


@triton.jit
def read_range(o, scale, size_in, K, CUBIC: tl.constexpr, S: tl.constexpr):
    """First input of output o, one past its last, the centre of the filter and the reciprocal of its stretch."""
    one = tl.full((), 1, S)
    stretch = tl.maximum(scale, one)
    support = (2 if CUBIC else 1) * stretch
    centre = scale * (o.to(S) + 0.5)
    bound = tl.full((), size_in + 1, S)  # so that the integers fit
    first = tl.minimum(tl.maximum(centre - support + 0.5, 0.0), bound).to(tl.int32)
    last = tl.minimum(tl.minimum(tl.maximum(centre + support + 0.5, 0.0), bound).to(tl.int32), size_in)
    return first, tl.minimum(last, first + K), centre, quotient(one, stretch, S)


@triton.jit
def tap(i, first, last, centre, shrink, CUBIC: tl.constexpr, S: tl.constexpr):
    weight = stretched((i.to(S) - centre + 0.5) * shrink, CUBIC)
    return tl.where((i >= first) & (i < last), weight, 0.0)


@triton.jit
def total_of(first, last, centre, shrink, K, CUBIC: tl.constexpr, S: tl.constexpr):
    total = tl.zeros(centre.shape, S)
    for k in tl.range(0, K):
        total += tap(first + k, first, last, centre, shrink, CUBIC, S)
    return tl.where(total != 0, total, 1.0)


@triton.jit(do_not_specialize=["size_in", "size_out", "scale", "K", "T", "reach", "inverse", "pad"])
def antialias_table(
    start, table, size_in, size_out, scale, K, T, reach, inverse, pad,
    CUBIC: tl.constexpr, TRANSPOSED: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """start [rows] int32 and table [T, rows] in S: row r of the map is sum_t table[t, r] * x[start[r] + t].

    Forward: rows = size_out, T = K. TRANSPOSED: rows = size_in, T the width of the candidate window.
    """
    scale = real_scale(scale, S)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if TRANSPOSED:
        mask = r < size_in
        begin = first_candidate(r, reach, inverse, pad, size_out)
        for t in tl.range(0, T):
            o = begin + t
            first, last, centre, shrink = read_range(o, scale, size_in, K, CUBIC, S)
            weight = tap(r, first, last, centre, shrink, CUBIC, S)
            weight = quotient(weight, total_of(first, last, centre, shrink, K, CUBIC, S), S)
            tl.store(table + tl.full((), t, tl.int64) * size_in + r, tl.where(o < size_out, weight, 0.0), mask=mask)
    else:
        mask = r < size_out
        begin, last, centre, shrink = read_range(r, scale, size_in, K, CUBIC, S)
        total = total_of(begin, last, centre, shrink, K, CUBIC, S)
        for t in tl.range(0, T):
            weight = quotient(tap(begin + t, begin, last, centre, shrink, CUBIC, S), total, S)
            tl.store(table + tl.full((), t, tl.int64) * size_out + r, weight, mask=mask)
    tl.store(start + r, begin, mask=mask)


@triton.jit(do_not_specialize=["lanes", "size_in", "size_out", "groups", "T"])
def banded(
    x, y, start, table, lanes, size_in, size_out, groups, T,
    V: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """y [outer, size_out, groups * V] = table applied along the middle axis of x [outer, size_in, groups * V]."""
    pid = tl.program_id(0)
    if IDX64:
        pid = pid.to(tl.int64)
    lane = pid * BW + tl.arange(0, BW)
    mask = lane < lanes
    g = lane % groups
    r = (lane // groups) % size_out
    outer = lane // groups // size_out
    first = tl.load(start + r, mask=mask, other=0)
    inner = (g * V)[:, None] + tl.arange(0, V)[None, :]
    sum = tl.zeros((BW, V), ACC)
    for t in tl.range(0, T):
        weight = tl.load(table + tl.full((), t, tl.int64) * size_out + r, mask=mask, other=0)
        offset = ((outer * size_in + (first + t)) * (groups * V))[:, None] + inner
        # A weight of zero can stand outside the tensor: not read.
        sum += tl.load(x + offset, mask=(mask & (weight != 0))[:, None], other=0).to(ACC) * weight[:, None]
    offset = (lane * V)[:, None] + tl.arange(0, V)[None, :]
    tl.store(y + offset, sum.to(y.dtype.element_ty), mask=mask[:, None])
