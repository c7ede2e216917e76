// The weight gradient of a transposed convolution on Hopper: for each tap, input^T . gradient, a sum over pixels. Rows
// are input channels, columns are (tap, 64 output channels) boxes side by side, both operands are read through tensor
// maps with the pixels as the slow dimension. The pixels are split into ranges, whose float32 partial sums a second
// kernel adds in fixed order: the same bits on every run.
#include "cuda/fold.h"
#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"

namespace aeup {
namespace {

constexpr int kMaps = 16, kTaps = 256;
struct Tap {
  int8_t h, w;
  uint8_t map;
};
struct Params {
  CUtensorMap input, grad[kMaps];
  float* partial;  // [splits, taps, ci, co]
  void* direct;    // [ci, taps, co]: the result itself, where there is one range and the layout allows; else null
  int ci, co, taps;
  int co_boxes;  // of 64 output channels in a tap
  int row_blocks, column_blocks, splits, tiles;
  int box_n, box_h, box_w;  // 64 pixels
  int tiles_h, tiles_w, pixel_tiles;
  Tap tap[kTaps];
};

template <int BN>
struct Shape {
  static constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1), kBoxes = BN / 64;
  static constexpr int kABytes = kWarpgroups * 8192, kBBytes = kBoxes * 8192, kStage = kABytes + kBBytes;
  static constexpr int kStages = 220 * 1024 / kStage < 8 ? 220 * 1024 / kStage : 8;
  static constexpr int kBytes = 1024 + kStages * kStage + 2 * 8 * 8;
};

template <class T, int BN>
__global__ void __launch_bounds__(Shape<BN>::kThreads, 1) weight_gradient(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<BN>;
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  uint64_t* full = reinterpret_cast<uint64_t*>(base + S::kStages * S::kStage);
  uint64_t* empty = full + 8;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) barrier_init(full + i, 2), barrier_init(empty + i, 4 * S::kWarpgroups);
    barrier_init_fence();
  }
  __syncthreads();
  after_previous();
  const int boxes = p.taps * p.co_boxes;
  if (warpgroup == 0) {
    give_registers<40>();
    // Warp 0 fetches the input, warp 1 the gradient.
    uint32_t stage = 0, parity = 1;
    for (int index = warp < 2 && lane == 0 ? blockIdx.x : p.tiles; index < p.tiles; index += gridDim.x) {
      const int column = index % p.column_blocks, row = index / p.column_blocks % p.row_blocks;
      const int split = index / (p.column_blocks * p.row_blocks);
      const int first = int(int64_t(p.pixel_tiles) * split / p.splits);
      const int last = int(int64_t(p.pixel_tiles) * (split + 1) / p.splits);
      Tap tap[S::kBoxes];
      int channel[S::kBoxes];
#pragma unroll
      for (int j = 0; j < S::kBoxes; ++j) {
        const int box = column * S::kBoxes + j < boxes ? column * S::kBoxes + j : boxes - 1;
        tap[j] = p.tap[box / p.co_boxes];
        channel[j] = box % p.co_boxes * 64;
      }
      int tile_w = first % p.tiles_w, tile_h = first / p.tiles_w % p.tiles_h, tile_n = first / (p.tiles_w * p.tiles_h);
      for (int at = first; at < last; ++at) {
        const int w = tile_w * p.box_w, h = tile_h * p.box_h, n = tile_n * p.box_n;
        unsigned char* a = base + stage * S::kStage;
        barrier_wait(empty + stage, parity);
        if (warp == 0) {
          barrier_expect(full + stage, S::kABytes);
#pragma unroll
          for (int j = 0; j < S::kWarpgroups; ++j)
            copy_box(a + j * 8192, &p.input, full + stage, row * 64 * S::kWarpgroups + j * 64, w, h, n);
        } else {
          barrier_expect(full + stage, S::kBBytes);
#pragma unroll
          for (int j = 0; j < S::kBoxes; ++j)
            copy_box(a + S::kABytes + j * 8192, &p.grad[tap[j].map], full + stage, channel[j], w + tap[j].w,
                     h + tap[j].h, n);
        }
        if (++stage == S::kStages) stage = 0, parity ^= 1;
        if (++tile_w == p.tiles_w) {
          tile_w = 0;
          if (++tile_h == p.tiles_h) tile_h = 0, ++tile_n;
        }
      }
    }
  } else {
    take_registers<232>();
    const int consumer = warpgroup - 1;
    const uint32_t base_address = shared_address(base);
    uint32_t stage = 0, parity = 0;
    float acc[BN / 2];
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const int column = index % p.column_blocks, row = index / p.column_blocks % p.row_blocks;
      const int split = index / (p.column_blocks * p.row_blocks);
      const int first = int(int64_t(p.pixel_tiles) * split / p.splits);
      const int last = int(int64_t(p.pixel_tiles) * (split + 1) / p.splits);
      uint64_t* previous = empty;
      for (int at = first; at < last; ++at) {
        barrier_wait(full + stage, parity);
        const uint64_t a = operand(base_address + stage * S::kStage + consumer * 8192, 8192, 1024);
        const uint64_t b = operand(base_address + stage * S::kStage + S::kABytes, 8192, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma<T, 1, 1>(acc, a + k * 128, b + k * 128, at - first + k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (at > first && lane == 0) barrier_arrive(previous);
        previous = empty + stage;
        if (++stage == S::kStages) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      hold(acc);
      if (lane == 0) barrier_arrive(previous);
      for (int h = 0; h < 2; ++h) {
        const int i = row * 64 * S::kWarpgroups + consumer * 64 + warp * 16 + h * 8 + lane / 4;
        if (i >= p.ci) break;
#pragma unroll
        for (int j = 0; j < S::kBoxes; ++j) {
          const int box = column * S::kBoxes + j;
          if (box >= boxes) break;
          const int c0 = box % p.co_boxes * 64 + lane % 4 * 2;
          float* to = p.partial + ((int64_t(split) * p.taps + box / p.co_boxes) * p.ci + i) * p.co + c0;
#pragma unroll
          for (int b = 0; b < 8; ++b) {
            const float v0 = h ? acc[j * 32 + b * 4 + 2] : acc[j * 32 + b * 4];
            const float v1 = h ? acc[j * 32 + b * 4 + 3] : acc[j * 32 + b * 4 + 1];
            if (p.direct) {
              T* out = static_cast<T*>(p.direct) + (int64_t(i) * p.taps + box / p.co_boxes) * p.co + c0 + b * 8;
              if (c0 + b * 8 < p.co) {
                AEUP_CHECK(out, 4, true);
                *reinterpret_cast<uint32_t*>(out) = pair_of<T>(v0, v1);
              }
              continue;
            }
            if (p.co % 2 == 0) {
              if (c0 + b * 8 < p.co) {
                AEUP_CHECK(to + b * 8, 8, true);
                *reinterpret_cast<float2*>(to + b * 8) = make_float2(v0, v1);
              }
            } else {
              if (c0 + b * 8 < p.co) store_one(to + b * 8, v0);
              if (c0 + b * 8 + 1 < p.co) store_one(to + b * 8 + 1, v1);
            }
          }
        }
      }
    }
  }
#endif
}

constexpr int kSumThreads = 256;
// partial [splits, taps, ci, co] -> [ci, co, taps], or [ci, taps, co] if channels_last. One block: one input channel,
// 64 output channels, all taps.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    add_partials(const float* partial, T* to, int splits, int taps, int ci, int co, bool channels_last) {
  AEUP_DYNAMIC_SHARED(float, sums);  // [taps, 65]
  const int i = blockIdx.x, c0 = blockIdx.y * 64;
  const int count = co - c0 < 64 ? co - c0 : 64;
  const int64_t step = int64_t(taps) * ci * co;
  for (int e = threadIdx.x; e < taps * 64; e += kSumThreads) {
    const int tap = e / 64, c = e % 64;
    if (c >= count) continue;
    const float* from = partial + (int64_t(tap) * ci + i) * co + c0 + c;
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += load_one(from + s * step);
    if (channels_last)
      store_one(to + (int64_t(i) * taps + tap) * co + c0 + c, sum);
    else
      sums[tap * 65 + c] = sum;
  }
  if (channels_last) return;
  __syncthreads();
  T* out = to + (int64_t(i) * co + c0) * taps;
  for (int e = threadIdx.x; e < count * taps; e += kSumThreads) store_one(out + e, sums[e % taps * 65 + e / taps]);
}

