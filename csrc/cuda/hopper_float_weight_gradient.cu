// The weight gradient of hopper_float: the sum over pixels of hopper_weight_gradient.cu, in tf32 or in three tf32
// products. tf32 operands in shared memory are contiguous along the sum, here pixels. So the output's gradient, whose
// boxes a tap shifts, is read from channels-last boxes into registers, and the input, whose boxes no tap moves, is
// turned beforehand (turn_input). Rows are (tap, 32 output channels) boxes side by side, columns are input channels.
#include "cuda/conv_partials.cuh"
#include "cuda/float_pack.cuh"
#include "cuda/hopper_float.h"
#include "cuda/hopper_plan.h"
#include "cuda/wgmma_tf32.cuh"

namespace aeup {
namespace {

constexpr int kTaps = 256, kStep = 32;  // pixels of a step
struct Tap {
  int8_t h, w;
  uint8_t map;
};
struct Block {
  int row, column, split, first, last;  // steps first .. last - 1
};
struct Params {
  CUtensorMap input, grad[kGemmMaps];
  float* partial;  // [splits, ci, taps, co]
  int ci, co, taps;
  int co_boxes;  // of 32 output channels in a tap
  int row_blocks, column_blocks, splits, tiles;
  int box_n, box_h, box_w;  // kStep pixels
  int tiles_h, tiles_w, steps;
  bool wide;  // results are stored 16 bytes at a time
  Tap tap[kTaps];
};

template <int BN, bool kStrict>
struct Shape {
  static constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1), kBoxes = 4 * kWarpgroups;
  static constexpr int kBox = kStep * 128, kPlanes = kStrict ? 2 : 1;
  static constexpr int kABytes = kBoxes * kBox, kPlane = BN * 128, kStage = kABytes + kPlanes * kPlane;
  static constexpr int kStages = 220 * 1024 / kStage < 8 ? 220 * 1024 / kStage : 8;
  static constexpr int kBytes = 1024 + kStages * kStage + 2 * 8 * 8;

  static AEUP_DEV Block block(const Params& p, int index) {
    Block b;
    b.column = index % p.column_blocks, b.row = index / p.column_blocks % p.row_blocks;
    b.split = index / (p.column_blocks * p.row_blocks);
    b.first = int(int64_t(p.steps) * b.split / p.splits), b.last = int(int64_t(p.steps) * (b.split + 1) / p.splits);
    return b;
  }
};

// Pixels 8 k + 2 t and 8 k + 2 t + 1 (t = lane % 4) of a box, channels 4 g .. 4 g + 3 (g = lane / 4): without bank
// conflicts. As operand registers of two tiles of 64 rows: row g of tile m is channel 4 g + 2 m, row g + 8 the next.
template <int kTiles>
AEUP_DEV void load_operands(uint32_t (&a)[kTiles][4], uint32_t box, int k) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = lane % 4 * 2 + e;
    const Words v = load_shared<Words>(box + (k * 8 + row) * 128 + (lane / 4 ^ row) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i / 2][e * 2 + i % 2] = v.w[i];
  }
}
template <int N>
AEUP_DEV void add_part(float (&acc)[N], float (&part)[N], const uint32_t (&high)[4][4], const uint32_t (&low)[4][4]) {
  hold(part);
#pragma unroll
  for (int k = 0; k < 4; ++k) keep(high[k]), keep(low[k]);
#pragma unroll
  for (int e = 0; e < N; ++e) acc[e] += part[e];
}

