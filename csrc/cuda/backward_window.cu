// Backward at scales up to 3 along the rows in NHWC: a thread makes V channels of one or two neighbouring grad-input
// pixels from a window of L grad-output pixels, with dense weights: in registers, or (`shared`) read from shared memory
// for every row, where the registers are worth more as accumulators of more warps.
#include "backward_walk.cuh"

namespace aeup::back {
namespace {

template <class T_, int K_, int V, int NC, int L, bool shared>
struct Window {
  using T = T_;
  static constexpr int K = K_, N = NC * V;  // order of the elements: pixel, channel
  static constexpr bool sparse = true;
  static constexpr int kFours = (NC * L + 3) / 4;
  static constexpr int kEntry = (NC * L + 4) / 4 * 4;  // of the table: weights [NC][L], then the window's first pixel
  struct Row {
    Raw<T, V> pixel[L];
    AEUP_DEV void clear() {}
  };
  float w[shared ? 1 : NC * L];  // [NC][L]
  const float* weights;
  int c, start, entry;
  bool single;

  AEUP_DEV static int window_start(const WalkArgs& p, int j) { return min(first_output_of<K>(p.u, j), p.u.out - L); }
  AEUP_DEV static int64_t first_read(const WalkArgs& p, int g) {
    const int j = g / p.chunks;
    return int64_t(window_start(p, j * NC)) * p.c + (g - j * p.chunks) * V;
  }
  // To L2: of the window, the pixels before the next group's. Each thread of a sector asks for other pixels.
  AEUP_DEV static void ahead(const T* x, int c) {
    constexpr int share = 32 / (V * int(sizeof(T))), own = (NC * L + K + NC - 2) / (K + NC - 1);
    const int mine = int(threadIdx.x) % share;
#pragma unroll
    for (int i = 0; i < own; i += share)
      if (i + mine < own) prefetch_l2(x + int64_t(i + mine) * c);
  }
  AEUP_DEV void ahead(const T* x) const { ahead(x, c); }
  // One entry for each group of NC columns that the block's threads touch.
  AEUP_DEV static void fill_table(const WalkArgs& p, unsigned first, float* table) {
    const int wide = (p.u.in + NC - 1) / NC, head = int(first / unsigned(p.chunks));
    const int entries = int((first + kWalkBlock - 1) / unsigned(p.chunks)) - head + 1;
    for (int i = threadIdx.x; i < entries * L; i += kWalkBlock) {
      const int e = i / L, t = i - e * L, j = int(unsigned(head + e) % unsigned(wide)) * NC;
      const int from = window_start(p, j);
#pragma unroll
      for (int k = 0; k < NC; ++k)
        table[e * kEntry + k * L + t] = j + k < p.u.in ? weight_of<K>(p.u.axis, from + t, j + k) : 0.f;
      if (t == 0) {
        reinterpret_cast<int*>(table)[e * kEntry + NC * L] = from;
#pragma unroll
        for (int k = NC * L + 1; k < kEntry; ++k) table[e * kEntry + k] = 0.f;  // reduce() reads whole float4
      }
#ifdef AEUP_EMULATE
      AEUP_EXPECT(outputs_before<K>(p.u, min(j + NC, p.u.in)) <= from + L, "window too narrow");
#endif
    }
  }
  AEUP_DEV Window(const WalkArgs& p, int g, unsigned first, unsigned id, const float* table) {
    c = p.c;
    single = NC == 2 && g / p.chunks * 2 + 2 > p.u.in;  // an odd width ends in half a pair
    entry = int(id / unsigned(p.chunks) - first / unsigned(p.chunks)) * kEntry;
    weights = table + entry;
    if constexpr (!shared) {
#pragma unroll
      for (int i = 0; i < NC * L; ++i) w[i] = weights[i];
    }
    start = reinterpret_cast<const int*>(table)[entry + NC * L];
  }
  AEUP_DEV int64_t read_at(const WalkArgs& p, int g) const { return int64_t(start) * c + g % p.chunks * V; }
  AEUP_DEV int64_t write_at(const WalkArgs& p, int g) const {
    return int64_t(g / p.chunks * NC) * c + g % p.chunks * V;
  }
  AEUP_DEV void load(const T* x, Row& q) const {
#pragma unroll
    for (int t = 0; t < L; ++t) q.pixel[t].load(x + int64_t(t) * c);
  }
  AEUP_DEV void reduce(const Row& q, float* h) const {
    float u[4 * kFours];
    if constexpr (shared) {
      int opaque = 0;  // or the compiler keeps the weights in registers from row to row
#ifndef AEUP_EMULATE
      asm volatile("" : "+r"(opaque));
#endif
      const float4* from = reinterpret_cast<const float4*>(weights + opaque);
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 four = from[i];
        u[4 * i] = four.x, u[4 * i + 1] = four.y, u[4 * i + 2] = four.z, u[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < NC * L; ++i) u[i] = w[i];
    }
#pragma unroll
    for (int t = 0; t < L; ++t) {
      float f[V];
      q.pixel[t].unpack(f);
#pragma unroll
      for (int k = 0; k < NC; ++k)
#pragma unroll
        for (int v = 0; v < V; ++v) h[k * V + v] = t == 0 ? u[k * L] * f[v] : fmaf(u[k * L + t], f[v], h[k * V + v]);
    }
  }
  // The same without the zero weights; rare, so small rather than fast.
  AEUP_DEV void reduce_nonfinite(const T* x, const float* table, float* h) const {
#pragma unroll
    for (int v = 0; v < N; ++v) h[v] = 0;
#pragma unroll 1
    for (int t = 0; t < L; ++t) {
      Raw<T, V> q;
      float f[V];
      q.load(x + int64_t(t) * c);
      q.unpack(f);
#pragma unroll
      for (int k = 0; k < NC; ++k) {
        const float u = table[entry + k * L + t];
#pragma unroll
        for (int v = 0; v < V; ++v) h[k * V + v] = u != 0.f ? fmaf(u, f[v], h[k * V + v]) : h[k * V + v];
      }
    }
  }
  AEUP_DEV void store(T* y, const WalkArgs&, const float* f) const {
    Raw<T, V> out;
    out.pack(f);
    out.store(y);
    if (NC == 1 || single) return;
    out.pack(f + (NC - 1) * V);
    out.store(y + c);
  }
};

constexpr int columns(int K, int bytes) { return K == 4 || (K == 2 && bytes == 2) ? 2 : 1; }  // NC
// Grad-output pixels of a window: the four sizes serve scales up to about 1.5 (1.9 for K = 1), 2, 2.8 and 3 (4).
constexpr int window(int K, int NC, int size) {
  constexpr int kSizes[4][4] = {{2, 3, 4, 4}, {4, 5, 6, 7}, {5, 7, 9, 10}, {8, 11, 14, 16}};
  return kSizes[K == 1 ? 0 : (K == 4 ? 3 : NC)][size];
}

struct Choice {
  int V, size;  // channels per thread or 0, the window's size or -1
};
Choice choose(const Problem& p) {
  const int es = element_size(p.dtype), K = taps_of(p.mode), NC = columns(K, es);
  const int at = smaller(alignment_of(p.src, p.c * es), alignment_of(p.dst));
  Choice c{at < 4 * es ? 0 : (es == 2 && K < 4 && at >= 16 ? 8 : 4), -1};
  const int need = most_outputs(make_map(p, false), K + NC - 1);
  for (int size = 3; size >= 0; --size)
    if (need <= window(K, NC, size) && p.ow >= window(K, NC, size)) c.size = size;
  return c;
}

template <class T, int K, int V, int size>
const char* tuned(const Problem& p, void* stream) {
  constexpr int NC = columns(K, sizeof(T)), L = window(K, NC, size);
  constexpr bool narrow = sizeof(T) == 2, shared = K == 4;
  constexpr int MB = K == 4 ? (narrow ? 5 : 4) : K == 2 && V == 8 ? 4 : 1;
  constexpr int want = K == 1 ? 2 : narrow ? (K == 4 ? 14 : 8) : K == 2 ? 19 : 28;  // as in the fastest on an H100
  constexpr int P = shared && narrow && size < 3 ? 2 : 0;  // at 3 they would cost registers that spill
  using S = Window<T, K, V, NC, L, shared>;
  WalkArgs a = walk_args(p);
  a.chunks = int(p.c / V);
  a.groups = int(ceil_div(p.iw, NC)) * a.chunks;
  const size_t entries = (kWalkBlock - 1) / size_t(a.chunks) + 2;
  return launch_walk<S, 1, MB, P>(p, a, want, entries * S::kEntry * sizeof(float), stream);
}

}  // namespace

const char* refuses_window(const Problem& p) {
  if (!p.channels_last) return "it needs channels_last";
  const Choice c = choose(p);
  if (!c.V) return "the channels or the addresses do not allow its vectors";
  return c.size >= 0 ? nullptr : "it needs a horizontal scale of at most 3 (nearest: 4) and a row that holds a window";
}

const char* launch_window(const Problem& p, void* stream) {
  const Choice c = choose(p);
  return with_kernel(p, [&](auto t, auto taps) -> const char* {
    using T = decltype(t);
    constexpr int K = decltype(taps)::value;
    constexpr bool wide = sizeof(T) == 2 && K < 4;
    const auto run = [&](auto v) -> const char* {
      constexpr int V = decltype(v)::value;
      if (c.size == 0) return tuned<T, K, V, 0>(p, stream);
      if (c.size == 1) return tuned<T, K, V, 1>(p, stream);
      if (c.size == 2) return tuned<T, K, V, 2>(p, stream);
      return tuned<T, K, V, K == 1 ? 2 : 3>(p, stream);
    };
    if constexpr (wide)
      if (c.V == 8) return run(std::integral_constant<int, 8>());
    return run(std::integral_constant<int, 4>());
  });
}

}  // namespace aeup::back