struct Plan {
  int bn, row_blocks, column_blocks, splits, pixel_tiles;
  Box box;
};
Plan plan_of(const Convolution& c) {
  Plan plan;
  const int boxes = c.kh * c.kw * int(ceil_div(c.co, 64));
  plan.bn = boxes >= 4 ? 256 : boxes >= 2 ? 128 : 64;
  plan.row_blocks = int(ceil_div(c.ci, 128));
  plan.column_blocks = int(ceil_div(boxes, plan.bn / 64));
  plan.box = choose_box(c.n, c.ih, c.iw, 64, true);
  const int64_t tiles = ceil_div(c.n, plan.box.n) * ceil_div(c.ih, plan.box.h) * ceil_div(c.iw, plan.box.w);
  plan.pixel_tiles = int(tiles);
  // Whole waves of one block on each multiprocessor, and at least 8 steps for each block.
  const int64_t blocks = int64_t(plan.row_blocks) * plan.column_blocks;
  const int64_t most = tiles / 8 < 1 ? 1 : tiles / 8;
  double best = 1e30;
  plan.splits = 1;
  for (int64_t s = 1; s <= most && s <= 128; ++s) {
    const double waves =
        double(ceil_div(blocks * s, 132)) * (double(ceil_div(tiles, s)) + 6) + 0.06 * s * blocks / 132 * 64;
    if (waves < best * 0.98) best = waves, plan.splits = int(s);
  }
  return plan;
}

