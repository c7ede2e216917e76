"""Batch normalisation and the activation after it: `statistics` and `sum_gradients` sum per channel and write partial
results; `normalise` and `input_gradient` first add those up, each program for its own channels and in the same order,
and then make the elements. So a direction takes two launches, and its results have the same bits on every run.

The tensors are [n, channels, plane], channels innermost with NHWC. A program has BC adjacent channels and a range of
positions (pixels of all images), in `steps` tiles of BM; the last axis of a tile is the one that lies together in
memory. The sums go through the tensor downward and the second launch upward, from what the cache still holds.
Compiled integer division truncates and the interpreter's floors: what is divided as a negative number is masked.
"""

import triton
import triton.language as tl

from .convolution_kernels import activated, before_activation
from .taps import real_scale


@triton.jit
def place(blocks, BC: tl.constexpr, IDX64: tl.constexpr):
    """The program's channels and its range of positions."""
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    s = tl.program_id(0) // blocks
    if IDX64:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    return c, s


@triton.jit
def elements(vectors, V: tl.constexpr, IDX64: tl.constexpr):
    if IDX64:
        vectors = vectors.to(tl.int64)
    return vectors * V


@triton.jit
def tile(first, c, pixels, plane, channels, PV: tl.constexpr, NHWC: tl.constexpr, BM: tl.constexpr):
    """Offsets of the positions from `first` on, and whether they are in the tensor: [BM, BC], or in NCHW [BC, BM]."""
    lane = tl.arange(0, BM)
    m = first + lane
    inside = (m >= 0) & (m < pixels)
    if NHWC:
        at = (m * channels)[:, None] + c[None, :]
        ok = inside[:, None] & (c < channels)[None, :]
    else:  # vectors are divided in 32 bits, whatever the size of the tensor
        pixel = tl.multiple_of((first % plane).to(tl.int32), PV) + lane
        image = first // plane + pixel // plane
        at = (c * plane)[:, None] + (image * channels * plane + pixel % plane)[None, :]
        ok = (c < channels)[:, None] & inside[None, :]
    return at, ok


@triton.jit
def of_channel(p, c, channels, ACC: tl.constexpr):
    return tl.load(p + c, mask=c < channels, other=0).to(ACC)


@triton.jit
def set_channel(p, c, channels, value):
    tl.store(p + c, value.to(p.dtype.element_ty), mask=c < channels)


@triton.jit
def follow(running, c, channels, batch, momentum, ACC: tl.constexpr):
    part = real_scale(momentum, ACC)
    set_channel(running, c, channels, (1 - part) * of_channel(running, c, channels, ACC) + part * batch)


@triton.jit
def inverse_root(x, ACC: tl.constexpr):
    if ACC == tl.float64:
        return 1 / tl.sqrt(x)
    else:  # both to nearest, where `/` and sqrt are approximate
        return tl.div_rn(tl.full(x.shape, 1, ACC), tl.sqrt_rn(x))


@triton.jit
def apart(x, NHWC: tl.constexpr, BC: tl.constexpr):
    """x [BC] as it is, in a layout of its own: a sum's would spread to the tiles of the loop after it, which would then
    go through shared memory on their way to the store."""
    if NHWC:
        return tl.gather(x, tl.arange(0, BC), 0)
    else:
        return x


@triton.jit
def affine(
    mean, invstd, weight, bias, c, channels, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):
    """Scale and bias of the channels: an element is scale * (x - mean) + bias before its activation."""
    scale = invstd
    if HAS_WEIGHT:
        scale = invstd * of_channel(weight, c, channels, ACC)
    offset = tl.zeros_like(invstd)
    if HAS_BIAS:
        offset = of_channel(bias, c, channels, ACC)
    return scale, offset


