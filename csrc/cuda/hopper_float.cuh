// The implicit GEMM of hopper_gemm.cuh for float32: the same tiles, taps and maps, steps of 32 source channels. Both
// operands are contiguous along the source channels (tf32 has no other form), so one kernel serves the forward and the
// input gradient; all phases are separate, or the columns of one group.
//
// tf32: one product; the copies into shared memory round to tf32 (the maps' element type).
// strict: three products at float32's error. a = hi + lo, both tf32: the pixels are split in registers on their way to
// wgmma, the weight beforehand into two planes. The sum of a step is taken small products first, since the tensor cores
// truncate what they add, and goes to a second accumulator rounded to nearest.
#pragma once
#include "cuda/float_pack.cuh"
#include "cuda/hopper_float.h"
#include "cuda/hopper_gemm.cuh"
#include "cuda/wgmma_tf32.cuh"

namespace aeup {

template <int BM, int BN, bool kStrict>
struct FloatShape {
  static constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1), kTilesM = BM / (64 * kWarpgroups);
  static constexpr int kABytes = BM * 128, kPlane = BN * 128, kBBytes = kPlane * (kStrict ? 2 : 1);
  static constexpr int kStage = kABytes + kBBytes;
  static constexpr int kStaging = 4 * kWarpgroups * 2048, kBias = kWarpgroups * BN * 4;
  static constexpr int kFree = 227 * 1024 - 1024 - 128 - kStaging - kBias;
  static constexpr int kStages = kFree / kStage < 8 ? kFree / kStage : 8;
  static constexpr int kBytes = 1024 + kStages * kStage + kStaging + kBias + 2 * 8 * 8;
};

AEUP_DEV float smooth_exact(float v, int activation) {
  switch (Activation(activation)) {
    case Activation::silu: return v / (1 + expf(-v));
    case Activation::gelu: return 0.5f * v * (1 + erff(v * 0.70710678118654752f));
    case Activation::tanh: return tanhf(v);
    default: return 1 / (1 + expf(-v));
  }
}
template <bool kSmooth>
AEUP_DEV float activated(float v, const FloatParams& p) {
  if constexpr (kSmooth) return smooth_exact(v, p.activation);
  if (p.activation == 0) return v;
  return v < 0 ? (p.activation == int(Activation::relu) ? 0.f : v * p.slope) : v;  // NaN stays NaN
}

// sum (+)= of one step's products, at the shared addresses of this warpgroup's rows and of the weight's planes. The
// source's channels 8 t .. 8 t + 7 of a row belong to lane t of its four, two for each k8 product: the weight is packed
// in that order (float_position), so that a row's 128 bytes are read 16 at a time without conflicts.
template <int kTilesM, int kLength>
AEUP_DEV void strict_step(float (&part)[kTilesM][kLength], uint32_t a, uint64_t hi, uint64_t lo) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, row = lane / 4;
  uint32_t high[kTilesM][4][4], low[kTilesM][4][4];  // [k8 product][operand register]
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t at = a + m * 8192 + (warp * 16 + r * 8 + row) * 128 + ((lane % 4 * 2 + half) ^ row) * 16;
        const Words v = load_shared<Words>(at);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = half * 2 + e / 2, i = r + e % 2 * 2;
          split_tf32(__uint_as_float(v.w[e]), &high[m][k][i], &low[m][k][i]);
        }
      }
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) hold(part[m]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      wgmma_tf32(part[m], low[m][k], hi + k * 2, k > 0);
      wgmma_tf32(part[m], high[m][k], lo + k * 2, 1);
    }
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) wgmma_tf32(part[m], high[m][k], hi + k * 2, 1);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) hold(part[m]);
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int k = 0; k < 4; ++k) keep(high[m][k]), keep(low[m][k]);
}

