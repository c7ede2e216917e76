"""Kernels for any scale: the weights come from the index code, evaluated where they are used.

Dense tensors [outer, rows, row elements] as in poly.py. A lane owns V adjacent elements of a row and slides down a
strip of R rows. Forward: the last K input rows, filtered horizontally, stay in registers. Backward: the same map in
scatter form along the rows (K accumulators in registers, each row written once when it is complete) and gathered along
the columns: each candidate output is asked which inputs it reads, so that it cannot disagree with the forward.
"""

import triton
import triton.language as tl


@triton.jit
def real_scale(scale, S: tl.constexpr):
    """float64 scales arrive as their bits, because a float argument of a kernel is float32."""
    if S == tl.float64:
        return tl.full((), scale, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full((), scale, tl.float32)


@triton.jit
def to_index(at, size):
    """Integer part of a floored coordinate, at most size - 1; the float is bounded first, so that it fits."""
    return tl.minimum(tl.minimum(at, tl.full((), size - 1, at.dtype)).to(tl.int32), size - 1)


@triton.jit
def cubic_near(x):
    return ((-0.75 + 2) * x - (-0.75 + 3)) * x * x + 1


@triton.jit
def cubic_far(x):
    return ((-0.75 * x + 3.75) * x - 6) * x + 3


@triton.jit
def source(o, scale, size, K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr):
    """First tap of output o (it may be -1) and its K weights."""
    if K == 1:
        at = (o + tl.zeros((), tl.int32)).to(tl.float32)
        if EXACT:
            at = at + 0.5
        return to_index(tl.floor(at * scale), size), (tl.full(at.shape, 1, tl.float32),)
    else:
        at = (o + tl.zeros((), tl.int32)).to(S)
        if ALIGN:
            at = scale * at
        else:
            at = scale * (at + 0.5) - 0.5
            if K == 2:
                at = tl.maximum(at, 0.0)
        i = to_index(tl.floor(at), size)
        t = tl.minimum(tl.maximum(at - i.to(S), 0.0), 1.0)
        if K == 2:
            return i, (1 - t, t)
        else:
            return i - 1, (cubic_far(t + 1), cubic_near(t), cubic_near(1 - t), cubic_far(2 - t))


@triton.jit
def clamp(i, size):
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def filter_row(x, row, offsets, weights, mask, K: tl.constexpr, ACC: tl.constexpr):
    sum = tl.load(x + (row + offsets[0]), mask=mask, other=0).to(ACC)
    if K > 1:
        sum = sum * weights[0]
    for k in tl.static_range(1, K):
        sum += tl.load(x + (row + offsets[k]), mask=mask, other=0).to(ACC) * weights[k]
    return sum


@triton.jit(do_not_specialize=["lanes", "strips", "groups", "cg", "ih", "iw", "oh", "scale_h", "scale_w"])
def taps_forward(
    x, y, lanes, strips, groups, cg, ih, iw, oh, scale_h, scale_w,
    K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
    V: tl.constexpr, LAYOUT: tl.constexpr, IDX64: tl.constexpr, BW: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [outer, oh, groups * V] from x [outer, ih, iw * channels].

    LAYOUT 0: NCHW, channels = 1. LAYOUT 1: NHWC, channels = cg * V, a lane's elements are channels of one pixel.
    LAYOUT 2: NHWC, channels = cg, a lane's elements are any neighbours in the row.
    """
    pid = tl.program_id(0)
    if IDX64:
        pid = pid.to(tl.int64)
    scale_h = real_scale(scale_h, S)
    scale_w = real_scale(scale_w, S)
    lane = (pid // strips) * BW + tl.arange(0, BW)
    mask = (lane < lanes)[:, None]
    outer = (lane // groups)[:, None]
    e = (lane % groups)[:, None]
    inner = tl.arange(0, V)[None, :]
    flat = e * V + inner
    pitch = iw
    if LAYOUT == 0:
        column = flat
        stride = 1
        channel = tl.zeros_like(flat)
    elif LAYOUT == 1:
        pitch = iw * (cg * V)
        stride = cg * V
        column = e // cg
        channel = (e % cg) * V + inner
    else:
        pitch = iw * cg
        stride = cg
        column = flat // cg
        channel = flat % cg
    j, weights = source(column, scale_w, iw, K, ALIGN, EXACT, S)
    offsets = ()
    for k in tl.static_range(K):
        offsets = offsets + (clamp(j + k, iw) * stride + channel,)

    o0 = (pid % strips).to(tl.int32) * R
    top, _ = source(o0, scale_h, ih, K, ALIGN, EXACT, S)
    ring = ()
    for k in tl.static_range(K):
        row = (outer * ih + clamp(top + k, ih)) * pitch
        ring = ring + (filter_row(x, row, offsets, weights, mask, K, ACC),)
    for o in tl.range(o0, tl.minimum(o0 + R, oh)):
        i, vertical = source(o, scale_h, ih, K, ALIGN, EXACT, S)
        top = tl.maximum(top, i - K)  # a jump over more than K rows leaves none of the old ones
        while top < i:  # not a range: Triton 3.6 loses a carried value that only bounds an inner `for`
            row = (outer * ih + clamp(top + K, ih)) * pitch
            last = (filter_row(x, row, offsets, weights, mask, K, ACC),)
            if K == 1:
                ring = last
            elif K == 2:
                ring = (ring[1],) + last
            else:
                ring = (ring[1], ring[2], ring[3]) + last
            top += 1
        value = ring[0]
        if K > 1:
            value = ring[0] * vertical[0]
            for k in tl.static_range(1, K):
                value += ring[k] * vertical[k]
        tl.store(y + ((outer * oh + o) * (groups * V) + flat), value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def first_candidate(i, reach, inverse, pad, size_out):
    """A lower bound of the first output that reads input i; aeup.kernels.axis.window checked it for the whole axis."""
    at = (i - reach).to(tl.float32) * inverse
    at = tl.minimum(tl.maximum(at, 0.0), tl.full((), size_out, tl.float32))
    return tl.maximum(tl.minimum(at.to(tl.int32), size_out) - pad, 0)


@triton.jit
def weight_of(
    o, i, scale, size_in, size_out, K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr
):
    """Weight with which output o reads input i; an edge collects the taps that were clamped onto it."""
    start, weights = source(o, scale, size_in, K, ALIGN, EXACT, S)
    sum = tl.where(clamp(start, size_in) == i, weights[0], 0.0)
    for k in tl.static_range(1, K):
        sum += tl.where(clamp(start + k, size_in) == i, weights[k], 0.0)
    return tl.where(o < size_out, sum, 0.0)


@triton.jit(
    do_not_specialize=[
        "lanes", "strips", "groups", "cg", "ih", "iw", "oh", "ow", "scale_h", "scale_w",
        "reach", "inverse_h", "pad_h", "inverse_w", "pad_w", "chunks",
    ]
)  # fmt: skip
def taps_backward(
    g_out, y, lanes, strips, groups, cg, ih, iw, oh, ow, scale_h, scale_w,
    reach, inverse_h, pad_h, inverse_w, pad_w, chunks,
    K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, ONCE: tl.constexpr, V: tl.constexpr, IDX64: tl.constexpr, BW: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [outer, ih, iw, cg * V], the gradient of the input, from g_out [outer, oh, ow, cg * V].

    The candidate window of a column is T outputs wide with ONCE (their weights stay in registers), else T * chunks.
    """
    pid = tl.program_id(0)
    if IDX64:
        pid = pid.to(tl.int64)
    scale_h = real_scale(scale_h, S)
    scale_w = real_scale(scale_w, S)
    lane = (pid // strips) * BW + tl.arange(0, BW)
    mask = lane < lanes
    outer = lane // groups
    e = lane % groups
    column = (e // cg).to(tl.int32)
    channel = ((e % cg) * V)[:, None] + tl.arange(0, V)[None, :]
    first = first_candidate(column, reach, inverse_w, pad_w, ow)
    weights = ()
    if ONCE:
        for t in tl.static_range(T):
            weights = weights + (weight_of(first + t, column, scale_w, iw, ow, K, ALIGN, EXACT, S),)

    i0 = (pid % strips).to(tl.int32) * R
    i1 = tl.minimum(i0 + R, ih)
    # The gradient rows [o0, o1) reach the strip: the first whose last tap is >= i0, to the last that starts before i1.
    o0 = first_candidate(i0, reach, inverse_h, pad_h, oh)
    s, _ = source(o0, scale_h, ih, K, ALIGN, EXACT, S)
    while (o0 < oh) & (s + (K - 1) < i0):
        o0 += 1
        s, _ = source(o0, scale_h, ih, K, ALIGN, EXACT, S)
    here = tl.minimum(s, i0)  # the row of the oldest accumulator
    o1 = oh
    if i1 < ih:
        o1 = first_candidate(i1, reach, inverse_h, pad_h, oh)
        s, _ = source(o1, scale_h, ih, K, ALIGN, EXACT, S)
        while (o1 < oh) & (s < i1):
            o1 += 1
            s, _ = source(o1, scale_h, ih, K, ALIGN, EXACT, S)

    acc = ()
    for _ in tl.static_range(K):
        acc = acc + (tl.zeros((BW, V), ACC),)
    for o in tl.range(o0, o1 + 1):
        i, vertical = source(o, scale_h, ih, K, ALIGN, EXACT, S)
        i = tl.where(o < o1, i, i1)  # after the last row: write what is left
        while here < i:  # not a range, as above
            value = acc[0]
            if K > 1:
                total = acc[0]
                for k in tl.static_range(1, K):
                    total += acc[k]
                value = tl.where(here == ih - 1, total, value)  # taps past the last row were clamped onto it
            offset = ((outer * ih + here) * (groups * V) + (e // cg) * (cg * V))[:, None] + channel
            write = mask & (here >= i0) & (here < i1)
            tl.store(y + offset, value.to(y.dtype.element_ty), mask=write[:, None])
            shifted = ()
            for k in tl.static_range(1, K):
                if k == 1:
                    shifted = shifted + (tl.where(here < 0, acc[1] + acc[0], acc[1]),)  # likewise before the first
                else:
                    shifted = shifted + (acc[k],)
            acc = shifted + (tl.zeros_like(acc[0]),)
            here += 1
        live = mask & (o < o1)
        base = (outer * oh + o) * ow
        sum = tl.zeros((BW, V), ACC)
        if ONCE:
            for t in tl.static_range(T):
                offset = ((base + (first + t)) * (cg * V))[:, None] + channel
                value = tl.load(g_out + offset, mask=(live & (weights[t] != 0))[:, None], other=0).to(ACC)
                sum += value * weights[t][:, None]
        else:
            for c in tl.range(0, chunks):
                for t in tl.static_range(T):
                    at = first + (c * T + t)
                    weight = weight_of(at, column, scale_w, iw, ow, K, ALIGN, EXACT, S)
                    offset = ((base + at) * (cg * V))[:, None] + channel
                    value = tl.load(g_out + offset, mask=(live & (weight != 0))[:, None], other=0).to(ACC)
                    sum += value * weight[:, None]
        added = ()
        for k in tl.static_range(K):
            added = added + (tl.where(vertical[k] != 0, acc[k] + sum * vertical[k], acc[k]),)
        acc = added