@triton.jit
def before(grad, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The gradient before the activation, from its argument."""
    if ACTIVATION == 5 or ACTIVATION == 6:
        z = activated(z, ACTIVATION, SLOPE)
    return before_activation(grad, z, ACTIVATION, SLOPE)


@triton.jit(do_not_specialize=["pixels", "plane", "channels", "blocks", "steps"])
def statistics(
    x, part, pixels, plane, channels, blocks, steps,
    PV: tl.constexpr, CV: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part [ranges, 2, channels]: the mean of each range, and its sum of squared distances from it.

    Distances are summed from the mean of the range's first tile, one of at most `steps`: their squares add up to at
    most 1 + steps times those from the mean of the range, so that little cancels, wherever the mean is.
    """
    P: tl.constexpr = 0 if NHWC else 1  # the axis of positions
    pixels = elements(pixels, PV, IDX64)
    plane = plane * PV
    channels = channels * CV
    c, s = place(blocks, BC, IDX64)
    first = pixels - (s * steps + 1) * BM  # ranges are counted from the end: all first tiles but a lone one are full
    at, ok = tile(first, c, pixels, plane, channels, PV, NHWC, BM)
    values = tl.load(x + at, mask=ok, other=0).to(ACC)
    shift = tl.sum(values, P) / tl.minimum(first + BM, BM).to(ACC)
    distance = tl.where(ok, values - tl.expand_dims(shift, P), 0.0)
    sums = distance
    squares = distance * distance
    for it in tl.range(1, steps, num_stages=STAGES):
        at, ok = tile(first - it * BM, c, pixels, plane, channels, PV, NHWC, BM)
        values = tl.load(x + at, mask=ok, other=0).to(ACC)
        distance = tl.where(ok, values - tl.expand_dims(shift, P), 0.0)
        sums += distance
        squares += distance * distance
    total = tl.sum(sums, P)
    from_shift = total / tl.minimum(first + BM, steps * BM).to(ACC)
    square = tl.sum(squares, P) - total * from_shift
    set_channel(part + 2 * s * channels, c, channels, shift + from_shift)
    set_channel(part + (2 * s + 1) * channels, c, channels, tl.where(square < 0, 0.0, square))  # NaN stays


@triton.jit
def partial(part, s, c, splits, channels):
    """Partial results of the ranges s, [BS, BC]; zeros after the last."""
    ok = (s < splits)[:, None] & (c < channels)[None, :]
    return tl.load(part + ((2 * s * channels)[:, None] + c[None, :]), mask=ok, other=0)


@triton.jit
def moments(part, c, pixels, channels, splits, each, ACC: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """Mean of all positions and sum of squared distances from it, from those of ranges of `each` positions (Chan, Golub
    & LeVeque, 1983, "Algorithms for computing the sample variance")."""
    of_squares = part + channels
    about = of_channel(part, c, channels, ACC)
    sums = tl.zeros((BS, BC), ACC)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        distance = tl.where((s < splits)[:, None], partial(part, s, c, splits, channels) - about[None, :], 0.0)
        sums += distance * tl.minimum(pixels - s.to(pixels.dtype) * each, each).to(ACC)[:, None]
    mean = about + tl.sum(sums, 0) / pixels.to(ACC)
    squares = tl.zeros((BS, BC), ACC)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        distance = tl.where((s < splits)[:, None], partial(part, s, c, splits, channels) - mean[None, :], 0.0)
        n = tl.minimum(pixels - s.to(pixels.dtype) * each, each).to(ACC)
        squares += partial(of_squares, s, c, splits, channels) + distance * distance * n[:, None]
    return mean, tl.sum(squares, 0)


@triton.jit(
    do_not_specialize=["pixels", "plane", "channels", "blocks", "steps", "splits", "each", "momentum", "eps"]
)  # fmt: skip
def normalise(
    x, y, weight, bias, running_mean, running_var, counter, mean_out, invstd_out, part,
    pixels, plane, channels, blocks, steps, splits, each, momentum, eps,
    TRAINING: tl.constexpr, TRACKS: tl.constexpr, COUNTS: tl.constexpr, BS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    PV: tl.constexpr, CV: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = activation(weight * (x - mean) * invstd + bias), mean and invstd [channels].

    TRAINING: they are the batch's, from part [splits, 2, channels] of `statistics`, and with TRACKS the running ones
    follow; else they are the running ones. COUNTS: the batch is counted.
    """
    P: tl.constexpr = 0 if NHWC else 1
    pixels = elements(pixels, PV, IDX64)
    plane = plane * PV
    channels = channels * CV
    c, s = place(blocks, BC, IDX64)
    if TRAINING:
        mean, squares = moments(part, c, pixels, channels, splits, each, ACC, BS, BC)
        mean = apart(mean, NHWC, BC)
        squares = apart(squares, NHWC, BC)
        var = squares / pixels.to(ACC)
    else:
        mean = of_channel(running_mean, c, channels, ACC)
        var = of_channel(running_var, c, channels, ACC)
    invstd = inverse_root(var + real_scale(eps, ACC), ACC)
    if s == 0:  # one range for all
        set_channel(mean_out, c, channels, mean)
        set_channel(invstd_out, c, channels, invstd)
        if TRACKS:
            follow(running_mean, c, channels, mean, momentum, ACC)
            follow(running_var, c, channels, squares / (pixels - 1).to(ACC), momentum, ACC)
        if COUNTS:
            if tl.program_id(0) == 0:
                tl.store(counter, tl.load(counter) + 1)
    scale, offset = affine(mean, invstd, weight, bias, c, channels, HAS_WEIGHT, HAS_BIAS, ACC)
    for it in tl.range(0, steps, num_stages=STAGES):
        at, ok = tile((s * steps + it) * BM, c, pixels, plane, channels, PV, NHWC, BM)
        value = tl.load(x + at, mask=ok, other=0).to(ACC) - tl.expand_dims(mean, P)
        value = activated(tl.expand_dims(scale, P) * value + tl.expand_dims(offset, P), ACTIVATION, SLOPE)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels", "plane", "channels", "blocks", "steps"])
def sum_gradients(
    grad, x, mean_in, invstd_in, weight, bias, part, pixels, plane, channels, blocks, steps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    PV: tl.constexpr, CV: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part [ranges, 2, channels]: of each range, the sums of the gradient before the activation, and of it times
    (x - mean)."""
    P: tl.constexpr = 0 if NHWC else 1
    pixels = elements(pixels, PV, IDX64)
    plane = plane * PV
    channels = channels * CV
    c, s = place(blocks, BC, IDX64)
    mean = of_channel(mean_in, c, channels, ACC)
    invstd = of_channel(invstd_in, c, channels, ACC)
    scale, offset = affine(mean, invstd, weight, bias, c, channels, HAS_WEIGHT, HAS_BIAS, ACC)
    sums = tl.zeros((BM, BC) if NHWC else (BC, BM), ACC)
    products = tl.zeros((BM, BC) if NHWC else (BC, BM), ACC)
    for it in tl.range(0, steps, num_stages=STAGES):
        at, ok = tile(pixels - (s * steps + it + 1) * BM, c, pixels, plane, channels, PV, NHWC, BM)
        distance = tl.load(x + at, mask=ok, other=0).to(ACC) - tl.expand_dims(mean, P)
        value = tl.load(grad + at, mask=ok, other=0).to(ACC)
        z = tl.expand_dims(scale, P) * distance + tl.expand_dims(offset, P)
        value = tl.where(ok, before(value, z, ACTIVATION, SLOPE), 0.0)
        sums += value
        products += value * distance
    set_channel(part + 2 * s * channels, c, channels, tl.sum(sums, P))
    set_channel(part + (2 * s + 1) * channels, c, channels, tl.sum(products, P))


@triton.jit(do_not_specialize=["pixels", "plane", "channels", "blocks", "steps", "splits"])
def input_gradient(
    grad, x, mean_in, invstd_in, weight, bias, dx, dweight, dbias, part,
    pixels, plane, channels, blocks, steps, splits,
    SUMS: tl.constexpr, TRAINING: tl.constexpr, BS: tl.constexpr,
    OF_INPUT: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    PV: tl.constexpr, CV: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr, IDX64: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients that are wanted, with SUMS from part [splits, 2, channels] of `sum_gradients`.

    With g the gradient before the activation, x^ the normalised input and scale = weight * invstd, the input's is
    scale * (g - mean(g) - x^ * mean(g * x^)), or outside TRAINING scale * g (Ioffe & Szegedy, 2015, section 3).
    """
    P: tl.constexpr = 0 if NHWC else 1
    pixels = elements(pixels, PV, IDX64)
    plane = plane * PV
    channels = channels * CV
    c, s = place(blocks, BC, IDX64)
    mean = of_channel(mean_in, c, channels, ACC)
    invstd = of_channel(invstd_in, c, channels, ACC)
    scale, offset = affine(mean, invstd, weight, bias, c, channels, HAS_WEIGHT, HAS_BIAS, ACC)
    if SUMS:
        sums = tl.zeros((BS, BC), ACC)
        products = tl.zeros((BS, BC), ACC)
        for start in range(0, splits, BS):
            of = start + tl.arange(0, BS)
            sums += partial(part, of, c, splits, channels)
            products += partial(part + channels, of, c, splits, channels)
        of_bias = apart(tl.sum(sums, 0), NHWC, BC)
        of_weight = apart(tl.sum(products, 0), NHWC, BC) * invstd
        if s == 0:
            if OF_WEIGHT:
                set_channel(dweight, c, channels, of_weight)
            if OF_BIAS:
                set_channel(dbias, c, channels, of_bias)
    if OF_INPUT:
        if TRAINING:
            constant = scale * (of_bias / pixels.to(ACC))
            slope = scale * (of_weight / pixels.to(ACC)) * invstd
        for it in tl.range(0, steps, num_stages=STAGES):
            at, ok = tile((s * steps + it) * BM, c, pixels, plane, channels, PV, NHWC, BM)
            distance = tl.load(x + at, mask=ok, other=0).to(ACC) - tl.expand_dims(mean, P)
            value = tl.load(grad + at, mask=ok, other=0).to(ACC)
            z = tl.expand_dims(scale, P) * distance + tl.expand_dims(offset, P)
            value = tl.expand_dims(scale, P) * before(value, z, ACTIVATION, SLOPE)
            if TRAINING:
                value = value - tl.expand_dims(constant, P) - tl.expand_dims(slope, P) * distance
            tl.store(dx + at, value.to(dx.dtype.element_ty), mask=ok)
