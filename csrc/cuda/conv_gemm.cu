// Forward and input gradient of the generic family: an implicit GEMM per phase on fused multiply-adds.
//
// Rows are result channels of a group, columns are pixels (image, row, column) of the phase, the reduction runs over
// the taps of the phase and the source channels. A block of warps makes a tile of kBM x kBN; a thread 8 x 8 (double: 4
// x 4) of it in fragments of 4 adjacent rows and columns. The next slab of 8 source channels is loaded into registers
// while the last one is multiplied from shared memory.
#include "conv_common.cuh"
#include "conv_generic.h"

namespace aeup {
namespace {

constexpr int kSlab = 8;
constexpr int kChain = 16;  // slabs that float32 sums in one go: the rounding of a long chain grows with its length

// An array that the compiler keeps in local memory, out of the registers' way.
template <class S>
AEUP_DEV S* in_memory(S* array) {
#ifndef AEUP_EMULATE
  asm volatile("" : "+l"(array));
#endif
  return array;
}

template <class T>
struct Gemm {
  const T *source, *weight, *bias;
  T* result;
  AxisMap v, h;
  int64_t n;
  int groups, rows, reduction;  // channels of a group: of the result, of the source
  int row_tiles;
  Strides from, to;
  int64_t wk, wm, wh, ww, wg;  // strides of the weight: reduction, row, tap, group
  bool wide_store;             // channels-last results in fragments of 4
  Activation activation;
  double slope;
};

// kVector: the source is channels-last, read by vectors of channels; else element by element, adjacent threads at
// adjacent pixels.
template <class T, int kBM, int kBN, bool kVector>
struct GemmShape {
  using S = Acc<T>;
  static constexpr int kF = std::is_same_v<T, double> ? 1 : 2;  // fragments of 4 per side of a thread's part
  static constexpr int kWarpM = 16 * kF, kWarpN = 32 * kF;      // lanes: 4 x 8
  static constexpr int kThreads = kBM / kWarpM * (kBN / kWarpN) * 32;
  static constexpr int kBlocks = 384 / kThreads > 1 ? 384 / kThreads : 2;  // per multiprocessor: 168 or 128 registers
  static constexpr int kVC = kVector ? (sizeof(T) == 2 ? 8 : 16 / int(sizeof(T))) : 1;
  static constexpr int kElements = kSlab * kBN / kThreads;  // source elements that a thread loads per slab
  static constexpr int kPixels = kVector ? kElements / kVC : (kBN > kThreads ? kBN / kThreads : 1);
  static constexpr int kPer = kElements / kPixels;  // of one pixel
  static constexpr int kWeights = kSlab * kBM / kThreads;
  static constexpr int kLM = kBM + 4, kLN = kBN + 4;  // rows of the slabs in shared memory
  static_assert(kVector ? kPer == kVC : kThreads % kBN == 0 || kBN % kThreads == 0);
};

template <class T, int kBM, int kBN, bool kVector>
__global__ void __launch_bounds__(GemmShape<T, kBM, kBN, kVector>::kThreads, GemmShape<T, kBM, kBN, kVector>::kBlocks)
    conv_gemm(Gemm<T> p) {
  using Q = GemmShape<T, kBM, kBN, kVector>;
  using S = Acc<T>;
  constexpr int kF = Q::kF, kThreads = Q::kThreads, kPixels = Q::kPixels, kPer = Q::kPer;
  alignas(16) __shared__ S slab_w[2][kSlab][Q::kLM];
  alignas(16) __shared__ S slab_x[2][kSlab][Q::kLN];
  const int tid = threadIdx.x;

  const int phases_w = p.h.phases(), phases = p.v.phases() * phases_w;
  Split at = split(blockIdx.x, phases);
  const int phase = int(at.remainder);
  at = split(at.quotient, p.row_tiles);
  const int m0 = int(at.remainder) * kBM;
  at = split(at.quotient, p.groups);
  const int group = int(at.remainder);
  const int64_t pixel0 = at.quotient * kBN;
  const PhaseTaps tv = p.v.taps(phase / phases_w), th = p.h.taps(phase % phases_w);
  const int64_t pixels = p.n * tv.size * th.size;
  if (pixel0 >= pixels) return;  // this phase has fewer pixels than the largest

  // What this thread loads of the source: kPer channels from channel `first_k` (vectors: adjacent, else kStepK apart)
  // of kPixels pixels.
  constexpr int kChunks = kSlab / (kVector ? Q::kVC : 1);
  constexpr int kStepK = kVector ? 1 : (kThreads > kBN ? kThreads / kBN : 1);
  const int first_k = kVector ? tid % kChunks * Q::kVC : (kThreads > kBN ? tid / kBN : 0);
  int column[kPixels], sy[kPixels], sx[kPixels];
  const T *image[kPixels], *pointer[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    column[i] = kVector ? tid / kChunks + i * (kThreads / kChunks) : tid % kBN + i * kThreads;
    const int64_t q = pixel0 + column[i];
    const Split x = split(q, th.size), y = split(x.quotient, tv.size);
    sx[i] = int(x.remainder) * th.step + th.base;
    sy[i] = q < pixels ? int(y.remainder) * tv.step + tv.base : INT_MIN / 2;
    image[i] = p.source + y.quotient * p.from.n + int64_t(group) * p.reduction * p.from.c;
  }
  // And of the weight: kWeights elements, adjacent threads along the shorter stride.
  const bool along_k = p.wk < p.wm;
  const int wk0 = along_k ? tid % kSlab : tid / kBM, wm0 = along_k ? tid / kSlab : tid % kBM;
  const int wk_step = along_k ? 0 : kThreads / kBM, wm_step = along_k ? kThreads / kSlab : 0;
  const T* const weight = p.weight + group * p.wg + (m0 + wm0) * p.wm;

  S acc[4 * kF][4 * kF];
#pragma unroll
  for (int i = 0; i < 4 * kF; ++i)
#pragma unroll
    for (int j = 0; j < 4 * kF; ++j) acc[i][j] = S(0);

  S next_x[kPixels * kPer], next_w[Q::kWeights];
  int jh = 0, jw = 0, k0 = 0;
  const T* tap_weight = weight;
  const auto enter_tap = [&] {
    tap_weight = weight + (tv.k0 + jh * tv.kstep) * p.wh + (th.k0 + jw * th.kstep) * p.ww;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int y = sy[i] + jh * tv.delta, x = sx[i] + jw * th.delta;
      const bool inside = y >= 0 && y < p.v.sources && x >= 0 && x < p.h.sources;
      pointer[i] = inside ? image[i] + y * p.from.h + x * p.from.w : nullptr;
    }
  };
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if constexpr (kVector) {
        Raw<T, Q::kVC> raw;
        if (pointer[i] && k0 + first_k < p.reduction)
          raw.load(pointer[i] + k0 + first_k);
        else
          raw.clear();
        raw.unpack(next_x + i * kPer);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          const int k = k0 + first_k + e * kStepK;
          next_x[i * kPer + e] = pointer[i] && k < p.reduction ? load_one(pointer[i] + k * p.from.c) : S(0);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < Q::kWeights; ++e) {
      const int k = k0 + wk0 + e * wk_step, m = wm0 + e * wm_step;
      next_w[e] = k < p.reduction && m0 + m < p.rows ? load_one(tap_weight + k * p.wk + e * (wm_step * p.wm)) : S(0);
    }
  };
  const auto advance = [&] {
    k0 += kSlab;
    if (k0 < p.reduction) return;
    k0 = 0;
    if (++jw == th.count) jw = 0, ++jh;
    enter_tap();
  };
  const auto keep = [&](int to) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int e = 0; e < kPer; ++e) slab_x[to][first_k + e * kStepK][column[i]] = next_x[i * kPer + e];
