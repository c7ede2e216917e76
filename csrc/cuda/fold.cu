#include "fold.h"
#include "fold_tile.cuh"

namespace aeup {
namespace {

constexpr int kThreads = 128, kLogRows = 4;  // of a tile of 8 x 16 vectors; fewer rows where they do not fit

template <class T>
struct FoldParams {
  const T* from;  // [groups * co, ci, kernel]
  T* to;
  int ci, co;  // of a group
  Fold h, w;
  bool channels_last, load_vectors, store_vectors;
  FoldedPlace place;
  PlacedTaps taps;
  // Of the common case: taps.h.offset(y), taps.w.offset(x), and a bit for each tap that is of the last phase.
  int64_t down[4], right[4];
  uint32_t last;
  // A tile: 2^log_rows of the channels that are not contiguous in the result, by kLanes that are; `parts` threads share
  // the taps of a vector.
  int log_rows, parts;
  Divider size, row_tiles, lane_tiles;
};

// Where the sums' terms are read: in shared memory, or in the weight, by vectors along its contiguous channels or one
// by one.
enum class Source { staged, vectors, elements };

// A block folds a tile of channels, all taps.
template <class T, int kForm, bool kCommon, Source kSource>
__global__ void __launch_bounds__(kThreads) fold(FoldParams<T> p) {
  using S = Acc<T>;
  constexpr int kV = kVector<S>, kPitch = pitch_of(kLanes<S>), kLogLanes = kV == 4 ? 5 : 4;
  static_assert(1 << kLogLanes == kLanes<S>, "the lanes of a tile");
  let_next_start();
  AEUP_DYNAMIC_SHARED(S, tile);
  const Fold fh = fold_or<kCommon>(p.h), fw = fold_or<kCommon>(p.w);
  const int size = fh.kernel * fw.kernel, log_rows = kCommon ? kLogRows : p.log_rows, row = row_of(size, kPitch);
  const bool along_ci = p.place.along_ci;
  int block = int(blockIdx.x);
  const int row0 = take(&block, p.row_tiles) << log_rows, lane0 = take(&block, p.lane_tiles) << kLogLanes;
  const int i0 = along_ci ? lane0 : row0, c0 = along_ci ? row0 : lane0, group = block;
  const int lanes = along_ci ? p.ci : p.co, rows = along_ci ? p.co : p.ci;
  // Kernel index j of channels (i0 + i, c0 + c) is at from + c * of_c + i * of_i + j * of_j.
  using Offset = std::conditional_t<kCommon, int, int64_t>;
  const Offset of_c = Offset(size) * p.ci, of_i = p.channels_last ? 1 : size, of_j = p.channels_last ? p.ci : 1;
  const T* const from = p.from + (int64_t(group) * p.co + c0) * of_c + int64_t(i0) * of_i;

  const auto stage = [&](auto width) {
    constexpr int V = decltype(width)::value, kAll = ((9 * kLanes<S> << kLogRows) / V - 1) / kThreads + 1;
    constexpr int kBatch = !kCommon ? 4 : kAll < 9 ? kAll : 9;  // loads in flight
    const int log_i = along_ci ? kLogLanes : log_rows, log_c = along_ci ? log_rows : kLogLanes;
    const int ni = p.ci - i0, nc = p.co - c0, tile_i = along_ci ? 1 : row, tile_c = along_ci ? row : 1;
    const int vectors = (size << (kLogLanes + log_rows)) / V, threads = kCommon ? kThreads : int(blockDim.x);
    for (int first = threadIdx.x; first < vectors; first += kBatch * threads) {
      Raw<T, V> raw[kBatch];
      int to[kBatch], from_j[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const Element e = element_of<kCommon>((first + b * threads) * V, p.channels_last, log_i, log_c, p.size);
        to[b] = e.c * tile_c + e.i * tile_i + e.j * kPitch, from_j[b] = e.j;
        if (e.i < ni && e.c < nc && first + b * threads < vectors)
          raw[b].load(from + (e.c * of_c + e.i * of_i + e.j * of_j));
        else
          raw[b].clear();
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * threads >= vectors) break;
        S v[V];
        raw[b].unpack(v);
        int at[V];
        offsets_of<kCommon, V>(to[b], from_j[b], size, p.channels_last, tile_i, kPitch, at);
#pragma unroll
        for (int k = 0; k < V; ++k) tile[at[k]] = v[k];
      }
    }
  };
  if constexpr (kSource == Source::staged) {
    if (p.load_vectors)
      stage(std::integral_constant<int, 16 / int(sizeof(T))>());
    else
      stage(std::integral_constant<int, 1>());
    __syncthreads();
  }

