// Backward at exactly x2 along the rows in NHWC: a thread makes V channels of NC neighbouring grad-input pixels, so
// that its 2 NC + 2 E loads serve all of them.
#include "backward_walk.cuh"

namespace aeup::back {
namespace {

template <class T_, int K_, int V, int NC>
struct PairX2 {
  using T = T_;
  static constexpr int K = K_, N = NC * V;                                   // order of the elements: pixel, channel
  static constexpr int E = K == 4 ? 3 : K == 2 ? 1 : 0, L = 2 * NC + 2 * E;  // pixels read on each side, in all
  static constexpr int es = int(sizeof(T));
  static constexpr bool sparse = false;
  struct Row {
    Raw<T, V> pixel[L];
    AEUP_DEV void clear() {
#pragma unroll
      for (int i = 0; i < L; ++i) pixel[i].clear();  // stay zero beyond the edges
    }
  };
  int c, left;  // grad-output pixels from the group's first to the row's end
  bool first, last, single;

  AEUP_DEV PairX2(const WalkArgs& p, int g, unsigned, unsigned, const float*) {
    const int j = g / p.chunks;
    c = p.c, left = p.u.out - 2 * NC * j;
    first = j == 0, last = left == 2 * NC, single = NC == 2 && left == 2;  // an odd width ends in half a pair
  }
  AEUP_DEV int64_t read_at(const WalkArgs& p, int g) const {
    const int j = g / p.chunks;
    return int64_t(2 * NC * j) * c + (g - j * p.chunks) * V;
  }
  AEUP_DEV int64_t write_at(const WalkArgs& p, int g) const {
    const int j = g / p.chunks;
    return int64_t(NC * j) * c + (g - j * p.chunks) * V;
  }
  AEUP_DEV void ahead(const T* x) const {
    constexpr int share = 32 / (V * es);  // threads of a sector: each prefetches it for other pixels
    const int own = int(threadIdx.x) % share;
#pragma unroll
    for (int i = 0; i < 2 * NC; i += share)
      if (i + own < left && i + own < 2 * NC) prefetch_l2(x + int64_t(i + own) * c);
  }
  AEUP_DEV void load(const T* x, Row& q) const {
#pragma unroll
    for (int i = 0; i < L; ++i) {
      const int at = i - E;
      const bool inside = at < 0 ? !first : NC == 2 ? at < 2 || left > (at & ~1) : at < 2 * NC || !last;
      if (inside) q.pixel[i].load(x + int64_t(at) * c);
    }
  }
  AEUP_DEV void reduce(const Row& q, float* h) const {
#pragma unroll
    for (int i = 0; i < L; ++i) {
      float f[V];
      q.pixel[i].unpack(f);
#pragma unroll
      for (int n = 0; n < NC; ++n) {
        const int t = i - 2 * n, m = 2 * K - 1 - t;  // the tap of pixel n, and counted from the window's end
        if (t < 0 || m < 0) continue;
        float w = x2_weight<K>(t);
        if (x2_edge_differs<K>(m) && (n == NC - 1 || NC == 2))
          w = (n == NC - 1 ? last : single) ? x2_edge_weight<K>(m) : w;
        if (x2_edge_differs<K>(t) && n == 0) w = first ? x2_edge_weight<K>(t) : w;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float& sum = h[n * V + v];
          sum = t == 0 ? (K == 1 ? f[v] : w * f[v]) : (K == 1 ? sum + f[v] : fmaf(w, f[v], sum));
        }
      }
    }
  }
  AEUP_DEV void store(T* y, const WalkArgs&, const float* f) const {
#pragma unroll
    for (int n = 0; n < NC; ++n) {
      if (n > 0 && single) return;
      Raw<T, V> out;
      out.pack(f + n * V);
      out.store(y + int64_t(n) * c);
    }
  }
};

// Channels per thread: 0 where sizes and addresses allow no vector.
int channels_per_thread(const Problem& p) {
  const int es = element_size(p.dtype), at = smaller(alignment_of(p.src, p.c * es), alignment_of(p.dst));
  if (es == 2 && p.mode == Mode::bilinear && at >= 16) return 8;
  return at >= 4 * es ? 4 : 0;
}

// Rows in flight (D), on their way to L2 (P) and per strip, least blocks (MB): as in the fastest variants on an H100.
template <class T, int K, int V, int NC, int P = 0>
const char* tuned(const Problem& p, void* stream) {
  constexpr bool narrow = sizeof(T) == 2;
  constexpr int D = K == 2 && !narrow ? 2 : 1;
  constexpr int MB = !narrow || K == 1 ? 1 : K == 4 ? 5 : V == 8 ? 4 : 8;
  constexpr int want = K == 1 ? 2 : K == 2 ? (narrow && V == 4 ? 8 : 16) : narrow ? 22 : 32;
  WalkArgs a = walk_args(p);
  a.chunks = int(p.c / V);
  a.groups = int(ceil_div(p.iw, NC)) * a.chunks;
  return launch_walk<PairX2<T, K, V, NC>, D, MB, P>(p, a, want, 0, stream);
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
      if (channels_per_thread(p) == 8) return tuned<T, K, 8, 2>(p, stream);
    if constexpr (K == 4 && sizeof(T) == 2) {
      // Where the channels of a pixel fill a block, neighbouring groups share no L1: their rows come ahead of time.
      if (p.c / 4 >= kWalkBlock) return tuned<T, K, 4, 2, 2>(p, stream);
      if (p.iw % 4 == 0) return tuned<T, K, 2, 4>(p, stream);
    }
    return tuned<T, K, 4, 2>(p, stream);
  });
}

}  // namespace aeup::back
