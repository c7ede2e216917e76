// Weight gradient for 1 to 4 output channels, stride 2 and a window of 4 taps: bound by the one read of the input.
//
// It is a product input channels x (tap, co) whose reduction runs over pixels. A block takes tiles of 4 x 32 pixels of
// 128 bytes of channels, a row per warp, and keeps its sums in registers from tile to tile. cp.async brings tiles in a
// ring: the input into slots of the thread that multiplies it (the order of pixels within a product is free), the
// output's gradient as its lines lie in memory, from which a thread picks the taps of its pixels. Sums of warps, then
// of blocks, are added in a fixed order.
#include "conv_partials.cuh"
#include "few.cuh"
#include "few.h"

namespace aeup {
namespace {

constexpr int kThreads = 128, kWarps = 4, kStages = 3, kTileRows = kWarps, kTileColumns = 32;
constexpr int kGradRows = 2 * kTileRows + 2, kSlot = 4096;  // kSlot: bytes of a warp's row of the input

template <class T>
struct FewWeight {
  const T *input, *grad;
  float* partial;  // [splits][ci][kh * kw][co]
  int ci, ih, iw, oh, ow;
  Strides from, to;  // of input, of grad
  Window window;
  int column_tiles, row_tiles, groups;
  int64_t tiles, splits;
  int64_t step_images;  // from one of a block's tiles to its next, `splits` tiles on
  int step_rows, step_columns;
  int input_alignment, grad_alignment;  // bytes, of every line
};

template <class T, int kCO, bool kLast, bool kSplit>
struct WeightShape {
  static constexpr int kEach = 4 / int(sizeof(T)), kV = 16 / int(sizeof(T));
  static constexpr int kGroup = 128 / int(sizeof(T));        // channels of a block
  static constexpr int kM = kGroup / 16, kN = 2 * kCO;       // products of 16 channels x 8 columns
  static constexpr int kSteps = kTileColumns / (8 * kEach);  // products along the pixels of a row
  // A line of the gradient's tile (of all co, NCHW: of one) begins and ends with a piece for the neighbours' columns.
  static constexpr int kColumn = kLast ? kCO : 1, kLines = kLast ? 1 : kCO;
  static constexpr int kLine = 2 * kTileColumns * kColumn + 2 * kV, kRow = kLine * kLines;
  static constexpr int kTile = kGradRows * kRow;
  static constexpr int kStage = kWarps * kSlot + kTile * int(sizeof(T));
  static constexpr int kSums = kWarps * kM * kN * 32 * 16;
  static constexpr int kShared = kStages * kStage > kSums ? kStages * kStage : kSums;
  static constexpr bool kMany = kM * kN >= 32 || (kSplit && kCO > 3);  // registers
  static constexpr int kBlocks = kMany || kShared > (74 << 10) ? 2 : 3;
};

template <class T, int kCO, bool kLast, bool kSplit>
__global__ void __launch_bounds__(kThreads, WeightShape<T, kCO, kLast, kSplit>::kBlocks)
    few_weight_gradient(FewWeight<T> p) {
  using Q = WeightShape<T, kCO, kLast, kSplit>;
  constexpr int kEach = Q::kEach, kV = Q::kV, kM = Q::kM, kN = Q::kN, kUnroll = kSplit ? 1 : Q::kSteps;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, q = lane % 4;
  const Split block = split(blockIdx.x, p.groups);
  const int first_channel = int(block.remainder) * Q::kGroup;

  // Pixel of the row that element e of word r is, past the thread's first; channel of the group that is row m, hi.
  constexpr int kLanePixels = kLast ? 2 * kEach : kV;  // from one thread's first pixel to the next one's
  const auto pixel_of = [](int step, int r, int e) {
    if (kLast) return step * 8 * kEach + r * kEach + e;
    return sizeof(T) == 2 ? step * 4 + r * 2 + e : step / 2 * 16 + step % 2 * 2 + r;
  };
  const auto channel_of = [](int row, int m, int hi) { return kLast ? row * kV + 2 * m + hi : m * 16 + hi * 8 + row; };

  Split at = split(block.quotient, p.column_tiles);
  int column = int(at.remainder), stage = 0;
  at = split(at.quotient, p.row_tiles);
  int row_tile = int(at.remainder);
  int64_t image = at.quotient, to_fetch = (p.tiles - block.quotient + p.splits - 1) / p.splits, to_do = to_fetch;
  const auto fetch = [&] {
    if (to_fetch-- > 0) {
      const int i0 = row_tile * kTileRows, j0 = column * kTileColumns, i = i0 + warp;
      unsigned char* const slot = shared + stage * Q::kStage + warp * kSlot + lane * 16;
      const T* const base = p.input + image * p.from.n + i * p.from.h + j0 * p.from.w + first_channel * p.from.c;
      const auto piece = [&](int k, auto copy) {
        int x, c;
        if (kLast) {
          x = q * kLanePixels + (sizeof(T) == 2 ? pixel_of(k / 4, k / 2 % 2, k % 2) : pixel_of(k / 2, k % 2, 0));
          c = g * kV;
        } else {
          x = q * kLanePixels + (sizeof(T) == 2 ? 0 : k / 4 * 16);
          c = sizeof(T) == 2 ? k * 8 + g : k % 4 * 8 + g;
        }
        const int channels = p.ci - first_channel - c, pixels = i < p.ih ? p.iw - j0 - x : 0;
        copy(slot + k * 512, base + x * p.from.w + c * p.from.c,
             kLast ? (pixels > 0 ? channels : 0) : (channels > 0 ? pixels : 0));
      };
      if (p.input_alignment == 16) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          piece(k, [](void* to, const T* from, int inside) { copy_or_zero<16>(to, from, inside > 0); });
      } else {
#pragma unroll 1
        for (int k = 0; k < 8; ++k)
          piece(k, [&](void* to, const T* from, int inside) { copy_narrow(to, from, inside, p.input_alignment); });
      }
      const T* const grad = p.grad + image * p.to.n;
      T* const tile = reinterpret_cast<T*>(shared + stage * Q::kStage + kWarps * kSlot);
      constexpr int kPieces = Q::kLine / kV;
#pragma unroll 1
      for (int f = tid; f < kGradRows * Q::kLines * kPieces; f += kThreads) {
        const int line = f / kPieces, row = line / Q::kLines, y = 2 * i0 - 1 + row;
        const int e = 2 * j0 * Q::kColumn + (f % kPieces - 1) * kV;
        const T* const from = grad + y * p.to.h + line % Q::kLines * p.to.c + e;
        const int inside = y >= 0 && y < p.oh && e >= 0 ? p.ow * Q::kColumn - e : 0;
        if (p.grad_alignment == 16)
          copy_or_zero<16>(tile + f * kV, from, inside > 0);
        else
          copy_narrow(tile + f * kV, from, inside, p.grad_alignment);
      }
      image += p.step_images, row_tile += p.step_rows, column += p.step_columns;
      if (column >= p.column_tiles) column -= p.column_tiles, ++row_tile;
      if (row_tile >= p.row_tiles) row_tile -= p.row_tiles, ++image;
    }
    copy_commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  };

