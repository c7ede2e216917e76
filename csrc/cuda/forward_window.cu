// Fast forward for NCHW at any enlargement (input columns per output column below 2/3, or 3/7 for 8 outputs).
#include "forward.h"
#include "forward_sources.cuh"

namespace aeup {
namespace {

// V outputs share a window of D inputs: dense V x D weights in registers, zeros included, need fewer instructions than
// V K separate loads.
template <class T, int K, int V, int D>
struct Window {
  using S = Acc<T>;
  static constexpr bool kManyPlanes = true;
  struct R {
    Raw<T, 1> x[D];
  };
  int base;
  S w[V][D];

  AEUP_DEV void init(const Sliding<S>& p, int group) {
    S u[K];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int s = folded_taps<K>(p.h, group * V + v, u);
      if (v == 0) base = min(s, int(p.h.in) - D);
      const int shift = s - base;  // 0 .. D - K
#pragma unroll
      for (int m = 0; m < D; ++m) {
        w[v][m] = S(0);
#pragma unroll
        for (int d = 0; d <= D - K; ++d)
          if (m - d >= 0 && m - d < K) w[v][m] = shift == d ? u[m - d] : w[v][m];
      }
    }
  }
  AEUP_DEV void ahead(const T* a) const { prefetch_l2(a); }
  AEUP_DEV void load(const T* a, R& q) const {
#pragma unroll
    for (int m = 0; m < D; ++m) q.x[m].load(a + m);
  }
  AEUP_DEV void horizontal(const R& q, S* h) const {
    S f;
    q.x[0].unpack(&f);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = w[v][0] * f;
#pragma unroll
    for (int m = 1; m < D; ++m) {
      q.x[m].unpack(&f);
#pragma unroll
      for (int v = 0; v < V; ++v) h[v] = w[v][m] * f + h[v];
    }
    if (finite<V>(h)) return;
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = S(0);
#pragma unroll
    for (int m = 0; m < D; ++m) {
      q.x[m].unpack(&f);
#pragma unroll
      for (int v = 0; v < V; ++v) h[v] = add_read(w[v][m], f, h[v]);
    }
  }
};

template <class T, int K, int V, int D>
const char* run(const Problem& p, void* stream) {
  constexpr bool small = sizeof(T) == 2, capped = K == 4 || V == 8;
  const Tuning tuning = capped ? Tuning{K == 4 && small ? 19 : 8, 4, 1, false, 4} : Tuning{small ? 8 : 4, 2, 2, false};
  return launch_slide<T, K, V, capped ? 6 : 1, false, Window<T, K, V, D>, capped ? 2 : 0>(p, tuning, stream);
}
template <class T>
const char* pick(const Problem& p, int elements, void* stream) {
  if constexpr (sizeof(T) == 2)
    if (elements == 8) return run<T, 2, 8, 5>(p, stream);
  return p.mode == Mode::bilinear ? run<T, 2, 4, 4>(p, stream) : run<T, 4, 4, 6>(p, stream);
}

}  // namespace

const char* launch_window(const Problem& p, int elements, void* stream) {
  switch (p.dtype) {
    case DType::f32: return pick<float>(p, elements, stream);
    case DType::f16: return pick<Half>(p, elements, stream);
    default: return pick<BFloat16>(p, elements, stream);
  }
}

}  // namespace aeup
