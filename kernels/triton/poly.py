"""Polyphase kernels: enlargement by 1, 2, 4 or 8 per axis, where the weights repeat with that period and are constants.

Both kernels read and write dense tensors [outer, rows, columns, cg * V]: for NCHW outer = n * c and cg * V = 1, for
NHWC outer = n and cg * V = c. A lane (one position in a block of BW) owns Q adjacent input columns (of one plane, or of
V adjacent channels) and slides down a strip of R input rows, so that each row is filtered horizontally once.

Weights come as flat constexpr tuples made by `aeup.kernels.axis`: W[p * (L + 1 + H) + L + d] is the weight with which
output phase p reads the input at distance d in [-L, H]. Zeros are skipped when the kernel is compiled.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def first_nonzero(w, at, n):
    return next(k for k in range(n) if w[at + k] != 0)


@triton.constexpr_function
def last_nonzero(w, at, n):
    return next(k for k in reversed(range(n)) if w[at + k] != 0)


@triton.constexpr_function
def any_nonzero(w):
    return any(x != 0 for x in w)


# In the interpreter a plain assignment makes a tensor of a number: constants are annotated or stay expressions.


@triton.jit
def split_columns(tile, N: tl.constexpr):
    """[BW, N] -> N tensors [BW]; registers only."""
    parts = (tile,)
    for step in tl.static_range(log2(N)):
        even = ()
        odd = ()
        for k in tl.static_range(1 << step):
            a, b = tl.split(tl.reshape(parts[k], (tile.shape[0], N >> (step + 1), 2)))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    columns = ()
    for k in tl.static_range(N):
        columns = columns + (tl.reshape(parts[k], (tile.shape[0],)),)
    return columns


@triton.jit
def join_columns(columns, N: tl.constexpr):
    """N tensors [BW] -> [BW, N], the inverse of split_columns."""
    parts = ()
    for k in tl.static_range(N):
        parts = parts + (tl.expand_dims(columns[k], 1),)
    for step in tl.static_range(log2(N)):
        joined = ()
        for k in tl.static_range(N >> (step + 1)):
            pair = tl.join(parts[k], parts[k + (N >> (step + 1))])
            joined = joined + (tl.reshape(pair, (columns[0].shape[0], 2 << step)),)
        parts = joined
    return parts[0]


@triton.jit
def scaled(value, weight: tl.constexpr):
    return value if weight == 1 else value * weight


@triton.jit
def weighted(values, AT: tl.constexpr, W: tl.constexpr, FROM: tl.constexpr, N: tl.constexpr):
    """sum over d in [0, N) of W[FROM + d] * values[AT + d]; zero weights are skipped, a 1 passes the value through."""
    FIRST: tl.constexpr = first_nonzero(W, FROM, N)
    acc = scaled(values[AT + FIRST], W[FROM + FIRST])
    for d in tl.static_range(FIRST + 1, N):
        if W[FROM + d] != 0:
            acc = acc + scaled(values[AT + d], W[FROM + d])
    return acc


@triton.constexpr_function
def next_power(n):
    return 1 << (n - 1).bit_length() if n > 0 else 1


@triton.jit
def halo_columns(
    ptr, row, j, lw, mask, edge,
    N: tl.constexpr, HALO: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The HALO columns beside a lane's own N, in NCHW: one load where the neighbour has as many as a vector wants."""
    HV: tl.constexpr = next_power(HALO)
    halo = ()
    if HALO > 0:
        if N % HV == 0:
            inner = (j + 1 < lw) if RIGHT else (j > 0)
            at = row + j * N + (N if RIGHT else -HV)
            tile = tl.load(ptr + at[:, None] + tl.arange(0, HV)[None, :], mask=(mask & inner)[:, None], other=0)
            wide = split_columns(tile, HV)
            for t in tl.static_range(HALO):
                value = wide[t if RIGHT else HV - HALO + t]
                if EDGE:
                    value = tl.where(inner, value, edge)
                halo = halo + (value.to(ACC),)
        else:
            for t in tl.static_range(HALO):
                at = j * N + (N + t if RIGHT else t - HALO)
                inside = mask
                if EDGE:
                    at = tl.minimum(tl.maximum(at, 0), lw * N - 1)
                else:
                    inside = mask & (at >= 0) & (at < lw * N)
                halo = halo + (tl.load(ptr + row + at, mask=inside, other=0).to(ACC),)
    return halo


