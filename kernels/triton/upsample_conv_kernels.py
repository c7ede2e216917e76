"""Convolution of an upsampled map that is never written.

Nearest with integer scales: `fold` turns the weight into that of a transposed convolution (convolution_kernels.py), and
its transpose turns the gradient back. Otherwise an implicit GEMM whose operand is resampled in the load, by the index
code of taps.py: forward and weight gradient make the upsampled map there, the input gradient applies the transposed
resampling to the gradient of the result. Tensors are dense, NHWC or NCHW: offsets are image * n +
pixel * (row * width + column) + channel * c.
"""

import triton
import triton.language as tl

from .convolution_kernels import activated, product
from .taps import clamp, first_candidate, real_scale, source, weight_of


@triton.jit(do_not_specialize=["cb", "row_blocks", "column_blocks", "first_h", "first_w"])
def fold(
    src, dst, ca, cb, row_blocks, column_blocks, first_h, first_w, kh, kw, mh, mw,
    src_group, src_a, src_b, src_tap, dst_group, dst_a, dst_b, dst_tap,
    SH: tl.constexpr, SW: tl.constexpr, ACC: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """dst[g, a, b, t] = the sum of src[g, a, b, j] over j in [first - t, first - t + S) that exist, along both axes.

    src has kh x kw taps and dst mh x mw, with strides of their own for group, a, b and tap: with first = k - 1 + e
    the weight w[co, ci, j] gives that of the transposed convolution, W[ci, co, t], e zeros wider on each side than
    k + S - 1; with the two exchanged it is the transposed map.
    """
    pid = tl.program_id(0)
    t = pid % (mh * mw)
    pid = pid // (mh * mw)
    a = pid % row_blocks * BA + tl.arange(0, BA)
    pid = pid // row_blocks
    b = pid % column_blocks * BB + tl.arange(0, BB)
    g = pid // column_blocks
    mask = (a < ca)[:, None] & (b < cb)[None, :]
    top = tl.maximum(first_h - t // mw, 0)
    left = tl.maximum(first_w - t % mw, 0)
    down = tl.minimum(first_h - t // mw + SH, kh)
    right = tl.minimum(first_w - t % mw + SW, kw)
    at = src + g * src_group + (a * src_a)[:, None] + (b * src_b)[None, :]
    acc = tl.zeros((BA, BB), ACC)
    for j in range(top, down):
        for i in range(left, right):
            acc += tl.load(at + (j * kw + i) * src_tap, mask=mask, other=0).to(ACC)
    to = g * dst_group + t * dst_tap + (a * dst_a)[:, None] + (b * dst_b)[None, :]
    tl.store(dst + to, acc.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def sampled(
    x, mask, r, c, pixel, ih, iw, uh, uw, scale_h, scale_w,
    K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """[rows, channels] of the upsampled map at (r, c), 0 outside; x points at pixel 0 of (row's image, channel)."""
    mask = mask & ((r >= 0) & (r < uh) & (c >= 0) & (c < uw))[:, None]
    top, down = source(r, scale_h, ih, K, ALIGN, EXACT, S)
    left, across = source(c, scale_w, iw, K, ALIGN, EXACT, S)
    if K == 1:
        return tl.load(x + ((clamp(top, ih) * iw + clamp(left, iw)) * pixel)[:, None], mask=mask, other=0)
    else:
        total = tl.zeros(mask.shape, ACC)
        for i in tl.static_range(K):
            row = clamp(top + i, ih) * iw
            line = tl.zeros(mask.shape, ACC)
            for j in tl.static_range(K):
                at = (row + clamp(left + j, iw)) * pixel
                line += tl.load(x + at[:, None], mask=mask, other=0).to(ACC) * across[j][:, None]
            total += line * down[i][:, None]
        if CAST:  # the interpreter truncates to bfloat16
            return total
        else:
            return total.to(x.dtype.element_ty)


@triton.jit(
    do_not_specialize=["size_in", "size_out", "scale", "reach", "inverse", "pad", "width"],
)
def transposed_table(
    first, table, size_in, size_out, scale, reach, inverse, pad, width,
    K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of input i: first[i], from which on width outputs may read it, and table[t, i], the weight of first[i] + t."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = real_scale(scale, S)
    at = first_candidate(i, reach, inverse, pad, size_out)
    tl.store(first + i, at, mask=i < size_in)
    for t in range(0, width):
        weight = weight_of(at + t, i, scale, size_in, size_out, K, ALIGN, EXACT, S)
        tl.store(table + t * size_in + i, weight.to(table.dtype.element_ty), mask=i < size_in)


@triton.jit
def gathered(
    g, mask, top, left, down, across, dh, dw, pixel, ih, iw, oh, ow, width_h, width_w,
    ACC: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """[rows, channels] of the transposed resampling of the map that is g, shifted by (dh, dw), and 0 outside g.

    A row's width_h x width_w candidates begin at (top, left); `down` and `across` point at the weights of the first.
    """
    total = tl.zeros(mask.shape, ACC)
    for a in range(0, width_h):
        vertical = tl.load(down + a * ih)
        r = top + (a + dh)
        live = (vertical != 0) & (r >= 0) & (r < oh)
        line = tl.zeros(mask.shape, ACC)
        for b in range(0, width_w):
            weight = tl.load(across + b * iw)
            c = left + (b + dw)
            here = mask & (live & (weight != 0) & (c >= 0) & (c < ow))[:, None]
            line += tl.load(g + ((r * ow + c) * pixel)[:, None], mask=here, other=0).to(ACC) * weight[:, None]
        total += line * vertical[:, None]
    if CAST:
        return total
    else:
        return total.to(g.dtype.element_ty)


@triton.jit(
    do_not_specialize=[
        "ih", "iw", "uh", "uw", "oh", "ow", "scale_h", "scale_w", "width_h", "width_w", "ck", "cn", "column_blocks",
        "pixel_blocks",
    ]
)  # fmt: skip
def resample_gemm(
    x, w, bias, y, first_h, first_w, table_h, table_w,
    pixels, ih, iw, uh, uw, oh, ow, scale_h, scale_w, width_h, width_w, ck, cn, column_blocks, pixel_blocks,
    x_image, x_pixel, x_channel, y_image, y_pixel, y_channel, w_group, w_k, w_n, w_tap,
    BACK: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, PREC: tl.constexpr, CAST: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Forward: y [n, groups * cn, oh, ow] = activation(bias + convolution of the upsampled x [n, groups * ck, ih, iw]).

    BACK: y [n, groups * cn, ih, iw], the gradient of the input, from x [n, groups * ck, oh, ow], that of the result,
    with the tables of both axes. pixels: those of y. The upsampled map has uh x uw pixels.
    """
    pid = tl.program_id(0)
    pn = pid % column_blocks
    pid = pid // column_blocks
    pm = pid % pixel_blocks
    g = pid // pixel_blocks
    height = ih if BACK else oh
    width = iw if BACK else ow
    scale_h = real_scale(scale_h, S)
    scale_w = real_scale(scale_w, S)
    if IDX64:
        pm = pm.to(tl.int64)
    m = pm * BM + tl.arange(0, BM)
    live = m < pixels
    column = (m % width).to(tl.int32)
    row = (m // width % height).to(tl.int32)
    image = m // width // height
    if BACK:
        top = tl.load(first_h + row)
        left = tl.load(first_w + column)
    n = pn * BN + tl.arange(0, BN)
    wide = n < cn
    kk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    taps = KH * KW
    for it in range(0, taps * tl.cdiv(ck, BK)):
        tap = it % taps
        k = it // taps * BK + kk
        dh = tap // KW - PH
        dw = tap % KW - PW
        deep = k < ck
        base = x + (image * x_image)[:, None] + ((g * ck + k) * x_channel)[None, :]
        mask = live[:, None] & deep[None, :]
        if BACK:
            xv = gathered(
                base, mask, top, left, table_h + row, table_w + column, -dh, -dw, x_pixel, ih, iw, oh, ow,
                width_h, width_w, ACC, CAST,
            )  # fmt: skip
        else:
            xv = sampled(
                base, mask, row + dh, column + dw, x_pixel, ih, iw, uh, uw, scale_h, scale_w,
                K, ALIGN, EXACT, S, ACC, CAST,
            )  # fmt: skip
        from_w = w + g * w_group + tap * w_tap + (k * w_k)[:, None] + (n * w_n)[None, :]
        wv = tl.load(from_w, mask=deep[:, None] & wide[None, :], other=0)
        acc = product(xv, wv, acc, PREC, ACC, CAST)
    if HAS_BIAS:
        acc += tl.load(bias + g * cn + n, mask=wide, other=0).to(ACC)[None, :]
    acc = activated(acc, ACTIVATION, SLOPE)
    to = (image * y_image + (row * width + column) * y_pixel)[:, None] + ((g * cn + n) * y_channel)[None, :]
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=live[:, None] & wide[None, :])


@triton.jit(
    do_not_specialize=[
        "ih", "iw", "uh", "uw", "oh", "ow", "scale_h", "scale_w", "ci", "co", "groups", "row_blocks", "column_blocks",
        "steps",
    ]
)  # fmt: skip
def resample_weight_gradient(
    x, grad, out, pixels, ih, iw, uh, uw, oh, ow, scale_h, scale_w, ci, co, groups, row_blocks, column_blocks, steps,
    total, x_image, x_pixel, x_channel, g_image, g_pixel, g_channel, to_row, to_column, to_tap,
    PH: tl.constexpr, PW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    K: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr, S: tl.constexpr,
    ACC: tl.constexpr, PREC: tl.constexpr, CAST: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out[range, co, ci, tap] = sum over the range's pixels o of grad[co, o] times the upsampled x[ci, o + tap - p].

    pixels = n * oh * ow; a range has steps blocks of BP pixels, and total elements of out.
    """
    pid = tl.program_id(0)
    tap = pid % (KH * KW)
    pid = pid // (KH * KW)
    pn = pid % column_blocks
    pid = pid // column_blocks
    pm = pid % row_blocks
    pid = pid // row_blocks
    g = pid % groups
    s = pid // groups
    if IDX64:
        s = s.to(tl.int64)
    scale_h = real_scale(scale_h, S)
    scale_w = real_scale(scale_w, S)
    r = pm * BM + tl.arange(0, BM)
    c = pn * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for it in range(0, steps):
        p = (s * steps + it) * BP + tl.arange(0, BP)
        live = p < pixels
        column = (p % ow).to(tl.int32)
        row = (p // ow % oh).to(tl.int32)
        image = p // ow // oh
        from_g = (image * g_image + (row * ow + column) * g_pixel)[:, None] + ((g * co + r) * g_channel)[None, :]
        gv = tl.load(grad + from_g, mask=live[:, None] & (r < co)[None, :], other=0)
        base = x + (image * x_image)[:, None] + ((g * ci + c) * x_channel)[None, :]
        xv = sampled(
            base, live[:, None] & (c < ci)[None, :], row + (tap // KW - PH), column + (tap % KW - PW), x_pixel,
            ih, iw, uh, uw, scale_h, scale_w, K, ALIGN, EXACT, S, ACC, CAST,
        )  # fmt: skip
        acc = product(tl.trans(gv), xv, acc, PREC, ACC, CAST)
    at = s.to(tl.int64) * total + ((g * co + r) * to_row)[:, None] + (c * to_column + tap * to_tap)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(r < co)[:, None] & (c < ci)[None, :])