#pragma unroll
    for (int e = 0; e < Q::kWeights; ++e) slab_w[to][wk0 + e * wk_step][wm0 + e * wm_step] = next_w[e];
  };

  const int lane = tid % 32, warp = tid / 32, warps_n = kBN / Q::kWarpN;
  const int row0 = warp / warps_n * Q::kWarpM + lane / 8 * 4, column0 = warp % warps_n * Q::kWarpN + lane % 8 * 4;
  const int slabs = tv.count * th.count * ((p.reduction + kSlab - 1) / kSlab);
  constexpr int kSums = std::is_same_v<T, float> ? 16 * kF * kF : 1;
  S sums[kSums];
  S* const chains = in_memory(sums);
  if (kSums > 1)
#pragma unroll
    for (int i = 0; i < kSums; ++i) chains[i] = S(0);
  if (slabs > 0) {
    enter_tap();
    load();
    keep(0);
    __syncthreads();
  }
  for (int s = 0; s < slabs; ++s) {
    const int now = s & 1;
    if (s + 1 < slabs) {
      advance();
      load();
    }
#pragma unroll
    for (int k = 0; k < kSlab; ++k) {
      S a[4 * kF], b[4 * kF];
#pragma unroll
      for (int f = 0; f < kF; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[4 * f + i] = slab_w[now][k][row0 + 16 * f + i];
          b[4 * f + i] = slab_x[now][k][column0 + 32 * f + i];
        }
#pragma unroll
      for (int i = 0; i < 4 * kF; ++i)
#pragma unroll
        for (int j = 0; j < 4 * kF; ++j) acc[i][j] += a[i] * b[j];
    }
    if (s + 1 < slabs) keep(now ^ 1);
    __syncthreads();
    if constexpr (kSums > 1)
      if (s % kChain == kChain - 1) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          S& a = acc[i / (4 * kF)][i % (4 * kF)];
          chains[i] += a, a = S(0);
        }
      }
  }
  if constexpr (kSums > 1)
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i / (4 * kF)][i % (4 * kF)] += chains[i];

  // Bias, activation, store.
  const int64_t channel0 = int64_t(group) * p.rows;
