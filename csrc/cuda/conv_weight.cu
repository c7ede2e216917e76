// Weight gradient of the generic family: a GEMM whose rows are input channels, whose columns are (tap, output channel)
// and whose reduction runs over the input's pixels, split into ranges; the partial sums are added in a fixed order.
#include "conv_generic.h"
#include "conv_partials.cuh"

namespace aeup {
namespace {

constexpr int kSlab = 8;

template <class T>
struct WeightGemm {
  const T *input, *grad;
  Acc<T>* partial;   // [splits][ci][taps][co / groups]
  Strides from, to;  // of input, of grad
  int ih, iw, oh, ow, kw, sh, sw, ph, pw, dh, dw;
  int groups, rows, columns, channels;  // of a group: ci, taps * co, co
  int row_tiles, column_tiles;
  int64_t pixels, range;  // n * ih * iw; those of a split
  int64_t count;          // elements of a partial result
};

// 8 x 8 results per thread (double: 4 x 4), as in conv_gemm.cu.
template <class T>
struct WeightShape {
  static constexpr bool kDouble = std::is_same_v<T, double>;
  static constexpr int kF = kDouble ? 1 : 2, kWarpM = 16 * kF, kWarpN = 32 * kF, kBM = 64, kBN = kDouble ? 64 : 128;
  static constexpr int kThreads = kBM / kWarpM * (kBN / kWarpN) * 32, kBlocks = kDouble ? 2 : 3;
  static constexpr int kRows = kSlab * kBM / kThreads, kColumns = kSlab * kBN / kThreads;  // that a thread loads
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kVM = kRows < kVector ? kRows : kVector, kVN = kColumns < kVector ? kColumns : kVector;
};

// kVector: channels-last, adjacent channels of a pixel by vectors; else adjacent threads at adjacent pixels.
template <class T, bool kVector>
__global__ void __launch_bounds__(WeightShape<T>::kThreads, WeightShape<T>::kBlocks) conv_weight(WeightGemm<T> p) {
  using Q = WeightShape<T>;
  using S = Acc<T>;
  constexpr int kF = Q::kF, kThreads = Q::kThreads, kBM = Q::kBM, kBN = Q::kBN;
  constexpr int kVM = kVector ? Q::kVM : 1;
  constexpr int kVN = kVector ? Q::kVN : 1;
  constexpr int kTaps = Q::kColumns / kVN;  // columns, or vectors of them, each with its tap
  alignas(16) __shared__ S slab_x[2][kSlab][kBM + 4];
  alignas(16) __shared__ S slab_g[2][kSlab][kBN + 4];
  const int tid = threadIdx.x;

  Split at = split(blockIdx.x, p.column_tiles);
  const int n0 = int(at.remainder) * kBN;
  at = split(at.quotient, p.row_tiles);
  const int m0 = int(at.remainder) * kBM;
  at = split(at.quotient, p.groups);
  const int group = int(at.remainder);
  const int64_t begin = at.quotient * p.range, end = min(begin + p.range, p.pixels);

  // One pixel of the slab, and kRows rows and kColumns columns: adjacent (vectors), or kThreads / 8 apart.
  constexpr int kApart = kVector ? 1 : kThreads / kSlab;
  const int pixel = kVector ? tid / (kThreads / kSlab) : tid % kSlab;
  const int lane_m = kVector ? tid % (kThreads / kSlab) * Q::kRows : tid / kSlab;
  const int lane_n = kVector ? tid % (kThreads / kSlab) * Q::kColumns : tid / kSlab;
  int dy[kTaps], dx[kTaps], channel[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const int n = n0 + lane_n + i * kVN * kApart, tap = n / p.channels;
    channel[i] = n % p.channels;
    dy[i] = n < p.columns ? tap / p.kw * p.dh - p.ph : INT_MIN / 2;
    dx[i] = tap % p.kw * p.dw - p.pw;
  }
  int64_t q = begin + pixel;
  Split column = split(q, p.iw), row = split(column.quotient, p.ih);
  int j = int(column.remainder), i = int(row.remainder);
  int64_t image = row.quotient;

  S acc[4 * kF][4 * kF];
#pragma unroll
  for (int a = 0; a < 4 * kF; ++a)
#pragma unroll
    for (int b = 0; b < 4 * kF; ++b) acc[a][b] = S(0);
  S next_x[Q::kRows], next_g[Q::kColumns];

  const auto load = [&] {  // and moves on by a slab
    const bool some = q < end;
    const T* const x =
        p.input + image * p.from.n + i * p.from.h + j * p.from.w + (int64_t(group) * p.rows + m0 + lane_m) * p.from.c;
    const T* const g = p.grad + image * p.to.n + int64_t(group) * p.channels * p.to.c;
#pragma unroll
    for (int r = 0; r < Q::kRows / kVM; ++r) {
      Raw<T, kVM> raw;
      if (some && m0 + lane_m + r * kVM * kApart < p.rows)
        raw.load(x + r * kVM * (kApart * p.from.c));
      else
        raw.clear();
      raw.unpack(next_x + r * kVM);
    }
#pragma unroll
    for (int r = 0; r < kTaps; ++r) {
      const int y = i * p.sh + dy[r], z = j * p.sw + dx[r];
      Raw<T, kVN> raw;
      if (some && y >= 0 && y < p.oh && z >= 0 && z < p.ow)
        raw.load(g + y * p.to.h + z * p.to.w + channel[r] * p.to.c);
      else
        raw.clear();
      raw.unpack(next_g + r * kVN);
    }
    q += kSlab;
    for (j += kSlab; j >= p.iw;) {
      j -= p.iw;
      if (++i == p.ih) i = 0, ++image;
    }
  };
  const auto keep = [&](int to) {
#pragma unroll
    for (int r = 0; r < Q::kRows; ++r) slab_x[to][pixel][lane_m + r * kApart] = next_x[r];
#pragma unroll
    for (int r = 0; r < Q::kColumns; ++r) slab_g[to][pixel][lane_n + r * kApart] = next_g[r];
  };

  const int lane = tid % 32, warp = tid / 32, warps_n = kBN / Q::kWarpN;
  const int row0 = warp / warps_n * Q::kWarpM + lane / 8 * 4, column0 = warp % warps_n * Q::kWarpN + lane % 8 * 4;
  const int64_t slabs = begin < end ? (end - begin + kSlab - 1) / kSlab : 0;
  if (slabs > 0) {
    load();
    keep(0);
    __syncthreads();
  }
  for (int64_t s = 0; s < slabs; ++s) {
    const int now = int(s & 1);
    if (s + 1 < slabs) load();
#pragma unroll
    for (int k = 0; k < kSlab; ++k) {
      S a[4 * kF], b[4 * kF];
#pragma unroll
      for (int f = 0; f < kF; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          a[4 * f + e] = slab_x[now][k][row0 + 16 * f + e];
          b[4 * f + e] = slab_g[now][k][column0 + 32 * f + e];
        }
#pragma unroll
      for (int e = 0; e < 4 * kF; ++e)
#pragma unroll
        for (int f = 0; f < 4 * kF; ++f) acc[e][f] += a[e] * b[f];
    }
    if (s + 1 < slabs) keep(now ^ 1);
    __syncthreads();
  }

  S* const to = p.partial + at.quotient * p.count + int64_t(group) * p.rows * p.columns;
#pragma unroll
  for (int e = 0; e < 4 * kF; ++e) {
    const int m = m0 + row0 + e / 4 * 16 + e % 4;
#pragma unroll
    for (int f = 0; f < 4 * kF; ++f) {
      const int n = n0 + column0 + f / 4 * 32 + f % 4;
      if (m < p.rows && n < p.columns) store_one(to + int64_t(m) * p.columns + n, acc[e][f]);
    }
  }
}

struct Split3 {
  int64_t row_tiles, column_tiles, splits;
};
template <class T>
Split3 splits_of(const Convolution& c) {
  using Q = WeightShape<T>;
  const int64_t rows = ceil_div(c.ci / c.groups, Q::kBM);
  const int64_t columns = ceil_div(int64_t(c.kh) * c.kw * (c.co / c.groups), Q::kBN);
  const int64_t wanted = 2 * Q::kBlocks * int64_t(multiprocessors()) / (rows * columns * c.groups);
  return {rows, columns, split_count(c, c.n * c.ih * c.iw, wanted, 128)};
}

template <class T>
const char* run(const Convolution& c, void* workspace, void* stream) {
  using Q = WeightShape<T>;
  if (!workspace) return "the weight gradient needs a workspace";
  const Split3 tiles = splits_of<T>(c);
  WeightGemm<T> p{};
  p.input = static_cast<const T*>(c.input), p.grad = static_cast<const T*>(c.grad);
  p.partial = static_cast<Acc<T>*>(workspace);
  p.from = strides_of(c.ci, c.ih, c.iw, c.channels_last), p.to = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow), p.kw = c.kw;
  p.sh = c.sh, p.sw = c.sw, p.ph = c.ph, p.pw = c.pw, p.dh = c.dh, p.dw = c.dw;
  p.groups = c.groups, p.rows = int(c.ci / c.groups), p.channels = int(c.co / c.groups);
  const int64_t columns = int64_t(c.kh) * c.kw * p.channels;
  if (columns >= kMaxAxis) return "the kernel has too many elements";
  p.columns = int(columns);
  p.row_tiles = int(tiles.row_tiles), p.column_tiles = int(tiles.column_tiles);
  p.pixels = c.n * c.ih * c.iw;
  p.range = ceil_div(ceil_div(p.pixels, tiles.splits), kSlab) * kSlab;
  p.count = c.ci * columns;
  const int64_t blocks = tiles.row_tiles * tiles.column_tiles * c.groups * tiles.splits;
  const int64_t bytes = int64_t(sizeof(T));
  const bool vectors = c.channels_last && p.rows % Q::kVM == 0 && p.channels % Q::kVN == 0 &&
                       alignment_of(c.input, c.ci * bytes) >= Q::kVM * bytes &&
                       alignment_of(c.grad, c.co * bytes) >= Q::kVN * bytes;
  if (vectors)
    AEUP_LAUNCH((conv_weight<T, true>), blocks, Q::kThreads, 0, stream, p);
  else
    AEUP_LAUNCH((conv_weight<T, false>), blocks, Q::kThreads, 0, stream, p);
  return launch_add_partials<T>(c, workspace, int(tiles.splits), stream);
}

}  // namespace

int64_t conv_weight_workspace(const Convolution& c) {
  const int64_t splits = c.dtype == DType::f64 ? splits_of<double>(c).splits : splits_of<float>(c).splits;
  return splits * partial_bytes(c);
}

const char* launch_conv_weight(const Convolution& c, void* workspace, void* stream) {
  return with_type(c.dtype, [&](auto t) { return run<decltype(t)>(c, workspace, stream); });
}

}  // namespace aeup
