// Layout changes in front of and behind the tensor-map kernels: tiles of 64 x 64 through shared memory.
// Elements are bits: uint16_t or uint32_t.
#include "cuda/common.cuh"
#include "cuda/fold.h"
#include "cuda/hopper_pack.h"

namespace aeup {
namespace {

constexpr int kTile = 64, kThreads = 256;

template <class E>
AEUP_DEV E load_bits(const E* p) {
  AEUP_CHECK(p, sizeof(E), false);
  return *p;
}
template <class E>
AEUP_DEV void store_bits(E* p, E bits) {
  AEUP_CHECK(p, sizeof(E), true);
  *p = bits;
}

// from [n, rows, columns] -> to [n, columns, pitch]; rows up to pitch are zeros. Element-wise where a pair would
// straddle, or lie across a word (load_pairs).
template <class E>
__global__ void __launch_bounds__(kThreads)
    transpose(const E* from, E* to, int64_t rows, int64_t columns, int64_t pitch, int64_t row_tiles, bool load_pairs) {
  let_next_start();
  constexpr bool kPairs = sizeof(E) == 2;
  __shared__ E tile[kTile][kTile + (kPairs ? 2 : 1)];
  const int64_t r0 = blockIdx.x % row_tiles * kTile, c0 = blockIdx.x / row_tiles * kTile;
  const int64_t n = blockIdx.y;
  from += n * rows * columns;
  to += n * columns * pitch;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  if (kPairs && load_pairs) {
#pragma unroll
    for (int i = 0; i < kTile; i += kThreads / 32) {
      const int64_t r = r0 + y + i, c = c0 + 2 * x;
      uint32_t v = 0;
      if (r < rows && c < columns) v = load_bits(reinterpret_cast<const uint32_t*>(from + r * columns + c));
      *reinterpret_cast<uint32_t*>(&tile[y + i][2 * x]) = v;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTile; i += kThreads / 32)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = r0 + y + i, c = c0 + x + 32 * h;
        tile[y + i][x + 32 * h] = r < rows && c < columns ? load_bits(from + r * columns + c) : 0;
      }
  }
  __syncthreads();
  if (kPairs && pitch % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kTile; i += kThreads / 32) {
      const int64_t c = c0 + y + i, r = r0 + 2 * x;
      const uint32_t v = tile[2 * x][y + i] | uint32_t(tile[2 * x + 1][y + i]) << 16;
      if (c < columns && r < pitch) store_bits(reinterpret_cast<uint32_t*>(to + c * pitch + r), v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTile; i += kThreads / 32)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t c = c0 + y + i, r = r0 + x + 32 * h;
        if (c < columns && r < pitch) store_bits(to + c * pitch + r, tile[x + 32 * h][y + i]);
      }
  }
}

template <class E>
const char* launch_transpose(const void* from, void* to, int64_t n, int64_t rows, int64_t columns, int64_t pitch,
                             void* stream) {
  const int64_t row_tiles = ceil_div(pitch, kTile);
  const int64_t tiles = row_tiles * ceil_div(columns, kTile);
  if (tiles > kMaxGrid) return "grid too large";
  const bool load_pairs = columns % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0;
  for (int64_t at = 0; at < n; at += 65535) {
    const int64_t count = n - at < 65535 ? n - at : 65535;
    AEUP_LAUNCH(transpose<E>, dim3(unsigned(tiles), unsigned(count)), kThreads, 0, stream,
                static_cast<const E*>(from) + at * rows * columns, static_cast<E*>(to) + at * columns * pitch, rows,
                columns, pitch, row_tiles, load_pairs);
  }
  return nullptr;
}

template <class E>
__global__ void __launch_bounds__(kThreads) pad(const E* from, E* to, int64_t rows, int c, int padded) {
  let_next_start();
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows * padded; i += step) {
    const int64_t row = i / padded;
    const int column = int(i % padded);
    store_bits(to + i, column < c ? load_bits(from + row * c + column) : E(0));
  }
}

// A block packs 64 output channels of one input channel, all taps.
__global__ void __launch_bounds__(kThreads)
    pack(const uint16_t* from, uint16_t* to, int ci, int co, int taps, int padded, bool channels_last) {
  let_next_start();
  AEUP_DYNAMIC_SHARED(uint16_t, line);  // [64 * taps]
  const int i = blockIdx.x, c0 = blockIdx.y * 64;
  const int count = co - c0 < 64 ? co - c0 : 64, wide = padded - c0 < 64 ? padded - c0 : 64;
  if (channels_last) {
    for (int e = threadIdx.x; e < wide * taps; e += kThreads) {
      const int tap = e / wide, c = e % wide;
      store_bits(to + (int64_t(tap) * ci + i) * padded + c0 + c,
                 c < count ? load_bits(from + (int64_t(i) * taps + tap) * co + c0 + c) : uint16_t(0));
    }
    return;
  }
  const uint16_t* source = from + (int64_t(i) * co + c0) * taps;
  for (int e = threadIdx.x; e < count * taps; e += kThreads) line[e] = load_bits(source + e);
  __syncthreads();
  for (int e = threadIdx.x; e < wide * taps; e += kThreads) {
    const int tap = e / wide, c = e % wide;
    store_bits(to + (int64_t(tap) * ci + i) * padded + c0 + c, c < count ? line[c * taps + tap] : uint16_t(0));
  }
}