template <class T, int BN>
const char* run(const Params& p, void* stream) {
  using S = Shape<BN>;
  const int64_t grid = p.tiles < multiprocessors() ? p.tiles : multiprocessors();
  return launch_early<weight_gradient<T, BN>>(grid, S::kThreads, S::kBytes, stream, p);
}
template <class T>
const char* run_all(const Params& p, const Convolution& c, int bn, void* stream) {
  const char* error = bn == 256 ? run<T, 256>(p, stream) : bn == 128 ? run<T, 128>(p, stream) : run<T, 64>(p, stream);
  if (error || p.direct) return error;
  if (c.folded()) return launch_fold_back(c, p.partial, p.splits, c.co, c.ci * c.co, stream);
  const dim3 grid{unsigned(c.ci), unsigned(ceil_div(c.co, 64))};
  AEUP_LAUNCH(add_partials<T>, grid, kSumThreads, c.weight_channels_last ? 0 : p.taps * 65 * 4, stream, p.partial,
              static_cast<T*>(c.result), p.splits, p.taps, p.ci, p.co, c.weight_channels_last);
  return nullptr;
}

}  // namespace

int64_t hopper_weight_gradient_workspace(const Convolution& c) {
  return int64_t(plan_of(c).splits) * c.kh * c.kw * c.ci * c.co * 4;
}

const char* hopper_weight_gradient(const Convolution& c, const void* x, const void* grad, void* workspace,
                                   void* stream) {
  const Plan plan = plan_of(c);
  Params p;
  const int64_t ci8 = round_up(c.ci, 8), co8 = round_up(c.co, 8);
  const int box[4] = {64, plan.box.w, plan.box.h, plan.box.n};
  {
    const int64_t size[4] = {ci8, c.iw, c.ih, c.n}, stride[4] = {1, ci8, c.iw * ci8, c.ih * c.iw * ci8};
    if (const char* e = make_map(&p.input, c.dtype, x, 4, size, stride + 1, box)) return e;
  }
  // Row ih of the input meets row sh * ih + dh * kh - ph of the gradient: row ih + shift of the phase with that
  // remainder.
  const auto floor_div = [](int a, int b) { return (a >= 0 ? a : a - b + 1) / b; };
  for (int a = 0; a < c.sh; ++a)
    for (int b = 0; b < c.sw; ++b) {
      CUtensorMap* map = &p.grad[a * c.sw + b];
      if (a >= c.oh || b >= c.ow) {  // no such pixel: all of the box lies outside
        *map = p.grad[0];
        continue;
      }
      const int64_t size[4] = {co8, ceil_div(c.ow - b, c.sw), ceil_div(c.oh - a, c.sh), c.n};
      const int64_t stride[4] = {1, c.sw * co8, c.sh * c.ow * co8, c.oh * c.ow * co8};
      const auto* first = static_cast<const uint16_t*>(grad) + (a * c.ow + b) * co8;
      if (const char* e = make_map(map, c.dtype, first, 4, size, stride + 1, box)) return e;
    }
  p.partial = static_cast<float*>(workspace);
  p.direct = plan.splits == 1 && c.weight_channels_last && c.co % 2 == 0 && !c.folded() ? c.result : nullptr;
  p.ci = int(c.ci), p.co = int(c.co), p.taps = c.kh * c.kw;
  p.co_boxes = int(ceil_div(c.co, 64));
  p.row_blocks = plan.row_blocks, p.column_blocks = plan.column_blocks, p.splits = plan.splits;
  p.tiles = plan.row_blocks * plan.column_blocks * plan.splits;
  p.box_n = plan.box.n, p.box_h = plan.box.h, p.box_w = plan.box.w;
  p.tiles_h = int(ceil_div(c.ih, plan.box.h)), p.tiles_w = int(ceil_div(c.iw, plan.box.w));
  p.pixel_tiles = plan.pixel_tiles;
  for (int i = 0; i < p.taps; ++i) {
    const int h = c.dh * (i / c.kw) - c.ph, w = c.dw * (i % c.kw) - c.pw;
    const int fh = floor_div(h, c.sh), fw = floor_div(w, c.sw);
    const int a = h - fh * c.sh, b = w - fw * c.sw;
    p.tap[i] = {int8_t(fh), int8_t(fw), uint8_t(a * c.sw + b)};
    if (a >= c.oh || b >= c.ow) p.tap[i] = {-128, -128, 0};
  }
  return c.dtype == DType::bf16 ? run_all<BFloat16>(p, c, plan.bn, stream) : run_all<Half>(p, c, plan.bn, stream);
}

}  // namespace aeup
