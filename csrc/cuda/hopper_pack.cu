// Layout changes in front of and behind the tensor-map kernels: tiles of 64 x 64 through shared memory.
// Elements are bits: uint16_t or uint32_t.
#include "cuda/common.cuh"
#include "cuda/fold.h"
#include "cuda/folded_place.cuh"
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

struct PackParams {
  const uint16_t* from;  // [ci, co, taps], or [ci, taps, co] if channels_last
  uint16_t* to;
  int ci, co, taps, padded, rows;                   // a tile: `rows` input channels x 64 output channels, all taps
  int64_t of_ci;                                    // in the result
  bool channels_last, load_vectors, store_vectors;  // of 8 elements
  PlacedTaps place;
  Divider by_taps, by_kw, by_group;  // by_group: loads of 8 output channels
};

// Not channels-last: through shared memory, [ci][8 output channels][taps], where an odd number of vectors for each 8
// channels keeps the banks apart.
__global__ void __launch_bounds__(kThreads) pack(PackParams p) {
  let_next_start();
  AEUP_DYNAMIC_SHARED(uint16_t, tile);
  const int i0 = int(blockIdx.x) * p.rows, c0 = int(blockIdx.y) * 64;
  const int rows = min(p.rows, p.ci - i0), group = 8 * (p.taps | 1);
  const int64_t row = int64_t(p.co) * p.taps;
  const auto stage = [&](auto width) {
    constexpr int V = decltype(width)::value, kWords = V == 8 ? 4 : 1, kBatch = 4;  // loads in flight
    const int count = rows * 64 * p.taps / V, valid = (p.co - c0) * p.taps;
    for (int first = threadIdx.x; first < count; first += kBatch * kThreads) {
      uint32_t w[kBatch][kWords];
      int to[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int n = first + b * kThreads;
        int q = n;
        const int e = take(&q, p.by_group) * V, at = q % 8 * 8 * p.taps + e;
        to[b] = n < count ? q * group + e : -1;
#pragma unroll
        for (int k = 0; k < kWords; ++k) w[b][k] = 0;
        if (n < count && at < valid) load_words<V * 2>(p.from + (i0 + q / 8) * row + c0 * p.taps + at, w[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (to[b] < 0) break;
        if constexpr (V == 8)
          *reinterpret_cast<uint4*>(tile + to[b]) = make_uint4(w[b][0], w[b][1], w[b][2], w[b][3]);
        else
          tile[to[b]] = uint16_t(w[b][0]);
      }
    }
  };
  if (!p.channels_last) {
    if (p.load_vectors)
      stage(std::integral_constant<int, 8>());
    else
      stage(std::integral_constant<int, 1>());
    __syncthreads();
  }
#pragma unroll 4
  for (int n = threadIdx.x; n < rows * p.taps * 8; n += kThreads) {
    int i = n / 8;
    const int tap = take(&i, p.by_taps), c = c0 + n % 8 * 8;
    int y = tap;
    const int x = take(&y, p.by_kw), room = (p.place.is_last(y, x) ? p.padded : p.co) - c;
    if (room <= 0) continue;
    uint32_t w[4] = {};
    if (p.channels_last && p.load_vectors) {
      if (c < p.co) load_words<16>(p.from + (i0 + i) * row + int64_t(tap) * p.co + c, w);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        uint32_t bits = 0;
        if (!p.channels_last)
          bits = tile[(i * 8 + n % 8) * group + k * p.taps + tap];
        else if (c + k < p.co)
          load_words<2>(p.from + (i0 + i) * row + int64_t(tap) * p.co + c + k, &bits);
        w[k / 2] |= bits << k % 2 * 16;
      }
    }
    uint16_t* const to = p.to + p.place.h.offset(y) + p.place.w.offset(x) + (i0 + i) * p.of_ci + c;
    if (p.store_vectors) {
      store_words<16>(to, w);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const uint32_t bits = w[k / 2] >> k % 2 * 16;
        if (k < room) store_words<2>(to + k, &bits);
      }
    }
  }
}

const char* launch_pack(const Convolution& c, const FoldedPlace& place, void* to, void* stream) {
  if (c.folded()) return launch_fold(c, place, to, stream);
  const int taps = c.kh * c.kw, columns = int(ceil_div(place.padded, 64));
  PackParams p{};
  p.from = static_cast<const uint16_t*>(c.weight), p.to = static_cast<uint16_t*>(to);
  p.ci = int(c.ci), p.co = int(c.co), p.taps = taps, p.padded = int(place.padded), p.of_ci = place.of_ci;
  p.channels_last = c.weight_channels_last;
  p.load_vectors = alignment_of(p.from, (p.channels_last ? c.co : c.co * taps) * 2) == 16;
  p.store_vectors = alignment_of(to, (place.of_step | place.of_phase | place.of_ci | place.padded) * 2) == 16;
  p.place = PlacedTaps(place, c.kw);
  p.by_taps = Divider(taps), p.by_kw = Divider(c.kw), p.by_group = Divider(p.load_vectors ? taps : 8 * taps);
  p.rows = max(1, 128 / taps);
  while (p.rows > 1 && ceil_div(c.ci, p.rows) * columns < 2 * multiprocessors()) p.rows = (p.rows + 1) / 2;
  const dim3 grid{unsigned(ceil_div(c.ci, p.rows)), unsigned(columns)};
  AEUP_LAUNCH(pack, grid, kThreads, p.channels_last ? 0 : size_t(p.rows) * 128 * (taps | 1), stream, p);
  return nullptr;
}

}  // namespace

const char* to_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                             void* stream, int bytes) {
  if (pixels == 1) return pad_channels(from, to, n, c, padded, stream, bytes);
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
  const int64_t padded = round_up(c.co, 8);
  return launch_pack(c, {FoldedPlace::plain, false, 0, c.ci * padded, 0, padded, 1, padded}, to, stream);
}

const char* pack_phases(const Convolution& c, void* to, void* stream) {
  const int64_t phases = c.sh * c.sw, pitch = round_up(phases * c.co, 8);
  FoldedPlace place{FoldedPlace::plain, false, 0, c.ci * pitch, c.co, pitch, 1, pitch - (phases - 1) * c.co};
  place.sh = c.sh, place.sw = c.sw, place.ph = c.ph, place.pw = c.pw;
  return launch_pack(c, place, to, stream);
}

}  // namespace aeup
