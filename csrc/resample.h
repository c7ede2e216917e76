// The resampling map of one axis, shared by the CPU and the CUDA kernels.
//
// y[o] = sum_k w[o,k] * x[clamp(start[o] + k, 0, in - 1)], k = 0 .. taps - 1.
//
// The formulas, their order of operations and their precision are torch's (ATen/native/UpSample.h and
// ATen/native/cpu/UpSampleKernel.cpp for the CPU, ATen/native/cuda/UpSample.cuh for CUDA), so that the chosen
// indices are equal bit for bit. `start` is never folded: a tap beyond an edge reads the edge element again, as in
// torch, so that an Inf or NaN never reaches an output that torch keeps finite.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define AEUP_HD __host__ __device__ __forceinline__
#else
#define AEUP_HD inline
#endif

namespace aeup {

enum class Mode : int { nearest = 0, nearest_exact = 1, bilinear = 2, bicubic = 3 };
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, u8 = 4 };

// One call. Forward: src is the input [n,c,ih,iw], dst the output [n,c,oh,ow]; backward: src is the gradient of the
// output, dst the gradient of the input. Both are dense in NCHW or, with channels_last, in NHWC order.
struct Problem {
  const void* src;
  void* dst;
  int64_t n, c, ih, iw, oh, ow;
  double scale_h, scale_w;  // scale factors that the caller gave and torch passes on; 0 where none
  Mode mode;
  DType dtype;
  bool align_corners, antialias, channels_last, backward;
};

// How an axis finds its source. The nearest rules differ only in rounding; torch has all of them.
enum class Rule : int {
  floor_scaled,      // nearest: floor(o * scale)
  floor_centre,      // nearest-exact, vectorised CPU and CUDA kernels: floor((o + 0.5) * scale)
  round_centre,      // nearest-exact, generic CPU kernel: floor(max(scale * (o + 0.5) - 0.5, 0) + 0.5)
  linear,            // 2 taps
  cubic,             // 4 taps, a = -0.75
  antialias_linear,  // tent stretched by max(scale, 1)
  antialias_cubic    // 4-tap cubic stretched by max(scale, 1), a = -0.5
};

// Positions along an axis: below 2^30, so that neither a tap beyond an edge nor a doubled position overflows. Offsets
// in a tensor are int64_t.
using Index = int32_t;
inline constexpr int64_t kMaxAxis = int64_t(1) << 30;

// S is float, or double for float64 tensors.
template <class S>
struct Axis {
  Index in, out;
  S scale;  // input pixels per output pixel
  Rule rule;
  bool align_corners;
  bool single;  // nearest rules: the source is computed in float32 even where S is double
};

template <class S>
AEUP_HD S floor_of(S x) {
  return std::floor(x);
}

AEUP_HD Index clamp_index(Index i, Index size) { return i < 0 ? 0 : (i >= size ? size - 1 : i); }

AEUP_HD bool is_antialias(Rule r) { return r == Rule::antialias_linear || r == Rule::antialias_cubic; }

// Number of taps of a map without antialias.
AEUP_HD constexpr int taps_of(Mode m) { return m == Mode::bicubic ? 4 : (m == Mode::bilinear ? 2 : 1); }

template <class S>
AEUP_HD S cubic_near(S x, S a) {  // |x| <= 1 (Keys 1981)
  return ((a + 2) * x - (a + 3)) * x * x + 1;
}
template <class S>
AEUP_HD S cubic_far(S x, S a) {  // 1 < |x| < 2
  return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
}

template <class F>
AEUP_HD Index nearest_floor(Rule rule, F scale, Index o) {
  if (rule == Rule::floor_scaled) return Index(floor_of(F(o) * scale));
  if (rule == Rule::floor_centre) return Index(floor_of((F(o) + F(0.5)) * scale));
  const F at = scale * (F(o) + F(0.5)) - F(0.5);
  return Index(floor_of((at < F(0) ? F(0) : at) + F(0.5)));
}
// Source of output o for a nearest rule, in [0, in - 1].
template <class S>
AEUP_HD Index nearest_source(const Axis<S>& axis, Index o) {
  const Index i =
      axis.single ? nearest_floor(axis.rule, float(axis.scale), o) : nearest_floor(axis.rule, axis.scale, o);
  return i < axis.in - 1 ? i : axis.in - 1;
}

