// The implicit GEMM of a transposed convolution and of its input gradient on Hopper: persistent, warp-specialised,
// tensor maps and wgmma. Rows are pixels, columns are channels, the sum runs over taps and channels.
//
// One tile is a box of pixels of one group of phases. A tap is the box of the source shifted by (h, w), read through a
// tensor map, which fills what lies outside the image with zeros, times one [channels, channels] slice of the weight.
// The forward reads the input through one map and has a group for each phase, or for phases merged because they read
// the same pixels (every phase where the kernel is a multiple of the stride); their columns then lie side by side. The
// input gradient reads the output's gradient through one map for each phase, and has one group.
#pragma once
#include "../convolution.h"
#include "cuda/hopper.h"
#include "cuda/wgmma.cuh"

namespace aeup {

struct GemmTap {  // one word, read at once
  uint32_t bits;
  GemmTap() = default;
  GemmTap(int weight, int map, int h, int w)
      : bits(uint32_t(weight) | uint32_t(map) << 12 | uint32_t(uint8_t(h)) << 16 | uint32_t(uint8_t(w)) << 24) {}
  AEUP_DEV int weight() const { return int(bits & 0xfff); }   // kernel index kh * KW + kw
  AEUP_DEV int map() const { return int(bits >> 12 & 0xf); }  // of the source
  AEUP_DEV int h() const { return int8_t(bits >> 16); }       // shift of the source box
  AEUP_DEV int w() const { return int8_t(bits >> 24); }
};
struct GemmGroup {
  int16_t first_tap, taps;
  int16_t oh, ow;  // pixel (uh, uw) is output (stride_h * uh + oh, stride_w * uw + ow)
};
// The only tap of a group that has none: weight and source are outside of their maps, and so zeros.
constexpr int kNoTap = kGemmTaps - 1, kNoWeight = 0xfff, kNoRow = 1 << 30;

// They travel with each launch, so they are made small: no map and no group that the kernel has no use for.
template <int kMaps, int kGroups>
struct GemmParams {
  CUtensorMap source[kMaps], weight;
  void* out;         // [n, oh, ow, c], dense
  const void* bias;  // [c] or null
  int64_t n;
  int oh, ow, c;
  int columns;  // c, or phases * c where the phases are columns: column v is channel v % c of group[v / c]'s output
  int word;     // columns v .. v + word - 1, v a multiple of word, are aligned neighbours in memory: 8, 4 or 1
  int stride_h, stride_w;
  int activation;
  float slope;
  int chunks;               // of 64 source channels
  bool short_chunk;         // the last one has at most 32
  int splits = 1;           // ranges of the sum, each a tile of its own: then `out` is float32 [splits, n, oh, ow, c]
  int groups, merged;       // merged: phases in a tile, 1 or 4; then group 0 has the taps of the first
  int16_t add[4];           // to a tap's weight, for each merged phase
  int blocks;               // column blocks in a group
  int box_n, box_h, box_w;  // pixels of a tile
  int tiles_h, tiles_w;
  int tiles;  // all
  Divider by_splits, by_groups, by_blocks, by_tiles_w, by_tiles_h, by_c;
  uint32_t source_bytes;  // of one box
  GemmGroup group[kGroups];
  GemmTap tap[kGemmTaps];
};
static_assert(sizeof(ForwardParams) <= 2048 && sizeof(GradientParams<4>) <= 2048 && sizeof(FloatParams) < 4096);

template <int BM, int BN>
struct GemmShape {
  static constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1), kTilesM = BM / (64 * kWarpgroups);
  static constexpr int kBoxes = BN < 64 ? 1 : BN / 64;
  static constexpr int kABytes = BM * 128, kBBytes = kBoxes * 8192, kStage = kABytes + kBBytes;
  static constexpr int kStaging = 4 * kWarpgroups * 2048, kBias = kWarpgroups * kBoxes * 256;
  static constexpr int kFree = 227 * 1024 - 1024 - 128 - kStaging - kBias;
  static constexpr int kStages = kFree / kStage < 8 ? kFree / kStage : 8;
  static constexpr int kBytes = 1024 + kStages * kStage + kStaging + kBias + 2 * 8 * 8;
};

