"""The resampling map of one axis on the host: scales, polyphase weights and the sizes of the transposed windows.

The formulas, their order and their precision are those of csrc/resample.h with torch's CUDA rules. Everything here
depends on plain numbers only and is computed once per geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np

TAPS = {"nearest": 1, "nearest-exact": 1, "bilinear": 2, "bicubic": 4}
# Output indices up to here, plus a half, are exact in float32, so that the constants agree with torch's formula.
EXACT = 1 << 22


@dataclass(frozen=True)
class Axis:
    """One axis: `size_in` inputs, `size_out` outputs; `scale` in input pixels per output pixel, rounded as by torch."""

    size_in: int
    size_out: int
    mode: str
    align_corners: bool
    antialias: bool
    double: bool
    scale: float

    @property
    def real(self) -> type:
        return np.float64 if self.double and TAPS[self.mode] > 1 else np.float32

    @property
    def bits(self) -> float | int:
        """The scale as a kernel takes it: a float32 value, or the bits of a float64 one."""
        return self.scale if self.real is np.float32 else int(np.float64(self.scale).view(np.int64))


def make_axis(size_in, size_out, mode, align_corners, antialias, given, double, same) -> Axis:
    """`given`: the scale factor passed on by torch or None; `same`: neither axis changes its size."""
    nearest = TAPS[mode] == 1
    real = np.float64 if double and not nearest else np.float32
    if nearest or not align_corners:
        scale = real(1.0 / given) if given is not None and given > 0 else real(size_in) / real(size_out)
    else:
        scale = real(size_in - 1) / real(size_out - 1) if size_out > 1 else real(0)
    align_corners = align_corners and not nearest
    if same and not antialias:
        scale, align_corners = real(1), False
    return Axis(size_in, size_out, mode, align_corners, antialias, double, float(scale))


def integer_scale(axis: Axis) -> int:
    """s where the axis is the plain enlargement by s, whose weights repeat with period s, else 0."""
    if axis.align_corners or axis.antialias or axis.size_out % axis.size_in or axis.size_out > EXACT:
        return 0
    s = axis.size_out // axis.size_in
    return s if axis.scale * s == 1 and axis.scale == 1 / s else 0


def starts(axis: Axis) -> np.ndarray:
    """First tap of every output, before clamping, [size_out] int64."""
    real, scale, last = axis.real, axis.real(axis.scale), axis.size_in - 1
    o = np.arange(axis.size_out, dtype=real)
    if axis.antialias:
        return antialias_ranges(axis)[0]
    if TAPS[axis.mode] == 1:
        at = o * scale if axis.mode == "nearest" else (o + real(0.5)) * scale
        return np.minimum(np.floor(at), last).astype(np.int64)
    at = scale * o if axis.align_corners else scale * (o + real(0.5)) - real(0.5)
    if axis.mode == "bilinear":
        return np.minimum(np.floor(np.maximum(at, 0)), last).astype(np.int64)
    return np.minimum(np.floor(at), last).astype(np.int64) - 1


def antialias_support(axis: Axis) -> float:
    half = axis.real(1 if axis.mode == "bilinear" else 2)
    return float(half * axis.real(axis.scale) if axis.scale >= 1 else half)


def antialias_taps(axis: Axis) -> int:
    return int(np.ceil(antialias_support(axis))) * 2 + 1


def antialias_ranges(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """First input and one past the last input of every output, [size_out] int64 each."""
    real = axis.real
    support, centre = (
        real(antialias_support(axis)),
        real(axis.scale) * (np.arange(axis.size_out, dtype=real) + real(0.5)),
    )
    first = np.maximum((centre - support + real(0.5)).astype(np.int64), 0)
    last = np.minimum((centre + support + real(0.5)).astype(np.int64), axis.size_in)
    return first, np.minimum(last, first + antialias_taps(axis))


@dataclass(frozen=True)
class Window:
    """The outputs that can read input i lie in [lo, lo + width), lo = max(int((i - reach) * inverse) - pad, 0).

    The kernels compute lo by the same formula and ask the forward map about each candidate.
    """

    reach: int
    inverse: float
    pad: int
    width: int


@lru_cache(maxsize=256)
def window(axis: Axis) -> Window:
    i = np.arange(axis.size_in)
    if axis.antialias:
        first, last = antialias_ranges(axis)
        reach = int(np.ceil(antialias_support(axis))) + 1
    else:
        first = starts(axis)
        last = first + TAPS[axis.mode]
        reach = TAPS[axis.mode] // 2
        last[first + TAPS[axis.mode] > axis.size_in] = axis.size_in
    # Both ends grow with o: the first output whose last tap is >= i, and one past the last whose first tap is <= i.
    true_lo = np.searchsorted(last - 1, i, side="left")
    true_hi = np.searchsorted(first, i, side="right")
    if axis.size_in:
        true_hi[-1] = axis.size_out
    inverse = np.float32(1 / axis.scale if axis.scale > 0 else 0)
    with np.errstate(over="ignore"):
        guess = np.clip((i.astype(np.float32) - np.float32(reach)) * inverse, 0, axis.size_out).astype(np.int64)
    pad = int(np.max(guess - true_lo, initial=0)) + 1  # 1: the kernel may round the product otherwise
    lo = np.maximum(guess - pad, 0)
    return Window(reach, float(inverse), pad, max(int(np.max(true_hi - lo, initial=0)), 0) + 1)


def cubic(x: Fraction, a: Fraction) -> Fraction:
    """Keys' kernel (1981) at |x|."""
    x = abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else Fraction(0)


