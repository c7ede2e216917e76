// The weight gradient: a GEMM whose rows are output channels, whose columns are (tap, input channel) and whose
// reduction runs over the output's pixels, split into ranges; the partial sums are added in a fixed order.
//
// A block makes 64 output channels x kChunk bytes of input channels of up to 9 taps: each pixel tile of the resampled
// input is made once for all of them. Four warps, 2 x 2.
#pragma once
#include "conv_partials.cuh"
#include "resample_conv_gemm.cuh"

namespace aeup {

constexpr int kGradChannels = 64, kGradTaps = 9;
template <class T>
constexpr int kGradHeight = sizeof(T) == 4 ? 4 : 8;  // rows of a pixel tile
template <class T>
constexpr int kGradPixels = kGradHeight<T> * kTileWidth;

template <class T>
struct ResampleWeight {
  Map<T> map;
  const T* grad;
  Strides to;                                      // of grad
  float* partial;                                  // [splits][co][taps][ci / groups]
  int oh, ow, ph, pw, kw, taps, groups, channels;  // channels: co of a group
  int tiles_h, tiles_w, row_tiles, column_tiles, tap_tiles;
  int64_t tiles, range;  // tiles of pixels; those of a split
  int64_t count;         // elements of a partial result
  int piece;             // bytes of a copy of grad
};
// Bytes of grad's tile from line to line: [pixel][channel] or (NCHW) [channel][pixel].
template <class T>
AEUP_HD constexpr int grad_pitch(bool last) {
  return (last ? kGradChannels : kGradPixels<T>)*int(sizeof(T)) + (last && sizeof(T) == 4 ? 32 : 16);
}
template <class T>
AEUP_HD constexpr int grad_bytes(bool last) {
  return grad_pitch<T>(last) * (last ? kGradPixels<T> : kGradChannels);
}

template <class T, int B>
AEUP_DEV void load_grad_by(const ResampleWeight<T>& p, const T* image, int channel0, int y0, int x0,
                           unsigned char* tile) {
  constexpr int kPer = B / int(sizeof(T));
  const bool last = p.map.last;
  const int pitch = grad_pitch<T>(last);
  for (int i = threadIdx.x; i < kGradPixels<T> * kGradChannels / kPer; i += kBlock) {
    const int line = last ? i / (kGradChannels / kPer) : i / (kGradPixels<T> / kPer);
    const int first = (last ? i % (kGradChannels / kPer) : i % (kGradPixels<T> / kPer)) * kPer;
    const int channel = channel0 + (last ? first : line), pixel = last ? line : first;
    const int y = y0 + pixel / kTileWidth, x = x0 + pixel % kTileWidth;
    unsigned char* const to = tile + line * pitch + first * int(sizeof(T));
    if (channel < p.channels && y < p.oh && x < p.ow)
      copy_piece<B>(to, image + channel * p.to.c + y * p.to.h + x * p.to.w);
    else
      shared_clear<B>(to);
  }
}
template <class T>
AEUP_DEV void load_grad(const ResampleWeight<T>& p, const T* image, int channel0, int y0, int x0, unsigned char* tile) {
  if (p.piece == 16) return load_grad_by<T, 16>(p, image, channel0, y0, x0, tile);
  if (sizeof(T) == 4 || p.piece == 4) return load_grad_by<T, 4>(p, image, channel0, y0, x0, tile);
  if constexpr (sizeof(T) == 2) load_grad_by<T, 2>(p, image, channel0, y0, x0, tile);
}

// The fragment of grad for a product: 16 channels from `channel`, as many pixels as it takes from `pixel`.
template <class T, bool kLast>
AEUP_DEV void grad_fragment(const unsigned char* tile, int channel, int pixel, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % 32, pitch = grad_pitch<T>(kLast);
  if constexpr (!kLast) {
    load_matrices<false>(tile + (channel + lane % 16) * pitch + pixel * int(sizeof(T)) + lane / 16 * 16, a);
  } else if constexpr (sizeof(T) == 2) {
    load_matrices<true>(tile + (pixel + lane / 16 * 8 + lane % 8) * pitch + (channel + lane / 8 % 2 * 8) * 2, a);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      shared_load<4>(tile + (pixel + lane % 4 + k / 2 * 4) * pitch + (channel + lane / 4 + k % 2 * 8) * 4, a + k);
  }
}

template <class T, bool kSplit, bool kLast>
__global__ void __launch_bounds__(kBlock, 2) resample_conv_weight(ResampleWeight<T> p) {
  constexpr int kSize = int(sizeof(T)), kChannels = kChunk / kSize, kF = kChannels / 16;  // fragments of 8 channels
  constexpr int kStep = 32 / kSize;                                                       // pixels of a product
  constexpr bool kRound = kSize == 4 && !kSplit;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ TileTaps table;
  static_assert(sizeof(table) <= kMostStatic);
  const Map<T>& m = p.map;
  unsigned char* const tile = shared;
  unsigned char* const grads = tile + m.tile_bytes();  // twice
  unsigned char* const window = grads + 2 * grad_bytes<T>(kLast);

  Split at = split(blockIdx.x, p.row_tiles);
  const int row0 = int(at.remainder) * kGradChannels;
  at = split(at.quotient, p.column_tiles);
  const int column0 = int(at.remainder) * kChannels;
  at = split(at.quotient, p.tap_tiles);
  const int tap0 = int(at.remainder) * kGradTaps, taps_here = min(kGradTaps, p.taps - tap0);
  at = split(at.quotient, p.groups);
  const int group = int(at.remainder);
  const int64_t begin = at.quotient * p.range, end = min(begin + p.range, p.tiles);

  const T* const source = m.source + int64_t(group) * m.channels * m.from.c;
  const T* const grad = p.grad + int64_t(group) * p.channels * p.to.c;
  float acc[kGradTaps][2][kF][4];
#pragma unroll
  for (int t = 0; t < kGradTaps; ++t)
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int f = 0; f < kF; ++f)
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[t][row][f][k] = 0.f;