#pragma unroll
  for (int i = 0; i < 4 * kF; ++i) {
    const int m = m0 + row0 + i / 4 * 16 + i % 4;
    const S add = p.bias && m < p.rows ? load_one(p.bias + channel0 + m) : S(0);
#pragma unroll
    for (int j = 0; j < 4 * kF; ++j) acc[i][j] = activate(acc[i][j] + add, p.activation, p.slope);
  }
#pragma unroll
  for (int j = 0; j < 4 * kF; ++j) {
    const int64_t q = pixel0 + column0 + j / 4 * 32 + j % 4;
    if (q >= pixels) continue;
    const Split x = split(q, th.size), y = split(x.quotient, tv.size);
    T* const to = p.result + y.quotient * p.to.n + (tv.first + y.remainder * tv.stride) * p.to.h +
                  (th.first + x.remainder * th.stride) * p.to.w + channel0 * p.to.c;
#pragma unroll
    for (int f = 0; f < kF; ++f) {
      const int m = m0 + row0 + 16 * f;
      if (p.wide_store) {
        if (m >= p.rows) continue;
        S four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = acc[4 * f + i][j];
        Raw<T, 4> raw;
        raw.pack(four);
        raw.store(to + m);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (m + i < p.rows) store_one(to + (m + i) * p.to.c, acc[4 * f + i][j]);
      }
    }
  }
}

// Weight to [group][tap][reduction][row], so that adjacent rows are adjacent in memory.
template <class T>
__global__ void __launch_bounds__(256)
    pack(const T* from, T* to, int64_t rows, int64_t reduction, int64_t kw, int64_t taps, int64_t wk, int64_t wm,
         int64_t wh, int64_t ww, int64_t wg, int64_t total) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= total) return;
  const Split m = split(i, rows), k = split(m.quotient, reduction), tap = split(k.quotient, taps);
  const Split position = split(tap.remainder, kw);
  Raw<T, 1> raw;
  raw.load(from + tap.quotient * wg + position.quotient * wh + position.remainder * ww + k.remainder * wk +
           m.remainder * wm);
  raw.store(to + i);
}