// First tap (possibly -1) and weights of output o. K is 1 (nearest rules), 2 (linear) or 4 (cubic).
template <int K, class S>
AEUP_HD Index taps(const Axis<S>& axis, Index o, S* w) {
  if constexpr (K == 1) {
    w[0] = S(1);
    return nearest_source(axis, o);
  } else {
    S at;
    if (axis.align_corners) {
      at = axis.scale * S(o);
    } else {
      at = axis.scale * (S(o) + S(0.5)) - S(0.5);
      if (K == 2 && at < S(0)) at = S(0);
    }
    S low = floor_of(at);
    Index i = Index(low);
    if (i > axis.in - 1) i = axis.in - 1;
    S t = at - S(i);
    t = t < S(0) ? S(0) : (t > S(1) ? S(1) : t);
    if constexpr (K == 2) {
      w[0] = S(1) - t;
      w[1] = t;
      return i;
    } else {
      const S a = S(-0.75);
      w[0] = cubic_far(t + S(1), a);
      w[1] = cubic_near(t, a);
      w[2] = cubic_near(S(1) - t, a);
      w[3] = cubic_far(S(2) - t, a);
      return i - 1;
    }
  }
}

// Antialias. Half the width of the stretched filter, in input pixels.
template <class S>
AEUP_HD S antialias_support(const Axis<S>& axis) {
  const S half = axis.rule == Rule::antialias_linear ? S(1) : S(2);
  return axis.scale >= S(1) ? half * axis.scale : half;
}
template <class S>
AEUP_HD Index antialias_max_taps(const Axis<S>& axis) {
  const S half = std::ceil(antialias_support(axis));
  return (half < S(axis.in) ? Index(half) : axis.in) * 2 + 1;
}
// First input of output o and the number of inputs, both inside [0, in].
template <class S>
AEUP_HD Index antialias_range(const Axis<S>& axis, Index o, Index* count) {
  const S support = antialias_support(axis), centre = axis.scale * (S(o) + S(0.5));
  const S low = centre - support + S(0.5), high = centre + support + S(0.5);
  const Index first = low > S(0) ? Index(low) : 0, last = high < S(axis.in) ? Index(high) : axis.in;
  const Index n = last - first, most = antialias_max_taps(axis);
  *count = n < 0 ? 0 : (n > most ? most : n);
  return first;
}
// Weight of input i for output o before normalisation by the sum over antialias_range.
template <class S>
AEUP_HD S antialias_weight(const Axis<S>& axis, Index o, Index i) {
  const S centre = axis.scale * (S(o) + S(0.5)), shrink = axis.scale >= S(1) ? S(1) / axis.scale : S(1);
  S x = (S(i) - centre + S(0.5)) * shrink;
  x = x < S(0) ? -x : x;
  if (axis.rule == Rule::antialias_linear) return x < S(1) ? S(1) - x : S(0);
  const S a = S(-0.5);
  return x < S(1) ? cubic_near(x, a) : (x < S(2) ? cubic_far(x, a) : S(0));
}

// The inputs [*lo, *hi] that output o reads; empty if *hi < *lo. Both ends grow with o.
template <class S>
AEUP_HD void reads(const Axis<S>& axis, Index o, Index* lo, Index* hi) {
  if (is_antialias(axis.rule)) {
    Index count;
    *lo = antialias_range(axis, o, &count);
    *hi = *lo + count - 1;
  } else if (axis.rule == Rule::linear || axis.rule == Rule::cubic) {
    S w[4];
    const Index s = axis.rule == Rule::linear ? taps<2>(axis, o, w) : taps<4>(axis, o, w);
    *lo = clamp_index(s, axis.in);
    *hi = clamp_index(s + (axis.rule == Rule::linear ? 1 : 3), axis.in);
  } else {
    *lo = *hi = nearest_source(axis, o);
  }
}

