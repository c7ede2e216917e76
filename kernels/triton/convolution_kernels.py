"""Transposed convolution as implicit GEMMs: forward and input gradient (`phase_gemm`), weight gradient, epilogue.

Along one axis, output o reads input i through kernel index k exactly when o + p = s * i + d * k (Dumoulin & Visin,
arXiv 1603.07285, relationship 14). With o = s * u + a, the outputs of one phase a read i = u + j for the shifts j with
d * k = a + p - s * j and 0 <= k < K: a dense convolution of stride 1 over u, so that no zero is multiplied.

The rows of the GEMM are pixels and its columns are channels. Each tensor is dense, NHWC or NCHW by a flag of its own;
for an NCHW result the product is taken transposed, so that the pixels are the contiguous side of the tile.
Compiled integer division truncates and the interpreter's floors: every dividend here is non-negative or a multiple.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def common(a, b):
    """The greatest common divisor."""
    while b:
        a, b = b, a % b
    return a


@triton.constexpr_function
def inverse(s, d):
    """Of d / g modulo s / g, g = gcd(s, d)."""
    g = common(s, d)
    return next(k for k in range(s // g) if (k * d // g) % (s // g) == 1 % (s // g))


@triton.constexpr_function
def weaves(channels_last, m, s):
    return not channels_last and m == s and m > 1 and m & (m - 1) == 0


@triton.jit
def sigmoid_of(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh_of(x):
    """Rational near zero (Cody & Waite; the coefficients of Cephes' tanh), else by the exponential."""
    z = x * x
    p = (-0.964399179425052238628 * z - 99.2877231001918586564) * z - 1614.68768441708447952
    q = ((z + 112.811678491632931402) * z + 2235.48839060100448583) * z + 4844.06305325125486048
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    return tl.where(tl.abs(x) < 0.625, x + x * z * (p / q), tl.where(x < 0, -far, far))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """1 relu, 2 leaky_relu, 3 silu, 4 gelu, 5 tanh, 6 sigmoid; NaN stays NaN."""
    if ACTIVATION == 1:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        x = tl.where(x < 0, x * SLOPE, x)
    elif ACTIVATION == 3:
        x = x * sigmoid_of(x)
    elif ACTIVATION == 4:
        x = 0.5 * x * (1 + tl.erf(x * 0.70710678118654752440))
    elif ACTIVATION == 5:
        x = tanh_of(x)
    elif ACTIVATION == 6:
        x = sigmoid_of(x)
    return x


@triton.jit
def before_activation(grad, y, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The gradient before the activation, from its result, but for silu and gelu from its argument. As torch's, relu's
    is not a product: 0 where the result is, whatever the gradient, and the gradient where that is NaN."""
    if ACTIVATION == 1:
        grad = tl.where(y <= 0, 0.0, grad)
    elif ACTIVATION == 2:
        grad = tl.where(y > 0, grad, grad * SLOPE)
    elif ACTIVATION == 3:
        s = sigmoid_of(y)
        grad = grad * (s * (1 + y * (1 - s)))
    elif ACTIVATION == 4:
        cdf = 0.5 * (1 + tl.erf(y * 0.70710678118654752440))
        grad = grad * (cdf + y * tl.exp(-0.5 * y * y) * 0.39894228040143267794)
    elif ACTIVATION == 5:
        grad = grad * (1 - y * y)
    elif ACTIVATION == 6:
        grad = grad * (y * (1 - y))
    return grad


@triton.jit
def product(a, b, acc, PREC: tl.constexpr, ACC: tl.constexpr, CAST: tl.constexpr):
    """acc + a @ b. CAST: the interpreter multiplies 16-bit operands wrongly, float32 ones rightly."""
    if CAST:
        a = a.to(ACC)
        b = b.to(ACC)
    if PREC == "tf32":  # the tensor cores cut off what tf32 has no room for: round to nearest first
        a = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        b = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.dot(a, b, acc, input_precision=PREC, out_dtype=ACC)


@triton.jit
def taps_of(a, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, T: tl.constexpr):
    """The taps of the M phases from a on: the first shift, the kernel index of phase a there, and how many (T if > 0).

    Tap t has the shift first - t * D / g. A single phase has the kernel index k + t * S / g there, g = gcd(S, D).
    """
    G: tl.constexpr = common(S, D)
    if M == 1:
        k = ((a + P) // G * inverse(S, D)) % (S // G)
        first = (a + P - D * k) // S
        count = tl.maximum(K - k + (S // G - 1), 0) // (S // G)
        if G > 1:
            count = tl.where((a + P) % G == 0, count, 0)
    else:
        tl.static_assert(D == 1)
        first = (a + (M - 1 + P)) // S
        last = (a + (P - K + S * K + S)) // S - K
        count = first - last + 1
        k = a + P - S * first
    if T > 0:
        count = T
    return first, k, count


@triton.jit
def reduced(
    xs, ws, live, xr, xc, wide, lh, lw, jh, kh, th, jw, kw, tw, ih, iw, in_plane, step, cx, wk, wh, ww,
    JH: tl.constexpr, JW: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MH: tl.constexpr, MW: tl.constexpr, PARTIAL: tl.constexpr, XC: tl.constexpr, YC: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr, CAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The sum over th x tw taps and cx channels: [BM, BN], or its transpose for an NCHW result. The taps of a block of
    channels follow each other, since they read almost the same x."""
    kk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN) if YC else (BN, BM), ACC)
    taps = th * tw
    for it in range(0, taps * tl.cdiv(cx, BK)):
        t = it % taps
        k = it // taps * BK
        dh = jh + t // tw * JH
        dw = jw + t % tw * JW
        row = kh + t // tw * IH  # kernel index of the first phase
        column = kw + t % tw * IW
        inside = live & (xr + dh >= 0) & (xr + dh < ih) & (xc + dw >= 0) & (xc + dw < iw)
        from_x = xs + ((dh * iw + dw) * step + (k if XC else k * in_plane))
        from_w = ws + (row * wh + column * ww + k * wk)
        ok = wide
        if PARTIAL:
            if MH > 1:
                ok = ok & (row + lh >= 0) & (row + lh < KH)
            if MW > 1:
                ok = ok & (column + lw >= 0) & (column + lw < KW)
        if EVEN_K:
            xv = tl.load(from_x, mask=inside[:, None], other=0)
        else:
            xv = tl.load(from_x, mask=inside[:, None] & (k + kk < cx)[None, :], other=0)
        if EVEN_K and EVEN_N and not PARTIAL:
            wv = tl.load(from_w)
        elif EVEN_K:
            wv = tl.load(from_w, mask=ok[None, :], other=0)
        else:
            wv = tl.load(from_w, mask=(k + kk < cx)[:, None] & ok[None, :], other=0)
        if YC:
            acc = product(xv, wv, acc, PREC, ACC, CAST)
        else:
            acc = product(tl.trans(wv), tl.trans(xv), acc, PREC, ACC, CAST)
    return acc