template <class T>
AEUP_DEV uint32_t pair_of(float a, float b) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return bf16_pair(a, b);
  else
    return half_pair(a, b);
}
// What is not a bound from below; kernels of their own, so that the plain ones stay short.
AEUP_DEV float smooth(float v, int activation, float slope) {
  switch (Activation(activation)) {
    case Activation::leaky_relu: return v < 0 ? v * slope : v;
    case Activation::silu: return v / (1 + __expf(-v));
    case Activation::gelu: return 0.5f * v * (1 + erff(v * 0.70710678118654752f));
    case Activation::tanh: return tanhf(v);
    default: return 1 / (1 + __expf(-v));
  }
}

struct GemmTile {
  int split, group, block, n, h, w;  // column block; first pixel of the box in the group's domain
};
AEUP_DEV int take_digit(int& n, const Divider& d) {  // n % d; n becomes n / d
  const int quotient = d.divide(n), digit = n - quotient * int(d.divisor);
  n = quotient;
  return digit;
}
template <class P>
AEUP_DEV GemmTile gemm_tile(const P& p, int index) {
  GemmTile t;
  t.split = take_digit(index, p.by_splits);
  t.group = take_digit(index, p.by_groups);
  t.block = take_digit(index, p.by_blocks);
  t.w = take_digit(index, p.by_tiles_w) * p.box_w;
  t.h = take_digit(index, p.by_tiles_h) * p.box_h;
  t.n = index * p.box_n;
  return t;
}
// The steps of a tile: step s is tap s % taps of chunk s / taps.
struct GemmSteps {
  int first, end;
};
template <class P>
AEUP_DEV GemmSteps gemm_steps(const P& p, const GemmTile& t) {
  const int steps = p.group[t.group].taps * p.chunks;
  return {steps * t.split / p.splits, steps * (t.split + 1) / p.splits};
}

// 16 rows x 64 columns (kChunks of 8) from shared memory, kElements of 4 or 1 at a time: where 8 neighbours are not
// always aligned neighbours in memory. Neighbouring lanes store neighbouring columns.
template <class T, int kElements, int kChunks, class P>
AEUP_DEV void store_columns(const P& p, const GemmGroup& g, uint32_t own, const int (&pixel)[4], const int (&top)[4],
                            const int (&left)[4], int first) {
  constexpr int kWords = kChunks * 8 / kElements, kLanes = kWords < 32 ? kWords : 32, kRows = 32 / kLanes;
  const int lane = threadIdx.x % 32, row_lane = lane / kLanes * 8;
#pragma unroll
  for (int word = lane % kLanes; word < kWords; word += kLanes) {
    const int v = first + word * kElements;
    int c = v, oh = g.oh, ow = g.ow;
    if (p.columns != p.c && v < p.columns) {
      const int q = p.by_c.divide(v);
      c = v - q * p.c, oh = p.group[q].oh, ow = p.group[q].ow;
    }
    T* out = static_cast<T*>(p.out) + c;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll 1
      for (int from = 0; from < 32; from += 8 * kRows) {
        const int row = i * 4 + (from + row_lane) / 8, column = word * kElements / 8;
        const int y = __shfl_sync(~0u, top[i], from + row_lane) + oh;
        const int x = __shfl_sync(~0u, left[i], from + row_lane) + ow;
        const int64_t at = __shfl_sync(~0u, pixel[i], from + row_lane) + oh * p.ow + ow;
        const uint32_t address = own + row * 128 + ((column ^ (row & 7)) << 4) + word * kElements % 8 * 2;
        const bool inside = unsigned(y) < unsigned(p.oh) && unsigned(x) < unsigned(p.ow) && v < p.columns;
        if constexpr (kElements == 4) {
          if (inside) store_words<8>(out + at * p.c, load_shared<Raw<float, 2>>(address).w);
        } else {
          const uint32_t value = load_shared<uint16_t>(address);
          if (inside) store_words<2>(out + at * p.c, &value);
        }
      }
  }
}

