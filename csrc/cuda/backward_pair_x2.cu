// Backward at exactly x2 along the rows in NHWC: a thread makes V channels of two neighbouring grad-input pixels, so
// that 2 + 2K loads (4 for K = 1) serve both.
#include "backward_walk.cuh"

namespace aeup::back {
namespace {

template <class T_, int K_, int V>
struct PairX2 {
  using T = T_;
  static constexpr int K = K_, N = 2 * V;                               // order of the elements: pixel, channel
  static constexpr int E = K == 4 ? 3 : K == 2 ? 1 : 0, L = 4 + 2 * E;  // pixels read on each side, in all
  static constexpr bool sparse = false;
  struct Row {
    Raw<T, V> pixel[L];
    AEUP_DEV void clear() {
#pragma unroll
      for (int i = 0; i < L; ++i) pixel[i].clear();  // stay zero beyond the edges
    }
  };
  int c, left;  // grad-output pixels from the pair's first to the row's end
  bool first, last, single;

  AEUP_DEV PairX2(const WalkArgs& p, int g, unsigned, unsigned, const float*) {
    const int j = g / p.chunks;
    c = p.c, left = p.u.out - 4 * j;
    first = j == 0, single = left == 2, last = left == 4;  // an odd width ends in half a pair
  }
  AEUP_DEV int64_t read_at(const WalkArgs& p, int g) const {
    const int j = g / p.chunks;
    return int64_t(4 * j) * c + (g - j * p.chunks) * V;
  }
  AEUP_DEV int64_t write_at(const WalkArgs& p, int g) const {
    const int j = g / p.chunks;
    return int64_t(2 * j) * c + (g - j * p.chunks) * V;
  }
  AEUP_DEV void load(const T* x, Row& q) const {
#pragma unroll
    for (int i = 0; i < L; ++i) {
      const int at = i - E;  // left is even: 2, 4, 6 (before half a pair) or more than at
      if (at < 0 ? !first : (at < 2 || left > (at < 4 ? 2 : at < 6 ? 4 : 6))) q.pixel[i].load(x + int64_t(at) * c);
    }
  }
  AEUP_DEV void reduce(const Row& q, float* h) const {
    float a[2 * K], b[2 * K];  // weights of the two pixels
#pragma unroll
    for (int t = 0; t < 2 * K; ++t) {
      const float w = x2_weight<K>(t), e = x2_edge_weight<K>(t), m = x2_edge_weight<K>(2 * K - 1 - t);
      a[t] = first && x2_edge_differs<K>(t) ? e : (single && x2_edge_differs<K>(2 * K - 1 - t) ? m : w);
      b[t] = last && x2_edge_differs<K>(2 * K - 1 - t) ? m : w;
    }
#pragma unroll
    for (int v = 0; v < N; ++v) h[v] = 0;
#pragma unroll
    for (int i = 0; i < L; ++i) {
      float f[V];
      q.pixel[i].unpack(f);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (i < 2 * K)
          h[v] =
              i == 0 ? (K == 1 ? f[v] : a[0] * f[v]) : (K == 1 ? h[v] + f[v] : fmaf(a[i < 2 * K ? i : 0], f[v], h[v]));
        if (i >= 2)
          h[V + v] = i == 2 ? (K == 1 ? f[v] : b[0] * f[v])
                            : (K == 1 ? h[V + v] + f[v] : fmaf(b[i >= 2 ? i - 2 : 0], f[v], h[V + v]));
      }
    }
  }
  AEUP_DEV void store(T* y, const WalkArgs&, const float* f) const {
    Raw<T, V> out;
    out.pack(f);
    out.store(y);
    if (single) return;
    out.pack(f + V);
    out.store(y + c);
  }
};

// Channels per thread: 0 where sizes and addresses allow no vector.
int channels_per_thread(const Problem& p) {
  const int es = element_size(p.dtype), at = smaller(alignment_of(p.src, p.c * es), alignment_of(p.dst));
  if (es == 2 && p.mode == Mode::bilinear && at >= 16) return 8;
  return at >= 4 * es ? 4 : 0;
}

template <class T, int K, int V>
const char* tuned(const Problem& p, void* stream) {
  // Rows in flight and per strip as in the fastest prototype on an H100; blocks as the registers allow.
  constexpr int D = K == 2 ? 2 : 1, MB = sizeof(T) == 2 && (K == 4 || (K == 2 && V == 4)) ? 5 : 1;
  constexpr int want = K == 1 ? 2 : K == 2 ? 16 : sizeof(T) == 2 ? 22 : 32;
  WalkArgs a = walk_args(p);
  a.chunks = int(p.c / V);
  a.groups = int(ceil_div(p.iw, 2)) * a.chunks;
  return launch_walk<PairX2<T, K, V>, D, MB>(p, a, want, 0, stream);
}

}  // namespace

const char* refuses_pair_x2(const Problem& p) {
  if (!p.channels_last) return "it needs channels_last";
  if (make_map(p, false).integer != 2 || p.iw < 2) return "it needs a width of exactly twice 2 or more pixels";
  return channels_per_thread(p) ? nullptr : "the channels or the addresses do not allow its vectors";
}

const char* launch_pair_x2(const Problem& p, void* stream) {
  return with_kernel(p, [&](auto t, auto taps) -> const char* {
    using T = decltype(t);
    constexpr int K = decltype(taps)::value;
    if constexpr (K == 2 && sizeof(T) == 2)
      if (channels_per_thread(p) == 8) return tuned<T, K, 8>(p, stream);
    return tuned<T, K, 4>(p, stream);
  });
}

}  // namespace aeup::back
