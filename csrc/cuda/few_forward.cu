// Forward for 1 to 4 output channels, stride 2 and a window of 4 taps: bound by memory, so every input is read once,
// but for the border of a tile.
//
// Position (a, b) is the 2 x 2 outputs in rows 2 a - 1, 2 a and columns 2 b - 1, 2 b. They take input rows a - 1, a and
// columns b - 1, b: positions [16 rows] x (parities, co) [8 columns] are products on tensor cores that sum over 4
// neighbours and all channels, with nothing left to add afterwards. A block keeps a tile of at most 256 positions, with
// its pixels in shared memory as [row][column][128 bytes of channels]; NCHW is turned to that on its way. An odd number
// of 16-byte pieces from pixel to pixel keeps the rows of a product in different banks. Results go through shared
// memory to wide stores, while the next tile is on its way.
#include "few.cuh"
#include "few.h"

namespace aeup {
namespace {

constexpr int kThreads = 128, kWarps = 4, kM = 4, kPositions = kWarps * kM * 16;

template <class T>
struct Few {
  const T *input, *weight, *bias;
  T* result;
  int ci, ih, iw, oh, ow;
  Strides from;
  WeightStrides strides;
  Window window;
  int rows, columns;  // of positions in a tile
  int row_tiles, column_tiles;
  int64_t tiles;
  int slabs, piece_bits;  // of channels: a slab is 1 << piece_bits pieces of 16 bytes
  int line, units;        // floats of a staged line; vectors that touch one
  Divider by_columns, by_units;
  int alignment;  // bytes, of every line of the input
  Activation activation;
  float slope;
};

template <class T, int kCO, bool kLast, bool kSplit>
struct FewShape {
  static constexpr int kV = 16 / int(sizeof(T)), kEach = 4 / int(sizeof(T));
  static constexpr int kN = kCO <= 2 ? 1 : 2, kParts = kSplit ? 2 : 1;
  static constexpr int kWords = 2 * kN;  // weights of a lane in a step of 32 bytes of channels, for one neighbour
  // Column n of a product: parities of row and column, co. Columns 2 k and 2 k + 1 are adjacent in the result.
  AEUP_HD static int co(int n) { return kLast ? n % kCO : n / 2 % kCO; }
  AEUP_HD static int row(int n) { return n / (2 * kCO); }
  AEUP_HD static int column(int n) { return kLast ? n / kCO % 2 : n % 2; }
};

template <class T, int kCO, bool kLast, bool kSplit>
__global__ void __launch_bounds__(kThreads, 3) few_forward(Few<T> p) {
  using Q = FewShape<T, kCO, kLast, kSplit>;
  constexpr int kV = Q::kV, kEach = Q::kEach, kN = Q::kN, kParts = Q::kParts;
  AEUP_DYNAMIC_SHARED(uint32_t, shared);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, q = lane % 4;
  const int steps = 1 << (p.piece_bits - 1), pitch = ((1 << p.piece_bits) + 1) * 16;  // bytes of a pixel
  const int width = p.columns + 1, count = p.rows * p.columns;

  // Shared memory: weights [step of all slabs][neighbour][part][lane][kWords], pixels, staged lines.
  uint32_t* const weights = shared;
  unsigned char* const pixels =
      reinterpret_cast<unsigned char*>(shared + p.slabs * steps * (4 * kParts * 32 * Q::kWords));
  float* const stage = reinterpret_cast<float*>(pixels + (p.rows + 1) * width * pitch);

  // Brings a slab of a tile's pixels, from input row a0 - 1 and column b0 - 1; zeros outside of the image.
  const auto fetch = [&](int64_t image, int a0, int b0, int slab) {
    const int first = slab * (kV << p.piece_bits);
    const T* const source = p.input + image * p.from.n + first * p.from.c;
    if constexpr (kLast) {
      const int piece = lane & ((1 << p.piece_bits) - 1), begin = lane >> p.piece_bits, step = 32 >> p.piece_bits;
      const int left = p.ci - first - piece * kV;
#pragma unroll 1
      for (int row = warp; row <= p.rows; row += kWarps) {
        const int y = a0 - 1 + row;
        const int inside = y >= 0 && y < p.ih ? left : 0;
        const T* from = source + y * p.from.h + (b0 - 1 + begin) * p.from.w + piece * kV;
        unsigned char* to = pixels + (row * width + begin) * pitch + piece * 16;
        if (p.alignment == 16) {
#pragma unroll 4
          for (int c = begin; c < width; c += step, from += step * p.from.w, to += step * pitch)
            copy_or_zero<16>(to, from, inside > 0 && unsigned(b0 - 1 + c) < unsigned(p.iw));
        } else {
#pragma unroll 1
          for (int c = begin; c < width; c += step, from += step * p.from.w, to += step * pitch)
            copy_narrow(to, from, unsigned(b0 - 1 + c) < unsigned(p.iw) ? inside : 0, p.alignment);
        }
      }
      copy_commit();
    } else {
      // A task is 16 bytes of pixels of kEach channels, which become kV words. A warp takes 16 words of channels and 2
      // pieces of a row at a time.
      constexpr int kBatch = sizeof(T) == 2 ? 4 : 8;
      const int word_bits = p.piece_bits + 2, begin = max(b0 - 1, 0) / kV;
      const int pieces = (min(b0 + p.columns, p.iw) + kV - 1) / kV - begin;
      const int tasks = ((pieces + 1) / 2) << (word_bits - 4);
#pragma unroll 1
      for (int row = warp; row <= p.rows; row += kWarps) {
        const int y = a0 - 1 + row;
        const bool inside = y >= 0 && y < p.ih;
        const T* const from = source + y * p.from.h;
        unsigned char* const to = pixels + row * width * pitch;
        const auto word_of = [&](int task) { return (task & ((1 << (word_bits - 4)) - 1)) * 16 + lane % 16; };
        const auto piece_of = [&](int task) { return (task >> (word_bits - 4)) * 2 + lane / 16; };
        const auto put = [&](int task, const uint32_t (*words)[4]) {
          const int x = (begin + piece_of(task)) * kV - (b0 - 1);
          if (task >= tasks || piece_of(task) >= pieces) return;
#pragma unroll
          for (int k = 0; k < kV; ++k)
            if (x + k >= 0 && x + k < width && x + k < p.iw - (b0 - 1)) {
              const uint32_t word = sizeof(T) == 4 ? words[0][k % 4]
                                                   : join<T>(words[0][k / kEach] >> 16 * (k % kEach),
                                                             words[kEach - 1][k / kEach] >> 16 * (k % kEach));
              *reinterpret_cast<uint32_t*>(to + (x + k) * pitch + word_of(task) * 4) = word;
            }
        };
        if (p.alignment == 16) {
#pragma unroll 1
          for (int task = 0; task < tasks; task += kBatch) {
            uint32_t words[kBatch][kEach][4];
#pragma unroll
            for (int t = 0; t < kBatch; ++t)
#pragma unroll
              for (int e = 0; e < kEach; ++e) {
                const int channel = word_of(task + t) * kEach + e;
                const bool there = inside && task + t < tasks && piece_of(task + t) < pieces && first + channel < p.ci;
                Raw<T, kV> raw;
                raw.clear();
                if (there) raw.load(from + channel * p.from.c + (begin + piece_of(task + t)) * kV);
#pragma unroll
                for (int k = 0; k < 4; ++k) words[t][e][k] = raw.w[k];
              }
#pragma unroll
            for (int t = 0; t < kBatch; ++t) put(task + t, words[t]);
          }
        } else {
#pragma unroll 1
          for (int task = 0; task < tasks; ++task) {
            uint32_t words[kEach][4];
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              const int channel = word_of(task) * kEach + e, x = (begin + piece_of(task)) * kV;
              load_narrow(from + channel * p.from.c + x, inside && first + channel < p.ci ? p.iw - x : 0, p.alignment,
                          words[e]);
            }
            put(task, words);
          }
        }
        // The columns beside the image.
        const int left = b0 == 0, right = min(p.iw - b0 + 1, width);
        for (int e = lane; e < (left + width - right) << word_bits; e += 32) {
          const int c = e >> word_bits, column = c < left ? 0 : right + c - left;
          *reinterpret_cast<uint32_t*>(to + column * pitch + (e & ((1 << word_bits) - 1)) * 4) = 0;
        }
      }
    }
  };

