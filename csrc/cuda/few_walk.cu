// Forward for 1 to 4 output channels, stride 2 and a window of 4 taps, for images that are not narrow: an operand is
// loaded and split once, and NCHW needs no turning.
//
// A warp walks down the rows of 32 columns. For input row i it multiplies the 32 pixels with the weights of all taps,
// as weights [16 rows] x pixels [8 columns] on tensor cores. Output rows 2 i + 1 and 2 i + 2 ("pair i") take window
// rows 2, 3 of input row i and 0, 1 of row i + 1: that sum is made in the accumulators. Output columns 2 j + 1 and 2 j
// + 2 take window columns 2, 3 of pixel j (part L) and 0, 1 of pixel j + 1 (part R): pixel 4 n + t is column n of the
// t-th product, so that the right neighbour is in the same thread but for one shuffle. Sums go through shared memory to
// wide stores.
//
// Pixels arrive by cp.async in a ring of slabs (64 bytes of channels each). The order of channels within a product is
// free, so a thread fetches just the 16 bytes (NCHW: 4 pixels of some channels) that it multiplies: slots are private
// and need no barrier.
#include "few.cuh"
#include "few.h"

namespace aeup {
namespace {

constexpr int kSegment = 32, kSlot = 2048;  // kSlot: bytes of a warp's slab
// Split weights take so much memory that one block fits: it has more warps then.
constexpr int warps_of(bool split) { return split ? 8 : 4; }
constexpr int depth_of(bool split) { return split ? 4 : 6; }

template <class T>
struct FewWalk {
  const T *input, *weight, *bias;
  T* result;
  int ci, ih, iw, oh, ow;
  Strides from;
  WeightStrides strides;
  Window window;
  int segments;       // warps side by side; kWarps / segments strips per block
  int rows;           // input rows of a strip
  int step, columns;  // pixels from one block of columns to the next, and their number
  int row_strips;
  int64_t strips;
  int slabs;
  bool wide;  // whole pieces, aligned
  int units;  // vectors that touch a line of results
  Divider by_units;
  Activation activation;
  float slope;
};

template <class T, int kCO, bool kSplit>
struct WalkShape {
  static constexpr int kWarps = warps_of(kSplit), kThreads = 32 * kWarps, kDepth = depth_of(kSplit);
  static constexpr int kV = 16 / int(sizeof(T)), kC = 64 / int(sizeof(T));  // channels of a piece, of a slab
  static constexpr bool kPacked = kCO <= 2;                                 // parts L and R in one product
  static constexpr int kM = kPacked ? 1 : 2, kItems = kPacked ? 1 : 2;      // products; rows of each part per thread
};
// Words of weights in shared memory: [slab][step 2][set 2][kM][kSplit + 1][lane 32][4].
template <int kM>
AEUP_HD int64_t weight_tiles(int slabs, bool split) {
  return int64_t(slabs) * 4 * kM * (split ? 2 : 1);
}
// Floats of a staged line of `channels` channels; a strip has lines [2 rows][local column, co] or [2 rows][co][local
// column]. 4 lines begin in different banks.
AEUP_HD int stage_line(int segments, int channels) { return (staged((segments * 64 + 4) * channels) + 7) / 8 * 8 + 2; }

template <class T, int kCO, bool kLast, bool kSplit>
__global__ void __launch_bounds__(WalkShape<T, kCO, kSplit>::kThreads, kSplit ? 1 : 3) few_walk(FewWalk<T> p) {
  using Q = WalkShape<T, kCO, kSplit>;
  constexpr int kM = Q::kM, kItems = Q::kItems, kV = Q::kV, kC = Q::kC, kParts = kSplit ? 2 : 1;
  constexpr int kWarps = Q::kWarps, kDepth = Q::kDepth, kEach = 4 / int(sizeof(T));
  AEUP_DYNAMIC_SHARED(uint4, shared);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, q = lane % 4;
  const int segment = warp % p.segments, in_block = warp / p.segments, strips = kWarps / p.segments;

  // Shared memory: weights, rings, staged rows (twice), bias.
  uint4* const weights = shared;
  unsigned char* const ring =
      reinterpret_cast<unsigned char*>(shared + weight_tiles<kM>(p.slabs, kSplit) * 32) + warp * (kDepth * kSlot);
  constexpr int kLines = kLast ? 2 : 2 * kCO;
  const int line_floats = stage_line(p.segments, kLast ? kCO : 1);
  float* const stages =
      reinterpret_cast<float*>(shared + weight_tiles<kM>(p.slabs, kSplit) * 32) + kWarps * kDepth * kSlot / 4;
  float* const bias = stages + 2 * strips * kLines * line_floats;

  const int64_t strip = int64_t(blockIdx.x) * strips + in_block;
  const bool active = strip < p.strips;
  Split at = split(active ? strip : 0, p.columns);
  const int j0 = int(at.remainder) * p.step;
  at = split(at.quotient, p.row_strips);
  const int r0 = int(at.remainder) * p.rows;
  const int64_t image = at.quotient;
  const int px0 = j0 + segment * kSegment + g * 4;  // this lane's 4 pixels
  const T* const source = p.input + image * p.from.n;

  // One slab of row i: channels slab * kC ..
  int fetch_row = r0, fetch_slab = 0, fetch_slot = 0;
  const auto fetch = [&] {
    unsigned char* const slot = ring + fetch_slot * kSlot;
    const bool row = active && fetch_row < p.ih && fetch_row <= r0 + p.rows;
    const int channel = fetch_slab * kC + q * kV;
    const T* const base = source + fetch_row * p.from.h + channel * p.from.c;
    constexpr int kPieces = kLast ? 4 : kV, kPer = kLast ? kV : 4, kBytes = kPer * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int x = kLast ? px0 + i : px0, c = kLast ? channel : channel + i;
      uint32_t* const to = reinterpret_cast<uint32_t*>(slot + (i * 32 + lane) * kBytes);
      const T* const piece = base + x * p.from.w + (c - channel) * p.from.c;
      if (row && x < p.iw && c < p.ci) {
        if (p.wide) {
          copy_async<kBytes>(to, piece);
        } else {
          uint32_t e[kPer];
#pragma unroll
          for (int k = 0; k < kPer; ++k) {
            const bool inside = kLast ? c + k < p.ci : x + k < p.iw;
            e[k] = inside ? bits_at(piece + (kLast ? k * p.from.c : k * p.from.w)) : 0u;
          }
#pragma unroll
          for (int k = 0; k < kBytes / 4; ++k)
            to[k] = sizeof(T) == 4 ? e[k] : join<T>(e[2 * k % kPer], e[(2 * k + 1) % kPer]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < kBytes / 4; ++k) to[k] = 0;
      }
    }
    copy_commit();
    if (++fetch_slot == kDepth) fetch_slot = 0;
    if (++fetch_slab == p.slabs) fetch_slab = 0, ++fetch_row;
  };
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) fetch();