// The transposed map. The outputs that read input i are the contiguous range [first, last) given here; it is found
// from the forward map itself (an estimate, then corrected), so that it cannot disagree with it by a rounding.
template <class S>
AEUP_HD Index first_output_reading(const Axis<S>& axis, Index i) {  // smallest o whose last tap is >= i
  Index lo, hi, o = 0;
  if (axis.scale > S(0)) {
    const S reach = is_antialias(axis.rule) ? antialias_support(axis) + S(1) : S(2);
    const S guess = (S(i) - reach) / axis.scale - S(1);
    o = guess > S(0) ? (guess < S(axis.out) ? Index(guess) : axis.out) : 0;
  } else {
    reads(axis, 0, &lo, &hi);  // every output reads the same inputs
    return hi >= i ? 0 : axis.out;
  }
  while (o > 0) {
    reads(axis, o - 1, &lo, &hi);
    if (hi < i) break;
    --o;
  }
  while (o < axis.out) {
    reads(axis, o, &lo, &hi);
    if (hi >= i) break;
    ++o;
  }
  return o;
}
template <class S>
AEUP_HD Index end_of_outputs_reading(const Axis<S>& axis, Index i) {  // one past the largest o whose first tap is <= i
  Index lo, hi, o = axis.out;
  if (axis.scale > S(0)) {
    const S reach = is_antialias(axis.rule) ? antialias_support(axis) + S(1) : S(2);
    const S guess = (S(i) + reach) / axis.scale + S(1);
    o = guess > S(0) ? (guess < S(axis.out) ? Index(guess) : axis.out) : 0;
  } else {
    reads(axis, 0, &lo, &hi);
    return lo <= i ? axis.out : 0;
  }
  while (o < axis.out) {
    reads(axis, o, &lo, &hi);
    if (lo > i) break;
    ++o;
  }
  while (o > 0) {
    reads(axis, o - 1, &lo, &hi);
    if (lo <= i) break;
    --o;
  }
  return o;
}
// Weight with which output o reads input i (K as in taps): an edge collects the taps that were clamped onto it.
template <int K, class S>
AEUP_HD S weight_of(const Axis<S>& axis, Index o, Index i) {
  S w[K], sum = S(0);
  const Index s = taps<K>(axis, o, w);
  for (int k = 0; k < K; ++k) sum += clamp_index(s + k, axis.in) == i ? w[k] : S(0);
  return sum;
}

// --- from a problem to its two axes (host) ---

template <class S>
inline S pixel_scale(int64_t in, int64_t out, bool align_corners, double given) {
  if (align_corners) return out > 1 ? S(in - 1) / S(out - 1) : S(0);
  return given > 0 ? S(1.0 / given) : S(in) / S(out);
}

// torch's CPU kernels have two rules for nearest; this is their switch (UpSampleKernel.cpp).
inline bool cpu_vectorized_rule(const Problem& p) { return (p.channels_last && p.c > 3) || p.oh + p.ow <= 128; }

// cuda: torch's CUDA kernels' rules, else its CPU kernels'.
template <class S>
inline Axis<S> make_axis(const Problem& p, bool vertical, bool cuda) {
  const int64_t in = vertical ? p.ih : p.iw, out = vertical ? p.oh : p.ow;
  const double given = vertical ? p.scale_h : p.scale_w;
  const bool same = cuda ? p.ih == p.oh && p.iw == p.ow : in == out;
  const bool vectorized = cuda || cpu_vectorized_rule(p);
  Axis<S> axis{Index(in), Index(out), S(1), Rule::floor_scaled, false, vectorized};
  if (p.mode == Mode::nearest || p.mode == Mode::nearest_exact) {
    // The vectorised rules compute in float32 whatever the dtype is.
    axis.scale = vectorized ? S(pixel_scale<float>(in, out, false, given)) : pixel_scale<S>(in, out, false, given);
    if (p.mode == Mode::nearest_exact) axis.rule = vectorized ? Rule::floor_centre : Rule::round_centre;
    if (p.mode == Mode::nearest && vectorized && !cuda && out == 2 * in) axis.scale = S(0.5);
    if (p.mode == Mode::nearest && vectorized && same) axis.scale = S(1);
    if (cuda && same) axis.scale = S(1);
    return axis;
  }
  axis.align_corners = p.align_corners;
  axis.scale = pixel_scale<S>(in, out, p.align_corners, given);
  if (p.antialias) {
    axis.rule = p.mode == Mode::bilinear ? Rule::antialias_linear : Rule::antialias_cubic;
    return axis;
  }
  axis.rule = p.mode == Mode::bilinear ? Rule::linear : Rule::cubic;
  if (same && (cuda || p.mode == Mode::bilinear)) {
    axis.scale = S(1);
    axis.align_corners = false;
  }
  return axis;
}

// s where the axis is the plain enlargement by the integer s (its weights repeat with period s), else 0.
template <class S>
inline Index integer_scale(const Axis<S>& axis) {
  if (axis.align_corners || axis.out % axis.in != 0) return 0;
  const Index s = axis.out / axis.in;
  return axis.scale * S(s) == S(1) && axis.scale == S(1) / S(s) ? s : 0;
}

}  // namespace aeup