  // A warp makes the weights of one neighbour: input row a - 1 + warp / 2, column b - 1 + warp % 2.
  const auto make_weights = [&] {
    int taps[kN];  // offsets in the weight; -1: outside of the kernel
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      const int n = u * 8 + g, th = Q::row(n) + 2 - warp / 2 * 2, tw = Q::column(n) + 2 - warp % 2 * 2;
      taps[u] = n < 4 * kCO ? window_tap(p.strides, p.window, Q::co(n), th, tw) : -1;
    }
    constexpr int kBatch = 4;
    const int all = p.slabs * steps;
#pragma unroll 1
    for (int first = 0; first < all; first += kBatch)  // many loads at a time: their latency counts, not their number
#pragma unroll
      for (int step = first; step < first + kBatch; ++step) {
        uint32_t words[Q::kWords], rest[Q::kWords];
#pragma unroll
        for (int u = 0; u < kN; ++u)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            uint32_t e[2] = {0, 0};
#pragma unroll
            for (int k = 0; k < kEach; ++k) {
              const int c = ((step * 2 + r) * 4 + q) * kEach + k;
              const bool inside = taps[u] >= 0 && c < p.ci;
              const uint32_t bits = bits_at(p.weight + (inside ? c * int(p.strides.ci) + taps[u] : 0));
              e[k] = inside ? bits : 0u;
            }
            make_operand<T, kSplit>(join<T>(e[0], e[1]), &words[2 * u + r], &rest[2 * u + r]);
          }
        uint32_t* const to = weights + ((step * 4 + warp) * kParts * 32 + lane) * Q::kWords;
        if (step >= all) continue;
#pragma unroll
        for (int i = 0; i < Q::kWords; ++i) {
          to[i] = words[i];
          if constexpr (kSplit) to[32 * Q::kWords + i] = rest[i];
        }
      }
  };
  // What is staged of a tile, to the result.
  const auto put_out = [&](int64_t image, int row, int column) {
    constexpr int kElement = kLast ? kCO : 1;  // of a column in a line
    const int begin = max(column, 0) * kElement, end = min(p.ow, column + 2 * p.columns) * kElement;
    const int lines = 2 * p.rows * (kLast ? 1 : kCO);
#pragma unroll 1
    for (int f = tid; f < lines * p.units; f += kThreads) {
      const int line = p.by_units.divide(f), y = row + (kLast ? line : line / kCO);
      if (y < 0 || y >= p.oh) continue;
      T* const to = p.result +
                    (kLast ? (image * p.oh + y) * p.ow * kCO : ((image * kCO + line % kCO) * p.oh + y) * int64_t(p.ow));
      const float* const sums = stage + line * p.line;
      // Unit k is the k-th vector of 16 bytes that touches the line.
      const int off = int(reinterpret_cast<uintptr_t>(to + begin) % 16 / sizeof(T));
      const int from = begin - off + (f - line * p.units) * kV;
      const bool whole = from >= begin && from + kV <= end;
      const auto inside = [&](int k) { return whole || (from + k >= begin && from + k < end); };
      float v[kV];
#pragma unroll
      for (int k = 0; k < kV; ++k) v[k] = inside(k) ? sums[staged(from + k - column * kElement)] : 0.f;
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
  };
  float bias[kN][2];
#pragma unroll
  for (int u = 0; u < kN; ++u)
#pragma unroll
    for (int k = 0; k < 2; ++k) bias[u][k] = p.bias ? load_one(p.bias + Q::co(u * 8 + 2 * q + k)) : 0.f;
  const unsigned char* rows[kM];  // the row of a product that this lane names, and the half of a step
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int at = min((m * kWarps + warp) * 16 + lane % 16, count - 1), r = p.by_columns.divide(at);
    rows[m] = pixels + (at + r) * pitch + lane / 16 * 16;
  }

  int64_t tile = blockIdx.x, image = 0, staged_image = -1;
  int row = 0, column = 0, slab = 0, staged_row = 0, staged_column = 0;
  float acc[kM][kN][4];
  for (bool begun = false;; begun = true) {
    if (tile < p.tiles) {
      if (slab == 0) {
        Split at = split(tile, p.column_tiles);
        column = int(at.remainder) * p.columns;
        at = split(at.quotient, p.row_tiles);
        row = int(at.remainder) * p.rows, image = at.quotient;
      }
      fetch(image, row, column, slab);
    }
    if (!begun) make_weights();
    if (staged_image >= 0) put_out(staged_image, 2 * staged_row - 1, 2 * staged_column - 1);
    if (tile >= p.tiles) return;
    copy_wait<0>();
    __syncthreads();  // the slab is there, the lines have been read
    if (slab == 0)
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int u = 0; u < kN; ++u)
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[m][u][k] = bias[u][k % 2];
    const uint32_t* b = weights + (slab * steps * 4 * kParts * 32 + lane) * Q::kWords;
