// The map of one axis as a banded matrix: dst[d] = sum over t < count[d] of weight[d * taps + t] * src[first[d] + t].
// Forward and backward are the same form: the backward table is the transpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "resample.h"

namespace aeup {

template <class A>
struct Band {
  int64_t src = 0, dst = 0, taps = 1;  // sizes, and the stride of `weight`
  std::vector<int32_t> first, count;
  std::vector<A> weight;
  bool gaps = false;  // some dst reads nothing, as in the gradient of a reduction
  bool sums = false;  // every weight is 1, as in the gradient of nearest

  void resize(int64_t src_size, int64_t dst_size, int64_t most) {
    src = src_size;
    dst = dst_size;
    taps = most;
    first.assign(dst, 0);
    count.assign(dst, 0);
    weight.assign(dst * taps, A(0));
  }
};

// Clamped taps are merged onto the edge, so a band never reads an input that torch does not read.
template <class A>
Band<A> forward_band(const Axis<A>& axis) {
  Band<A> band;
  const bool aa = is_antialias(axis.rule);
  const int k = axis.rule == Rule::cubic ? 4 : (axis.rule == Rule::linear ? 2 : 1);
  band.resize(axis.in, axis.out, aa ? std::min(antialias_max_taps(axis), axis.in) : k);
  for (int64_t o = 0; o < axis.out; ++o) {
    A* w = &band.weight[o * band.taps];
    if (aa) {
      Index n, lo = antialias_range(axis, Index(o), &n);
      A total = A(0);
      for (int64_t t = 0; t < n; ++t) total += w[t] = antialias_weight(axis, o, lo + t);
      if (total != A(0)) {
        for (int64_t t = 0; t < n; ++t) w[t] /= total;
      }
      band.first[o] = int32_t(lo);
      band.count[o] = int32_t(n);
    } else {
      A tap[4];
      const int64_t s = k == 4 ? taps<4>(axis, o, tap) : (k == 2 ? taps<2>(axis, o, tap) : taps<1>(axis, o, tap));
      const int64_t lo = clamp_index(s, axis.in), hi = clamp_index(s + k - 1, axis.in);
      for (int t = 0; t < k; ++t) w[clamp_index(s + t, axis.in) - lo] += tap[t];
      band.first[o] = int32_t(lo);
      band.count[o] = int32_t(hi - lo + 1);
    }
  }
  return band;
}

// The bands of a problem by torch's CPU rules. Smooth weights are computed in float64 whatever the dtype is (a table
// costs nothing), so that only the sums carry float32 rounding; a nearest index must round as torch's does.
template <class A>
Band<A> forward_band(const Problem& p, bool vertical) {
  if (p.mode == Mode::nearest || p.mode == Mode::nearest_exact) return forward_band(make_axis<A>(p, vertical, false));
  const Band<double> exact = forward_band(make_axis<double>(p, vertical, false));
  Band<A> band;
  band.resize(exact.src, exact.dst, exact.taps);
  // Taps at the ends whose weight is nothing but the rounding of a position are not read: 0 * Inf would be NaN, and the
  // transposed band would lose its regular shape.
  const double noise = double(exact.dst) * 2.3e-16;
  for (int64_t o = 0; o < exact.dst; ++o) {
    const double* w = &exact.weight[o * exact.taps];
    int64_t lo = 0, hi = exact.count[o];
    while (hi > lo + 1 && std::abs(w[hi - 1]) <= noise) --hi;
    while (hi > lo + 1 && std::abs(w[lo]) <= noise) ++lo;
    band.first[o] = int32_t(exact.first[o] + lo);
    band.count[o] = int32_t(hi - lo);
    for (int64_t t = lo; t < hi; ++t) band.weight[o * band.taps + t - lo] = A(w[t]);
  }
  return band;
}

template <class A>
Band<A> transpose(const Band<A>& band) {
  std::vector<int32_t> first(band.src, 0), end(band.src, 0);
  for (int64_t o = band.dst - 1; o >= 0; --o) {
    for (int64_t i = band.first[o]; i < band.first[o] + band.count[o]; ++i) {
      first[i] = int32_t(o);
      if (end[i] == 0) end[i] = int32_t(o + 1);
    }
  }
  int64_t most = 1;
  for (int64_t i = 0; i < band.src; ++i) most = std::max<int64_t>(most, end[i] - first[i]);
  Band<A> out;
  out.resize(band.dst, band.src, most);
  for (int64_t i = 0; i < band.src; ++i) {
    out.first[i] = first[i];
    out.count[i] = end[i] - first[i];
    out.gaps = out.gaps || out.count[i] == 0;
  }
  out.sums = true;
  for (int64_t o = 0; o < band.dst; ++o) {
    for (int32_t t = 0; t < band.count[o]; ++t) {
      const int64_t i = band.first[o] + t;
      const A w = band.weight[o * band.taps + t];
      out.weight[i * most + o - first[i]] = w;
      out.sums = out.sums && w == A(1);
    }
  }
  return out;
}

}  // namespace aeup
