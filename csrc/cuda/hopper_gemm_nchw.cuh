// The implicit GEMM of hopper_gemm.cuh turned round for results in NCHW: rows are channels, columns are pixels, so that
// a thread holds neighbouring pixels of a channel and stores them as they lie in memory. Where the stride is 2, one
// tile makes both phases of a row (kPhases = 2), which interleave to whole sectors. The source is channels-last all the
// same.
#pragma once
#include "cuda/hopper_gemm.cuh"

namespace aeup {

// BM channels, and BN pixels for each warpgroup: with BM = 128 the two warpgroups share the pixels, with 64 the
// channels.
template <int BM, int BN>
struct NchwShape {
  static constexpr int kThreads = 384, kPixels = BM == 128 ? BN : 2 * BN;
  static constexpr int kABytes = BM * 128, kBBytes = kPixels * 128, kStage = kABytes + kBBytes;
  static constexpr int kOffsets = 2 * BN * 8;
  static constexpr int kFree = 227 * 1024 - 1024 - 128 - kOffsets;
  static constexpr int kStages = kFree / kStage < 8 ? kFree / kStage : 8;
  static constexpr int kBytes = 1024 + kStages * kStage + kOffsets + 2 * 8 * 8;
};

// p.group[t.group * kPhases + b] holds the taps of phase b; `merged` is 1 and `columns` is c.
template <class T, int BM, int BN, int kPhases, bool kForward, bool kSmooth>
__global__ void __launch_bounds__(384, 1) hopper_gemm_nchw(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = NchwShape<BM, BN>;
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  int64_t* offsets = reinterpret_cast<int64_t*>(base + S::kStages * S::kStage);
  uint64_t* full = reinterpret_cast<uint64_t*>(base + S::kStages * S::kStage + S::kOffsets);
  uint64_t* empty = full + 8;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 32) prefetch_map(&p.weight), prefetch_map(&p.source[0]);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) barrier_init(full + i, 2), barrier_init(empty + i, 8);
    barrier_init_fence();
  }
  __syncthreads();
  after_previous();

  if (warpgroup == 0) {
    give_registers<40>();
    uint32_t stage = 0, parity = 1;
    for (int index = warp < 2 && lane == 0 ? blockIdx.x : p.tiles; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      for (int phase = 0; phase < kPhases; ++phase) {
        const GemmGroup& g = p.group[t.group * kPhases + phase];
        const int first = g.first_tap, last = first + g.taps;
        for (int chunk = 0; chunk < p.chunks * 64; chunk += 64) {
          for (int i = first; i < last; ++i) {
            const GemmTap tap = p.tap[i];
            unsigned char* a = base + stage * S::kStage;
            barrier_wait(empty + stage, parity);
            if (warp == 0) {
              barrier_expect(full + stage, p.source_bytes);
              copy_box(a + S::kABytes, &p.source[kForward ? 0 : tap.map], full + stage, chunk, t.w + tap.w, t.h + tap.h,
                       t.n);
            } else {
              barrier_expect(full + stage, S::kABytes);
              if constexpr (kForward) {
#pragma unroll
                for (int j = 0; j < BM / 64; ++j)
                  copy_box(a + j * 8192, &p.weight, full + stage, t.block * BM + j * 64, chunk, tap.weight[0]);
              } else {
                copy_box(a, &p.weight, full + stage, chunk, t.block * BM, tap.weight[0]);
              }
            }
            if (++stage == S::kStages) stage = 0, parity ^= 1;
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int consumer = warpgroup - 1;
    const uint32_t base_address = shared_address(base);
    const int first_pixel = BM == 128 ? 0 : consumer * BN;
    int64_t* own_offsets = offsets + consumer * BN;
    const int64_t plane = int64_t(p.oh) * p.ow;
    const float least = p.activation == int(Activation::relu) ? 0.f : -__int_as_float(0x7f800000);
    // Pairs of pixels stay in one row of the image and store as one word for each phase.
    const bool paired = p.box_w % 2 == 0 && p.ow % (2 * kPhases) == 0;
    uint32_t stage = 0, parity = 0;
    float acc[kPhases][BN / 2];
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      const GemmGroup& g = p.group[t.group * kPhases];
      const int channel = t.block * BM + (BM == 128 ? consumer * 64 : 0) + warp * 16 + lane / 4;  // and channel + 8
      const T* bias = static_cast<const T*>(p.bias);
      const float bias0 = bias && channel < p.c ? load_one(bias + channel) : 0.f;
      const float bias1 = bias && channel + 8 < p.c ? load_one(bias + channel + 8) : 0.f;
      named_barrier(1 + consumer, 128);  // the tile before has read its offsets
#pragma unroll
      for (int e = 0; e < BN; e += 128) {
        const int at = first_pixel + e + threadIdx.x % 128, rows = at / p.box_w, image = rows / p.box_h;
        const int n = t.n + image, y = (t.h + rows % p.box_h) * p.stride_h + g.oh[0];
        const int x = (t.w + at % p.box_w) * kPhases;
        const bool inside = image < p.box_n && n < p.n && y < p.oh && x < p.ow;
        own_offsets[e + threadIdx.x % 128] = inside ? n * plane * p.c + int64_t(y) * p.ow + x : -1;
      }
      named_barrier(1 + consumer, 128);
      uint64_t* previous = nullptr;
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) {
        const int steps = p.group[t.group * kPhases + phase].taps * p.chunks;
        for (int i = 0; i < steps; ++i) {
          barrier_wait(full + stage, parity);
          const uint32_t a = base_address + stage * S::kStage + (BM == 128 ? consumer * 8192 : 0);
          const uint32_t b = base_address + stage * S::kStage + S::kABytes + first_pixel * 128;
          const uint64_t ad = operand(a, 16, 1024), bd = operand(b, 16, 1024);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k)
            wgmma<T, kForward, 0>(acc[phase], ad + k * (kForward ? 128 : 2), bd + k * 2, i + k > 0);
          wgmma_commit();
          wgmma_wait<1>();
          if (previous && lane == 0) barrier_arrive(previous);
          previous = empty + stage;
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
      }
      wgmma_wait<0>();
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) hold(acc[phase]);
      if (lane == 0) barrier_arrive(previous);

#pragma unroll
      for (int b = 0; b < BN / 8; ++b) {
        const int64_t at = own_offsets[b * 8 + lane % 4 * 2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int c = channel + 8 * h;
          float v[2][kPhases];  // [pixel][phase]: as they lie in a row
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float x = acc[phase][b * 4 + 2 * h + e] + (h ? bias1 : bias0);
              v[e][phase] = kSmooth ? smooth(x, p.activation, p.slope) : at_least(x, least);
            }
          if (c >= p.c) continue;
          T* out = static_cast<T*>(p.out) + c * plane;
          if (paired) {
            if (at < 0) continue;
            if constexpr (kPhases == 2) {
              const uint32_t pairs[2] = {pair_of<T>(v[0][0], v[0][1]), pair_of<T>(v[1][0], v[1][1])};
              store_words<8>(out + at, pairs);
            } else {
              const uint32_t pair = pair_of<T>(v[0][0], v[1][0]);
              store_words<4>(out + at, &pair);
            }
          } else {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int64_t from = e ? own_offsets[b * 8 + lane % 4 * 2 + 1] : at;
              if (from < 0) continue;
              store_one(out + from, v[e][0]);
              if (kPhases == 2 && from % p.ow + 1 < p.ow) store_one(out + from + 1, v[e][kPhases - 1]);
            }
          }
        }
      }
    }
  }
#endif
}

}  // namespace aeup