@dataclass(frozen=True)
class Phases:
    """Enlargement by s: weight[p * (before + 1 + after) + before + d] of the input at distance d for phase p."""

    s: int
    before: int
    after: int
    weight: tuple[float, ...]

    def at(self, p: int, d: int) -> float:
        return (
            self.weight[p * (self.before + 1 + self.after) + self.before + d]
            if -self.before <= d <= self.after
            else 0.0
        )


@cache
def phases(mode: str, s: int) -> Phases:
    """The weights are dyadic fractions for s = 1, 2, 4, 8: exact in float32."""
    reach = TAPS[mode] // 2 if s > 1 else 0
    rows = []
    for p in range(s):
        at = Fraction(2 * p + 1, 2 * s) - Fraction(1, 2)  # relative to the cell's input
        for d in range(-reach, reach + 1):
            x = d - at
            if TAPS[mode] == 1:
                rows.append(1.0)
            elif mode == "bilinear":
                rows.append(float(max(1 - abs(x), 0)))
            else:
                rows.append(float(cubic(x, Fraction(-3, 4))))
    return Phases(s, reach, reach, tuple(rows))


@dataclass(frozen=True)
class Transposed:
    """Weights of gradient columns -left .. s * q + right - 1 of a group of q input columns; see poly_backward."""

    left: int
    right: int
    weight: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@cache
def transposed(mode: str, s: int, q: int) -> Transposed:
    ph = phases(mode, s)
    span = range(-ph.after * s, (q + ph.before) * s)
    low, high, rows = {}, {}, {}
    for t in span:
        cell, p = divmod(t, s)
        rows[t] = [ph.at(p, i - cell) for i in range(q)]
        low[t] = sum(ph.at(p, d) for d in range(-ph.before, ph.after + 1) if cell + d < 0 <= cell)
        high[t] = sum(ph.at(p, d) for d in range(-ph.before, ph.after + 1) if cell + d >= q > cell)
    used = [t for t in span if any(rows[t]) or low[t] or high[t]]
    left, right = max(0, -used[0]), max(0, used[-1] + 1 - s * q)
    columns = range(-left, s * q + right)
    return Transposed(
        left,
        right,
        tuple(rows[t][i] for i in range(q) for t in columns),
        tuple(low[t] for t in columns),
        tuple(high[t] for t in columns),
    )