  const int vector = threadIdx.x % 8, mine = threadIdx.x / 8 & ((1 << log_rows) - 1), lane = lane0 + vector * kV;
  const int part = kCommon ? 0 : threadIdx.x / 8 >> log_rows, parts = kCommon ? 1 : p.parts;
  if (row0 + mine >= rows) return;
  const T* const source = from + (mine * (along_ci ? of_c : of_i) + vector * kV * (along_ci ? of_i : of_c));
  const auto value = [&](int j, S* v) {
    if constexpr (kSource == Source::staged) {
      const S* const at = tile + mine * row + j * kPitch;
#pragma unroll
      for (int k = 0; k < kV; k += 2) {
        if constexpr (kForm == FoldedPlace::tf32_pair) {  // the channels that float_position puts side by side
          v[k] = at[vector + 8 * k], v[k + 1] = at[vector + 8 * k + 8];
        } else {
          const auto pair = *reinterpret_cast<const Pair<S>*>(at + vector * kV + k);
          v[k] = pair.v[0], v[k + 1] = pair.v[1];
        }
      }
    } else if constexpr (kSource == Source::vectors) {
      Raw<T, kV> raw;
      raw.clear();
      if (lane < lanes) raw.load(source + j * of_j);
      raw.unpack(v);
    } else {
#pragma unroll
      for (int k = 0; k < kV; ++k)
        v[k] = lane + k < lanes ? load_one(source + k * (along_ci ? of_i : of_c) + j * of_j) : S(0);
    }
  };
  S terms[kCommon ? 9 : 1][kV];
  if constexpr (kCommon)
#pragma unroll
    for (int j = 0; j < 9; ++j) value(j, terms[j]);

  T* const to =
      p.to + group * p.place.of_group + lane + int64_t(row0 + mine) * (along_ci ? p.place.of_co : p.place.of_ci);
#pragma unroll(kCommon ? 4 : 1)
  for (int y = part; y < fh.taps(); y += parts) {
    const TapRange v = fh.of_folded(y);
#pragma unroll(kCommon ? 4 : 1)
    for (int x = 0; x < fw.taps(); ++x) {
      const bool last = kCommon ? p.last >> (4 * y + x) & 1 : p.taps.is_last(y, x);
      const int room = (along_ci || last ? int(p.place.padded) : lanes) - lane;
      if (room <= 0) continue;
      const TapRange h = fw.of_folded(x);
      S sum[kV] = {};
      if constexpr (kCommon) {
        bool some = false;
#pragma unroll
        for (int j = 0; j < 9; ++j) {
          if (j / 3 < v.first || j / 3 > v.last || j % 3 < h.first || j % 3 > h.last) continue;
#pragma unroll
          for (int k = 0; k < kV; ++k) sum[k] = some ? sum[k] + terms[j][k] : terms[j][k];
          some = true;
        }
      } else {
        for (int jy = v.first; jy <= v.last; ++jy)
          for (int j = jy * fw.kernel + h.first; j <= jy * fw.kernel + h.last; ++j) {
            value(j, terms[0]);
#pragma unroll
            for (int k = 0; k < kV; ++k) sum[k] += terms[0][k];
          }
      }
      const auto store = [&](T* at) {
        if (p.store_vectors) {
          Raw<T, kV> raw;
          raw.pack(sum);
          raw.store(at);
        } else {
#pragma unroll
          for (int k = 0; k < kV; ++k)
            if (k < room) store_one(at + k, sum[k]);
        }
      };
      T* const at = to + (kCommon ? p.down[y] : p.taps.h.offset(y)) + (kCommon ? p.right[x] : p.taps.w.offset(x));
      if constexpr (kForm == FoldedPlace::plain) {
        store(at);
      } else {
        S low[kV];
#pragma unroll
        for (int k = 0; k < kV; ++k) {
          const S high = __uint_as_float(round_tf32(sum[k]));
          low[k] = __uint_as_float(round_tf32(sum[k] - high)), sum[k] = high;
        }
        store(at);
        if constexpr (kForm == FoldedPlace::tf32_pair) {
#pragma unroll
          for (int k = 0; k < kV; ++k) sum[k] = low[k];
          store(at + p.place.plane);
        }
      }
    }
  }
}

template <class T, int kForm>
const char* start_fold(FoldParams<T>& p, int groups, void* stream) {
  using S = Acc<T>;
  constexpr int kV = kVector<S>, kE = int(sizeof(T));
  const FoldedPlace& place = p.place;
  const bool along_ci = place.along_ci;
  const bool common = is_common(p.h) && is_common(p.w) && p.ci < kMostCommon;
  const int rows = along_ci ? p.co : p.ci, lanes = along_ci ? p.ci : p.co, size = p.h.kernel * p.w.kernel;
  const int64_t row = row_of(size, pitch_of(kLanes<S>)) * int64_t(sizeof(S));
  bool staged = row <= kMostShared;
  p.log_rows = kLogRows;
  while (!common && p.log_rows && ((staged && row << p.log_rows > kMostShared) || 1 << p.log_rows >= 2 * rows))
    --p.log_rows;
  p.parts = min(1 << (kLogRows - p.log_rows), p.h.taps());
  p.size = Divider(size);
  p.row_tiles = Divider(ceil_div(rows, 1 << p.log_rows));
  p.lane_tiles = Divider(ceil_div(max(int64_t(lanes), place.padded), kLanes<S>));
  p.taps = PlacedTaps(place, p.w.taps());
  for (int t = 0; common && t < 16; ++t) {
    p.down[t / 4] = p.taps.h.offset(t / 4), p.right[t % 4] = p.taps.w.offset(t % 4);
    p.last |= uint32_t(p.taps.is_last(t / 4, t % 4)) << t;
  }
  const int alignment = alignment_of(p.from, p.ci * kE);
  p.load_vectors = alignment == 16 && (along_ci || (kE << p.log_rows) % 16 == 0);
  const int64_t strides = place.of_group | place.of_step | place.of_phase | (along_ci ? place.of_co : place.of_ci);
  p.store_vectors = alignment_of(p.to, (strides | place.plane) * kE) >= kV * kE && place.padded % kV == 0 &&
                    (along_ci || place.sh * place.sw == 1 || lanes % kV == 0);
  const int64_t blocks = int64_t(p.row_tiles.divisor) * p.lane_tiles.divisor * groups;
  const int threads = common ? kThreads : (8 << p.log_rows) * p.parts;
  const auto shared = size_t(row << p.log_rows);
  if constexpr (kForm == FoldedPlace::tf32)
    if (common && along_ci && p.channels_last && alignment == 16) {
      AEUP_LAUNCH((fold<T, kForm, true, Source::vectors>), blocks, threads, 0, stream, p);
      return nullptr;
    }
  if (common)
    AEUP_LAUNCH((fold<T, kForm, true, Source::staged>), blocks, threads, shared, stream, p);
  else if (staged)
    AEUP_LAUNCH((fold<T, kForm, false, Source::staged>), blocks, threads, shared, stream, p);
  else if constexpr (kForm == FoldedPlace::plain)
    AEUP_LAUNCH((fold<T, kForm, false, Source::elements>), blocks, threads, 0, stream, p);
  else
    return "the kernel has too many elements";
  return nullptr;
}

}  // namespace