// kForward: the weight slice is [source channels, 64 columns] with the columns contiguous, else [columns, 64 source
// channels] with the source channels contiguous. kPartial: no epilogue, float32 sums of each of `splits` ranges.
template <class T, int BM, int BN, bool kForward, bool kSmooth, bool kPartial, class P>
__global__ void __launch_bounds__(GemmShape<BM, BN>::kThreads, 1) hopper_gemm(const __grid_constant__ P p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = GemmShape<BM, BN>;
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  unsigned char* staging = base + S::kStages * S::kStage;
  float* bias_shared = reinterpret_cast<float*>(staging + S::kStaging);
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + S::kStaging + S::kBias);
  uint64_t* empty = full + 8;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 32) prefetch_map(&p.weight), prefetch_map(&p.source[0]);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) barrier_init(full + i, 2), barrier_init(empty + i, 4 * S::kWarpgroups);
    barrier_init_fence();
  }
  __syncthreads();
  after_previous();
  const int columns = BN / p.merged;
  int box_phase[S::kBoxes], box_column[S::kBoxes];  // of 64 columns: merged phase, first column within it
#pragma unroll
  for (int j = 0; j < S::kBoxes; ++j) {
    box_phase[j] = p.merged == 1 ? 0 : j * p.merged / S::kBoxes;
    box_column[j] = 64 * j - box_phase[j] * columns;
  }

  if (warpgroup == 0) {
    give_registers<40>();
    // Warp 0 fetches the source, warp 1 the weight: one thread issuing both would not keep up with short steps.
    uint32_t stage = 0, parity = 1;
    for (int index = warp < 2 && lane == 0 ? blockIdx.x : p.tiles; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      const int first = p.group[t.group].first_tap, taps = p.group[t.group].taps, c0 = t.block * columns;
      const int top = first == kNoTap ? kNoRow : t.h;
      const GemmSteps steps = gemm_steps(p, t);
      int chunk = steps.first / taps * 64, i = first + steps.first % taps;
      for (int step = steps.first; step < steps.end; ++step) {
        const GemmTap tap = p.tap[i];
        unsigned char* a = base + stage * S::kStage;
        unsigned char* b = a + S::kABytes;
        barrier_wait(empty + stage, parity);
        if (warp == 0) {
          barrier_expect(full + stage, p.source_bytes);
          copy_box(a, &p.source[kForward ? 0 : tap.map()], full + stage, chunk, t.w + tap.w(), top + tap.h(), t.n);
        } else {
          barrier_expect(full + stage, S::kBBytes);
          if constexpr (kForward) {
#pragma unroll
            for (int j = 0; j < S::kBoxes; ++j) {
              const int weight = tap.weight() + p.add[box_phase[j]];
              copy_box(b + j * 8192, &p.weight, full + stage, c0 + box_column[j], chunk, weight);
            }
          } else {
            copy_box(b, &p.weight, full + stage, chunk, c0, tap.weight());
          }
        }
        if (++i == first + taps) i = first, chunk += 64;
        if (++stage == S::kStages) stage = 0, parity ^= 1;
      }
    }
  } else {
    take_registers<232>();
    const int consumer = warpgroup - 1;
    const uint32_t base_address = shared_address(base);
    const uint32_t own = shared_address(staging) + (consumer * 4 + warp) * 2048;
    float* own_bias = bias_shared + consumer * S::kBoxes * 64;
    int row_box[S::kTilesM][4];  // of the rows that this lane stores: image, row and column in the box, 10 bits each
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (consumer * S::kTilesM + m) * 64 + warp * 16 + i * 4 + lane / 8;
        const int rows = row / p.box_w, image = rows / p.box_h;
        row_box[m][i] = image < p.box_n ? image << 20 | rows % p.box_h << 10 | row % p.box_w : -1;
      }
    uint32_t stage = 0, parity = 0;
    // The second warpgroup starts two steps late, so that one multiplies while the other stores.
    const GemmSteps early = gemm_steps(p, gemm_tile(p, blockIdx.x));
    if (consumer == 1 && S::kStages > 2 && early.end - early.first > 2) barrier_wait(full + 2, 0);
    float acc[S::kTilesM][BN / 2];
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      const T* bias = static_cast<const T*>(p.bias);
      float own_values[(S::kBoxes + 1) / 2];