  // Weights as the fragments that the products take: a word holds the channels of word 2 step + r of a piece. A warp's
  // fragments are all of one product and one set.
  {
    const int m = warp % kM, set = warp / kM % 2;
    int taps[2];  // of rows g and g + 8
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int item = Q::kPacked ? g : g + 8 * h, right = Q::kPacked ? h : m;
      taps[h] = item < 4 * kCO ? window_tap(p.strides, p.window, item / 2 % kCO, item / 2 / kCO + 2 * set,
                                            item % 2 + (right ? 0 : 2))
                               : -1;
    }
    constexpr int kBatch = 4;
    const int all = p.slabs * 4 * kM;
#pragma unroll 1
    for (int first = warp; first < all; first += kBatch * kWarps)  // many loads at a time
#pragma unroll
      for (int tile = first; tile < first + kBatch * kWarps; tile += kWarps) {
        const int channel = tile / (4 * kM) * kC + q * kV + tile / (2 * kM) % 2 * 2 * kEach;
        uint32_t words[4], rest[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // row g (+ 8 for odd i), channels of r = i / 2
          uint32_t e[2] = {0, 0};
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const int c = channel + i / 2 * kEach + k;
            const bool inside = taps[i % 2] >= 0 && c < p.ci;
            const uint32_t bits = bits_at(p.weight + (inside ? c * int(p.strides.ci) + taps[i % 2] : 0));
            e[k] = inside ? bits : 0u;
          }
          make_operand<T, kSplit>(join<T>(e[0], e[1]), words + i, rest + i);
        }
        if (tile >= all) continue;
        uint4* const to = weights + tile * kParts * 32 + lane;
        to[0] = make_uint4(words[0], words[1], words[2], words[3]);
        if constexpr (kSplit) to[32] = make_uint4(rest[0], rest[1], rest[2], rest[3]);
      }
  }
  if (tid < kCO) bias[tid] = p.bias ? load_one(p.bias + tid) : 0.f;
  __syncthreads();

  float above[kM][4][4], below[kM][4][4];  // pairs i - 1 and i
  const auto clear = [](auto& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) a[m][t][k] = 0.f;
  };
  clear(above);
  int slot = 0;