// nchw: the result is [n, c, oh, ow], stored by the lanes that hold it: 8 neighbouring pixels of 4 channels at a time.
// The phases of a row run side by side, so that their sectors fill up in L2.
template <int BM, int BN, bool kStrict, bool kSmooth>
__global__ void __launch_bounds__(FloatShape<BM, BN, kStrict>::kThreads, 1)
    hopper_float(const __grid_constant__ FloatParams p, bool nchw) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = FloatShape<BM, BN, kStrict>;
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  unsigned char* staging = base + S::kStages * S::kStage;
  float* bias_shared = reinterpret_cast<float*>(staging + S::kStaging);
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + S::kStaging + S::kBias);
  uint64_t* empty = full + 8;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) barrier_init(full + i, 2), barrier_init(empty + i, 4 * S::kWarpgroups);
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<40>();
    uint32_t stage = 0, parity = 1;
    for (int index = warp < 2 && lane == 0 ? blockIdx.x : p.tiles; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      const int first = p.group[t.group].first_tap, last = first + p.group[t.group].taps, c0 = t.block * BN;
      for (int chunk = 0; chunk < p.chunks * 32; chunk += 32) {
        for (int i = first; i < last; ++i) {
          const GemmTap tap = p.tap[i];
          unsigned char* a = base + stage * S::kStage;
          unsigned char* b = a + S::kABytes;
          barrier_wait(empty + stage, parity);
          if (warp == 0) {
            barrier_expect(full + stage, p.source_bytes);
            copy_box(a, &p.source[tap.map()], full + stage, chunk, t.w + tap.w(), t.h + tap.h(), t.n);
          } else {
            barrier_expect(full + stage, S::kBBytes);
            copy_box(b, &p.weight, full + stage, chunk, c0, tap.weight());
            if constexpr (kStrict) copy_box(b + S::kPlane, &p.weight, full + stage, chunk, c0, tap.weight() + p.add[1]);
          }
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    take_registers<232>();
    const int consumer = warpgroup - 1;
    const uint32_t base_address = shared_address(base);
    const uint32_t own = shared_address(staging) + (consumer * 4 + warp) * 2048;
    float* own_bias = bias_shared + consumer * BN;
    int row_box[S::kTilesM][4];  // of the rows that this lane stores: image, row and column in the box, 10 bits each
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (consumer * S::kTilesM + m) * 64 + warp * 16 + (nchw ? i % 2 * 8 + lane / 4 : i * 4 + lane / 8);
        const int rows = row / p.box_w, image = rows / p.box_h;
        row_box[m][i] = image < p.box_n ? image << 20 | rows % p.box_h << 10 | row % p.box_w : -1;
      }
    uint32_t stage = 0, parity = 0;
    // The second warpgroup starts two steps late, so that one multiplies while the other stores.
    if (consumer == 1 && S::kStages > 2 && p.group[gemm_tile(p, blockIdx.x).group].taps * p.chunks > 2)
      barrier_wait(full + 2, 0);
    float acc[S::kTilesM][BN / 2];
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      const GemmGroup& g = p.group[t.group];
      const int steps = g.taps * p.chunks;
      uint64_t* previous = empty;
      if (kStrict || steps == 0) {
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m)
#pragma unroll
          for (int i = 0; i < BN / 2; ++i) acc[m][i] = 0;
      }
      for (int i = 0; i < steps; ++i) {
        barrier_wait(full + stage, parity);
        const uint32_t a = base_address + stage * S::kStage + consumer * S::kTilesM * 8192;
        const uint32_t b = base_address + stage * S::kStage + S::kABytes;
        const uint64_t bd = operand(b, 16, 1024);
        if constexpr (kStrict) {
          float part[S::kTilesM][BN / 2];
          strict_step(part, a, bd, operand(b + S::kPlane, 16, 1024));
          if (lane == 0) barrier_arrive(empty + stage);
#pragma unroll
          for (int m = 0; m < S::kTilesM; ++m)
#pragma unroll
            for (int e = 0; e < BN / 2; ++e) acc[m][e] += part[m][e];
        } else {
          const uint64_t ad = operand(a, 16, 1024);
#pragma unroll
          for (int m = 0; m < S::kTilesM; ++m) hold(acc[m]);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int m = 0; m < S::kTilesM; ++m)  // descriptors count 16 bytes
              wgmma_tf32(acc[m], ad + m * 512 + k * 2, bd + k * 2, i + k > 0);
          wgmma_commit();
          wgmma_wait<1>();
#pragma unroll
          for (int m = 0; m < S::kTilesM; ++m) hold(acc[m]);
          if (i > 0 && lane == 0) barrier_arrive(previous);
          previous = empty + stage;
        }
        if (++stage == S::kStages) stage = 0, parity ^= 1;
      }
      const float* bias = static_cast<const float*>(p.bias);
      float own_values[(BN + 127) / 128];
#pragma unroll
      for (int e = 0; e < (BN + 127) / 128; ++e) {
        const int v = threadIdx.x % 128 + 128 * e, c = t.block * BN + v;
        own_values[e] = bias && v < BN && c < p.columns
                            ? load_one(bias + (p.columns == p.c ? c : c - p.by_c.divide(c) * p.c))
                            : 0.f;
      }
      named_barrier(1 + consumer, 128);  // the tile before has read its bias
