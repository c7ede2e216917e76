// Weight gradient for 1 to 4 output channels, stride 2 and a window of 4 taps: bound by the one read of the input.
//
// It is a product input channels x (tap, co) whose reduction runs over pixels. A block keeps the output's gradient of a
// tile in shared memory as [row][column][co]; a warp takes 32 adjacent pixels of 128 bytes of channels at a time, which
// cp.async brings into slots of the thread that multiplies them (the order of pixels within a product is free), and
// keeps its sums in registers from tile to tile. Sums of warps, then of blocks, are added in a fixed order.
#include "conv_partials.cuh"
#include "few.cuh"
#include "few.h"

namespace aeup {
namespace {

constexpr int kThreads = 128, kWarps = 4, kTileRows = 8, kDepth = 3, kSlot = 4096;  // kSlot: bytes of a warp's unit
constexpr int kUnitPixels = 32;

template <class T>
struct FewWeight {
  const T *input, *grad;
  float* partial;  // [splits][ci][kh * kw][co]
  int ci, ih, iw, oh, ow;
  Strides from, to;  // of input, of grad
  Window window;
  int segments, column_tiles, row_tiles;  // a tile: kTileRows x 32 * segments pixels
  int64_t tiles, splits;
  int sets, side;  // sets of channel groups, one per block; groups of a set: kWarps / side warps share one
  bool wide;
};

template <class T, int kCO>
struct WeightShape {
  static constexpr int kEach = 4 / int(sizeof(T)), kV = 16 / int(sizeof(T));
  static constexpr int kGroup = 128 / int(sizeof(T));       // channels of a unit
  static constexpr int kM = kGroup / 16, kN = 2 * kCO;      // products of 16 channels x 8 columns
  static constexpr int kSteps = kUnitPixels / (8 * kEach);  // products along the pixels of a unit
  AEUP_HD static int row_elements(int segments) { return (64 * segments + 2) * kCO; }
};

template <class T, int kCO, bool kLast, bool kSplit>
__global__ void __launch_bounds__(kThreads, 2) few_weight_gradient(FewWeight<T> p) {
  using Q = WeightShape<T, kCO>;
  constexpr int kEach = Q::kEach, kV = Q::kV, kM = Q::kM, kN = Q::kN;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, q = lane % 4;
  unsigned char* const ring = shared + warp * (kDepth * kSlot);
  T* const tile = reinterpret_cast<T*>(shared + kWarps * kDepth * kSlot);
  const int row_elements = Q::row_elements(p.segments), width = 32 * p.segments;
  const int sharers = kWarps / p.side, first_unit = warp / p.side, units = kTileRows * p.segments;
  const int group = int(blockIdx.x) % p.sets * p.side + warp % p.side;
  const int64_t split_index = int64_t(blockIdx.x) / p.sets;

  // Pixel of the unit and channel of the group that this thread holds as element e of word r, and as row m, hi.
  const auto pixel_of = [&](int step, int r, int e) {
    if (kLast) return sizeof(T) == 2 ? step * 16 + q * 4 + r * 2 + e : step * 8 + q * 2 + r;
    return sizeof(T) == 2 ? q * 8 + step * 4 + r * 2 + e : step / 2 * 16 + q * 4 + step % 2 * 2 + r;
  };
  const auto channel_of = [&](int m, int hi) {
    return group * Q::kGroup + (kLast ? g * kV + 2 * m + hi : m * 16 + hi * 8 + g);
  };

  int64_t fetch_tile = split_index;
  int fetch_unit = first_unit, fetch_slot = 0;
  const auto fetch = [&] {
    Split at = split(fetch_tile, p.column_tiles);
    const int j = int(at.remainder) * width + fetch_unit % p.segments * kUnitPixels;
    at = split(at.quotient, p.row_tiles);
    const int i = int(at.remainder) * kTileRows + fetch_unit / p.segments;
    const bool row = fetch_tile < p.tiles && i < p.ih;
    const T* const base = p.input + at.quotient * p.from.n + i * p.from.h + j * p.from.w;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      int x, c;
      if (kLast) {
        x = sizeof(T) == 2 ? pixel_of(k / 4, k / 2 % 2, k % 2) : pixel_of(k / 2, k % 2, 0);
        c = channel_of(0, 0);
      } else {
        x = sizeof(T) == 2 ? q * 8 : k / 4 * 16 + q * 4;
        c = sizeof(T) == 2 ? channel_of(k / 2, k % 2) : channel_of(k / 2 % 2, k % 2);
      }
      uint32_t* const to = reinterpret_cast<uint32_t*>(ring + fetch_slot * kSlot + (k * 32 + lane) * 16);
      const T* const piece = base + x * p.from.w + c * p.from.c;
      if (row && j + x < p.iw && c < p.ci) {
        if (p.wide) {
          copy_async<16>(to, piece);
        } else {
          uint32_t e[kV];
#pragma unroll
          for (int v = 0; v < kV; ++v)
            e[v] =
                (kLast ? c + v < p.ci : j + x + v < p.iw) ? bits_at(piece + (kLast ? v * p.from.c : v * p.from.w)) : 0u;
#pragma unroll
          for (int v = 0; v < 4; ++v) to[v] = sizeof(T) == 4 ? e[v % kV] : join<T>(e[2 * v % kV], e[(2 * v + 1) % kV]);
        }
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) to[v] = 0;
      }
    }
    copy_commit();
    if (++fetch_slot == kDepth) fetch_slot = 0;
    if ((fetch_unit += sharers) >= units) fetch_unit = first_unit, fetch_tile += p.splits;
  };
#pragma unroll 1
  for (int k = 0; k < kDepth; ++k) fetch();

