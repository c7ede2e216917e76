// The convolution of a tile made on chip, as an implicit GEMM with mma.sync: rows are pixels, columns are result
// channels. Four warps of 64 pixels (4 rows of 16) x kColumns / kWarpsN channels each. Weights come by cp.async in a
// ring of one tap and kChunk bytes of channels a stage; two blocks on a multiprocessor overlap the making of the tile
// with products.
#pragma once
#include "resample_conv.cuh"

namespace aeup {

template <class T_, bool kSplit_, int kWarpsM_, int kFragments_>
struct GemmTile {
  using T = T_;
  static constexpr bool kSplit = kSplit_, kRound = std::is_same_v<T, float> && !kSplit;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = 4 / kWarpsM, kFragments = kFragments_;
  static constexpr int kPixels = 64 * kWarpsM, kHeight = kPixels / kTileWidth, kColumns = 8 * kFragments * kWarpsN;
  static constexpr int kStages = 4, kStage = kColumns * kPitch;
};

// Weights: adjacent reduction channels are adjacent in memory, and 16-byte pieces of them aligned.
template <class T>
struct GemmWeight {
  const T* data;
  int64_t row, tap, group;  // elements from one to the next; a row is a result channel
  int rows, reduction;      // of a group; reduction in whole pieces, zero past the channels
};
template <class T>
struct ConvGemm {
  Map<T> map;
  GemmWeight<T> weight;
  int taps, kw, groups;
  int column_tiles;  // of a group
};

// A thread loads the piece threadIdx.x % 4 of every 32nd row; `mine` is its first, at channel 0 of tap 0.
template <class Q>
AEUP_DEV void load_stage(const GemmWeight<typename Q::T>& w, const typename Q::T* mine, int row0, int channel0, int tap,
                         unsigned char* stage) {
  constexpr int kPieces = kChunk / 16, kRows = kBlock / kPieces, kPer = 16 / int(sizeof(typename Q::T));
  const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  const bool some = channel0 + piece * kPer < w.reduction;
  const typename Q::T* from = mine + tap * w.tap + channel0;
  stage += first * kPitch + piece * 16;
#pragma unroll
  for (int i = 0; i < Q::kColumns / kRows; ++i) {
    if (some && row0 + first + i * kRows < w.rows)
      copy_async<16>(stage + i * kRows * kPitch, from);
    else
      shared_clear<16>(stage + i * kRows * kPitch);
    from += kRows * w.row;
  }
}

// acc += tile shifted by tap (j, i) . stage.
template <class Q>
AEUP_DEV void multiply_tap(const unsigned char* tile, int tw, int j, int i, const unsigned char* stage,
                           float (&acc)[4][Q::kFragments][4]) {
  using T = typename Q::T;
  constexpr int kF = Q::kFragments;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / Q::kWarpsN, warp_n = warp % Q::kWarpsN;
  const unsigned char* const a_row = tile + ((warp_m * 4 + j) * tw + i + lane % 16) * kPitch + lane / 16 * 16;
  const unsigned char* const b_row = stage + (warp_n * kF * 8 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll(Q::kSplit ? 1 : 2)
  for (int step = 0; step < kChunk / 32; ++step) {
    uint32_t b[kF][2], b_rest[Q::kSplit ? kF : 1][2];
#pragma unroll
    for (int f = 0; f < kF; f += 2) {
      uint32_t w[4];
      load_matrices<false>(b_row + f * 8 * kPitch + step * 32, w);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        make_operand<T, Q::kSplit>(w[k], &b[f + k / 2][k % 2], &b_rest[Q::kSplit ? f + k / 2 : 0][k % 2]);
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      uint32_t a[4];
      load_matrices<false>(a_row + row * tw * kPitch + step * 32, a);
      if constexpr (Q::kSplit) {
        uint32_t high[4], rest[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) make_operand<T, true>(a[k], high + k, rest + k);
#pragma unroll
        for (int f = 0; f < kF; ++f)
          split_product<T>(acc[row][f], high, rest, b[f][0], b[f][1], b_rest[f][0], b_rest[f][1]);
      } else {
#pragma unroll
        for (int f = 0; f < kF; ++f) matrix_product<T>(acc[row][f], a, b[f][0], b[f][1]);
      }
    }
  }
}

// acc = the convolution for the tile whose first row and column, halo included, are u0 and v0 in the resampled image.
// Shared memory: tile, stages, window. Ends with a barrier.
template <class Q, bool kPlain>
AEUP_DEV void convolve(const ConvGemm<typename Q::T>& p, int64_t image, int group, int row0, int u0, int v0,
                       unsigned char* shared, TileTaps* table, float (&acc)[4][Q::kFragments][4]) {
  using T = typename Q::T;
  const Map<T>& m = p.map;
  unsigned char* const tile = shared;
  unsigned char* const stages = tile + m.tile_bytes();
  unsigned char* const window = stages + Q::kStages * Q::kStage;
  const T* const source = m.source + image * m.from.n + int64_t(group) * m.channels * m.from.c;
  constexpr int kChannels = kChunk / int(sizeof(T));
  const T* const weight = p.weight.data + group * p.weight.group +
                          int64_t(row0 + threadIdx.x / (kChunk / 16)) * p.weight.row +
                          threadIdx.x % (kChunk / 16) * (16 / int(sizeof(T)));
  const Origin at = window_origin(m, u0, v0);
#pragma unroll
  for (int row = 0; row < 4; ++row)
#pragma unroll
    for (int f = 0; f < Q::kFragments; ++f)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[row][f][k] = 0.f;

  const int chunks = (m.channels + kChannels - 1) / kChannels;
  int ahead_tap = 0, ahead_chunk = 0, ahead = 0;  // the next stage to load
  const auto fetch = [&] {
    if (ahead_chunk < chunks)
      load_stage<Q>(p.weight, weight, row0, ahead_chunk * kChannels, ahead_tap, stages + ahead * Q::kStage);
    if (++ahead_tap == p.taps) ahead_tap = 0, ++ahead_chunk;
    if (++ahead == Q::kStages) ahead = 0;
    copy_commit();
  };
  fill_taps(m, u0, v0, table);
  load_window(m, source, at, 0, window);
#pragma unroll 1
  for (int s = 0; s + 1 < Q::kStages; ++s) fetch();
  int now = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<0>();
    __syncthreads();
    make_tile<T, Q::kRound, kPlain>(m, *table, window, at, tile);
    __syncthreads();
    if (chunk + 1 < chunks) load_window(m, source, at, (chunk + 1) * kChannels, window);
    int j = 0, i = 0;
#pragma unroll 1
    for (int tap = 0; tap < p.taps; ++tap) {
      if (tap > 0) {
        copy_wait<Q::kStages - 2>();
        __syncthreads();
      }
      fetch();  // into the stage that all warps have left
      multiply_tap<Q>(tile, m.tw, j, i, stages + now * Q::kStage, acc);
      if (++now == Q::kStages) now = 0;
      if (++i == p.kw) i = 0, ++j;
    }
  }
  copy_wait<0>();
  __syncthreads();
}

// Floats from one line of the staged sums to the next: [pixel][channel], or [channel][pixel].
template <class Q>
AEUP_HD constexpr int stage_pitch(bool last) {
  return last ? Q::kColumns + 8 : Q::kPixels + 4;
}
template <class Q>
constexpr int stage_bytes(bool last) {
  return stage_pitch<Q>(last) * (last ? Q::kPixels : Q::kColumns) * 4;
}
// The fragments of acc to sums, [pixel][channel] or [channel][pixel].
template <class Q>
AEUP_DEV void stage_sums(const float (&acc)[4][Q::kFragments][4], bool last, float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pixel0 = warp / Q::kWarpsN * 64 + lane / 4, column0 = warp % Q::kWarpsN * Q::kFragments * 8 + lane % 4 * 2;
  const int pitch = stage_pitch<Q>(last);
#pragma unroll
  for (int row = 0; row < 4; ++row)
#pragma unroll
    for (int f = 0; f < Q::kFragments; ++f)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = pixel0 + row * 16 + half * 8, column = column0 + f * 8;
        const float* const two = acc[row][f] + 2 * half;
        if (last) {
          *reinterpret_cast<float2*>(sums + pixel * pitch + column) = make_float2(two[0], two[1]);
        } else {
          sums[column * pitch + pixel] = two[0];
          sums[(column + 1) * pitch + pixel] = two[1];
        }
      }
}