#pragma unroll
      for (int e = 0; e < (S::kBoxes + 1) / 2; ++e) {
        const int v = threadIdx.x % 128 + 128 * e, j = v / 64;  // column of the tile
        const int c = t.block * columns + 64 * j - (p.merged == 1 ? 0 : j * p.merged / S::kBoxes * columns) + v % 64;
        own_values[e] = bias && j < S::kBoxes && c < p.columns
                            ? load_one(bias + (p.columns == p.c ? c : c - p.by_c.divide(c) * p.c))
                            : 0.f;
      }
      const GemmSteps steps = gemm_steps(p, t);
      const int whole = p.short_chunk ? p.group[t.group].taps * (p.chunks - 1) : steps.end;
      int step = steps.first;
      uint64_t* previous = nullptr;
      const auto multiply = [&](auto sixteens) {  // channels of the step
        barrier_wait(full + stage, parity);
        const uint32_t a = base_address + stage * S::kStage + consumer * S::kTilesM * 8192;
        const uint32_t b = base_address + stage * S::kStage + S::kABytes;
        const uint64_t ad = operand(a, 16, 1024), bd = kForward ? operand(b, 8192, 1024) : operand(b, 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < sixteens; ++k)
#pragma unroll
          for (int m = 0; m < S::kTilesM; ++m)  // descriptors count 16 bytes
            wgmma<T, 0, kForward>(acc[m], ad + m * 512 + k * 2, bd + k * (kForward ? 128 : 2), step + k > steps.first);
        wgmma_commit();
        wgmma_wait<1>();
        if (previous && lane == 0) barrier_arrive(previous);
        previous = empty + stage;
        if (++stage == S::kStages) stage = 0, parity ^= 1;
      };
      const auto finish = [&] {
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) hold(acc[m]);
        if (previous && lane == 0) barrier_arrive(previous);
        previous = nullptr;
      };
      for (; step < steps.end && step < whole; ++step) multiply(std::integral_constant<int, 4>());
      if (step < steps.end) {
        finish();
        for (; step < steps.end; ++step) multiply(std::integral_constant<int, 2>());
      }
      named_barrier(1 + consumer, 128);  // the tile before has read its bias
#pragma unroll
      for (int e = 0; e < (S::kBoxes + 1) / 2; ++e) {
        const int v = threadIdx.x % 128 + 128 * e;
        if (v < S::kBoxes * 64) own_bias[v] = own_values[e];
      }
      named_barrier(1 + consumer, 128);
      finish();
      const float least = p.activation == int(Activation::relu) ? 0.f : -__int_as_float(0x7f800000);
      // Each warp turns 16 rows x 64 columns at a time in its own shared memory, so that a row leaves as whole lines.
      constexpr int kChunks = (BN < 64 ? BN : 64) / 8;  // of 8 columns
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        int pixel[4], top[4], left[4];  // of the output, before the phase
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = t.n + (row_box[m][i] >> 20);
          top[i] = row_box[m][i] >= 0 && n < p.n ? (t.h + (row_box[m][i] >> 10 & 1023)) * p.stride_h : INT_MIN / 2;
          left[i] = (t.w + (row_box[m][i] & 1023)) * p.stride_w;
          pixel[i] = int((unsigned(n) * p.oh + top[i]) * p.ow + left[i]);
        }