  float acc[kM][kN][4];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int u = 0; u < kN; ++u)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[m][u][k] = 0.f;
  int slot = 0;
  for (int64_t index = split_index; index < p.tiles; index += p.splits) {
    Split at = split(index, p.column_tiles);
    const int j0 = int(at.remainder) * width;
    at = split(at.quotient, p.row_tiles);
    const int i0 = int(at.remainder) * kTileRows;
    __syncthreads();  // the last tile has been read
    load_gradient_tile<T, kCO, kLast, kWarps>(p.grad + at.quotient * p.to.n, p.to, p.oh, p.ow, 2 * i0 - 1, 2 * j0 - 1,
                                              2 * kTileRows + 2, 2 * width + 2, row_elements, tile);
    __syncthreads();
#pragma unroll 1
    for (int unit = first_unit; unit < units; unit += sharers) {
      copy_wait<kDepth - 1>();
      const int li = unit / p.segments, lj = unit % p.segments * kUnitPixels;
      if (i0 + li < p.ih && j0 + lj < p.iw) {
        const unsigned char* const mine = ring + slot * kSlot + lane * 16;
        const T* const patch = tile + 2 * li * row_elements + 2 * lj * kCO;
#pragma unroll
        for (int step = 0; step < Q::kSteps; ++step) {
          uint32_t words[kM][4];  // row hi of m in word 2 r + hi, as products take them
          if constexpr (kLast) {
            constexpr int kPieces = 8 / Q::kSteps;
            uint4 pieces[kPieces];
#pragma unroll
            for (int k = 0; k < kPieces; ++k)
              pieces[k] = *reinterpret_cast<const uint4*>(mine + (step * kPieces + k) * 512);
            const auto word = [&](int k, int w) {
              return w == 0 ? pieces[k].x : w == 1 ? pieces[k].y : w == 2 ? pieces[k].z : pieces[k].w;
            };
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
              for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int hi = 0; hi < 2; ++hi)
                  words[m][2 * r + hi] = sizeof(T) == 4 ? word(r, (2 * m + hi) % 4)
                                                        : join<T>(word(2 * r % kPieces, m) >> 16 * hi,
                                                                  word((2 * r + 1) % kPieces, m) >> 16 * hi);
          } else {
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
              for (int hi = 0; hi < 2; ++hi) {
                const int k = sizeof(T) == 2 ? m * 2 + hi : step / 2 * 4 + m * 2 + hi;
                const uint2 two = *reinterpret_cast<const uint2*>(mine + k * 512 + step % 2 * 8);
                words[m][hi] = two.x, words[m][2 + hi] = two.y;
              }
          }
          uint32_t b[kN][2], rest[kN][2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const T* const one = patch + 2 * pixel_of(step, r, 0) * kCO;
            const T* const two = patch + 2 * pixel_of(step, r, kEach - 1) * kCO;
#pragma unroll
            for (int u = 0; u < kN; ++u) {
              const int n = u * 8 + g, from = n / (4 * kCO) * row_elements + n % (4 * kCO);
              make_operand<T, kSplit>(join<T>(shared_bits(one + from), shared_bits(two + from)), &b[u][r], &rest[u][r]);
            }
          }
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            uint32_t a[4], d[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) make_operand<T, kSplit>(words[m][k], a + k, d + k);
#pragma unroll
            for (int u = 0; u < kN; ++u) {
              if constexpr (kSplit) {
                split_product<T>(acc[m][u], a, d, b[u][0], b[u][1], rest[u][0], rest[u][1]);
              } else {
                matrix_product<T>(acc[m][u], a, b[u][0], b[u][1]);
              }
            }
          }
        }
      }
      fetch();
      if (++slot == kDepth) slot = 0;
    }
  }
  copy_wait<0>();

  // The warps of a group: the first adds the others' sums in their order.
  float* const sums = reinterpret_cast<float*>(shared);  // [warp][product column][4][lane]
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kN; ++u)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[((warp * kN + u) * 4 + k) * 32 + lane] = acc[m][u][k];
    __syncthreads();
    if (warp >= p.side) continue;