// --- host ---
template <class Q>
int64_t operand_bytes(const Map<typename Q::T>& m) {
  return m.tile_bytes() + Q::kStages * Q::kStage + m.window_bytes();
}
// The weight as the GEMM wants it: as it is, or packed into the workspace as [group][tap][rows][reduction], the latter
// padded to pieces of 16 bytes. The input gradient's rows are input channels, and its taps are in reverse.
inline bool packs_weight(const ResampleConv& c, Pass pass) {
  const int64_t bytes = c.ci / c.groups * element_size(c.dtype);
  return pass != Pass::forward || !c.weight_channels_last || alignment_of(c.weight, bytes) != 16;
}
inline int64_t packed_reduction(const ResampleConv& c, Pass pass) {
  const int64_t per = 16 / element_size(c.dtype), channels = (pass == Pass::forward ? c.ci : c.co) / c.groups;
  return ceil_div(channels, per) * per;
}
inline int64_t packed_bytes(const ResampleConv& c, Pass pass) {
  const int64_t rows = pass == Pass::forward ? c.co : c.ci;
  return rows * c.kh * c.kw * packed_reduction(c, pass) * element_size(c.dtype);
}
const char* launch_pack_weight(const ResampleConv& c, Pass pass, void* workspace, void* stream);

template <class T>
GemmWeight<T> gemm_weight(const ResampleConv& c, Pass pass, void* workspace) {
  const bool forward = pass == Pass::forward;
  const int64_t taps = int64_t(c.kh) * c.kw, ci = c.ci / c.groups, co = c.co / c.groups;
  GemmWeight<T> w{};
  w.rows = int(forward ? co : ci), w.reduction = int(packed_reduction(c, pass));
  if (packs_weight(c, pass)) {
    w.data = static_cast<const T*>(workspace);
    w.row = w.reduction, w.tap = w.rows * w.row, w.group = taps * w.tap;
  } else {
    w.data = static_cast<const T*>(c.weight);
    w.row = taps * ci, w.tap = ci, w.group = co * w.row;
  }
  return w;
}
// Calls f(GemmTile) with the tile for so many result channels of a group; kWide: it may have 128 of them. Split
// operands take twice the registers.
template <class T, bool kSplit, bool kWide, class F>
auto with_gemm_tile(int64_t columns, F f) {
  if constexpr (!kSplit) {
    if constexpr (kWide)
      if (columns > 64) return f(GemmTile<T, kSplit, 2, 8>());
    if (columns > 32) return f(GemmTile<T, kSplit, 4, 8>());
  }
  return f(GemmTile<T, kSplit, 4, 4>());
}

}  // namespace aeup
