// Backward at exactly x2 along the rows where a pixel has 1 element (NCHW) or 3 (RGB in NHWC): a thread makes V
// grad-input pixels from 2V grad-output pixels and a halo of E pixels on each side, all by vectors.
#include "backward_walk.cuh"

namespace aeup::back {
namespace {

template <class T_, int K_, int V, int CC>
struct RowX2 {
  using T = T_;
  static constexpr int K = K_, N = V * CC, C = 2 * N;                    // elements made and in the middle
  static constexpr int S = K == 4 ? 3 : K == 2 ? 1 : 0;                  // pixels read on each side
  static constexpr int E = K == 4 ? 4 : K == 2 ? (CC == 3 ? 2 : 1) : 0;  // pixels loaded, so that vectors fit
  static constexpr int H = E ? E * CC : 1, es = int(sizeof(T));
  static constexpr int AC = widest_access(C * es), AH = smaller(widest_access(H * es), AC);
  static constexpr int per = AH / es, chunks = E ? H / per : 0;
  static constexpr bool sparse = false;
  struct Row {
    Raw<T, C, AC> middle;
    uint32_t left[E ? chunks * (AH < 4 ? 1 : AH / 4) : 1], right[E ? chunks * (AH < 4 ? 1 : AH / 4) : 1];
    AEUP_DEV void clear() {
      middle.clear();
#pragma unroll
      for (int i = 0; i < int(sizeof(left) / 4); ++i) left[i] = right[i] = 0;  // stay zero beyond the edges
    }
  };
  int before, behind;  // pixels of the row on each side of the middle
  float wl[2 * K], wr[2 * K];

  AEUP_DEV int64_t read_at(const WalkArgs&, int g) const { return int64_t(g) * C; }
  AEUP_DEV int64_t write_at(const WalkArgs&, int g) const { return int64_t(g) * N; }
  AEUP_DEV RowX2(const WalkArgs& p, int g, unsigned, unsigned, const float*) {
    before = 2 * V * g, behind = 2 * V * (p.groups - 1 - g);
    const bool first = g == 0, last = g == p.groups - 1;
#pragma unroll
    for (int t = 0; t < 2 * K; ++t) {
      const float w = x2_weight<K>(t), e = x2_edge_weight<K>(t), m = x2_edge_weight<K>(2 * K - 1 - t);
      wr[t] = last ? m : w;
      wl[t] = first ? e : (V == 1 ? wr[t] : w);
    }
  }
  AEUP_DEV void ahead(const T* x) const {
#pragma unroll
    for (int i = 0; i < C * es; i += 32) prefetch_l2(reinterpret_cast<const char*>(x) + i);
  }
  AEUP_DEV void load(const T* x, Row& q) const {
    q.middle.load(x);
    constexpr int words = AH < 4 ? 1 : AH / 4;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const int far_left = E - i * per / CC, far_right = (i * per + per - 1) / CC + 1;
      if (before >= (2 * V >= E ? 1 : far_left)) load_words<AH>(x - H + i * per, q.left + i * words);
      if (behind >= (2 * V >= E ? 1 : far_right)) load_words<AH>(x + C + i * per, q.right + i * words);
    }
  }
  AEUP_DEV void reduce(const Row& q, float* h) const {
    float f[C + 2 * H];
    q.middle.unpack(f + H);
    if constexpr (E > 0) {
      Raw<T, H, AH> side;
#pragma unroll
      for (int i = 0; i < int(sizeof(q.left) / 4); ++i) side.w[i] = q.left[i];
      side.unpack(f);
#pragma unroll
      for (int i = 0; i < int(sizeof(q.left) / 4); ++i) side.w[i] = q.right[i];
      side.unpack(f + H + C);
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int c = 0; c < CC; ++c) {
        const float* a = f + H + (2 * v - S) * CC + c;
        float sum = 0;
        if constexpr (K == 1) {
          sum = a[0] + a[CC];
        } else {
#pragma unroll
          for (int t = 0; t < 2 * K; ++t) {
            float w = x2_weight<K>(t);
            if (v == V - 1 && x2_edge_differs<K>(2 * K - 1 - t)) w = wr[t];
            if (v == 0 && x2_edge_differs<K>(t)) w = wl[t];
            sum = t == 0 ? w * a[0] : fmaf(w, a[t * CC], sum);
          }
        }
        h[v * CC + c] = sum;
      }
  }
  AEUP_DEV void store(T* y, const WalkArgs&, const float* f) const {
    Raw<T, N> out;
    out.pack(f);
    out.store(y);
  }
};

template <class T, int K, int CC>
constexpr int widest_pixels() {  // V of the fastest instance
  if (CC == 3) return sizeof(T) == 4 ? 2 : 4;
  return sizeof(T) == 4 || K == 1 ? 4 : 8;
}
// Pixels per thread that sizes and addresses allow; 0 for none.
int pixels_per_thread(const Problem& p) {
  const int es = element_size(p.dtype), cc = int(pixel_of(p)), K = taps_of(p.mode);
  const int widest = cc == 3 ? (es == 4 ? 2 : 4) : (es == 4 || K == 1 ? 4 : 8);
  for (int V = widest; V >= (cc == 3 ? widest : 1); V /= 2) {
    const bool fits = p.iw % V == 0 && alignment_of(p.src) >= widest_access(2 * V * cc * es) &&
                      alignment_of(p.dst) >= widest_access(V * cc * es);
    if (fits) return V;
  }
  return 0;
}

template <class S, int D, int MB, int P>
const char* run(const Problem& p, int pixels, int want, void* stream) {
  WalkArgs a = walk_args(p);
  a.groups = int(p.iw / pixels);
  return launch_walk<S, D, MB, P>(p, a, want, 0, stream);
}
// Rows in flight, ahead in L2 (P) and per strip as in the fastest variants on an H100; blocks as the registers allow.
template <class T, int K, int V, int CC>
const char* tuned(const Problem& p, void* stream) {
  constexpr bool narrow = sizeof(T) == 2;
  constexpr int D = K == 1 && (CC == 1 ? narrow : !narrow) ? 2 : 1;
  constexpr int MB = K < 4 || (CC == 3 && narrow) ? 1 : CC == 3 ? 4 : narrow ? 6 : 7;
  constexpr int want = K == 1 ? 2 : K == 2 ? 8 : narrow ? 16 : 24, P = K == 4 && V == 8 ? 2 : 0;
  return run<RowX2<T, K, V, CC>, D, MB, P>(p, V, want, stream);
}

}  // namespace

const char* refuses_row_x2(const Problem& p) {
  if (pixel_of(p) != 1 && pixel_of(p) != 3) return "it needs 1 or 3 elements per pixel";
  if (make_map(p, false).integer != 2 || p.iw < 2) return "it needs a width of exactly twice 2 or more pixels";
  return pixels_per_thread(p) ? nullptr : "the width or the addresses do not allow its vectors";
}

const char* launch_row_x2(const Problem& p, void* stream) {
  const int V = pixels_per_thread(p);
  return with_kernel(p, [&](auto t, auto taps) -> const char* {
    using T = decltype(t);
    constexpr int K = decltype(taps)::value, W1 = widest_pixels<T, K, 1>();
    if (pixel_of(p) == 3) return tuned<T, K, widest_pixels<T, K, 3>(), 3>(p, stream);
    if (V == W1) return tuned<T, K, W1, 1>(p, stream);
    if (V == 4) return tuned<T, K, 4, 1>(p, stream);
    if (V == 2) return tuned<T, K, 2, 1>(p, stream);
    return tuned<T, K, 1, 1>(p, stream);
  });
}

}  // namespace aeup::back