#pragma unroll 1
  for (int i = r0; i <= r0 + p.rows; ++i) {
    clear(below);
#pragma unroll 1
    for (int slab = 0; slab < p.slabs; ++slab) {
      copy_wait<kDepth - 1>();
      uint32_t b[4][4];  // pixel t, word
      const unsigned char* const mine = ring + slot * kSlot;
      if constexpr (kLast || sizeof(T) == 4) {
        uint4 piece[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) piece[k] = reinterpret_cast<const uint4*>(mine)[k * 32 + lane];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t words[4] = {piece[k].x, piece[k].y, piece[k].z, piece[k].w};
#pragma unroll
          for (int w = 0; w < 4; ++w) (kLast ? b[k][w] : b[w][k]) = words[w];
        }
      } else {
        uint2 piece[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) piece[k] = reinterpret_cast<const uint2*>(mine)[k * 32 + lane];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          b[0][w] = join<T>(piece[2 * w].x, piece[2 * w + 1].x);
          b[1][w] = join<T>(piece[2 * w].x >> 16, piece[2 * w + 1].x >> 16);
          b[2][w] = join<T>(piece[2 * w].y, piece[2 * w + 1].y);
          b[3][w] = join<T>(piece[2 * w].y >> 16, piece[2 * w + 1].y >> 16);
        }
      }
      fetch();
      if (++slot == kDepth) slot = 0;
      if (i >= p.ih) continue;
      const uint4* const tiles = weights + slab * (4 * kM * kParts * 32) + lane;
