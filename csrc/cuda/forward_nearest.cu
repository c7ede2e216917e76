// Fast forward of nearest and nearest-exact: bits are copied, the dtype is only a size.
#include "forward.cuh"
#include "forward.h"

namespace aeup {
namespace {

// NHWC: a pixel is c words of 8 bytes, whatever the dtype; a thread moves N of them.
template <int N>
struct Unit {
  struct R {
    Raw<uint64_t, N> x;
  };
  int base;
  AEUP_DEV void init(const Sliding<float>& p, int group) {
    const int column = p.chunks.divide(group);
    float w;
    base = int(taps<1>(p.h, column, &w)) * int(p.c.divisor) + (group - column * int(p.chunks.divisor)) * N;
  }
  AEUP_DEV void load(const uint64_t* a, R& q) const { q.x.load(a); }
  AEUP_DEV void expand(const R& q, Raw<uint64_t, N>& y) const { y = q.x; }
};

AEUP_DEV uint32_t element_bits(const uint32_t* w, int i, int bytes) {  // element i of packed words (bytes < 4)
  return (w[i * bytes / 4] >> (8 * (i * bytes % 4))) & ((1u << (8 * bytes)) - 1);
}
// Packs V elements, element v from `get(v)` (bytes < 4: its bits; else words copied from get(v)[..]).
template <class T, int V, class F>
AEUP_DEV void assemble(Raw<T, V>& y, F word) {
  constexpr int kBytes = int(sizeof(T));
  if constexpr (kBytes >= 4) {
#pragma unroll
    for (int i = 0; i < V * kBytes / 4; ++i) y.w[i] = word(i * 4 / kBytes, i % (kBytes / 4));
  } else if constexpr (V * kBytes < 4) {
    y.w[0] = word(0, 0);
  } else {
    constexpr int kPer = 4 / kBytes;
#pragma unroll
    for (int i = 0; i < V / kPer; ++i) {
      y.w[i] = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) y.w[i] |= word(i * kPer + j, 0) << (8 * kBytes * j);
    }
  }
}

// NCHW enlarged by the integer kScale: V outputs from V / kScale inputs (or a part of one).
template <class T, int V, int kScale>
struct Repeat {
  static constexpr int N = V > kScale ? V / kScale : 1, kBytes = int(sizeof(T));
  struct R {
    Raw<T, N> x;
  };
  int base;
  AEUP_DEV void init(const Sliding<float>&, int group) { base = int(int64_t(group) * V / kScale); }
  AEUP_DEV void load(const T* a, R& q) const { q.x.load(a); }
  AEUP_DEV void expand(const R& q, Raw<T, V>& y) const {
    assemble(y, [&](int v, int part) {
      const int i = v / kScale;
      if constexpr (kBytes >= 4) return q.x.w[i * (kBytes / 4) + part];
      if constexpr (kBytes < 4 && N * kBytes < 4) return element_bits(q.x.w, i, kBytes);
      return element_bits(q.x.w, i, kBytes < 4 ? kBytes : 1);
    });
  }
};

// Flat rows: each of V elements has its own source column.
template <class T, int V>
struct Pick {
  struct R {
    Raw<T, 1> x[V];
  };
  static constexpr int base = 0;
  int offset[V];
  AEUP_DEV void init(const Sliding<float>& p, int group) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int e = group * V + v, c = int(p.c.divisor), column = p.c.divide(e);
      float w;
      offset[v] = int(taps<1>(p.h, column, &w)) * c + e - column * c;
    }
  }
  AEUP_DEV void load(const T* a, R& q) const {
#pragma unroll
    for (int v = 0; v < V; ++v) q.x[v].load(a + offset[v]);
  }
  AEUP_DEV void expand(const R& q, Raw<T, V>& y) const {
    assemble(y, [&](int v, int part) { return q.x[v].w[part]; });
  }
};

constexpr Tuning kTuning{4, 2, 1, false};

template <class F>
const char* with_bits(DType t, F f) {
  switch (element_size(t)) {
    case 1: return f(uint8_t());
    case 2: return f(uint16_t());
    case 4: return f(uint32_t());
    default: return f(uint64_t());
  }
}

}  // namespace

const char* launch_nearest_channels(const Problem& p, int bytes, void* stream) {
  Problem q = p;
  q.c = p.c * element_size(p.dtype) / 8;
  if (bytes == 16) return launch_nearest<uint64_t, 2, Unit<2>>(q, kTuning, stream);
  return launch_nearest<uint64_t, 1, Unit<1>>(q, kTuning, stream);
}

const char* launch_nearest_integer(const Problem& p, int scale, void* stream) {
  return with_bits(p.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int V = 16 / int(sizeof(T));
    if (scale == 2) return launch_nearest<T, V, Repeat<T, V, 2>>(p, kTuning, stream);
    if (scale == 4) return launch_nearest<T, V, Repeat<T, V, 4>>(p, kTuning, stream);
    return launch_nearest<T, V, Repeat<T, V, 8>>(p, kTuning, stream);
  });
}

const char* launch_nearest_gather(const Problem& p, int bytes, void* stream) {
  return with_bits(p.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kSize = int(sizeof(T)), kFour = kSize < 4 ? 4 / kSize : 1;
    if (bytes == 16) return launch_nearest<T, 16 / kSize, Pick<T, 16 / kSize>>(p, kTuning, stream);
    if (bytes >= 4 && kFour > 1) return launch_nearest<T, kFour, Pick<T, kFour>>(p, kTuning, stream);
    return launch_nearest<T, 1, Pick<T, 1>>(p, kTuning, stream);
  });
}

}  // namespace aeup