@triton.jit(do_not_specialize=["u", "ih", "oh", "ck", "cn", "groups", "column_blocks", "pixel_blocks"])
def phase_gemm(
    x, w, bias, y, pixels, u, v, ih, iw, in_plane, oh, ow, out_plane, ck, cn, groups, column_blocks, pixel_blocks,
    BACK: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    GH: tl.constexpr, GW: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    PARTIAL: tl.constexpr, PAIR: tl.constexpr,
    XC: tl.constexpr, YC: tl.constexpr, WC: tl.constexpr, XV: tl.constexpr, YV: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr, CAST: tl.constexpr,
    IDX64: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [n, groups * cn * YV, oh, ow] from x [n, groups * ck * XV, ih, iw]; pixels = n * u * v.

    Forward: y[s * u + a] = activation(bias + sum over taps of x[u + j] w[k]); one program makes MH x MW phases, whose
    columns lie side by side. The phases come in GH x GW groups, next to each other in the grid: they read the same x.
    BACK (the input gradient): y[u] = sum over k of x[s * u + d * k - p] w[k], with x the gradient of the output.
    PARTIAL: some of the side-by-side phases have no kernel index at some shift (the weight is zero there).
    PAIR: one program makes both phases of a row (NCHW, SW = 2, MW = 1), one after the other.
    XC, YC, WC: channels are innermost in x, in y, in the weight. IDX64: offsets within x or y need 64 bits.
    """
    cx = ck * XV
    cy = cn * YV
    pid = tl.program_id(0)
    ah = pid % (GH * GW) // GW * MH
    aw = pid % GW * MW
    pid = pid // (GH * GW)
    pn = pid % column_blocks
    pid = pid // column_blocks
    pm = pid % pixel_blocks
    g = pid // pixel_blocks
    if IDX64:
        pm = pm.to(tl.int64)
        g = g.to(tl.int64)

    # Rows: pixels (image, iu, jv).
    m = pm * BM + tl.arange(0, BM)
    live = m < pixels
    jv = m % v
    iu = m // v % u
    image = m // v // u
    xr = iu * SH if BACK else iu
    xc = jv * SW if BACK else jv
    if XC:
        rows = ((image * ih + xr) * iw + xc) * (groups * cx) + g * cx
        step = groups * cx
    else:
        rows = (image * groups + g) * cx * in_plane + xr * iw + xc
        step = 1

    # Columns: (phase row, phase column, channel), or (phase row, channel, phase column) where these are interleaved.
    WEAVE: tl.constexpr = weaves(YC, MW, SW)
    c = pn * BN + tl.arange(0, BN)
    wide = c < cy * (MH * MW)
    if WEAVE:
        lw = c % MW
        co = c // MW % cy
        lh = c // MW // cy
    else:
        co = c % cy
        lw = c // cy % MW
        lh = c // cy // MW

    if BACK:
        th = KH
        tw = KW
        jh = -PH
        jw = -PW
        kh = 0
        kw = 0
    else:
        jh, kh, th = taps_of(ah, SH, PH, DH, KH, MH, TH)
        jw, kw, tw = taps_of(aw, SW, PW, DW, KW, MW, TW)
    # From one tap to the next.
    JH: tl.constexpr = DH if BACK else -(DH // common(SH, DH))
    JW: tl.constexpr = DW if BACK else -(DW // common(SW, DW))
    IH: tl.constexpr = 1 if BACK else (SH // common(SH, DH) if MH == 1 else SH)
    IW: tl.constexpr = 1 if BACK else (SW // common(SW, DW) if MW == 1 else SW)

    kk = tl.arange(0, BK)
    xs = x + rows[:, None] + (kk[None, :] if XC else kk[None, :] * in_plane)
    inner = cx if BACK else cy  # channels of the output per group, of which the weight has that many
    w_input = inner * (KH * KW)
    w_output = 1 if WC else KH * KW
    wk = w_output if BACK else w_input
    wn = w_input if BACK else w_output
    wh = inner * KW if WC else KW
    ww = inner if WC else 1
    cw = co * wn
    if MH > 1:
        cw += lh * wh
    if MW > 1:
        cw += lw * ww
    ws = w + g * (cy if BACK else cx) * w_input + kk[:, None] * wk + cw[None, :]
    acc = reduced(
        xs, ws, live, xr, xc, wide, lh, lw, jh, kh, th, jw, kw, tw, ih, iw, in_plane, step, cx, wk, wh, ww,
        JH, JW, IH, IW, KH, KW, MH, MW, PARTIAL, XC, YC, EVEN_K, EVEN_N, ACC, PREC, CAST, BM, BN, BK,
    )  # fmt: skip
    YH: tl.constexpr = 1 if BACK else SH
    YW: tl.constexpr = 1 if BACK else SW
    SIDE: tl.constexpr = 0 if YC else 1  # the axis along which pixels lie is the other one
    if HAS_BIAS:
        acc += tl.expand_dims(tl.load(bias + g * cy + co, mask=wide, other=0).to(ACC), SIDE)
    acc = activated(acc, ACTIVATION, SLOPE)
    if WEAVE or PAIR:
        # Interleave the phases of a row: [channels, pixels * SW], whole rows of y.
        CHANNELS: tl.constexpr = BN if PAIR else BN // SW
        if PAIR:
            jw, kw, tw = taps_of(aw + 1, SW, PW, DW, KW, MW, TW)
            other = reduced(
                xs, ws, live, xr, xc, wide, lh, lw, jh, kh, th, jw, kw, tw, ih, iw, in_plane, step, cx, wk, wh, ww,
                JH, JW, IH, IW, KH, KW, MH, MW, PARTIAL, XC, YC, EVEN_K, EVEN_N, ACC, PREC, CAST, BM, BN, BK,
            )  # fmt: skip
            if HAS_BIAS:
                other += tl.expand_dims(tl.load(bias + g * cy + co, mask=wide, other=0).to(ACC), SIDE)
            other = activated(other, ACTIVATION, SLOPE)
            tile = tl.interleave(acc.to(y.dtype.element_ty), other.to(y.dtype.element_ty))
        else:
            tile = tl.permute(tl.reshape(acc.to(y.dtype.element_ty), (CHANNELS, SW, BM)), (0, 2, 1))
            tile = tl.reshape(tile, (CHANNELS, BM * SW))
        e = pn * CHANNELS + tl.arange(0, CHANNELS)
        q = pm * (BM * SW) + tl.arange(0, BM * SW)
        to_w = q % (v * SW)
        iu = q // (v * SW) % u
        image = q // (v * SW) // u
        to_h = (iu * YH)[None, :] + (ah + e // cy)[:, None]
        ok = ((e < cy * MH)[:, None]) & ((q < pixels * SW) & (to_w < ow))[None, :] & (to_h < oh)
        base = image * (groups * cy) * out_plane + to_w
        at = (base[None, :] + ((g * cy + e % cy) * out_plane)[:, None]) + to_h * ow
        tl.store(y + at, tile, mask=ok)
    else:
        to_h = tl.expand_dims(iu * YH, 1 - SIDE) + tl.expand_dims(ah + lh, SIDE)
        to_w = tl.expand_dims(jv * YW, 1 - SIDE) + tl.expand_dims(aw + lw, SIDE)
        ok = tl.expand_dims(live, 1 - SIDE) & tl.expand_dims(wide, SIDE) & (to_h < oh) & (to_w < ow)
        if YC:
            pixel = ((image * oh + iu * YH) * ow + jv * YW) * (groups * cy)
            column = ((ah + lh) * ow + (aw + lw)) * (groups * cy) + g * cy + co
        else:
            pixel = image * (groups * cy) * out_plane + iu * YH * ow + jv * YW
            column = (g * cy + co) * out_plane + (ah + lh) * ow + (aw + lw)
        at = tl.expand_dims(pixel, 1 - SIDE) + tl.expand_dims(column, SIDE)
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=[
        "ih", "oh", "ow", "ci", "co", "groups", "row_blocks", "column_blocks", "steps", "total", "to_tap",
    ]
)  # fmt: skip
def weight_gradient(
    x, grad, out, pixels, ih, iw, in_plane, oh, ow, out_plane, ci, co, groups, row_blocks, column_blocks, steps, total,
    to_ci, to_co, to_tap,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, XC: tl.constexpr, YC: tl.constexpr, XV: tl.constexpr, YV: tl.constexpr,
    ONE_TAP: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr, CAST: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out[range, ci, tap, co] = sum over the pixels i of the range of x[ci, i] grad[co, s * i + d * k - p].

    x [n, groups * ci * XV, ih, iw], grad [n, groups * co * YV, oh, ow], pixels = n * ih * iw; a range has steps blocks
    of BP pixels, and total elements of out. Columns are (tap, channel): the columns of one block share x, and
    neighbours in the grid share x and grad. ONE_TAP: a block of columns lies within one tap.
    """
    cx = ci * XV
    cy = co * YV
    pid = tl.program_id(0)
    pn = pid % column_blocks
    pid = pid // column_blocks
    pm = pid % row_blocks
    pid = pid // row_blocks
    g = pid % groups
    s = pid // groups
    if IDX64:
        s = s.to(tl.int64)
    r = pm * BM + tl.arange(0, BM)
    c = pn * BN + tl.arange(0, BN)
    wide = c < cy * (KH * KW)
    ch = c % cy
    tap = pn * BN // cy if ONE_TAP else c // cy
    shift_h = tap // KW * DH - PH
    shift_w = tap % KW * DW - PW
    acc = tl.zeros((BM, BN), ACC)
    for it in range(0, steps):
        p = (s * steps + it) * BP + tl.arange(0, BP)
        live = p < pixels
        j = p % iw
        i = p // iw % ih
        image = p // in_plane
        if XC:
            from_x = (p * (groups * cx) + g * cx)[:, None] + r[None, :]
        else:
            from_x = (image * (groups * cx) * in_plane + i * iw + j)[:, None] + ((g * cx + r) * in_plane)[None, :]
        xv = tl.load(x + from_x, mask=live[:, None] & (r < cx)[None, :], other=0)
        if ONE_TAP:
            h = i * SH + shift_h
            w = j * SW + shift_w
            ok = (live & (h >= 0) & (h < oh) & (w >= 0) & (w < ow))[:, None] & wide[None, :]
        else:
            h = (i * SH)[:, None] + shift_h[None, :]
            w = (j * SW)[:, None] + shift_w[None, :]
            ok = live[:, None] & wide[None, :] & (h >= 0) & (h < oh) & (w >= 0) & (w < ow)
        if YC:
            pixel = ((image * oh + i * SH) * ow + j * SW) * (groups * cy) + g * cy
            column = (shift_h * ow + shift_w) * (groups * cy) + ch
        else:
            pixel = (image * groups + g) * cy * out_plane + i * SH * ow + j * SW
            column = shift_h * ow + shift_w + ch * out_plane
        gv = tl.load(grad + (pixel[:, None] + column[None, :]), mask=ok, other=0)
        acc = product(tl.trans(xv), gv, acc, PREC, ACC, CAST)
    at = s.to(tl.int64) * total + ((g * cx + r) * to_ci)[:, None] + (ch * to_co + tap * to_tap)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(r < cx)[:, None] & wide[None, :])