@triton.jit
def load_columns(
    ptr, row, j, g, cg, lw, mask,
    N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    NHWC: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns j * N - LEFT .. (j + 1) * N + RIGHT - 1 of the row that begins at offset `row`: LEFT + N + RIGHT tensors.

    A column outside [0, lw * N) repeats the edge if EDGE, else it is zero.
    """
    columns = ()
    if NHWC:
        channels = tl.arange(0, V)[None, :]
        for t in tl.static_range(LEFT + N + RIGHT):
            at = j * N + (t - LEFT)
            inside = mask
            if t < LEFT or t >= LEFT + N:
                if EDGE:
                    at = tl.minimum(tl.maximum(at, 0), lw * N - 1)
                else:
                    inside = mask & (at >= 0) & (at < lw * N)
            offset = (row + at * (cg * V) + g * V)[:, None] + channels
            columns = columns + (tl.load(ptr + offset, mask=inside[:, None], other=0).to(ACC),)
    else:
        first = row + j * N
        own = split_columns(tl.load(ptr + first[:, None] + tl.arange(0, N)[None, :], mask=mask[:, None], other=0), N)
        columns = halo_columns(ptr, row, j, lw, mask, own[0], N, LEFT, False, EDGE, ACC)
        for t in tl.static_range(N):
            columns = columns + (own[t].to(ACC),)
        columns = columns + halo_columns(ptr, row, j, lw, mask, own[N - 1], N, RIGHT, True, EDGE, ACC)
    return columns


@triton.jit
def store_columns(
    ptr, row, j, g, cg, mask, values, AT: tl.constexpr, N: tl.constexpr, NHWC: tl.constexpr, V: tl.constexpr
):
    """Write N adjacent columns per lane: from one tensor [BW, N] (NCHW) or from N tensors [BW, V] (NHWC)."""
    if NHWC:
        for t in tl.static_range(N):
            offset = (row + (j * N + t) * (cg * V) + g * V)[:, None] + tl.arange(0, V)[None, :]
            tl.store(ptr + offset, values[AT + t].to(ptr.dtype.element_ty), mask=mask[:, None])
    else:
        offset = (row + j * N)[:, None] + tl.arange(0, N)[None, :]
        tl.store(ptr + offset, values[AT].to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def lane_of(lanes, strips, lw, cg, BW: tl.constexpr, R: tl.constexpr, NHWC: tl.constexpr, IDX64: tl.constexpr):
    """First row of the program's strip, and outer index, column group, channel group and mask of its lanes."""
    pid = tl.program_id(0)
    if IDX64:
        pid = pid.to(tl.int64)
    lane = (pid // strips) * BW + tl.arange(0, BW)
    per_row = lw * cg if NHWC else lw
    outer = lane // per_row
    e = lane % per_row
    j = e
    g = e
    if NHWC:
        j = e // cg
        g = e % cg
    return (pid % strips) * R, outer, j, g, lane < lanes


@triton.jit(do_not_specialize=["lanes", "strips", "lw", "cg", "ih"])
def poly_forward(
    x, y, lanes, strips, lw, cg, ih,
    SH: tl.constexpr, LH: tl.constexpr, HH: tl.constexpr, WH: tl.constexpr,
    SW: tl.constexpr, LW: tl.constexpr, HW: tl.constexpr, WW: tl.constexpr,
    Q: tl.constexpr, V: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr,
    BW: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [outer, SH * ih, SW * lw * Q, cg * V] from x [outer, ih, lw * Q, cg * V]."""
    i0, outer, j, g, mask = lane_of(lanes, strips, lw, cg, BW, R, NHWC, IDX64)
    pitch = lw * cg * (Q * V) if NHWC else lw * Q
    if IDX64:
        pitch = pitch.to(tl.int64)
    NT: tl.constexpr = SW * Q if NHWC else 1  # tensors per filtered row
    ring = ()
    for r in tl.static_range(R + LH + HH):
        i = tl.minimum(tl.maximum(i0 + (r - LH), 0), ih - 1)
        columns = load_columns(x, (outer * ih + i) * pitch, j, g, cg, lw, mask, Q, LW, HW, True, NHWC, V, ACC)
        wide = ()
        for q in tl.static_range(Q):
            for p in tl.static_range(SW):
                wide = wide + (weighted(columns, q, WW, p * (LW + 1 + HW), LW + 1 + HW),)
        if not NHWC:
            wide = (join_columns(wide, SW * Q),)
        ring = ring + wide
        if r >= LH + HH:
            here = i0 + (r - LH - HH)
            for p in tl.static_range(SH):
                values = ()
                for t in tl.static_range(NT):
                    taps = ()
                    for d in tl.static_range(LH + 1 + HH):
                        taps = taps + (ring[(r - LH - HH + d) * NT + t],)
                    values = values + (weighted(taps, 0, WH, p * (LH + 1 + HH), LH + 1 + HH),)
                row = ((outer * ih + here) * SH + p) * (pitch * SW)
                store_columns(y, row, j, g, cg, mask & (here < ih), values, 0, SW * Q, NHWC, V)


@triton.jit(do_not_specialize=["lanes", "strips", "lw", "cg", "ih"])
def poly_backward(
    g_out, y, lanes, strips, lw, cg, ih,
    SH: tl.constexpr, LH: tl.constexpr, HH: tl.constexpr, WH: tl.constexpr,
    SW: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WT: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    Q: tl.constexpr, V: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr,
    BW: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [outer, ih, lw * Q, cg * V], the gradient of the input, from g_out [outer, SH * ih, SW * lw * Q, cg * V].

    WT[q * N + t], N = LEFT + SW * Q + RIGHT, is the weight of a lane's gradient column t for its input column q. LO and
    HI [N] are added for the first and the last column of a row, onto which the taps outside were clamped. Rows go
    into LH + 1 + HH accumulators; the oldest is complete, and written, after each cell of SH gradient rows.
    """
    i0, outer, j, g, mask = lane_of(lanes, strips, lw, cg, BW, R, NHWC, IDX64)
    pitch = lw * cg * (Q * V) if NHWC else lw * Q
    if IDX64:
        pitch = pitch.to(tl.int64)
    i1 = tl.minimum(i0 + R, ih)
    N: tl.constexpr = LEFT + SW * Q + RIGHT
    NT: tl.constexpr = Q if NHWC else 1
    K: tl.constexpr = LH + 1 + HH
    leftmost = j == 0
    rightmost = j == lw - 1
    if NHWC:
        leftmost = leftmost[:, None]
        rightmost = rightmost[:, None]
    acc = ()
    for _ in tl.static_range(K * NT):
        acc = acc + (tl.zeros((BW, V if NHWC else Q), ACC),)
    for m in tl.range(tl.maximum(i0 - HH, 0), i1 + LH):
        for p in tl.static_range(SH):
            # Rows that reach nothing in this strip are not read.
            reaches = (m + (last_nonzero(WH, p * K, K) - LH) >= i0) & (m + (first_nonzero(WH, p * K, K) - LH) < i1)
            live = reaches & (m < ih)
            row = ((outer * ih + m) * SH + p) * (pitch * SW)
            columns = load_columns(g_out, row, j, g, cg, lw, mask & live, SW * Q, LEFT, RIGHT, False, NHWC, V, ACC)
            narrow = ()
            for q in tl.static_range(Q):
                sum = weighted(columns, 0, WT, q * N, N)
                if q == 0 and any_nonzero(LO):
                    sum = tl.where(leftmost, sum + weighted(columns, 0, LO, 0, N), sum)
                if q == Q - 1 and any_nonzero(HI):
                    sum = tl.where(rightmost, sum + weighted(columns, 0, HI, 0, N), sum)
                narrow = narrow + (sum,)
            if not NHWC:
                narrow = (join_columns(narrow, Q),)
            added = ()
            for k in tl.static_range(K):
                for t in tl.static_range(NT):
                    if WH[p * K + k] == 0:
                        added = added + (acc[k * NT + t],)
                    else:
                        added = added + (acc[k * NT + t] + scaled(narrow[t], WH[p * K + k]),)
            acc = added
        here = m - LH
        done = ()
        for t in tl.static_range(NT):
            value = acc[t]
            if K > 1:
                total = value
                for k in tl.static_range(1, K):
                    total += acc[k * NT + t]
                value = tl.where(here == ih - 1, total, value)  # rows past the last one were clamped onto it
            done = done + (value,)
        store_columns(y, (outer * ih + here) * pitch, j, g, cg, mask & (here >= i0) & (here < i1), done, 0, Q, NHWC, V)
        shifted = ()
        for k in tl.static_range(1, K + 1):
            for t in tl.static_range(NT):
                if k == K:
                    shifted = shifted + (tl.zeros_like(acc[t]),)
                elif k == 1:
                    # Rows before the first one were clamped onto it.
                    shifted = shifted + (tl.where(here < 0, acc[NT + t] + acc[t], acc[NT + t]),)
                else:
                    shifted = shifted + (acc[k * NT + t],)
        acc = shifted