#pragma unroll
    for (int u = 0; u < kN; ++u)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float sum = acc[m][u][k];
        for (int w = warp + p.side; w < kWarps; w += p.side) sum += sums[((w * kN + u) * 4 + k) * 32 + lane];
        const int ci = channel_of(m, k / 2), n = u * 8 + 2 * q + k % 2;
        const int kh = n / (4 * kCO) - p.window.shift_h, kw = n / kCO % 4 - p.window.shift_w;
        if (ci < p.ci && kh >= 0 && kh < p.window.kh && kw >= 0 && kw < p.window.kw)
          store_one(p.partial + (((split_index * p.ci + ci) * p.window.kh + kh) * p.window.kw + kw) * kCO + n % kCO,
                    sum);
      }
  }
}

// Sizes that the workspace depends on.
struct Tiles {
  int segments, column_tiles, row_tiles, side, sets;
  int64_t tiles, splits;
};
Tiles tiles_of(const Convolution& c) {
  Tiles t{};
  t.segments = c.iw <= 32 ? 1 : c.iw <= 64 ? 2 : 4;
  t.column_tiles = int(ceil_div(c.iw, 32 * t.segments)), t.row_tiles = int(ceil_div(c.ih, kTileRows));
  t.tiles = c.n * t.row_tiles * t.column_tiles;
  const int64_t groups = ceil_div(c.ci, c.dtype == DType::f32 ? 32 : 64);
  t.side = groups >= 3 ? 4 : int(groups);
  t.sets = int(ceil_div(groups, t.side));
  const int64_t wanted = max(2 * int64_t(multiprocessors()) / t.sets, int64_t(1));
  t.splits = min(t.tiles, int64_t(split_count(c, wanted, wanted, 1)));
  return t;
}

template <class T, int kCO, bool kLast, bool kSplit>
const char* start(FewWeight<T>& p, void* stream) {
  const size_t tile = size_t(2 * kTileRows + 2) * WeightShape<T, kCO>::row_elements(p.segments) * sizeof(T);
  const auto kernel = few_weight_gradient<T, kCO, kLast, kSplit>;
  AEUP_LAUNCH(kernel, p.splits * p.sets, kThreads, kWarps * kDepth * kSlot + tile, stream, p);
  return nullptr;
}
template <class T, bool kLast, bool kSplit>
const char* with_channels(FewWeight<T>& p, int64_t co, void* stream) {
  switch (co) {
    case 1: return start<T, 1, kLast, kSplit>(p, stream);
    case 2: return start<T, 2, kLast, kSplit>(p, stream);
    case 3: return start<T, 3, kLast, kSplit>(p, stream);
    default: return start<T, 4, kLast, kSplit>(p, stream);
  }
}

template <class T>
const char* multiply(const Convolution& c, const Tiles& t, void* workspace, void* stream) {
  FewWeight<T> p{};
  p.input = static_cast<const T*>(c.input), p.grad = static_cast<const T*>(c.grad);
  p.partial = static_cast<float*>(workspace);
  p.ci = int(c.ci), p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow);
  p.from = strides_of(c.ci, c.ih, c.iw, c.channels_last), p.to = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.window = window_of(c);
  p.segments = t.segments, p.column_tiles = t.column_tiles, p.row_tiles = t.row_tiles;
  p.tiles = t.tiles, p.splits = t.splits, p.sets = t.sets, p.side = t.side;
  p.wide = alignment_of(c.input, (c.channels_last ? c.ci : c.iw) * int64_t(sizeof(T))) == 16;
  if constexpr (std::is_same_v<T, float>) {
    if (!c.tf32)
      return c.channels_last ? with_channels<T, true, true>(p, c.co, stream)
                             : with_channels<T, false, true>(p, c.co, stream);
  }
  return c.channels_last ? with_channels<T, true, false>(p, c.co, stream)
                         : with_channels<T, false, false>(p, c.co, stream);
}
template <class T>
const char* run(const Convolution& c, void* workspace, void* stream) {
  if (!workspace) return "the weight gradient needs a workspace";
  const Tiles t = tiles_of(c);
  if (const char* error = multiply<T>(c, t, workspace, stream)) return error;
  return launch_add_partials<T>(c, workspace, t.splits, stream);
}

}  // namespace

int64_t few_weight_gradient_shared(const Convolution& c) {
  const int64_t row = (64 * tiles_of(c).segments + 2) * c.co * element_size(c.dtype);
  return kWarps * kDepth * kSlot + (2 * kTileRows + 2) * row;
}

int64_t few_weight_gradient_workspace(const Convolution& c) { return tiles_of(c).splits * partial_bytes(c); }

const char* launch_few_weight_gradient(const Convolution& c, void* workspace, void* stream) {
  switch (c.dtype) {
    case DType::f32: return run<float>(c, workspace, stream);
    case DType::f16: return run<Half>(c, workspace, stream);
    case DType::bf16: return run<BFloat16>(c, workspace, stream);
    default: return "unsupported dtype";
  }
}

}  // namespace aeup