#pragma unroll
      for (int e = 0; e < (BN + 127) / 128; ++e) {
        const int v = threadIdx.x % 128 + 128 * e;
        if (v < BN) own_bias[v] = own_values[e];
      }
      named_barrier(1 + consumer, 128);
      if constexpr (!kStrict) {
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) hold(acc[m]);
        if (steps > 0 && lane == 0) barrier_arrive(previous);
      }

      // Each warp turns 16 rows x 32 columns at a time in its own shared memory, so that a row leaves as a whole line.
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
        if (nchw) {
          const int64_t plane = int64_t(p.oh) * p.ow;
          float* first[2];  // of the two rows: channel 0 of the pixel before the phase
#pragma unroll
          for (int h = 0; h < 2; ++h)
            first[h] = static_cast<float*>(p.out) + (t.n + (row_box[m][h] >> 20)) * plane * p.c +
                       (int64_t(top[h]) * p.ow + left[h]);
#pragma unroll
          for (int b = 0; b < BN / 8; ++b)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int at = b * 8 + lane % 4 * 2 + e, v = t.block * BN + at;
              int c = v, oh = g.oh, ow = g.ow;
              if (p.columns != p.c && v < p.columns) {
                const int q = p.by_c.divide(v);
                c = v - q * p.c, oh = p.group[q].oh, ow = p.group[q].ow;
              }
              const float add = own_bias[at];
              const int64_t offset = c * plane + (oh * p.ow + ow);
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const float value = activated<kSmooth>(acc[m][b * 4 + 2 * h + e] + add, p);
                if (unsigned(top[h] + oh) < unsigned(p.oh) && unsigned(left[h] + ow) < unsigned(p.ow) && v < p.columns)
                  store_one(first[h] + offset, value);
              }
            }
          continue;
        }
#pragma unroll
        for (int j = 0; j < BN / 32; ++j) {
          __syncwarp();
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const float* from = &acc[m][j * 16 + b * 4];
            const float2 add = *reinterpret_cast<const float2*>(own_bias + j * 32 + b * 8 + lane % 4 * 2);
            float v[4] = {from[0] + add.x, from[1] + add.y, from[2] + add.x, from[3] + add.y};
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = activated<kSmooth>(v[e], p);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int row = lane / 4 + 8 * h, chunk = (2 * b + lane % 4 / 2) ^ (row & 3) << 1;
              store_shared(own + row * 128 + chunk * 16 + lane % 2 * 8, v[2 * h], v[2 * h + 1]);
            }
          }
          __syncwarp();
          if (p.c % 4 == 0) {
            const int v = t.block * BN + j * 32 + lane % 8 * 4;
            int c = v, oh = g.oh, ow = g.ow;
            if (p.columns != p.c && v < p.columns) {
              const int q = p.by_c.divide(v);
              c = v - q * p.c, oh = p.group[q].oh, ow = p.group[q].ow;
            }
            float* out = static_cast<float*>(p.out) + c;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int y = top[i] + oh, x = left[i] + ow, row = i * 4 + lane / 8;
              if (unsigned(y) < unsigned(p.oh) && unsigned(x) < unsigned(p.ow) && v < p.columns)
                store_words<16>(out + int64_t(pixel[i] + oh * p.ow + ow) * p.c,
                                load_shared<Words>(own + row * 128 + (lane % 8 ^ (row & 3) << 1) * 16).w);
            }
          } else {
            const int v = t.block * BN + j * 32 + lane;
            int c = v, oh = g.oh, ow = g.ow;
            if (p.columns != p.c && v < p.columns) {
              const int q = p.by_c.divide(v);
              c = v - q * p.c, oh = p.group[q].oh, ow = p.group[q].ow;
            }
            float* out = static_cast<float*>(p.out) + c;
#pragma unroll
            for (int row = 0; row < 16; ++row) {
              const int i = row / 4, from = row % 4 * 8;
              const int y = __shfl_sync(~0u, top[i], from) + oh, x = __shfl_sync(~0u, left[i], from) + ow;
              const int64_t at = __shfl_sync(~0u, pixel[i], from) + oh * p.ow + ow;
              const float value = load_shared<float>(own + row * 128 + (lane / 4 ^ (row & 3) << 1) * 16 + lane % 4 * 4);
              if (unsigned(y) < unsigned(p.oh) && unsigned(x) < unsigned(p.ow) && v < p.columns)
                store_one(out + at * p.c, value);
            }
          }
        }
      }
    }
  }
#endif
}

template <int BM, int BN, bool kStrict>
const char* launch_float(const FloatParams& p, bool nchw, void* stream) {
  using S = FloatShape<BM, BN, kStrict>;
  const int64_t grid = min(p.tiles, multiprocessors());
  if (p.activation > int(Activation::leaky_relu))
    AEUP_LAUNCH((hopper_float<BM, BN, kStrict, true>), grid, S::kThreads, S::kBytes, stream, p, nchw);
  else
    AEUP_LAUNCH((hopper_float<BM, BN, kStrict, false>), grid, S::kThreads, S::kBytes, stream, p, nchw);
  return nullptr;
}

}  // namespace aeup
