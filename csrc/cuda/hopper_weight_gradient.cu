// The weight gradient of a transposed convolution on Hopper: for each tap, input^T . gradient, a sum over pixels. Rows
// are input channels, columns are (tap, 64 output channels) boxes side by side, both operands are read through tensor
// maps with the pixels as the slow dimension. The pixels are split into ranges, whose float32 partial sums a second
// kernel adds in fixed order: the same bits on every run.
//
// Two kernel rows of the same phase read the same gradient, some rows apart. Where tiles of pixels are 8 wide, a row is
// one repetition of the swizzle (1024 bytes), so that both can be taken from one strip that is a little higher than the
// tile: two shifts of each strip.
#include "cuda/fold.h"
#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"
#include "cuda/hopper_plan.h"
#include "cuda/hopper_weight_sum.h"

namespace aeup {
namespace {

constexpr int kMaps = 16, kTaps = 256;
// Shared memory: the stages, at 1024 bytes; 2 KiB for each warp that multiplies; barriers.
constexpr int kShared = 227 * 1024, kMostStages = 8, kStaging = 8 * 2048;
constexpr int kRing = (kShared - 1024 - kStaging - 2 * 8 * kMostStages) / 1024 * 1024;
struct Unit {  // of columns: what 64 channels of one strip are for
  int8_t h, w;
  uint8_t map;
  uint8_t tap[2];  // of each shift; the second is the first again where there is none
};
struct Params {
  CUtensorMap input, grad[kMaps];
  float* partial;  // [splits, ci, taps, co]
  void* rounded;   // [ci, taps, co] in the result's type, where there is one range; else null
  bool followed;   // by the kernel that adds them
  int ci, co, taps;
  int co_boxes;  // of 64 output channels in a unit
  int boxes;     // units * co_boxes
  int row_blocks, column_blocks, tiles;
  int steps, longer;        // of a range; the first `longer` ranges have one more
  int box_n, box_h, box_w;  // 64 pixels
  int tiles_h, tiles_w;
  int stages, stage, strip, shift;  // bytes
  int slice[4], pitch;              // where 16 pixels begin in a strip, in 16 bytes; bytes from 8 pixels to the next 8
  Unit unit[kTaps];
};
static_assert(sizeof(Params) <= 4096);

// 64 * kRows input channels by kStrips boxes of columns, each at kShifts shifts. Two warpgroups multiply: they share
// the rows, or, if there is one of 64, the shifts.
template <int kRowTiles, int kStripTiles, int kShiftTiles>
struct Shape {
  static constexpr int kRows = kRowTiles, kStrips = kStripTiles, kShifts = kShiftTiles;
  static_assert(kRows == 2 || kShifts == 2);
  static constexpr int kThreads = 384, kOwn = kRows * kShifts / 2;  // shifts of a warpgroup
  static constexpr int kABytes = kRows * 8192;
};

struct Range {
  int row, column;         // the first 64 input channels, the first box
  int split, first, last;  // steps
};
template <class S>
AEUP_DEV Range range_of(const Params& p, int index) {
  const int rest = index / p.column_blocks, split = rest / p.row_blocks;
  const int first = split * p.steps + min(split, p.longer);
  return {(rest - split * p.row_blocks) * S::kRows, (index - rest * p.column_blocks) * S::kStrips, split, first,
          first + p.steps + (split < p.longer)};
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) weight_gradient(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* base = memory + (-shared_address(memory) & 1023);
  unsigned char* staging = base + kRing;
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + kStaging);
  uint64_t* empty = full + kMostStages;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  if (threadIdx.x >= 32 && threadIdx.x <= 32 + S::kStrips) {  // maps of the first tile
    const int box = min(int(blockIdx.x) % p.column_blocks * S::kStrips + lane, p.boxes - 1);
    prefetch_map(lane == S::kStrips ? &p.input : &p.grad[p.unit[box / p.co_boxes].map]);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) barrier_init(full + i, 2), barrier_init(empty + i, 8);
    barrier_init_fence();
  }
  __syncthreads();
  after_previous();
  if (p.followed) let_next_start();
  if (warpgroup == 0) {
    give_registers<56>();
    // Warp 0 fetches the input, warp 1 the gradient.
    uint32_t stage = 0, parity = 1;
    for (int index = warp < 2 && lane == 0 ? blockIdx.x : p.tiles; index < p.tiles; index += gridDim.x) {
      const Range r = range_of<S>(p, index);
      Unit unit[S::kStrips];
      int channel[S::kStrips];
#pragma unroll
      for (int j = 0; j < S::kStrips; ++j) {
        const int box = min(r.column + j, p.boxes - 1), u = box / p.co_boxes;
        unit[j] = p.unit[u];
        channel[j] = (box - u * p.co_boxes) * 64;
      }
      int tile_h = r.first / p.tiles_w, tile_w = r.first - tile_h * p.tiles_w, tile_n = tile_h / p.tiles_h;
      tile_h -= tile_n * p.tiles_h;
      for (int at = r.first; at < r.last; ++at) {
        const int w = tile_w * p.box_w, h = tile_h * p.box_h, n = tile_n * p.box_n;
        unsigned char* a = base + stage * p.stage;
        barrier_wait(empty + stage, parity);
        if (warp == 0) {
          barrier_expect(full + stage, S::kABytes);
#pragma unroll
          for (int j = 0; j < S::kRows; ++j) copy_box(a + j * 8192, &p.input, full + stage, (r.row + j) * 64, w, h, n);
        } else {
          barrier_expect(full + stage, S::kStrips * p.strip);
#pragma unroll
          for (int j = 0; j < S::kStrips; ++j)
            copy_box(a + S::kABytes + j * p.strip, &p.grad[unit[j].map], full + stage, channel[j], w + unit[j].w,
                     h + unit[j].h, n);
        }
        if (++stage == p.stages) stage = 0, parity ^= 1;
        if (++tile_w == p.tiles_w) {
          tile_w = 0;
          if (++tile_h == p.tiles_h) tile_h = 0, ++tile_n;
        }
      }
    }
  } else {
    take_registers<224>();
    const int consumer = warpgroup - 1;
    const uint32_t base_address = shared_address(base);
    const uint32_t own = shared_address(staging) + (consumer * 4 + warp) * 2048;
    const int first_shift = S::kRows == 1 ? consumer : 0;
    uint32_t stage = 0, parity = 0;
    // The second warpgroup starts two steps late, so that one multiplies while the other stores.
    if (consumer == 1 && p.tiles > int(gridDim.x) && p.steps > 2 && p.stages > 2) barrier_wait(full + 2, 0);
    float acc[S::kOwn][S::kStrips * 32];
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const Range r = range_of<S>(p, index);
      uint64_t* previous = empty;
      for (int at = r.first; at < r.last; ++at) {
        barrier_wait(full + stage, parity);
        const uint32_t from = base_address + stage * p.stage;
        const uint64_t a = operand(from + (S::kRows == 2 ? consumer * 8192 : 0), 8192, 1024);
        const uint64_t b = operand(from + S::kABytes + first_shift * p.shift, p.strip, p.pitch);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int s = 0; s < S::kOwn; ++s)  // descriptors count 16 bytes
            wgmma<T, 1, 1>(acc[s], a + k * 128, b + p.slice[k] + s * (p.shift >> 4), at - r.first + k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (at > r.first && lane == 0) barrier_arrive(previous);
        previous = empty + stage;
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int s = 0; s < S::kOwn; ++s) hold(acc[s]);
      if (lane == 0) barrier_arrive(previous);

      // Each warp turns 16 rows of 128 bytes at a time in its own shared memory, so that a row leaves as whole lines.
      const int i0 = (r.row + (S::kRows == 2 ? consumer : 0)) * 64 + warp * 16;
      const int64_t row_pitch = int64_t(p.taps) * p.co;
#pragma unroll
      for (int s = 0; s < S::kOwn; ++s)
#pragma unroll
        for (int j = 0; j < S::kStrips; ++j) {
          const int box = r.column + j;
          if (box >= p.boxes) continue;
          const int u = box / p.co_boxes, tap = p.unit[u].tap[first_shift + s], c0 = (box - u * p.co_boxes) * 64;
          if (first_shift + s > 0 && tap == p.unit[u].tap[0]) continue;
          const float* v = acc[s] + j * 32;
          if (p.rounded) {
            __syncwarp();
#pragma unroll
            for (int b = 0; b < 4; ++b, v += 8) {
              const int row = lane % 16, column = 2 * b + lane / 16;
              store_matrices(own + row * 128 + ((column ^ (row & 7)) << 4), pair_of<T>(v[0], v[1]),
                             pair_of<T>(v[2], v[3]), pair_of<T>(v[4], v[5]), pair_of<T>(v[6], v[7]));
            }
            __syncwarp();
            T* to = static_cast<T*>(p.rounded) + i0 * row_pitch + int64_t(tap) * p.co + c0 + lane % 8 * 8;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = i * 4 + lane / 8;
              if (i0 + row < p.ci && c0 + lane % 8 * 8 < p.co)
                store_words<16>(to + row * row_pitch,
                                load_shared<Words>(own + row * 128 + ((lane % 8 ^ (row & 7)) << 4)).w);
            }
            continue;
          }
          float* to = p.partial + (int64_t(r.split) * p.ci + i0) * row_pitch + int64_t(tap) * p.co + c0;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            __syncwarp();
#pragma unroll
            for (int b = 0; b < 4; ++b, v += 4)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int row = h * 8 + lane / 4, chunk = (2 * b + lane % 4 / 2) ^ (row & 3) << 1;
                store_shared(own + row * 128 + (chunk << 4) + lane % 2 * 8, v[2 * h], v[2 * h + 1]);
              }
            __syncwarp();
            if (p.co % 4 == 0) {
              const int c = half * 32 + lane % 8 * 4;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int row = i * 4 + lane / 8;
                if (i0 + row < p.ci && c0 + c < p.co)
                  store_words<16>(to + row * row_pitch + c,
                                  load_shared<Words>(own + row * 128 + ((lane % 8 ^ (row & 3) << 1) << 4)).w);
              }
            } else {
              const int c = half * 32 + lane;
#pragma unroll 1
              for (int row = 0; row < 16 && i0 + row < p.ci && c0 + c < p.co; ++row)
                store_one(to + row * row_pitch + c,
                          load_shared<float>(own + row * 128 + ((lane / 4 ^ (row & 3) << 1) << 4) + lane % 4 * 4));
            }
          }
        }
    }
  }