#pragma unroll 1
    for (int step = 0; step < steps; ++step)
#pragma unroll(kSplit ? 1 : 4)
      for (int neighbour = 0; neighbour < 4; ++neighbour) {
        uint32_t high[Q::kWords], low[Q::kWords];
        const auto words = [&](const uint32_t* from, uint32_t* to) {
          if constexpr (kN == 2) {
            const uint4 w = *reinterpret_cast<const uint4*>(from);
            to[0] = w.x, to[1] = w.y, to[2] = w.z, to[3] = w.w;
          } else {
            const uint2 w = *reinterpret_cast<const uint2*>(from);
            to[0] = w.x, to[1] = w.y;
          }
        };
        words(b, high);
        if constexpr (kSplit) words(b + 32 * Q::kWords, low);
        b += kParts * 32 * Q::kWords;
        const int offset = (neighbour / 2 * width + neighbour % 2) * pitch + step * 32;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t read[4], a[4], d[4];
          load_matrices(rows[m] + offset, read);
#pragma unroll
          for (int k = 0; k < 4; ++k) make_operand<T, kSplit>(read[k], a + k, d + k);
#pragma unroll
          for (int u = 0; u < kN; ++u) {
            if constexpr (kSplit)
              split_product<T>(acc[m][u], a, d, high[2 * u], high[2 * u + 1], low[2 * u], low[2 * u + 1]);
            else
              matrix_product<T>(acc[m][u], a, high[2 * u], high[2 * u + 1]);
          }
        }
      }
    if (++slab == p.slabs) {
      // To lines [row][column, co], NCHW [row][co][column], from output row 2 a0 - 1 and column 2 b0 - 1.
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = (m * kWarps + warp) * 16 + h * 8 + g, r = p.by_columns.divide(at), c = at - r * p.columns;
          float* const to = stage + r * 2 * (kLast ? 1 : kCO) * p.line;
#pragma unroll
          for (int u = 0; u < kN; ++u) {
            const int n = u * 8 + 2 * q;
            if (at < count && n < 4 * kCO)
              *reinterpret_cast<float2*>(to + (kLast ? n / (2 * kCO) : n / 2) * p.line +
                                         staged(kLast ? c * 2 * kCO + n % (2 * kCO) : c * 2)) =
                  make_float2(acc[m][u][2 * h], acc[m][u][2 * h + 1]);
          }
        }
      staged_image = image, staged_row = row, staged_column = column;
      slab = 0, tile += gridDim.x;
    } else {
      staged_image = -1;
    }
    __syncthreads();  // the slab has been read, the lines are there
  }
}