#pragma unroll(kSplit ? 1 : 2)  // registers
      for (int step = 0; step < 2; ++step) {
        uint32_t high[4][2], low[4][2];
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int r = 0; r < 2; ++r) make_operand<T, kSplit>(step ? b[t][2 + r] : b[t][r], &high[t][r], &low[t][r]);
#pragma unroll
        for (int k = 0; k < 2 * kM; ++k) {
          const uint4 a4 = tiles[(step * 2 * kM + k) * kParts * 32];
          const uint32_t a[4] = {a4.x, a4.y, a4.z, a4.w};
          auto& to = k < kM ? above : below;
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if constexpr (kSplit) {
              const uint4 d4 = tiles[(step * 2 * kM + k) * kParts * 32 + 32];
              const uint32_t d[4] = {d4.x, d4.y, d4.z, d4.w};
              split_product<T>(to[k % kM][t], a, d, high[t][0], high[t][1], low[t][0], low[t][1]);
            } else {
              matrix_product<T>(to[k % kM][t], a, high[t][0], high[t][1]);
            }
          }
        }
      }
    }

    // Pair i - 1: to the staged rows, then to the result.
    float* const stage = stages + ((i & 1) * strips + in_block) * kLines * line_floats;
    const auto place = [&](int item, int local) {
      const int parity = item / 2 / kCO, co = item / 2 % kCO;
      return kLast ? parity * line_floats + staged(local * kCO + co)
                   : (parity * kCO + co) * line_floats + staged(local);
    };
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      const int item = g + 8 * e;
      const auto left = [&](int t, int h) { return above[0][t][2 * e + h]; };
      const auto right = [&](int t, int h) { return Q::kPacked ? above[0][t][2 + h] : above[kM - 1][t][2 * e + h]; };
      float next = __shfl_down_sync(~0u, right(0, 0), 1);
      if (q == 3) next = 0.f;  // the next segment adds its part below
      if (item >= 4 * kCO) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float sum = left(t, h) + (t < 3 ? right((t + 1) % 4, h) : h == 0 ? right(0, 1) : next);
          stage[place(item, 2 * (segment * kSegment + (2 * q + h) * 4 + t) + 1 + item % 2)] = sum;
        }
      if (segment == 0 && q == 0 && item % 2) stage[place(item, 0)] = right(0, 0);
    }
    if (p.segments == 1) {
      __syncwarp();
    } else {
      __syncthreads();
      if (segment > 0 && q == 0)
#pragma unroll
        for (int e = 0; e < kItems; ++e) {
          const int item = g + 8 * e;
          if (item < 4 * kCO)
            stage[place(item, segment * 64 - 1 + item % 2)] += Q::kPacked ? above[0][0][2] : above[kM - 1][0][2 * e];
        }
      __syncthreads();
    }
    if (active && i <= p.ih && (i > r0 || r0 == 0)) {
      const int first = j0 == 0 ? 0 : 2 * j0 + 1;
      const int last = min(p.ow, j0 / p.step + 1 == p.columns ? p.ow : 2 * (j0 + p.step) + 1);
      const int begin = kLast ? first * kCO : first, end = kLast ? last * kCO : last;
      const int origin = kLast ? 2 * j0 * kCO : 2 * j0;  // of local column 0
#pragma unroll 1
      for (int u = segment * 32 + lane; u < kLines * p.units; u += p.segments * 32) {
        const int line = p.by_units.divide(u), row = 2 * i - 1 + (kLast ? line : line / kCO);
        if (row < 0 || row >= p.oh) continue;
        const int channel = kLast ? 0 : line % kCO;
        T* const to = p.result + (kLast ? (image * p.oh + row) * p.ow * kCO
                                        : ((image * kCO + channel) * p.oh + row) * int64_t(p.ow));
        const float* const sums = stage + line * line_floats;
        // Unit k is the k-th vector of 16 bytes that touches the line.
        const int off = int(reinterpret_cast<uintptr_t>(to + begin) % 16 / sizeof(T));
        const int from = begin - off + (u - line * p.units) * kV;
        const bool whole = from >= begin && from + kV <= end;
        const auto inside = [&](int k) { return whole || (from + k >= begin && from + k < end); };
        float v[kV];
        int c = kLast ? (from + kCO * kV) % kCO : channel;
#pragma unroll
        for (int k = 0; k < kV; ++k) {
          v[k] = inside(k) ? sums[staged(from + k - origin)] + bias[c] : 0.f;
          if (kLast && ++c == kCO) c = 0;
        }
        activate_all(v, p.activation, p.slope);
        if (whole) {
          Raw<T, kV> raw;
          raw.pack(v);
          raw.store(to + from);
        } else {
#pragma unroll
          for (int k = 0; k < kV; ++k)
            if (inside(k)) store_one(to + from + k, v[k]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) above[m][t][k] = below[m][t][k];
  }
  copy_wait<0>();
}

int segments_of(const Convolution& c) { return c.iw <= kSegment ? 1 : c.iw <= 2 * kSegment ? 2 : 4; }
int64_t shared_bytes(const Convolution& c) {
  const bool split = c.dtype == DType::f32 && !c.tf32;
  const int slabs = int(ceil_div(c.ci, 64 / element_size(c.dtype))), warps = warps_of(split);
  const int64_t tiles = c.co <= 2 ? weight_tiles<1>(slabs, split) : weight_tiles<2>(slabs, split);
  const int segments = segments_of(c), lines = c.channels_last ? 2 : 2 * int(c.co);
  return tiles * 512 + int64_t(warps) * depth_of(split) * kSlot +
         int64_t(2) * (warps / segments) * lines * stage_line(segments, c.channels_last ? int(c.co) : 1) * 4 + 16;
}

template <class T, int kCO, bool kLast, bool kSplit>
const char* start(FewWalk<T>& p, int64_t images, int64_t shared, void* stream) {
  using Q = WalkShape<T, kCO, kSplit>;
  const auto kernel = few_walk<T, kCO, kLast, kSplit>;
  // Strips as long as one wave of blocks allows: a strip reads one row more than it owns.
  const int64_t per_block = Q::kWarps / p.segments;
  const int64_t resident =
      multiprocessors() * max(min(int64_t(228 << 10) / (shared + 1024), int64_t(kSplit ? 1 : 3)), int64_t(1));
  const int64_t lines = images * p.columns * p.ih;
  p.rows = int(min(max(ceil_div(lines, resident * per_block), int64_t(4)), int64_t(p.ih)));
  p.row_strips = int(ceil_div(p.ih, p.rows));
  p.rows = int(ceil_div(p.ih, p.row_strips));
  p.strips = images * p.row_strips * p.columns;
  AEUP_LAUNCH(kernel, ceil_div(p.strips, per_block), Q::kThreads, size_t(shared), stream, p);
  return nullptr;
}

template <class T, bool kLast, bool kSplit>
const char* run(const Convolution& c, void* stream) {
  using Q = WalkShape<T, 1, false>;
  FewWalk<T> p{};
  p.input = static_cast<const T*>(c.input), p.weight = static_cast<const T*>(c.weight);
  p.bias = static_cast<const T*>(c.bias), p.result = static_cast<T*>(c.result);
  p.ci = int(c.ci), p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow);
  p.from = strides_of(c.ci, c.ih, c.iw, c.channels_last);
  p.strides = weight_strides(c), p.window = window_of(c);
  p.slabs = int(ceil_div(c.ci, Q::kC));
  p.segments = segments_of(c);
  p.step = c.iw <= 4 * kSegment ? 4 * kSegment : 4 * kSegment - 4;  // wider images: the last pixels are another's too
  p.columns = c.iw <= 4 * kSegment ? 1 : int(ceil_div(c.iw, p.step));
  const int64_t line = (c.channels_last ? c.ci : c.iw) * int64_t(sizeof(T));
  const int piece = c.channels_last ? 16 : 4 * int(sizeof(T));
  p.wide = alignment_of(c.input, line) >= piece;
  const int64_t pixels = p.columns == 1 ? c.ow : 2 * p.step + 1;  // of a line, at most
  p.units = int(ceil_div(pixels * (c.channels_last ? c.co : 1), 16 / int64_t(sizeof(T)))) + 1;
  p.by_units = Divider(p.units);
  p.activation = c.activation, p.slope = float(c.slope);
  return with_channels(c, [&](auto co) { return start<T, co(), kLast, kSplit>(p, c.n, shared_bytes(c), stream); });
}

}  // namespace

int64_t few_walk_shared(const Convolution& c) { return shared_bytes(c); }

const char* launch_few_walk(const Convolution& c, void* stream) {
  return with_operands(c, [&](auto t, auto last, auto split) { return run<decltype(t), last(), split()>(c, stream); });
}

}  // namespace aeup