#endif
}

constexpr struct {
  int rows, strips, shifts;
} kShapes[] = {{2, 4, 1}, {2, 2, 1}, {2, 1, 1}, {2, 2, 2}, {1, 4, 2}};

template <class T, int kConfig>
const char* run(const Params& p, bool early, void* stream) {
  using S = Shape<kShapes[kConfig].rows, kShapes[kConfig].strips, kShapes[kConfig].shifts>;
  static_assert(2 * (S::kABytes + S::kStrips * 8192) <= kRing && S::kOwn * S::kStrips <= 4);
  const int64_t grid = min(p.tiles, multiprocessors());
  if (early) return launch_early<weight_gradient<T, S>>(grid, S::kThreads, kShared, stream, p);
  return launch(weight_gradient<T, S>, grid, S::kThreads, kShared, stream, p);
}
template <class T>
const char* run(const Params& p, int config, bool early, void* stream) {
  switch (config) {
    case 0: return run<T, 0>(p, early, stream);
    case 1: return run<T, 1>(p, early, stream);
    case 2: return run<T, 2>(p, early, stream);
    case 3: return run<T, 3>(p, early, stream);
    default: return run<T, 4>(p, early, stream);
  }
}

// Kernel rows of the same phase: `period` apart, their gradients `rows` apart.
struct Pairs {
  int period, rows;
};
Pairs pairs_of(const Convolution& c) {
  int a = c.sh, b = c.dh;
  while (b) {
    const int rest = a % b;
    a = b, b = rest;
  }
  return {c.sh / a, c.dh / a};
}