@triton.jit(do_not_specialize=["total", "count", "co", "taps"])
def sum_partials(
    part, out, total, count, co, taps, PLANAR: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr
):
    """out[e] = the sum of part[range, e] over the ranges, in an order that depends on the sizes alone.

    e runs over [ci, tap, co]; PLANAR: out is [ci, co, tap].
    """
    e = tl.program_id(0) * BN + tl.arange(0, BN)
    s = tl.arange(0, BS)
    acc = tl.zeros((BS, BN), ACC)
    for first in range(0, count, BS):
        at = (first + s).to(tl.int64)[:, None] * total + e[None, :]
        acc += tl.load(part + at, mask=(first + s < count)[:, None] & (e < total)[None, :], other=0)
    to = e
    if PLANAR:
        to = (e // (co * taps) * co + e % co) * taps + e // co % taps
    tl.store(out + to, tl.sum(acc, 0).to(out.dtype.element_ty), mask=e < total)


@triton.jit(do_not_specialize=["channels", "blocks", "steps"])
def epilogue_gradient(
    grad, output, result, part, pixels, plane, channels, blocks, steps,
    YC: tl.constexpr, CV: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, IDX64: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """result: the gradient before the activation; part[range, channel]: its sum over a range of steps blocks of BP
    pixels."""
    c_all = channels * CV
    pid = tl.program_id(0)
    c = pid % blocks * BC + tl.arange(0, BC)
    s = pid // blocks
    if IDX64:
        s = s.to(tl.int64)
    acc = tl.zeros((BP, BC), ACC)
    for it in range(0, steps):
        p = (s * steps + it) * BP + tl.arange(0, BP)
        if YC:
            at = (p * c_all)[:, None] + c[None, :]
        else:
            at = (p // plane * c_all * plane + p % plane)[:, None] + (c * plane)[None, :]
        ok = (p < pixels)[:, None] & (c < c_all)[None, :]
        value = tl.load(grad + at, mask=ok, other=0).to(ACC)
        if ACTIVATION != 0:
            value = before_activation(value, tl.load(output + at, mask=ok, other=0).to(ACC), ACTIVATION, SLOPE)
            tl.store(result + at, value.to(result.dtype.element_ty), mask=ok)
        if HAS_BIAS:
            acc += tl.where(ok, value, 0.0)
    if HAS_BIAS:
        tl.store(part + s * c_all + c, tl.sum(acc, 0), mask=c < c_all)


@triton.jit(do_not_specialize=["row_blocks", "column_blocks"])
def transpose(x, y, rows, columns, row_blocks, column_blocks, IDX64: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y [n, columns, rows] from x [n, rows, columns]."""
    pid = tl.program_id(0)
    r = pid % row_blocks * BM + tl.arange(0, BM)
    c = pid // row_blocks % column_blocks * BN + tl.arange(0, BN)
    n = pid // row_blocks // column_blocks
    if IDX64:
        n = n.to(tl.int64)
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    base = n * rows * columns
    tile = tl.load(x + base + (r * columns)[:, None] + c[None, :], mask=(r < rows)[:, None] & (c < columns)[None, :])
    to = base + (c * rows)[:, None] + r[None, :]
    tl.store(y + to, tl.trans(tile), mask=(c < columns)[:, None] & (r < rows)[None, :])