// Column (rh * sw + rw) * co + c of tap (i, j) is the weight at kernel row (rh + ph) mod sh + i sh, and so on.
__global__ void __launch_bounds__(kThreads)
    gather_phases(const uint16_t* from, uint16_t* to, int ci, int co, int kh, int kw, int sh, int sw, int ph, int pw,
                  int pitch, bool channels_last) {
  let_next_start();
  const int total = kh / sh * (kw / sw) * ci * pitch;
  for (int e = blockIdx.x * kThreads + threadIdx.x; e < total; e += gridDim.x * kThreads) {
    const int v = e % pitch, i = e / pitch % ci, tap = e / pitch / ci;
    const int phase = v / co, c = v % co;
    const int y = (phase / sw + ph) % sh + tap / (kw / sw) * sh, x = (phase % sw + pw) % sw + tap % (kw / sw) * sw;
    const int64_t at =
        channels_last ? ((int64_t(i) * kh + y) * kw + x) * co + c : ((int64_t(i) * co + c) * kh + y) * kw + x;
    store_bits(to + e, phase < sh * sw ? load_bits(from + at) : uint16_t(0));
  }
}

}  // namespace

const char* to_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                             void* stream, int bytes) {
  return bytes == 2 ? launch_transpose<uint16_t>(from, to, n, c, pixels, padded, stream)
                    : launch_transpose<uint32_t>(from, to, n, c, pixels, padded, stream);
}

const char* from_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                               void* stream) {
  if (padded != c) return "the padded way back is not served";
  return launch_transpose<uint16_t>(from, to, n, pixels, c, pixels, stream);
}

const char* pad_channels(const void* from, void* to, int64_t rows, int64_t c, int64_t padded, void* stream, int bytes) {
  int64_t blocks = ceil_div(rows * padded, kThreads * 4);
  blocks = blocks < 8192 ? blocks : 8192;
  if (bytes == 2)
    AEUP_LAUNCH(pad<uint16_t>, blocks, kThreads, 0, stream, static_cast<const uint16_t*>(from),
                static_cast<uint16_t*>(to), rows, int(c), int(padded));
  else
    AEUP_LAUNCH(pad<uint32_t>, blocks, kThreads, 0, stream, static_cast<const uint32_t*>(from),
                static_cast<uint32_t*>(to), rows, int(c), int(padded));
  return nullptr;
}

const char* pack_weight(const Convolution& c, void* to, void* stream) {
  const int64_t taps = int64_t(c.kh) * c.kw, padded = round_up(c.co, 8);
  if (c.folded())
    return launch_fold(c, {FoldedPlace::plain, false, 0, c.ci * padded, 0, padded, 1, padded}, to, stream);
  const dim3 grid{unsigned(c.ci), unsigned(ceil_div(padded, 64))};
  AEUP_LAUNCH(pack, grid, kThreads, 64 * taps * 2, stream, static_cast<const uint16_t*>(c.weight),
              static_cast<uint16_t*>(to), int(c.ci), int(c.co), int(taps), int(padded), c.weight_channels_last);
  return nullptr;
}

const char* pack_phases(const Convolution& c, void* to, void* stream) {
  const int phases = c.sh * c.sw, pitch = int(round_up(phases * c.co, 8));
  if (c.folded()) {
    FoldedPlace place{FoldedPlace::plain, false, 0, c.ci * pitch, c.co, pitch, 1, pitch - (phases - 1) * c.co};
    place.sh = c.sh, place.sw = c.sw, place.ph = c.ph, place.pw = c.pw;
    return launch_fold(c, place, to, stream);
  }
  const int64_t blocks = ceil_div(int64_t(c.kh / c.sh) * (c.kw / c.sw) * c.ci * pitch, kThreads);
  AEUP_LAUNCH(gather_phases, blocks < 4096 ? blocks : 4096, kThreads, 0, stream, static_cast<const uint16_t*>(c.weight),
              static_cast<uint16_t*>(to), int(c.ci), int(c.co), c.kh, c.kw, c.sh, c.sw, c.ph, c.pw, pitch,
              c.weight_channels_last);
  return nullptr;
}

}  // namespace aeup
