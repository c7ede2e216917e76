// The implicit GEMM of hopper_gemm.cuh turned round for results in NCHW: rows are channels, columns are pixels. Where
// the stride is 2, one tile makes both phases of a row of the image (kPhases = 2), one after the other, and stores them
// interleaved. The source is channels-last all the same.
#pragma once
#include "cuda/hopper_gemm.cuh"

namespace aeup {

// BM channels, and BN pixels for each warpgroup: with BM = 128 the two warpgroups share the pixels, with 64 the
// channels.
template <int BM, int BN>
struct NchwShape {
  static constexpr int kThreads = 384, kPixels = BM == 128 ? BN : 2 * BN;
  static constexpr int kABytes = BM * 128, kBBytes = kPixels * 128, kStage = kABytes + kBBytes;
  static constexpr int kStaging = 8 * 2048, kOffsets = 2 * BN * 8;
  static constexpr int kFree = 227 * 1024 - 1024 - 128 - kStaging - kOffsets;
  static constexpr int kStages = kFree / kStage < 8 ? kFree / kStage : 8;
  static constexpr int kBytes = 1024 + kStages * kStage + kStaging + kOffsets + 2 * 8 * 8;
};

// p.group[t.group * kPhases + b] holds the taps of phase b; `merged` is 1 and `columns` is c.
template <class T, int BM, int BN, int kPhases, bool kForward, bool kSmooth, class P>
__global__ void __launch_bounds__(384, 1) hopper_gemm_nchw(const __grid_constant__ P p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = NchwShape<BM, BN>;
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  unsigned char* staging = base + S::kStages * S::kStage;
  int64_t* offsets = reinterpret_cast<int64_t*>(staging + S::kStaging);
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + S::kStaging + S::kOffsets);
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
        const int first = g.first_tap, last = first + g.taps, top = first == kNoTap ? kNoRow : t.h;
        for (int chunk = 0; chunk < p.chunks * 64; chunk += 64) {
          for (int i = first; i < last; ++i) {
            const GemmTap tap = p.tap[i];
            unsigned char* a = base + stage * S::kStage;
            barrier_wait(empty + stage, parity);
            if (warp == 0) {
              barrier_expect(full + stage, p.source_bytes);
              copy_box(a + S::kABytes, &p.source[kForward ? 0 : tap.map()], full + stage, chunk, t.w + tap.w(),
                       top + tap.h(), t.n);
            } else {
              barrier_expect(full + stage, S::kABytes);
              if constexpr (kForward) {
#pragma unroll
                for (int j = 0; j < BM / 64; ++j)
                  copy_box(a + j * 8192, &p.weight, full + stage, t.block * BM + j * 64, chunk, tap.weight());
              } else {
                copy_box(a, &p.weight, full + stage, chunk, t.block * BM, tap.weight());
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
    const uint32_t own = shared_address(staging) + (consumer * 4 + warp) * 2048;
    const int first_pixel = BM == 128 ? 0 : consumer * BN;
    int64_t* own_offsets = offsets + consumer * BN;
    const int64_t plane = int64_t(p.oh) * p.ow;
    const float least = p.activation == int(Activation::relu) ? 0.f : -__int_as_float(0x7f800000);
    // Each 8 outputs are neighbours in memory, aligned, and all inside or all outside: within a row, or in images whose
    // rows follow each other in the tile.
    const bool whole = (p.ow % 8 == 0 && p.box_w * kPhases % 8 == 0) ||
                       (kPhases * p.stride_h == 1 && p.box_w == p.ow && p.box_w * p.box_h % 8 == 0 && plane % 8 == 0);
    uint32_t stage = 0, parity = 0;
    // As in hopper_gemm: one multiplies while the other stores.
    if (consumer == 1 && S::kStages > 2 && p.group[gemm_tile(p, blockIdx.x).group * kPhases].taps * p.chunks > 2)
      barrier_wait(full + 2, 0);
    float acc[BN / 2];
    uint32_t kept[kPhases == 2 ? BN / 4 : 1];  // the first phase, rounded: pairs of pixels
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const GemmTile t = gemm_tile(p, index);
      const GemmGroup& g = p.group[t.group * kPhases];
      const int channel = t.block * BM + (BM == 128 ? consumer * 64 : 0) + warp * 16;  // the first of 16
      const T* bias = static_cast<const T*>(p.bias);
      const float bias0 = bias && channel + lane / 4 < p.c ? load_one(bias + channel + lane / 4) : 0.f;
      const float bias1 = bias && channel + lane / 4 + 8 < p.c ? load_one(bias + channel + lane / 4 + 8) : 0.f;
      named_barrier(1 + consumer, 128);  // the tile before has read its offsets
#pragma unroll
      for (int e = 0; e < BN; e += 128) {
        const int at = first_pixel + e + threadIdx.x % 128, rows = at / p.box_w, image = rows / p.box_h;
        const int n = t.n + image, y = (t.h + rows % p.box_h) * p.stride_h + g.oh;
        const int x = (t.w + at % p.box_w) * kPhases;
        const bool inside = image < p.box_n && n < p.n && y < p.oh && x < p.ow;
        // of the first phase, times 2, and whether the second is inside
        own_offsets[e + threadIdx.x % 128] =
            inside ? (n * plane * p.c + int64_t(y) * p.ow + x) * 2 + (x + kPhases <= p.ow) : -1;
      }
      named_barrier(1 + consumer, 128);
      // Two pixels of row lane / 4 (half = 0) or 8 below.
      const auto rounded = [&](int block, int half) {
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = acc[block * 4 + 2 * half + e] + (half ? bias1 : bias0);
          v[e] = kSmooth ? smooth(x, p.activation, p.slope) : at_least(x, least);
        }
        return pair_of<T>(v[0], v[1]);
      };
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) {
        uint64_t* previous = nullptr;
        const int taps = p.group[t.group * kPhases + phase].taps, steps = taps * p.chunks;
        const int whole_steps = p.short_chunk ? steps - taps : steps;
        int step = 0;
        const auto multiply = [&](auto sixteens) {  // channels of the step
          barrier_wait(full + stage, parity);
          const uint32_t a = base_address + stage * S::kStage + (BM == 128 ? consumer * 8192 : 0);
          const uint32_t b = base_address + stage * S::kStage + S::kABytes + first_pixel * 128;
          const uint64_t ad = operand(a, 16, 1024), bd = operand(b, 16, 1024);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < sixteens; ++k)
            wgmma<T, kForward, 0>(acc, ad + k * (kForward ? 128 : 2), bd + k * 2, step + k > 0);
          wgmma_commit();
          wgmma_wait<1>();
          if (previous && lane == 0) barrier_arrive(previous);
          previous = empty + stage;
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        };
        const auto finish = [&] {
          wgmma_wait<0>();
          hold(acc);
          if (previous && lane == 0) barrier_arrive(previous);
          previous = nullptr;
        };
        for (; step < whole_steps; ++step) multiply(std::integral_constant<int, 4>());
        if (step < steps) {
          finish();
          for (; step < steps; ++step) multiply(std::integral_constant<int, 2>());
        }
        finish();
        if constexpr (kPhases == 2) {
          if (phase == 0) {
#pragma unroll
            for (int i = 0; i < BN / 4; ++i) kept[i] = rounded(i / 2, i % 2);
          }
        }
      }

      // Each warp brings 16 rows x 64 outputs at a time in order in its own shared memory, so that they leave as lines.
      constexpr int kWide = 64 / kPhases;  // pixels
#pragma unroll
      for (int j = 0; j < BN / kWide; ++j) {
        __syncwarp();
        if constexpr (kPhases == 1) {
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const int from = j * 8 + 2 * b, row = (lane / 8 & 1) * 8 + lane % 8, column = 2 * b + lane / 16;
            store_matrices(own + row * 128 + ((column ^ (row & 7)) << 4), rounded(from, 0), rounded(from, 1),
                           rounded(from + 1, 0), rounded(from + 1, 1));
          }
        } else {
#pragma unroll
          for (int b = 0; b < 4; ++b)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int from = j * 4 + b, row = lane / 4 + 8 * half, column = 2 * b + lane % 4 / 2;
              const uint32_t first = kept[from * 2 + half], second = rounded(from, half);
              store_shared(own + row * 128 + ((column ^ (row & 7)) << 4) + lane % 2 * 8,
                           __uint_as_float((first & 0xffff) | second << 16),
                           __uint_as_float(first >> 16 | (second & 0xffff0000)));
            }
        }
        __syncwarp();
        T* out = static_cast<T*>(p.out) + channel * plane;
        if (whole) {
          const int64_t at = own_offsets[j * kWide + lane % 8 * 8 / kPhases];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = i * 4 + lane / 8;
            if (at >= 0 && channel + row < p.c)
              store_words<16>(out + row * plane + (at >> 1),
                              load_shared<Words>(own + row * 128 + ((lane % 8 ^ (row & 7)) << 4)).w);
          }
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t at = own_offsets[j * kWide + (half * 32 + lane) / kPhases];
            const int phase = kPhases == 2 ? lane % 2 : 0, column = half * 4 + lane / 8;
            const bool inside = at >= 0 && (phase == 0 || at & 1);
#pragma unroll 4
            for (int row = 0; row < 16; ++row) {
              const uint32_t value =
                  load_shared<uint16_t>(own + row * 128 + ((column ^ (row & 7)) << 4) + lane % 8 * 2);
              if (inside && channel + row < p.c) store_words<2>(out + row * plane + (at >> 1) + phase, &value);
            }
          }
        }
      }
    }
  }
#endif
}

}  // namespace aeup