// Sizes that shared memory depends on.
struct Plan {
  int rows, columns, row_tiles, column_tiles, slabs, piece_bits, line;
  int64_t shared;
};
Plan plan_of(const Convolution& c) {
  Plan best{};
  const int64_t height = c.ih + 1, width = c.iw + 1, fewest = ceil_div(width, 64);
  int64_t least = INT64_MAX;
  for (int64_t tiles = fewest; tiles < fewest + 4 && tiles <= width; ++tiles) {  // which split reads least?
    Plan at{};
    at.columns = int(ceil_div(width, tiles)), at.column_tiles = int(ceil_div(width, at.columns));
    const int64_t most = min(int64_t(kPositions / at.columns), int64_t(16));
    at.row_tiles = int(ceil_div(height, most)), at.rows = int(ceil_div(height, at.row_tiles));
    const int64_t cost =
        int64_t(at.row_tiles) * at.column_tiles * (at.rows + 1) * (at.columns + 5);  // 4: ends of lines
    if (cost < least) best = at, least = cost;
  }
  const int64_t bytes = c.ci * element_size(c.dtype);
  best.slabs = int(ceil_div(bytes, 128));
  best.piece_bits = bytes > 64 ? 3 : bytes > 32 || !c.channels_last ? 2 : 1;
  const int line = staged(2 * best.columns * (c.channels_last ? int(c.co) : 1) + 6);
  best.line = c.channels_last ? line / 2 * 2 : (line + 23) / 32 * 32 + 8;  // NCHW: 4 lines are 8 banks from each other
  const int64_t split = c.dtype == DType::f32 && !c.tf32 ? 2 : 1;
  const int64_t weights = int64_t(best.slabs) * (1 << (best.piece_bits - 1)) * 4 * split * 32 * (c.co <= 2 ? 8 : 16);
  best.shared = weights + int64_t(best.rows + 1) * (best.columns + 1) * ((1 << best.piece_bits) + 1) * 16 +
                int64_t(2 * best.rows) * (c.channels_last ? 1 : c.co) * best.line * 4;
  return best;
}