template <int BN, bool kStrict>
__global__ void __launch_bounds__(Shape<BN, kStrict>::kThreads, 1) weight_gradient(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<BN, kStrict>;
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  uint64_t* full = reinterpret_cast<uint64_t*>(base + S::kStages * S::kStage);
  uint64_t* empty = full + 8;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) barrier_init(full + i, 4), barrier_init(empty + i, 4 * S::kWarpgroups);
    barrier_init_fence();
  }
  __syncthreads();
  after_previous();
  const int boxes = p.taps * p.co_boxes;
  if (warpgroup == 0) {
    give_registers<40>();
    // Each warp fetches two boxes of the gradient, the first ones a plane of the input as well.
    uint32_t stage = 0, parity = 1;
    for (int index = lane == 0 ? blockIdx.x : p.tiles; index < p.tiles; index += gridDim.x) {
      const Block t = S::block(p, index);
      Tap tap[2];
      int channel[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int wanted = t.row * S::kBoxes + warp * 2 + j, box = wanted < boxes ? wanted : boxes - 1;
        tap[j] = p.tap[box / p.co_boxes], channel[j] = box % p.co_boxes * 32;
      }
      int tile_w = t.first % p.tiles_w, tile_h = t.first / p.tiles_w % p.tiles_h;
      int tile_n = t.first / (p.tiles_w * p.tiles_h);
#pragma unroll 1
      for (int at = t.first; at < t.last; ++at) {
        const int w = tile_w * p.box_w, h = tile_h * p.box_h, n = tile_n * p.box_n;
        unsigned char* a = base + stage * S::kStage;
        barrier_wait(empty + stage, parity);
        barrier_expect(full + stage, 2 * S::kBox + (warp < S::kPlanes ? S::kPlane : 0));
#pragma unroll
        for (int j = 0; j < 2; ++j)
          copy_box(a + (warp * 2 + j) * S::kBox, &p.grad[tap[j].map], full + stage, channel[j], w + tap[j].w,
                   h + tap[j].h, n);
        if (warp < S::kPlanes)
          copy_box(a + S::kABytes + warp * S::kPlane, &p.input, full + stage, 0, t.column * BN, at + warp * p.steps);
        if (++stage == S::kStages) stage = 0, parity ^= 1;
        if (++tile_w == p.tiles_w) {
          tile_w = 0;
          if (++tile_h == p.tiles_h) tile_h = 0, ++tile_n;
        }
      }
    }
  } else {
    take_registers<232>();
    const int own_box = (warpgroup - 1) * 4 + warp;
    const uint32_t base_address = shared_address(base);
    uint32_t stage = 0, parity = 0;
    float acc[2][BN / 2];
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const Block t = S::block(p, index);
      if constexpr (kStrict) {
        // As strict_step: a step's small products first, and each step's sum added rounded to nearest.
        float part[2][BN / 2];
        uint32_t high[2][4][4], low[2][4][4];  // [tile][k]
#pragma unroll
        for (int e = 0; e < BN / 2; ++e) acc[0][e] = acc[1][e] = 0;
        for (int at = t.first; at < t.last; ++at) {
          barrier_wait(full + stage, parity);
          const uint32_t box = base_address + stage * S::kStage + own_box * S::kBox;
          const uint64_t hi = operand(base_address + stage * S::kStage + S::kABytes, 16, 1024);
          const uint64_t lo = operand(base_address + stage * S::kStage + S::kABytes + S::kPlane, 16, 1024);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            uint32_t a[2][4];
            load_operands(a, box, k);
#pragma unroll
            for (int i = 0; i < 8; ++i)
              split_tf32(__uint_as_float(a[i / 4][i % 4]), &high[i / 4][k][i % 4], &low[i / 4][k][i % 4]);
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            hold(part[m]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              wgmma_tf32(part[m], low[m][k], hi + k * 2, k > 0);
              wgmma_tf32(part[m], high[m][k], lo + k * 2, 1);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) wgmma_tf32(part[m], high[m][k], hi + k * 2, 1);
            wgmma_commit();
          }
          wgmma_wait<1>();
          add_part(acc[0], part[0], high[0], low[0]);
          wgmma_wait<0>();
          add_part(acc[1], part[1], high[1], low[1]);
          if (lane == 0) barrier_arrive(empty + stage);
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
      } else {
        uint64_t* previous = empty;
        uint32_t a[2][2][2][4] = {};  // [half of a step][k][tile]: one half is loaded while the other is multiplied
        for (int at = t.first; at < t.last; ++at) {
          barrier_wait(full + stage, parity);
          const uint32_t box = base_address + stage * S::kStage + own_box * S::kBox;
          const uint64_t b = operand(base_address + stage * S::kStage + S::kABytes, 16, 1024);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int k = 0; k < 2; ++k) load_operands(a[half][k], box, half * 2 + k);
            hold(acc[0]), hold(acc[1]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
              for (int m = 0; m < 2; ++m)
                wgmma_tf32(acc[m], a[half][k][m], b + (half * 2 + k) * 2, at - t.first + half + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            hold(acc[0]), hold(acc[1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) keep(a[1 - half][i / 2][i % 2]);
            if (half == 0 && at > t.first && lane == 0) barrier_arrive(previous);
          }
          previous = empty + stage;
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        hold(acc[0]), hold(acc[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) keep(a[1][i / 2][i % 2]);
        if (lane == 0) barrier_arrive(previous);
      }
      const int box = t.row * S::kBoxes + own_box, c = box % p.co_boxes * 32 + lane / 4 * 4;
      if (box >= boxes || c >= p.co) continue;
      float* to = p.partial + (int64_t(t.split) * p.ci * p.taps + box / p.co_boxes) * p.co + c;
#pragma unroll
      for (int b = 0; b < BN / 8; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = t.column * BN + b * 8 + lane % 4 * 2 + e;
          if (i >= p.ci) continue;
          const float v[4] = {acc[0][b * 4 + e], acc[0][b * 4 + 2 + e], acc[1][b * 4 + e], acc[1][b * 4 + 2 + e]};
          float* out = to + int64_t(i) * p.taps * p.co;
          if (p.wide) {
            Words words;
            words.pack(v);
            words.store(out);
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (c + j < p.co) store_one(out + j, v[j]);
          }
        }
    }
  }
#endif
}

// The input [n, ci, pixels] (or [n, pixels, ci]) -> [planes, steps, ci, kStep]: the pixels of each step's box, zeros
// outside of the image, in the order of load_operands; rounded to tf32, or split into two such planes.
struct Turning {
  const float* from;
  float* to;
  int64_t n, plane;
  int ci, ih, iw;
  int log_n, log_h, log_w;  // of the box
  Divider by_blocks, by_tiles_w, by_tiles_h;
};
constexpr int kTurned = 64, kTurnThreads = 256;  // kTurned: channels of a block

template <bool kStrict, bool kChannelsLast>
__global__ void __launch_bounds__(kTurnThreads) turn_input(const Turning p) {
  let_next_start();
  __shared__ float tile[kChannelsLast ? kStep : 1][kTurned + 1];
  const int step = p.by_blocks.divide(blockIdx.x), c0 = (blockIdx.x - step * int(p.by_blocks.divisor)) * kTurned;
  const int row = p.by_tiles_w.divide(step), image = p.by_tiles_h.divide(row);
  const int w0 = (step - row * int(p.by_tiles_w.divisor)) << p.log_w;
  const int h0 = (row - image * int(p.by_tiles_h.divisor)) << p.log_h;
  const int64_t n0 = int64_t(image) << p.log_n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // The element of channel 0 at pixel i of the box, -1 outside.
  const auto place = [&](int i) {
    const int w = w0 + (i & ((1 << p.log_w) - 1)), h = h0 + (i >> p.log_w & ((1 << p.log_h) - 1));
    const int64_t n = n0 + (i >> (p.log_w + p.log_h));
    if (w >= p.iw || h >= p.ih || n >= p.n) return int64_t(-1);
    return kChannelsLast ? ((n * p.ih + h) * p.iw + w) * p.ci : (n * p.ci * p.ih + h) * p.iw + w;
  };
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int e = 0; e < kStep; e += kTurnThreads / 32) {
      const int64_t at = place(warp + e);
#pragma unroll
      for (int half = 0; half < kTurned; half += 32) {
        const int c = c0 + half + lane;
        tile[warp + e][half + lane] = at >= 0 && c < p.ci ? load_one(p.from + at + c) : 0.f;
      }
    }
    __syncthreads();
  }
  const int64_t own = place(lane), pixels = int64_t(p.ih) * p.iw;
  const int position = lane / 8 * 8 + lane % 8 / 2 + lane % 2 * 4;