// One range is rounded by the first kernel, and may be the result as it is.
bool rounds(const Convolution& c, int64_t splits) { return splits == 1 && c.co % 8 == 0 && !c.folded(); }
bool at_once(const Convolution& c, int64_t splits) {
  return rounds(c, splits) && c.weight_channels_last && reinterpret_cast<uintptr_t>(c.result) % 16 == 0;
}

struct Plan {
  int config = -1, row_blocks = 0, column_blocks = 0, units = 0, splits = 1, pixel_tiles = 0, stages = 0, strip = 0;
  Box box{};
  double cost = 1e300;  // us
};
// What a plan costs: the matrix units at 1.6 GHz, L2's bandwidth (blocks that run side by side fetch what they have in
// common once), memory's, and the partial sums, which are written and read again.
Plan plan_of(const Convolution& c) {
  const Pairs pairs = pairs_of(c);
  const int co_boxes = int(ceil_div(c.co, 64));
  const Box whole = choose_box(c.n, c.ih, c.iw, 64, true);
  Box wide{1, 8, 8};  // 8 pixels wide, with the fewest rows to fetch
  double least = 1e300;
  for (int bh = 8; bh; bh /= 2) {
    const double rows = double(ceil_div(c.n, 8 / bh)) * double(ceil_div(c.ih, bh)) * (bh + pairs.rows) / bh;
    if (rows < least) least = rows, wide = {8 / bh, bh, 8};
  }
  const double weights = double(c.ci) * c.co * c.kh * c.kw / 1e6;
  const double memory = 2. * c.n * (double(c.ci) * c.ih * c.iw + double(c.co) * c.oh * c.ow) / 2.6e6;
  const auto fourth = [](double us) { return us * us * us * us; };
  Plan best;
  for (int config = 0; config < int(sizeof(kShapes) / sizeof(*kShapes)); ++config) {
    if (forced_config() >= 40 && forced_config() != 40 + config) continue;
    const auto& shape = kShapes[config];
    const bool shared = shape.shifts == 2;
    Plan plan;
    plan.config = config, plan.box = shared ? wide : whole;
    plan.units = shared
                     ? (c.kh / (2 * pairs.period) * pairs.period + min(c.kh % (2 * pairs.period), pairs.period)) * c.kw
                     : c.kh * c.kw;
    plan.strip = shared ? wide.n * (wide.h + pairs.rows) * 1024 : 8192;
    if (shared && wide.h + pairs.rows > 256) continue;
    const int stage = shape.rows * 8192 + shape.strips * plan.strip;
    plan.stages = min(kRing / stage, kMostStages);
    if (plan.stages < 2) continue;
    plan.row_blocks = int(ceil_div(c.ci, 64 * shape.rows));
    plan.column_blocks = int(ceil_div(plan.units * co_boxes, shape.strips));
    const int64_t pixels = ceil_div(c.n, plan.box.n) * ceil_div(c.ih, plan.box.h) * ceil_div(c.iw, plan.box.w);
    plan.pixel_tiles = int(pixels);
    const int64_t blocks = int64_t(plan.row_blocks) * plan.column_blocks;
    const double products =
        2. * shape.rows * shape.strips * shape.shifts * 64 * (shared ? shape.rows == 2 ? 1.08 : 1.06 : 1);
    const double step = fmax(products, stage / 48.) / 1600;
    const double once = shape.rows * 8192. * c.ci / (plan.row_blocks * 64. * shape.rows) / plan.column_blocks +
                        double(shape.strips) * plan.strip * c.co / (co_boxes * 64.) / plan.row_blocks;
    const double fetched = once * double(blocks) * double(pixels) / 5.4e6;
    for (int eighths = 1; eighths <= 32; eighths += eighths < 8 ? 1 : 8) {
      int64_t splits = 132 * eighths / 8 / blocks;
      splits = max(min(splits, pixels), int64_t(1));
      const double tiles = double(ceil_div(blocks * splits, 132));
      const double main = tiles * (double(ceil_div(pixels, splits)) * step + 1.5);
      double cost = sqrt(sqrt(fourth(main) + fourth(fetched) + fourth(memory))) + 5;
      if (!rounds(c, splits))
        cost += 2 + double(splits) * weights * 2;
      else if (!c.weight_channels_last)
        cost += 2 + weights * 2;
      if (config > 0) cost *= 1.03;  // estimates: the first one is measured
      if (cost < best.cost) best = plan, best.cost = cost, best.splits = int(splits);
      if (blocks >= 132) break;
    }
  }
  return best;
}

}  // namespace