template <class T, int kCO, bool kLast, bool kSplit>
const char* start(const Few<T>& p, int64_t shared, void* stream) {
  const int64_t fit = max(min(int64_t(220 << 10) / (shared + 1024), int64_t(3)), int64_t(1));
  const auto kernel = few_forward<T, kCO, kLast, kSplit>;
  AEUP_LAUNCH(kernel, min(p.tiles, fit * multiprocessors()), kThreads, size_t(shared), stream, p);
  return nullptr;
}

template <class T, bool kLast, bool kSplit>
const char* run(const Convolution& c, void* stream) {
  const Plan plan = plan_of(c);
  Few<T> p{};
  p.input = static_cast<const T*>(c.input), p.weight = static_cast<const T*>(c.weight);
  p.bias = static_cast<const T*>(c.bias), p.result = static_cast<T*>(c.result);
  p.ci = int(c.ci), p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow);
  p.from = strides_of(c.ci, c.ih, c.iw, c.channels_last);
  p.strides = weight_strides(c), p.window = window_of(c);
  p.rows = plan.rows, p.columns = plan.columns, p.row_tiles = plan.row_tiles, p.column_tiles = plan.column_tiles;
  p.tiles = c.n * plan.row_tiles * plan.column_tiles;
  p.slabs = plan.slabs, p.piece_bits = plan.piece_bits, p.line = plan.line;
  const int64_t elements = 2 * int64_t(plan.columns) * (c.channels_last ? c.co : 1);
  p.units = int(ceil_div(elements, 16 / int64_t(sizeof(T)))) + 1;
  p.by_columns = Divider(plan.columns), p.by_units = Divider(p.units);
  p.alignment = alignment_of(c.input, (c.channels_last ? c.ci : c.iw) * int64_t(sizeof(T)));
  p.activation = c.activation, p.slope = float(c.slope);
  return with_channels(c, [&](auto co) { return start<T, co(), kLast, kSplit>(p, plan.shared, stream); });
}

// Tiles take each pixel 4 times, which costs where operands are split, and turn NCHW on its way; but a walk takes 32
// columns at least, and its strips are short where images are small.
bool walks(const Convolution& c) {
  const bool split = c.dtype == DType::f32 && !c.tf32;
  return c.iw >= (c.channels_last && !split ? 64 : 24);
}

}  // namespace

int64_t few_forward_shared(const Convolution& c) { return walks(c) ? few_walk_shared(c) : plan_of(c).shared; }

const char* launch_few_forward(const Convolution& c, void* stream) {
  if (walks(c)) return launch_few_walk(c, stream);
  return with_operands(c, [&](auto t, auto last, auto split) { return run<decltype(t), last(), split()>(c, stream); });
}

}  // namespace aeup