  int taps[kN];  // where in a patch, from the thread's first pixel
#pragma unroll
  for (int u = 0; u < kN; ++u) {
    const int n = u * 8 + g, th = n / (4 * kCO), tw = n / kCO % 4, co = n % kCO;
    taps[u] =
        (2 * warp + th) * Q::kRow + kV + (2 * q * kLanePixels + tw - 1) * Q::kColumn + co * (kLast ? 1 : Q::kLine);
  }
  float acc[kM][kN][4];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int u = 0; u < kN; ++u)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[m][u][k] = 0.f;
#pragma unroll 1
  for (int ahead = kStages - 1; to_do > 0;) {
    if (ahead == 0) {
      copy_wait<kStages - 2>();
      __syncthreads();  // this tile is there, and the one before has been read
    }
    fetch();
    if (ahead > 0) {
      --ahead;
      continue;
    }
    --to_do;
    const unsigned char* const mine = shared + stage * Q::kStage + warp * kSlot + lane * 16;
    const T* const tile = reinterpret_cast<const T*>(shared + stage * Q::kStage + kWarps * kSlot);
#pragma unroll(kUnroll)
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
      for (int u = 0; u < kN; ++u)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const T* const one = tile + taps[u] + 2 * pixel_of(step, r, 0) * Q::kColumn;
          const T* const two = tile + taps[u] + 2 * pixel_of(step, r, kEach - 1) * Q::kColumn;
          make_operand<T, kSplit>(join<T>(shared_bits(one), shared_bits(two)), &b[u][r], &rest[u][r]);
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

  // Sums of warps. A short loop: code that runs once costs more than what it computes.
  copy_wait<0>();
  __syncthreads();
  uint4* const sums = reinterpret_cast<uint4*>(shared);  // [warp][m][u][lane]
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int u = 0; u < kN; ++u)
      sums[((warp * kM + m) * kN + u) * 32 + lane] =
          make_uint4(__float_as_uint(acc[m][u][0]), __float_as_uint(acc[m][u][1]), __float_as_uint(acc[m][u][2]),
                     __float_as_uint(acc[m][u][3]));
  __syncthreads();
  float* const partial = p.partial + (block.quotient * p.ci + first_channel) * (p.window.kh * p.window.kw * kCO);
#pragma unroll 1
  for (int f = tid; f < kM * kN * 32; f += kThreads) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint4 v = sums[w * (kM * kN * 32) + f];
      sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y);
      sum[2] += __uint_as_float(v.z), sum[3] += __uint_as_float(v.w);
    }
    const int m = f / (kN * 32), u = f / 32 % kN;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = channel_of(g, m, k / 2), n = u * 8 + 2 * q + k % 2;
      const int kh = n / (4 * kCO) - p.window.shift_h, kw = n / kCO % 4 - p.window.shift_w;
      if (first_channel + c < p.ci && kh >= 0 && kh < p.window.kh && kw >= 0 && kw < p.window.kw)
        store_one(partial + ((c * p.window.kh + kh) * p.window.kw + kw) * kCO + n % kCO, sum[k]);
    }
  }
}