int64_t hopper_weight_gradient_workspace(const Convolution& c) {
  const Plan& plan = remembered(c, Pass::weight_gradient, plan_of);
  const int64_t elements = int64_t(c.kh) * c.kw * c.ci * c.co;
  return at_once(c, plan.splits) ? 0 : rounds(c, plan.splits) ? elements * 2 : elements * plan.splits * 4;
}

const char* hopper_weight_gradient(const Convolution& c, const void* x, const void* grad, void* workspace,
                                   void* stream) {
  const Plan& plan = remembered(c, Pass::weight_gradient, plan_of);
  if (plan.config < 0) return "no tile for this weight gradient";
  const auto& shape = kShapes[plan.config];
  const Pairs pairs = pairs_of(c);
  const bool shared = shape.shifts == 2;
  const int more = shared ? pairs.rows : 0;
  Params p;
  const int64_t ci8 = round_up(c.ci, 8), co8 = round_up(c.co, 8);
  {
    const int64_t size[4] = {ci8, c.iw, c.ih, c.n}, stride[4] = {1, ci8, c.iw * ci8, c.ih * c.iw * ci8};
    const int box[4] = {64, plan.box.w, plan.box.h, plan.box.n};
    if (const char* e = make_map(&p.input, c.dtype, x, 4, size, stride + 1, box)) return e;
  }
  // Row ih of the input meets row sh * ih + dh * kh - ph of the gradient: row ih + shift of the phase with that
  // remainder.
  const int box[4] = {64, plan.box.w, plan.box.h + more, plan.box.n};
  if (const char* e = map_phases(p.grad, map_type(c.dtype), 2, grad, c, co8, box)) return e;
  const bool rounded = rounds(c, plan.splits), done = at_once(c, plan.splits);
  p.partial = static_cast<float*>(workspace);
  p.rounded = done ? c.result : rounded ? workspace : nullptr;
  p.followed = !done && !c.folded();
  p.ci = int(c.ci), p.co = int(c.co), p.taps = c.kh * c.kw;
  p.co_boxes = int(ceil_div(c.co, 64));
  p.boxes = plan.units * p.co_boxes;
  p.row_blocks = plan.row_blocks, p.column_blocks = plan.column_blocks;
  p.tiles = plan.row_blocks * plan.column_blocks * plan.splits;
  p.steps = plan.pixel_tiles / plan.splits, p.longer = plan.pixel_tiles % plan.splits;
  p.box_n = plan.box.n, p.box_h = plan.box.h, p.box_w = plan.box.w;
  p.tiles_h = int(ceil_div(c.ih, plan.box.h)), p.tiles_w = int(ceil_div(c.iw, plan.box.w));
  p.stages = plan.stages, p.strip = plan.strip, p.stage = shape.rows * 8192 + shape.strips * plan.strip;
  p.shift = more * 1024;
  // Row h of image n of a tile is row n * (box_h + more) + h of a strip, where rows are 8 pixels.
  const auto row = [&](int i) { return shared ? i / plan.box.h * (plan.box.h + more) + i % plan.box.h : i; };
  for (int k = 0; k < 4; ++k) p.slice[k] = row(2 * k) * 64;
  p.pitch = (row(1) - row(0)) * 1024;
  int units = 0;
  for (int i = 0; i < c.kh; ++i)
    for (int j = 0; j < c.kw; ++j) {
      if (shared && i / pairs.period % 2) continue;  // the second of a pair
      const int h = c.dh * i - c.ph, w = c.dw * j - c.pw, fh = floor_div(h, c.sh), fw = floor_div(w, c.sw);
      const int a = h - fh * c.sh, b = w - fw * c.sw, other = i + (shared ? pairs.period : 0);
      Unit& unit = p.unit[units++];
      unit = {int8_t(fh), int8_t(fw), uint8_t(a * c.sw + b), {uint8_t(i * c.kw + j), uint8_t(i * c.kw + j)}};
      if (other < c.kh) unit.tap[1] = uint8_t(other * c.kw + j);
      if (a >= c.oh || b >= c.ow) unit.h = unit.w = -128, unit.map = 0;
    }
  // An early start behind a transposition gives blocks to multiprocessors as these become free, so that blocks which
  // fetch the same are no neighbours: long kernels start in order.
  const bool early = c.channels_last || plan.cost < 60;
  const char* e =
      c.dtype == DType::bf16 ? run<BFloat16>(p, plan.config, early, stream) : run<Half>(p, plan.config, early, stream);
  if (e || done) return e;
  if (c.folded()) return launch_fold_back(c, p.partial, plan.splits, int64_t(p.taps) * c.co, c.co, stream);
  return hopper_weight_sum(c, workspace, rounded, plan.splits, stream);
}

}  // namespace aeup
