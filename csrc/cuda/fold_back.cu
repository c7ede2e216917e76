// The way back of fold.cu: the gradient of a folded weight, from its partial sums.
#include "fold.h"
#include "fold_tile.cuh"

namespace aeup {
namespace {

constexpr int kThreads = 256, kLogShare = 5;

template <class T>
struct BackParams {
  const Acc<T>* partial;
  T* to;  // [groups * co, ci, kernel]
  int64_t splits, count, ci_stride, tap_stride;
  int ci, co;  // of a group
  Fold h, w;
  bool channels_last, load_vectors, store_vectors;
  // A tile: 2^log_i ci by 2^log_c co; 2^log_parts threads share the splits of a vector along co. ci times parts: at
  // most 2^kLogShare. `chunk` kernel indices at a time.
  int log_c, log_i, log_parts, chunk;
  Divider chunk_of, tiles_i, tiles_c;
};

// A block makes the gradient of a tile of channels, all kernel indices: in shared memory, [part][ci][kernel index][co].
template <class T, bool kCommon>
__global__ void __launch_bounds__(kThreads, 2) fold_back(BackParams<T> p) {
  using S = Acc<T>;
  constexpr int kV = kVector<S>, kLogV = kV == 4 ? 2 : 1;
  AEUP_DYNAMIC_SHARED(S, tile);
  const Fold fh = fold_or<kCommon>(p.h), fw = fold_or<kCommon>(p.w);
  const int size = fh.kernel * fw.kernel, chunk = kCommon ? 9 : p.chunk, taps_w = fw.taps();
  const int pitch = pitch_of(1 << p.log_c), row = row_of(chunk, pitch), parts = 1 << p.log_parts;
  using Offset = std::conditional_t<kCommon, int, int64_t>;
  int block = int(blockIdx.x);
  const int i0 = take(&block, p.tiles_i) << p.log_i, c0 = take(&block, p.tiles_c) << p.log_c, group = block;
  const int ni = p.ci - i0, nc = p.co - c0;

  const int log_vectors = p.log_c - kLogV, in_block = threadIdx.x >> log_vectors, part = in_block >> p.log_i;
  const int i = in_block & ((1 << p.log_i) - 1), c = (threadIdx.x & ((1 << log_vectors) - 1)) * kV;
  const S* const from = p.partial + (int64_t(group) * p.ci + i0 + i) * p.ci_stride + c0 + c;
  const bool some = i < ni && c < nc;
  const auto keep = [&](int j, const S* v) {
#pragma unroll
    for (int k = 0; k < kV; k += 2)
      *reinterpret_cast<Pair<S>*>(tile + in_block * row + j * pitch + c + k) = {v[k], v[k + 1]};
  };
  // Makes the kernel indices from j0; loads whole vectors, or, if A = 1, element by element.
  const auto sums = [&](int j0, auto width) {
    constexpr int A = decltype(width)::value, kBatch = kCommon ? 8 : 4;  // loads in flight
    const auto load = [&](const S* at, S* v) {
#pragma unroll
      for (int k = 0; k < kV; k += A) {
        Raw<S, A> raw;
        raw.clear();
        if (A > 1 || c + k < nc) raw.load(at + k);
        raw.unpack(v + k);
      }
    };
    if constexpr (kCommon) {
      S sum[16][kV] = {};
      if (some) {
        const S* at = from + part * p.count;
#pragma unroll
        for (int tap = 0; tap < 16; ++tap) load(at + tap * p.tap_stride, sum[tap]);
        for (int64_t s = part + parts; s < p.splits; s += parts) {
          at += parts * p.count;
#pragma unroll
          for (int first = 0; first < 16; first += kBatch) {
            S v[kBatch][kV];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) load(at + (first + b) * p.tap_stride, v[b]);
#pragma unroll
            for (int b = 0; b < kBatch; ++b)
#pragma unroll
              for (int k = 0; k < kV; ++k) sum[first + b][k] += v[b][k];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 9; ++j) {
        const int tap = fh.of_kernel(j / 3).first * 4 + fw.of_kernel(j % 3).first;
        S v[kV];
#pragma unroll
        for (int k = 0; k < kV; ++k) v[k] = sum[tap][k] + sum[tap + 1][k] + (sum[tap + 4][k] + sum[tap + 5][k]);
        keep(j, v);
      }
    } else {
      for (int j = j0; j < min(j0 + chunk, size); ++j) {
        const int jy = j / fw.kernel, y = fh.of_kernel(jy).first, x = fw.of_kernel(j - jy * fw.kernel).first;
        S sum[kV] = {};
        for (int64_t s = part; some && s < p.splits; s += parts) {
          const S* at = from + s * p.count + (int64_t(y) * taps_w + x) * p.tap_stride;
          for (int n = 0, column = 0; n < fh.scale * fw.scale; n += kBatch) {
            S v[kBatch][kV] = {};
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
              if (n + b >= fh.scale * fw.scale) break;
              load(at, v[b]);
              at += p.tap_stride;
              if (++column == fw.scale) column = 0, at += (taps_w - fw.scale) * p.tap_stride;
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b)
#pragma unroll
              for (int k = 0; k < kV; ++k) sum[k] += v[b][k];
          }
        }
        keep(j - j0, sum);
      }
    }
  };
  for (int j0 = 0; j0 < size; j0 += chunk) {
    if (kCommon || p.load_vectors)
      sums(j0, std::integral_constant<int, kV>());
    else if constexpr (!kCommon)
      sums(j0, std::integral_constant<int, 1>());
    __syncthreads();
    const auto write = [&](auto width) {
      constexpr int V = decltype(width)::value;
      const Offset of_c = Offset(size) * p.ci, of_i = p.channels_last ? 1 : size, of_j = p.channels_last ? p.ci : 1;
      T* const to = p.to + (int64_t(group) * p.co + c0) * of_c + int64_t(i0) * of_i + j0 * of_j;
      for (int n = threadIdx.x * V; n < chunk << (p.log_i + p.log_c); n += int(blockDim.x) * V) {
        const Element e = element_of<kCommon>(n, p.channels_last, p.log_i, p.log_c, p.chunk_of);
        if (e.i >= ni || e.c >= nc || e.j >= size - j0) continue;
        int at[V];
        offsets_of<kCommon, V>(e.i * row + e.j * pitch + e.c, e.j, chunk, p.channels_last, row, pitch, at);
        S v[V];
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = tile[at[k]];
        for (int part = 1; part < parts; ++part)
#pragma unroll
          for (int k = 0; k < V; ++k) v[k] += tile[at[k] + part * (row << p.log_i)];
        Raw<T, V> raw;
        raw.pack(v);
        raw.store(to + (e.c * of_c + e.i * of_i + e.j * of_j));
      }
    };
    if (p.store_vectors)
      write(std::integral_constant<int, kV>());
    else
      write(std::integral_constant<int, 1>());
    __syncthreads();
  }
}

template <class T>
const char* start_back(const Convolution& c, BackParams<T>& p, void* stream) {
  using S = Acc<T>;
  constexpr int kV = kVector<S>, kE = int(sizeof(T)), kLogV = kV == 4 ? 2 : 1;
  const int64_t vectors = ceil_div(p.co, kV) * c.ci;
  const auto tiles = [&] { return ceil_div(p.ci, 1 << p.log_i) * ceil_div(p.co, 1 << p.log_c) * c.groups; };
  for (p.log_c = kLogV + 3; p.log_c > kLogV && 1 << p.log_c >= 2 * p.co; --p.log_c) {
  }
  // Threads enough to have the memory busy, then blocks enough to have all multiprocessors busy.
  while (p.log_parts < kLogShare && 2 << p.log_parts <= p.splits && vectors << p.log_parts < 512 * multiprocessors())
    ++p.log_parts;
  p.log_i = min(kLogShare - p.log_parts, 4);
  while (p.log_i && (1 << p.log_i >= 2 * p.ci || tiles() < multiprocessors())) --p.log_i;
  const int size = p.h.kernel * p.w.kernel, log_share = p.log_i + p.log_parts;
  p.chunk =
      int(min(int64_t(size), int64_t(((kMostShared / int(sizeof(S)) >> log_share) - 2) / pitch_of(1 << p.log_c))));
  p.chunk_of = Divider(p.chunk);
  p.tiles_i = Divider(ceil_div(p.ci, 1 << p.log_i)), p.tiles_c = Divider(ceil_div(p.co, 1 << p.log_c));
  p.load_vectors = alignment_of(p.partial, (p.count | p.ci_stride | p.tap_stride) * sizeof(S)) == 16 && p.co % kV == 0;
  const bool common = is_common(p.h) && is_common(p.w) && p.load_vectors && p.ci < kMostCommon;
  p.store_vectors = alignment_of(p.to, p.ci * kE) >= kV * kE && p.chunk == size && 1 << p.log_i >= kV;
  const int threads = 1 << (p.log_c - kLogV + log_share);
  const auto shared = size_t(row_of(p.chunk, pitch_of(1 << p.log_c)) * sizeof(S) << log_share);
  AEUP_LAUNCH((common ? fold_back<T, true> : fold_back<T, false>), tiles(), threads, shared, stream, p);
  return nullptr;
}

}  // namespace

const char* launch_fold_back(const Convolution& c, const void* partial, int64_t splits, int64_t ci_stride,
                             int64_t tap_stride, void* stream) {
  return with_type(c.dtype, [&](auto t) {
    using T = decltype(t);
    BackParams<T> p{};
    p.partial = static_cast<const Acc<T>*>(partial), p.to = static_cast<T*>(c.result);
    p.splits = splits, p.count = c.ci * (c.co / c.groups) * c.kh * c.kw;
    p.ci_stride = ci_stride, p.tap_stride = tap_stride;
    p.ci = int(c.ci / c.groups), p.co = int(c.co / c.groups);
    p.h = c.fold_h, p.w = c.fold_w, p.channels_last = c.weight_channels_last;
    return start_back<T>(c, p, stream);
  });
}

}  // namespace aeup