// Packing costs a launch and a pass over the weight; it pays where many blocks read the weight.
bool packs(const Convolution& c, Pass pass) {
  const int64_t pixels = pass == Pass::forward ? c.n * c.oh * c.ow : c.n * c.ih * c.iw;
  return !c.weight_channels_last && int64_t(c.kh) * c.kw > 1 && pixels >= 4096;
}

template <class T, int kBM, int kBN, bool kVector>
const char* start(Gemm<T>& p, void* stream) {
  const int64_t most = p.n * p.v.taps(0).size * p.h.taps(0).size;
  p.row_tiles = int(ceil_div(p.rows, kBM));
  const double blocks = double(ceil_div(most, kBN)) * p.groups * p.row_tiles * p.v.phases() * p.h.phases();
  if (blocks > double(kMaxGrid)) return "the result has too many pixels or phases";
  constexpr int kThreads = GemmShape<T, kBM, kBN, kVector>::kThreads;
  AEUP_LAUNCH((conv_gemm<T, kBM, kBN, kVector>), int64_t(blocks), kThreads, 0, stream, p);
  return nullptr;
}
template <class T, bool kVector>
const char* with_tile(Gemm<T>& p, void* stream) {
  if constexpr (std::is_same_v<T, double>) {
    return start<T, 64, 64, kVector>(p, stream);
  } else {
    if (p.rows <= 32) return start<T, 32, 256, kVector>(p, stream);
    return start<T, 64, 128, kVector>(p, stream);
  }
}

template <class T>
const char* run(const Convolution& c, Pass pass, void* workspace, void* stream) {
  const bool forward = pass == Pass::forward;
  const int64_t ci = c.ci / c.groups, co = c.co / c.groups, taps = int64_t(c.kh) * c.kw;
  Gemm<T> p{};
  p.source = static_cast<const T*>(forward ? c.input : c.grad);
  p.weight = static_cast<const T*>(c.weight);
  p.result = static_cast<T*>(c.result);
  p.v = axis_map(c, true, forward), p.h = axis_map(c, false, forward);
  p.n = c.n, p.groups = c.groups;
  p.rows = int(forward ? co : ci), p.reduction = int(forward ? ci : co);
  const Strides input = strides_of(c.ci, c.ih, c.iw, c.channels_last);
  const Strides output = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.from = forward ? input : output, p.to = forward ? output : input;
  const WeightStrides w = weight_strides(c);
  p.wk = forward ? w.ci : w.co, p.wm = forward ? w.co : w.ci, p.wh = w.h, p.ww = w.w, p.wg = ci * w.ci;
  p.bias = static_cast<const T*>(c.bias), p.activation = c.activation, p.slope = c.slope;
  if (packs(c, pass)) {
    if (!workspace) return "the generic kernels need a workspace";
    T* const packed = static_cast<T*>(workspace);
    const int64_t total = c.ci * co * taps;
    AEUP_LAUNCH(pack<T>, ceil_div(total, 256), 256, 0, stream, p.weight, packed, int64_t(p.rows), int64_t(p.reduction),
                int64_t(c.kw), taps, p.wk, p.wm, p.wh, p.ww, p.wg, total);
    p.weight = packed;
    p.wm = 1, p.wk = p.rows, p.ww = ci * co, p.wh = c.kw * p.ww, p.wg = taps * p.ww;
  }
  const int size = int(sizeof(T)), vector = size == 2 ? 8 : 16 / size;
  p.wide_store = c.channels_last && p.rows % 4 == 0 && alignment_of(c.result) >= (size > 4 ? 16 : 4 * size);
  const bool vectors = c.channels_last && p.reduction % vector == 0 && alignment_of(p.source) == 16;
  return vectors ? with_tile<T, true>(p, stream) : with_tile<T, false>(p, stream);
}

}  // namespace

int64_t conv_gemm_workspace(const Convolution& c, Pass pass) {
  return packs(c, pass) ? c.ci * (c.co / c.groups) * c.kh * c.kw * element_size(c.dtype) : 0;
}

const char* launch_conv_gemm(const Convolution& c, Pass pass, void* workspace, void* stream) {
  return with_type(c.dtype, [&](auto t) { return run<decltype(t)>(c, pass, workspace, stream); });
}

}  // namespace aeup