#pragma unroll
        for (int j = 0; j < (kPartial ? BN / 32 : 0); ++j) {  // 16 rows x 32 columns
          __syncwarp();
#pragma unroll
          for (int b = 0; b < 8; ++b) {
            const int row = lane / 4 + b % 2 * 8, column = b / 2 * 2 + lane % 4 / 2;
            const float* from = &acc[m][j * 16 + b * 2];
            store_shared(own + row * 128 + ((column ^ (row & 7)) << 4) + lane % 2 * 8, from[0], from[1]);
          }
          __syncwarp();
          const int c = t.block * BN + j * 32 + lane % 8 * 4;
          float* out = static_cast<float*>(p.out) + int64_t(t.split) * p.n * p.oh * p.ow * p.c + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = i * 4 + lane / 8;
            if (unsigned(top[i]) < unsigned(p.oh) && left[i] < p.ow && c < p.c)
              store_words<16>(out + int64_t(pixel[i]) * p.c,
                              load_shared<Words>(own + row * 128 + ((lane % 8 ^ (row & 7)) << 4)).w);
          }
        }
#pragma unroll
        for (int j = 0; j < (kPartial ? 0 : S::kBoxes); ++j) {
          __syncwarp();
#pragma unroll
          for (int b = 0; b < kChunks / 2; ++b) {
            uint32_t packed[4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {  // the two 8-column blocks of 16
              const float* from = &acc[m][j * 32 + (2 * b + h) * 4];
              const float2 add = *reinterpret_cast<const float2*>(own_bias + j * 64 + (2 * b + h) * 8 + lane % 4 * 2);
              float v[4] = {from[0] + add.x, from[1] + add.y, from[2] + add.x, from[3] + add.y};
#pragma unroll
              for (int e = 0; e < 4; ++e) v[e] = kSmooth ? smooth(v[e], p.activation, p.slope) : at_least(v[e], least);
              packed[2 * h] = pair_of<T>(v[0], v[1]), packed[2 * h + 1] = pair_of<T>(v[2], v[3]);
            }
            const int row = (lane / 8 & 1) * 8 + lane % 8, column = 2 * b + lane / 16;
            store_matrices(own + row * 128 + ((column ^ (row & 7)) << 4), packed[0], packed[1], packed[2], packed[3]);
          }
          __syncwarp();
          const GemmGroup& g = p.group[t.group + box_phase[j]];
          if (p.word == 8) {
            const int v = t.block * columns + box_column[j] + lane % 8 * 8;
            int c = v, oh = g.oh, ow = g.ow;
            if (p.columns != p.c && v < p.columns) {
              const int q = p.by_c.divide(v);
              c = v - q * p.c, oh = p.group[q].oh, ow = p.group[q].ow;
            }
            const bool inside = v < p.columns && lane % 8 < kChunks;
            T* out = static_cast<T*>(p.out) + c;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int y = top[i] + oh, x = left[i] + ow, row = i * 4 + lane / 8;
              if (unsigned(y) < unsigned(p.oh) && unsigned(x) < unsigned(p.ow) && inside)
                store_words<16>(out + int64_t(pixel[i] + oh * p.ow + ow) * p.c,
                                load_shared<Words>(own + row * 128 + ((lane % 8 ^ (row & 7)) << 4)).w);
            }
          } else if (p.word == 4) {
            store_columns<T, 4, kChunks>(p, g, own, pixel, top, left, t.block * columns + box_column[j]);
          } else {
            store_columns<T, 1, kChunks>(p, g, own, pixel, top, left, t.block * columns + box_column[j]);
          }
        }
      }
    }
  }
#endif
}

}  // namespace aeup