#pragma unroll
  for (int e = 0; e < kTurned; e += kTurnThreads / 32) {
    const int c = c0 + warp + e;
    if (c >= p.ci) break;
    const float v = kChannelsLast ? tile[lane][warp + e] : own >= 0 ? load_one(p.from + own + c * pixels) : 0.f;
    store_split<kStrict>(p.to, p.plane, (int64_t(step) * p.ci + c) * kStep + position, v);
  }
}

struct Plan {
  int bn, row_blocks, column_blocks, splits;
  int64_t steps;
  Box box;
  double cost = 1e300;
};
// Estimated cycles: whole waves of one block on each multiprocessor, then the partial sums there and back.
Plan plan_of(const Convolution& c) {
  const bool strict = !c.tf32;
  Plan best;
  const Box box = choose_box(c.n, c.ih, c.iw, kStep, true);
  const int64_t steps = ceil_div(c.n, box.n) * ceil_div(c.ih, box.h) * ceil_div(c.iw, box.w);
  const int64_t rows = ceil_div(c.kh * c.kw * ceil_div(c.co, 32), 8);
  const int64_t bytes = partial_bytes(c), most = split_count(c, steps, 128, 4);
  for (const int bn : {64, 128}) {
    if (bn == 128 && strict) continue;  // two accumulators
    const int64_t columns = ceil_div(c.ci, bn);
    const double products = bn * (strict ? 28 : 9.5), loads = (32768 + bn * 128 * (strict ? 2 : 1)) / 50.;
    const double step = products > loads ? products : loads;
    for (int64_t s = 1; s <= most; ++s) {
      const bool direct = s == 1 && c.weight_channels_last && !c.folded();
      const double waves = double(ceil_div(rows * columns * s, 132)) * (double(ceil_div(steps, s)) * step + 2500);
      const double cost = waves + (direct ? 0 : 3500 + s * bytes / 800.);
      if (cost < best.cost * 0.98) best = {bn, int(rows), int(columns), int(s), steps, box, cost};
    }
  }
  return best;
}

template <int BN, bool kStrict>
const char* run(const Params& p, void* stream) {
  using S = Shape<BN, kStrict>;
  const int64_t grid = min(p.tiles, multiprocessors());
  return launch_early<weight_gradient<BN, kStrict>>(grid, S::kThreads, S::kBytes, stream, p);
}