struct Block {
  int shared, of_processor;  // bytes; blocks that a multiprocessor holds
};
template <class T, bool kSplit, int kCO>
Block block_of(bool channels_last) {
  using Last = WeightShape<T, kCO, true, kSplit>;
  using First = WeightShape<T, kCO, false, kSplit>;
  return channels_last ? Block{Last::kShared, Last::kBlocks} : Block{First::kShared, First::kBlocks};
}
template <class T, bool kSplit>
Block block_of(const Convolution& c) {
  switch (c.co) {
    case 1: return block_of<T, kSplit, 1>(c.channels_last);
    case 2: return block_of<T, kSplit, 2>(c.channels_last);
    case 3: return block_of<T, kSplit, 3>(c.channels_last);
    default: return block_of<T, kSplit, 4>(c.channels_last);
  }
}
Block block_of(const Convolution& c) {
  if (c.dtype != DType::f32) return block_of<Half, false>(c);
  return c.tf32 ? block_of<float, false>(c) : block_of<float, true>(c);
}

// Sizes that the workspace depends on.
struct Tiles {
  int column_tiles, row_tiles, groups;
  int64_t tiles, splits;
};
Tiles tiles_of(const Convolution& c) {
  Tiles t{};
  t.column_tiles = int(ceil_div(c.iw, kTileColumns)), t.row_tiles = int(ceil_div(c.ih, kTileRows));
  t.tiles = c.n * t.row_tiles * t.column_tiles;
  t.groups = int(ceil_div(c.ci, c.dtype == DType::f32 ? 32 : 64));
  const int64_t wanted = max(block_of(c).of_processor * int64_t(multiprocessors()) / t.groups, int64_t(1));
  const int64_t splits = split_count(c, t.tiles, wanted, 1);
  t.splits = ceil_div(t.tiles, ceil_div(t.tiles, splits));  // no more than the longest range asks for
  return t;
}

template <class T, int kCO, bool kLast, bool kSplit>
const char* start(FewWeight<T>& p, void* stream) {
  const auto kernel = few_weight_gradient<T, kCO, kLast, kSplit>;
  AEUP_LAUNCH(kernel, p.splits * p.groups, kThreads, size_t(WeightShape<T, kCO, kLast, kSplit>::kShared), stream, p);
  return nullptr;
}

template <class T, bool kLast, bool kSplit>
const char* multiply(const Convolution& c, const Tiles& t, void* workspace, void* stream) {
  FewWeight<T> p{};
  p.input = static_cast<const T*>(c.input), p.grad = static_cast<const T*>(c.grad);
  p.partial = static_cast<float*>(workspace);
  p.ci = int(c.ci), p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow);
  p.from = strides_of(c.ci, c.ih, c.iw, c.channels_last), p.to = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.window = window_of(c);
  p.column_tiles = t.column_tiles, p.row_tiles = t.row_tiles, p.groups = t.groups;
  p.tiles = t.tiles, p.splits = t.splits;
  const int64_t rows = t.splits / t.column_tiles;
  p.step_columns = int(t.splits % t.column_tiles);
  p.step_rows = int(rows % t.row_tiles), p.step_images = rows / t.row_tiles;
  p.input_alignment = alignment_of(c.input, (c.channels_last ? c.ci : c.iw) * int64_t(sizeof(T)));
  p.grad_alignment = alignment_of(c.grad, (c.channels_last ? c.co : 1) * c.ow * int64_t(sizeof(T)));
  return with_channels(c, [&](auto co) { return start<T, co(), kLast, kSplit>(p, stream); });
}
template <class T, bool kLast, bool kSplit>
const char* run(const Convolution& c, void* workspace, void* stream) {
  if (!workspace) return "the weight gradient needs a workspace";
  const Tiles t = tiles_of(c);
  if (const char* error = multiply<T, kLast, kSplit>(c, t, workspace, stream)) return error;
  return launch_add_partials<T>(c, workspace, t.splits, stream);
}
}  // namespace

int64_t few_weight_gradient_shared(const Convolution& c) { return block_of(c).shared; }

int64_t few_weight_gradient_workspace(const Convolution& c) { return tiles_of(c).splits * partial_bytes(c); }

const char* launch_few_weight_gradient(const Convolution& c, void* workspace, void* stream) {
  return with_operands(
      c, [&](auto t, auto last, auto split) { return run<decltype(t), last(), split()>(c, workspace, stream); });
}

}  // namespace aeup
