// Fast forward for NCHW x2, x4, x8 and RGB channels-last x2: the weights repeat with the scale and are immediates.
#include "forward.cuh"
#include "forward.h"

namespace aeup {
namespace {

// Weight of tap k at phase `phase` of the enlargement by `scale` (Keys 1981, a = -0.75).
constexpr double keys_near(double x) { return (1.25 * x - 2.25) * x * x + 1; }
constexpr double keys_far(double x) { return ((-.75 * x + 3.75) * x - 6) * x + 3; }
template <int K>
constexpr float phase_weight(int scale, int phase, int k) {
  double t = (phase + .5) / scale - .5;
  if (t < 0) t += 1;
  if (K == 2) return float(k ? t : 1 - t);
  return float(k == 0 ? keys_far(1 + t) : k == 1 ? keys_near(t) : k == 2 ? keys_near(1 - t) : keys_far(2 - t));
}

// x2 with C interleaved channels (1: NCHW, 3: RGB): V elements from V / 2C input pixels and H more on each side.
template <class T, int K, int V, int C>
struct Double {
  using S = float;
  static constexpr bool kManyPlanes = false;
  static constexpr int kPixels = V / C / 2, kHalo = C == 3 || K == 4 ? 2 : 1, kReach = K / 2;
  static constexpr int N = kPixels * C, NH = kHalo * C, kSize = int(sizeof(T));
  static_assert(kPixels >= kHalo, "a halo must not be wider than the neighbour");
  struct R {
    Raw<T, N, C == 1 ? widest_access(N * kSize) : 2 * kSize> centre;
    Raw<T, NH, C == 1 ? widest_access(NH * kSize) : 2 * kSize> left, right;
  };
  int base;
  bool first, last;

  AEUP_DEV void init(const Sliding<S>& p, int group) {
    base = group * N, first = group == 0, last = group == int(p.groups.divisor) - 1;
  }
  AEUP_DEV void load(const T* a, R& q) const {
    q.centre.load(a);
    if (!first) q.left.load(a - NH);
    if (!last) q.right.load(a + N);
  }
  AEUP_DEV void horizontal(const R& q, S* h) const {
    S f[N + 2 * NH];
    q.left.unpack(f);
    q.centre.unpack(f + NH);
    q.right.unpack(f + NH + N);
#pragma unroll
    for (int i = 0; i < NH; ++i) {
      f[i] = first ? f[NH + i % C] : f[i];
      f[NH + N + i] = last ? f[NH + N - C + i % C] : f[NH + N + i];
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int phase = 0; phase < 2; ++phase) {
          const S* a = f + (i + kHalo - kReach + phase) * C + c;
          S sum = S(0);
#pragma unroll
          for (int k = 0; k < K; ++k) sum = phase_weight<K>(2, phase, k) * a[k * C] + sum;
          h[(2 * i + phase) * C + c] = sum;
        }
  }
};

// NCHW x4 or x8 (kScale): V outputs from max(V / kScale, 1) columns; columns are clamped, not folded.
template <class T, int K, int V, int kScale>
struct Phases {
  using S = float;
  static constexpr bool kManyPlanes = false;
  static constexpr bool kHalf = V < kScale;  // V = kScale / 2: every second thread starts in the middle of a column
  static constexpr int D = kHalf ? K : V / kScale + K;
  struct R {
    Raw<T, 1> x[D];
  };
  static constexpr int base = 0;
  int offset[D];
  S w[kHalf ? V : 1][kHalf ? K : 1];

  AEUP_DEV void init(const Sliding<S>& p, int group) {
    const bool half = kHalf && (group & 1);
    const int column = kHalf ? group / 2 : group * (V / kScale);
#pragma unroll
    for (int m = 0; m < D; ++m) offset[m] = min(max(column - K / 2 + int(half) + m, 0), int(p.h.in) - 1);
    if constexpr (kHalf) {
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int k = 0; k < K; ++k) w[v][k] = half ? phase_weight<K>(kScale, v + V, k) : phase_weight<K>(kScale, v, k);
    }
  }
  AEUP_DEV void load(const T* a, R& q) const {
#pragma unroll
    for (int m = 0; m < D; ++m) q.x[m].load(a + offset[m]);
  }
  AEUP_DEV void horizontal(const R& q, S* h) const {
    S f[D];
#pragma unroll
    for (int m = 0; m < D; ++m) q.x[m].unpack(f + m);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int phase = v % kScale, at = kHalf ? 0 : v / kScale + (phase >= kScale / 2);
      h[v] = S(0);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if constexpr (kHalf)
          h[v] = w[v][k] * f[k] + h[v];
        else
          h[v] = phase_weight<K>(kScale, phase, k) * f[at + k] + h[v];
      }
    }
  }
};

template <class T, int K>
const char* run_scale(const Problem& p, int scale, void* stream) {
  constexpr bool small = sizeof(T) == 2;
  constexpr int V = small ? 8 : 4;
  const Tuning two = K == 2 ? Tuning{4, 2, 1, false} : Tuning{small ? 12 : 8, 4, 1, false};
  const Tuning more = K == 2 ? Tuning{8, 4, 1, false} : Tuning{small ? 19 : 8, 8, 1, false};
  // Register caps under which nothing spills (16-bit bicubic: 64 registers, 32 warps).
  constexpr int kBlocks = K == 4 && small ? 8 : 1, kBlocks4 = K == 4 && small ? 7 : 1;
  if (scale == 2) return launch_slide<T, K, V, kBlocks, false, Double<T, K, V, 1>>(p, two, stream);
  if (scale == 4) return launch_slide<T, K, V, kBlocks4, false, Phases<T, K, V, 4>>(p, more, stream);
  return launch_slide<T, K, V, kBlocks, false, Phases<T, K, V, 8>>(p, more, stream);
}
template <class T, int K>
const char* run_rgb(const Problem& p, void* stream) {
  constexpr bool small = sizeof(T) == 2;
  constexpr int kBlocks = K == 2 ? 1 : small ? 6 : 5;
  const Tuning tuning = K == 2 ? Tuning{4, 2, 1, false} : Tuning{small ? 21 : 16, 4, 1, false};
  return launch_slide<T, K, 12, kBlocks, true, Double<T, K, 12, 3>>(p, tuning, stream);
}
template <class F>
const char* with_single(DType t, F f) {
  return t == DType::f32 ? f(float()) : t == DType::f16 ? f(Half()) : f(BFloat16());
}

}  // namespace

const char* launch_polyphase(const Problem& p, int scale, void* stream) {
  return with_single(p.dtype, [&](auto t) {
    using T = decltype(t);
    return p.mode == Mode::bilinear ? run_scale<T, 2>(p, scale, stream) : run_scale<T, 4>(p, scale, stream);
  });
}
const char* launch_rgb(const Problem& p, void* stream) {
  return with_single(p.dtype, [&](auto t) {
    using T = decltype(t);
    return p.mode == Mode::bilinear ? run_rgb<T, 2>(p, stream) : run_rgb<T, 4>(p, stream);
  });
}

}  // namespace aeup