int64_t turned_bytes(const Convolution& c, const Plan& plan) {
  return round_up(plan.steps * c.ci * kStep * (c.tf32 ? 4 : 8), 256);
}

int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

const char* launch_turn(const Convolution& c, const Plan& plan, float* to, void* stream) {
  Turning t;
  t.from = static_cast<const float*>(c.input), t.to = to;
  t.n = c.n, t.plane = plan.steps * c.ci * kStep;
  t.ci = int(c.ci), t.ih = int(c.ih), t.iw = int(c.iw);
  t.log_n = log2_of(plan.box.n), t.log_h = log2_of(plan.box.h), t.log_w = log2_of(plan.box.w);
  t.by_tiles_h = Divider(ceil_div(c.ih, plan.box.h)), t.by_tiles_w = Divider(ceil_div(c.iw, plan.box.w));
  const int64_t blocks = ceil_div(c.ci, kTurned), grid = plan.steps * blocks;
  t.by_blocks = Divider(blocks);
  if (c.tf32) {
    if (c.channels_last)
      AEUP_LAUNCH((turn_input<false, true>), grid, kTurnThreads, 0, stream, t);
    else
      AEUP_LAUNCH((turn_input<false, false>), grid, kTurnThreads, 0, stream, t);
  } else {
    if (c.channels_last)
      AEUP_LAUNCH((turn_input<true, true>), grid, kTurnThreads, 0, stream, t);
    else
      AEUP_LAUNCH((turn_input<true, false>), grid, kTurnThreads, 0, stream, t);
  }
  return nullptr;
}

}  // namespace

int64_t float_weight_gradient_workspace(const Convolution& c) {
  const Plan& plan = remembered(c, Pass::weight_gradient, plan_of);
  return turned_bytes(c, plan) + plan.splits * partial_bytes(c);
}

const char* float_weight_gradient(const Convolution& c, const void* grad, void* workspace, void* stream) {
  const Plan& plan = remembered(c, Pass::weight_gradient, plan_of);
  const bool strict = !c.tf32;
  auto* turned = static_cast<float*>(workspace);
  if (const char* e = launch_turn(c, plan, turned, stream)) return e;
  Params p;
  const auto type = strict ? CU_TENSOR_MAP_DATA_TYPE_INT32 : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  {
    const int64_t size[3] = {kStep, c.ci, plan.steps * (strict ? 2 : 1)}, stride[2] = {kStep, c.ci * kStep};
    const int box[3] = {kStep, plan.bn, 1};
    if (const char* e = make_map(&p.input, type, 4, turned, 3, size, stride, box)) return e;
  }
  // Row ih of the input meets row sh * ih + dh * kh - ph of the gradient: row ih + shift of the phase with that
  // remainder.
  const int box[4] = {32, plan.box.w, plan.box.h, plan.box.n};
  if (const char* e = map_phases(p.grad, type, 4, grad, c, round_up(c.co, 4), box)) return e;
  const bool direct = plan.splits == 1 && c.weight_channels_last && !c.folded();
  p.partial = direct ? static_cast<float*>(c.result) : turned + turned_bytes(c, plan) / 4;
  p.wide = c.co % 4 == 0 && reinterpret_cast<uintptr_t>(p.partial) % 16 == 0;
  p.ci = int(c.ci), p.co = int(c.co), p.taps = c.kh * c.kw;
  p.co_boxes = int(ceil_div(c.co, 32));
  p.row_blocks = plan.row_blocks, p.column_blocks = plan.column_blocks, p.splits = plan.splits;
  p.tiles = plan.row_blocks * plan.column_blocks * plan.splits;
  p.box_n = plan.box.n, p.box_h = plan.box.h, p.box_w = plan.box.w;
  p.tiles_h = int(ceil_div(c.ih, plan.box.h)), p.tiles_w = int(ceil_div(c.iw, plan.box.w));
  p.steps = int(plan.steps);
  for (int i = 0; i < p.taps; ++i) {
    const int h = c.dh * (i / c.kw) - c.ph, w = c.dw * (i % c.kw) - c.pw;
    const int fh = floor_div(h, c.sh), fw = floor_div(w, c.sw);
    const int a = h - fh * c.sh, b = w - fw * c.sw;
    p.tap[i] = {int8_t(fh), int8_t(fw), uint8_t(a * c.sw + b)};
    if (a >= c.oh || b >= c.ow) p.tap[i] = {-128, -128, 0};
  }
  const char* e = strict          ? run<64, true>(p, stream)
                  : plan.bn == 64 ? run<64, false>(p, stream)
                                  : run<128, false>(p, stream);
  return e || direct ? e : launch_add_partials<float>(c, p.partial, p.splits, stream);
}

}  // namespace aeup