  Origin origin{0, 0};
  const auto fetch = [&](int64_t tile_index, int buffer) {
    const Split x = split(tile_index, p.tiles_w), y = split(x.quotient, p.tiles_h);
    const int x0 = int(x.remainder) * kTileWidth, y0 = int(y.remainder) * kGradHeight<T>;
    origin = window_origin(m, y0 - p.ph, x0 - p.pw);
    load_window(m, source + y.quotient * m.from.n, origin, column0, window);
    load_grad(p, grad + y.quotient * p.to.n, row0, y0, x0, grads + buffer * grad_bytes<T>(kLast));
    fill_taps(m, y0 - p.ph, x0 - p.pw, &table);
    copy_commit();
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int channel0 = warp / 2 * 32, input0 = warp % 2 * (kChannels / 2);  // of the warp, in the tiles
  int buffer = 0;
  if (begin < end) fetch(begin, 0);
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    copy_wait<0>();
    __syncthreads();
    make_tile<T, kRound, false>(m, table, window, origin, tile);
    __syncthreads();
    if (t + 1 < end) fetch(t + 1, buffer ^ 1);
    const unsigned char* const g = grads + buffer * grad_bytes<T>(kLast);
#pragma unroll 1
    for (int pixel = 0; pixel < kGradPixels<T>; pixel += kStep) {
      uint32_t a[2][4], a_rest[kSplit ? 2 : 1][4];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        uint32_t w[4];
        grad_fragment<T, kLast>(g, channel0 + row * 16, pixel, w);
#pragma unroll
        for (int k = 0; k < 4; ++k) make_operand<T, kSplit>(w[k], &a[row][k], &a_rest[kSplit ? row : 0][k]);
      }
      const unsigned char* const from =
          tile + (pixel / kTileWidth * m.tw + pixel % kTileWidth) * kPitch + input0 * kSize;
      int j = tap0 / p.kw, i = tap0 % p.kw;
#pragma unroll
      for (int tap = 0; tap < kGradTaps; ++tap) {
        if (tap >= taps_here) continue;
        const unsigned char* const at_tap = from + (j * m.tw + i) * kPitch;
        if (++i == p.kw) i = 0, ++j;
        uint32_t b[kF][2], b_rest[kF][2];
        if constexpr (kSize == 2) {
          uint32_t w[4];
          load_matrices<true>(at_tap + (lane / 8 % 2 * 8 + lane % 8) * kPitch + lane / 16 * 16, w);
#pragma unroll
          for (int k = 0; k < 4; ++k) b[k / 2][k % 2] = w[k];
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            uint32_t w[1];
            shared_load<4>(at_tap + (lane % 4 + k * 4) * kPitch + lane / 4 * 4, w);
            make_operand<T, kSplit>(w[0], &b[0][k], &b_rest[0][k]);
          }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
          for (int f = 0; f < kF; ++f) {
            if constexpr (kSplit)
              split_product<T>(acc[tap][row][f], a[row], a_rest[row], b[f][0], b[f][1], b_rest[f][0], b_rest[f][1]);
            else
              matrix_product<T>(acc[tap][row][f], a[row], b[f][0], b[f][1]);
          }
      }
    }
    buffer ^= 1;
  }

  float* const partial = p.partial + at.quotient * p.count;
