// Sources of slide() for any horizontal scale.
#pragma once
#include "forward.cuh"

namespace aeup {

// NHWC, c % V == 0: the V elements are channels, the K taps K vectors.
template <class T, int K, int V>
struct Channels {
  using S = Acc<T>;
  static constexpr bool kManyPlanes = false;
  struct R {
    Raw<T, V> tap[K];
  };
  int base, offset[K];
  S w[K];

  AEUP_DEV void init(const Sliding<S>& p, int group) {
    const int column = p.chunks.divide(group);
    const int s = int(taps<K>(p.h, column, w));
    base = (group - column * int(p.chunks.divisor)) * V;
#pragma unroll
    for (int k = 0; k < K; ++k) offset[k] = min(max(s + k, 0), int(p.h.in) - 1) * int(p.c.divisor);
  }
  AEUP_DEV void ahead(const T* a) const { prefetch_l2(a + offset[K / 2 - 1]); }
  AEUP_DEV void load(const T* a, R& q) const {
#pragma unroll
    for (int k = 0; k < K; ++k) q.tap[k].load(a + offset[k]);
  }
  AEUP_DEV void horizontal(const R& q, S* h) const {
    S f[V];
    q.tap[0].unpack(f);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = w[0] * f[v];
#pragma unroll
    for (int k = 1; k < K; ++k) {
      q.tap[k].unpack(f);
#pragma unroll
      for (int v = 0; v < V; ++v) h[v] = w[k] * f[v] + h[v];
    }
  }
};

// First input column and K weights of output column `o`, the window of K columns kept inside the row (h.in >= K):
// taps clamped onto an edge column add to its weight. Columns that o does not read get weight 0; a source must not
// multiply them by Inf or NaN (see finite()).
template <int K, class S>
AEUP_DEV int folded_taps(const Axis<S>& axis, int o, S* w) {
  const int s = int(taps<K>(axis, o, w)), last = int(axis.in) - 1, first = min(max(s, 0), last - K + 1);
  if (s != first) {
    if constexpr (K == 4) {  // one tap beyond the edge, or two: nearly every warp has such a column
      const S a = w[0], b = w[1], c = w[2], d = w[3];
      const bool left = s < first, two = s < first - 1 || s > first + 1;
      w[0] = left ? (two ? a + b + c : a + b) : S(0);
      w[1] = left ? (two ? d : c) : (two ? S(0) : a);
      w[2] = left ? (two ? S(0) : d) : (two ? a : b);
      w[3] = left ? S(0) : (two ? b + c + d : c + d);
    } else {
      S u[K];
#pragma unroll
      for (int m = 0; m < K; ++m) {
        u[m] = S(0);
#pragma unroll
        for (int k = 0; k < K; ++k) u[m] += min(max(s + k, 0), last) == first + m ? w[k] : S(0);
      }
#pragma unroll
      for (int m = 0; m < K; ++m) w[m] = u[m];
    }
  }
  return first;
}
// False if some value is Inf or NaN.
template <int V, class S>
AEUP_DEV bool finite(const S* h) {
  S zero = h[0] * S(0);
#pragma unroll
  for (int v = 1; v < V; ++v) zero = h[v] * S(0) + zero;
  return zero == S(0);
}

// sum + w x, but sum where w is 0 (x is not read). Opaque: the rare path must not keep V K comparisons in registers.
template <class S>
AEUP_DEV S add_read(S w, S x, S sum) {
#ifndef AEUP_EMULATE
  if constexpr (std::is_same_v<S, float>)
    asm volatile("" : "+f"(w));
  else
    asm volatile("" : "+d"(w));
#endif
  return w != S(0) ? w * x + sum : sum;
}

// Flat rows (NHWC with any c, NCHW with c = 1), h.in >= K: each of V elements reads K taps c apart.
template <class T, int K, int V>
struct Gather {
  using S = Acc<T>;
  static constexpr bool kManyPlanes = V > 1;
  struct R {
    Raw<T, 1> tap[V][K];
  };
  static constexpr int base = 0;
  int offset[V], c;
  S w[V][K];

  AEUP_DEV void init(const Sliding<S>& p, int group) {
    c = int(p.c.divisor);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int e = group * V + v, column = p.c.divide(e);
      offset[v] = folded_taps<K>(p.h, column, w[v]) * c + e - column * c;
    }
  }
  AEUP_DEV void ahead(const T* a) const { prefetch_l2(a + offset[0] + (K / 2 - 1) * c); }
  AEUP_DEV void load(const T* a, R& q) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T* b = a + offset[v];
#pragma unroll
      for (int k = 0; k < K; ++k, b += c) q.tap[v][k].load(b);
    }
  }
  AEUP_DEV void horizontal(const R& q, S* h) const {
    S f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      h[v] = S(0);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        q.tap[v][k].unpack(&f);
        h[v] = w[v][k] * f + h[v];
      }
    }
    if (finite<V>(h)) return;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      h[v] = S(0);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        q.tap[v][k].unpack(&f);
        h[v] = add_read(w[v][k], f, h[v]);
      }
    }
  }
};

}  // namespace aeup