const char* launch_fold(const Convolution& c, const FoldedPlace& place, void* to, void* stream) {
  return with_type(c.dtype, [&](auto t) -> const char* {
    using T = decltype(t);
    FoldParams<T> p{};
    p.from = static_cast<const T*>(c.weight), p.to = static_cast<T*>(to);
    p.ci = int(c.ci / c.groups), p.co = int(c.co / c.groups);
    p.h = c.fold_h, p.w = c.fold_w, p.channels_last = c.weight_channels_last, p.place = place;
    if constexpr (std::is_same_v<T, float>) {
      if (place.form == FoldedPlace::tf32) return start_fold<float, FoldedPlace::tf32>(p, c.groups, stream);
      if (place.form == FoldedPlace::tf32_pair) return start_fold<float, FoldedPlace::tf32_pair>(p, c.groups, stream);
    }
    return start_fold<T, FoldedPlace::plain>(p, c.groups, stream);
  });
}

int64_t fold_workspace(Convolution* c, Pass pass) {
  if (!c->folded() || pass == Pass::weight_gradient) return 0;
  c->fold_h = c->fold_w = Fold{};
  c->weight_channels_last = true;
  const int64_t bytes = c->ci * (c->co / c->groups) * c->kh * c->kw * element_size(c->dtype);
  return ceil_div(bytes, 256) * 256;
}

const char* fold_weight(Convolution* c, Pass pass, void** workspace, void* stream) {
  const Convolution given = *c;
  const int64_t bytes = fold_workspace(c, pass);
  if (!bytes) return nullptr;
  if (!*workspace) return "the folded weight needs a workspace";
  const int64_t taps = int64_t(c->kh) * c->kw, ci = c->ci / c->groups, co = c->co / c->groups;
  const FoldedPlace place{FoldedPlace::plain, false, ci * taps * co, co, 0, taps * co, 1, co};
  c->weight = *workspace;
  *workspace = static_cast<char*>(*workspace) + bytes;
  return launch_fold(given, place, const_cast<void*>(c->weight), stream);
}

}  // namespace aeup