#pragma unroll
  for (int tap = 0; tap < kGradTaps; ++tap)
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int f = 0; f < kF; ++f)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int co = row0 + channel0 + row * 16 + lane / 4 + k / 2 * 8;
          const int ci = column0 + input0 + f * 8 + lane % 4 * 2 + k % 2;
          if (tap >= taps_here || co >= p.channels || ci >= m.channels) continue;
          store_one(partial + ((int64_t(group) * p.channels + co) * p.taps + tap0 + tap) * m.channels + ci,
                    acc[tap][row][f][k]);
        }
}

struct WeightRanges {
  int64_t row_tiles, column_tiles, tap_tiles, tiles, splits;
};
inline int64_t weight_partial_bytes(const ResampleConv& c) { return c.co * (c.ci / c.groups) * c.kh * c.kw * 4; }
inline WeightRanges weight_ranges(const ResampleConv& c) {
  WeightRanges r{};
  r.row_tiles = ceil_div(c.co / c.groups, kGradChannels);
  r.column_tiles = ceil_div(c.ci / c.groups, kChunk / element_size(c.dtype));
  r.tap_tiles = ceil_div(int64_t(c.kh) * c.kw, kGradTaps);
  r.tiles =
      c.n * ceil_div(c.oh, c.dtype == DType::f32 ? kGradHeight<float> : kGradHeight<Half>) * ceil_div(c.ow, kTileWidth);
  // Two blocks on a multiprocessor, twice; 4 tiles or more each, and no more than 256 MiB of partial sums.
  const int64_t blocks = r.row_tiles * r.column_tiles * r.tap_tiles * c.groups;
  r.splits = min(ceil_div(4 * int64_t(multiprocessors()), blocks), r.tiles / 4);
  r.splits = max(int64_t(1), min(r.splits, (int64_t(256) << 20) / weight_partial_bytes(c)));
  return r;
}

template <class T>
int64_t weight_shared(const ResampleConv& c) {
  const Map<T> m = map_of<T>(c, false, kGradHeight<T>);
  return m.tile_bytes() + 2 * grad_bytes<T>(c.channels_last) + m.window_bytes();
}
template <class T, bool kSplit>
const char* start_resample_weight(const ResampleConv& c, void* workspace, void* stream) {
  if (!workspace) return "the weight gradient needs a workspace";
  const WeightRanges r = weight_ranges(c);
  ResampleWeight<T> p{};
  p.map = map_of<T>(c, false, kGradHeight<T>);
  p.grad = static_cast<const T*>(c.grad), p.to = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.partial = static_cast<float*>(workspace);
  p.oh = int(c.oh), p.ow = int(c.ow), p.ph = c.ph, p.pw = c.pw, p.kw = c.kw, p.taps = c.kh * c.kw;
  p.groups = c.groups, p.channels = int(c.co / c.groups);
  p.tiles_h = int(ceil_div(c.oh, kGradHeight<T>)), p.tiles_w = int(ceil_div(c.ow, kTileWidth));
  p.row_tiles = int(r.row_tiles), p.column_tiles = int(r.column_tiles), p.tap_tiles = int(r.tap_tiles);
  p.tiles = r.tiles, p.range = ceil_div(r.tiles, r.splits);
  p.count = weight_partial_bytes(c) / 4;
  const int64_t bytes = int64_t(sizeof(T));
  p.piece =
      c.channels_last ? alignment_of(c.grad, c.co * bytes | p.channels * bytes) : alignment_of(c.grad, c.ow * bytes);
  p.piece = p.piece == 16 ? 16 : p.piece >= 4 ? 4 : int(bytes);
  const int64_t blocks = r.row_tiles * r.column_tiles * r.tap_tiles * c.groups * r.splits;
  const size_t shared = size_t(weight_shared<T>(c));
  if (c.channels_last)
    AEUP_LAUNCH((resample_conv_weight<T, kSplit, true>), blocks, kBlock, shared, stream, p);
  else
    AEUP_LAUNCH((resample_conv_weight<T, kSplit, false>), blocks, kBlock, shared, stream, p);
  return launch_add_partials<T>(p.partial, static_cast<T*>(c.result), r.splits, p.count, int64_t(p.taps),
                                c.ci / c.groups, c.weight_channels_last, stream);
}

}  // namespace aeup
