// Input gradient for 1 to 4 output channels, stride 2 and a window of 4 taps: bound by the stores of the result. Or,
// with bias and activation, the convolution of an image.
//
// grad of the input at a pixel is a product of its 4 x 4 x CO patch of the output's gradient with the weights. A block
// keeps the gradient of a tile in shared memory as [row][column][co]: four columns of a patch row are adjacent words,
// in either layout. A warp makes 32 adjacent pixels at a time, for all input channels: channels-last as pixels x
// channels, NCHW as channels x pixels, with the free order of the columns of a product such that a thread ends with 16
// adjacent bytes.
#include "few.cuh"
#include "few.h"

namespace aeup {
namespace {

constexpr int kThreads = 128, kWarps = 4, kTileRows = 8;

template <class T>
struct FewGradient {
  const T *grad, *weight, *bias;  // bias [ci], or null
  T* result;
  int ci, ih, iw, oh, ow;
  Strides from, to;
  WeightStrides strides;
  Window window;
  int segments, column_tiles, row_tiles;  // a tile: kTileRows x 32 * segments pixels
  int64_t tiles;
  int groups;  // of channels: 64 bytes channels-last, 16 channels NCHW
  int pieces;  // of 16 bytes that touch a line of the tile
  Divider by_pieces;
  int grad_alignment, alignment;  // bytes, of every line of the gradient and of the result
  Activation activation;
  float slope;
};

template <class T, int kCO, bool kLast, bool kSplit>
struct GradientShape {
  static constexpr int kV = 16 / int(sizeof(T)), kEach = 4 / int(sizeof(T));  // elements of 16 bytes, of a word
  static constexpr int kRowWords = 4 * kCO / kEach, kSteps = kRowWords / 2;   // of a patch row; products
  static constexpr int kPixelWords = 2 * kCO / kEach;                         // from one pixel's patch to the next
  static constexpr int kGroup = kLast ? 4 * kV : 16, kN = kV / 2;             // channels; products of 8 channels
  static constexpr int kParts = kSplit ? 2 : 1;
  static constexpr int kLaneWords = kLast ? kN * 2 : 4;  // weights of a lane per group and step
  static constexpr int kBlocks = sizeof(T) == 2 ? 4 : 2;
  static constexpr int kElement = kLast ? kCO : 1, kLines = kLast ? 1 : kCO;  // of a column in a line; lines of a row
  // Words of a row of the staged tile, and of all weights.
  AEUP_HD static int row_words(int segments) { return (64 * segments + 2) * kCO / kEach; }
  AEUP_HD static int weight_words(int groups) { return groups * kSteps * kParts * 32 * kLaneWords; }
};

template <class T, int kCO, bool kLast, bool kSplit>
__global__ void __launch_bounds__(kThreads, GradientShape<T, kCO, kLast, kSplit>::kBlocks)
    few_input_gradient(FewGradient<T> p) {
  using Q = GradientShape<T, kCO, kLast, kSplit>;
  constexpr int kV = Q::kV, kEach = Q::kEach, kR = Q::kRowWords, kSteps = Q::kSteps, kParts = Q::kParts;
  AEUP_DYNAMIC_SHARED(uint32_t, shared);
  uint32_t* const weights = shared;  // [group][step][part][kLast: product][lane][2, NCHW: 4]
  uint32_t* const tile = shared + Q::weight_words(p.groups);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, q = lane % 4;
  const int row_words = Q::row_words(p.segments), width = 32 * p.segments;

  // Word w of a patch is word w % kR of its row w / kR; step s, half r, lane q takes w = 8 s + 4 r + q.
  constexpr int kProducts = kLast ? Q::kN : 1, kWords = kLast ? 2 : 4, kBatch = 4;
  int taps[kSteps][2][kEach];  // offsets in the weight; -1: outside of the kernel
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int w = 8 * step + 4 * r + q, at = w % kR * kEach + k;
        const int kh = w / kR - p.window.shift_h, kw = at / kCO - p.window.shift_w;
        const bool inside = unsigned(kh) < unsigned(p.window.kh) && unsigned(kw) < unsigned(p.window.kw);
        taps[step][r][k] = inside ? int(at % kCO * p.strides.co + kh * p.strides.h + kw * p.strides.w) : -1;
      }
#pragma unroll 1
  for (int f = warp; f < p.groups * kProducts; f += kWarps) {
    const int u = f % kProducts, group = f / kProducts;
    uint32_t bits[kSteps][kWords][kEach];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < kWords; ++i)
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          const int ci = group * Q::kGroup + (kLast ? g / 2 * kV + u * 2 + g % 2 : g + i % 2 * 8);
          const int tap = taps[step][kLast ? i : i / 2][k];
          const bool inside = tap >= 0 && ci < p.ci;
          const uint32_t one = bits_at(p.weight + (inside ? ci * int(p.strides.ci) + tap : 0));
          bits[step][i][k] = inside ? one : 0u;
        }
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        uint32_t* const to = weights + (((group * kSteps + step) * kParts * kProducts + u) * 32 + lane) * kWords + i;
        uint32_t high, low;
        make_operand<T, kSplit>(join<T>(bits[step][i][0], bits[step][i][kEach - 1]), &high, &low);
        to[0] = high;
        if constexpr (kSplit) to[kProducts * 32 * kWords] = low;
      }
  }

  // Fills the tile, [row][column][co], with the gradient from row y0 and column x0; zero outside of it.
  const auto load_tile = [&](const T* grad, int y0, int x0) {
    const int low = x0 * Q::kElement, high = p.ow * Q::kElement, length = (2 * width + 2) * Q::kElement;
    const int tasks = (2 * kTileRows + 2) * Q::kLines * p.pieces, piece0 = low >= 0 ? low / kV : -1;
    const auto load = [&](int task, auto bring) {
      const int line = p.by_pieces.divide(task), y = y0 + line / Q::kLines;
      const int e = (piece0 + task - line * p.pieces) * kV;
      const bool inside = task < tasks && y >= 0 && y < p.oh && e >= 0;
      bring(grad + y * p.from.h + line % Q::kLines * p.from.c + e, inside ? high - e : 0);
    };
    const auto put = [&](int task, const uint32_t* words) {
      const int line = p.by_pieces.divide(task), e = (piece0 + task - line * p.pieces) * kV - low;
      if (task >= tasks) return;
      T* const to = reinterpret_cast<T*>(tile) + line / Q::kLines * (row_words * kEach) + line % Q::kLines;
#pragma unroll
      for (int k = 0; k < kV; ++k)
        if (e + k >= 0 && e + k < length) {
          T& element = to[(e + k) * (kCO / Q::kElement)];
          if constexpr (sizeof(T) == 2)
            element.bits = uint16_t(words[k / 2] >> 16 * (k % 2));
          else
            element = __uint_as_float(words[k]);
        }
    };
    if (p.grad_alignment == 16) {
#pragma unroll 1
      for (int task = tid; task < tasks; task += kBatch * kThreads) {
        uint32_t words[kBatch][4];
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          load(task + k * kThreads, [&](const T* from, int inside) {
            words[k][0] = words[k][1] = words[k][2] = words[k][3] = 0;
            if (inside > 0) load_words<16>(from, words[k]);
          });
#pragma unroll
        for (int k = 0; k < kBatch; ++k) put(task + k * kThreads, words[k]);
      }
    } else {
#pragma unroll 1
      for (int task = tid; task < tasks; task += kThreads) {
        uint32_t words[4];
        load(task, [&](const T* from, int inside) { load_narrow(from, inside, p.grad_alignment, words); });
        put(task, words);
      }
    }
  };

  const auto bias_of = [&](int ci) { return p.bias && ci < p.ci ? load_one(p.bias + ci) : 0.f; };
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    Split at = split(index, p.column_tiles);
    const int j0 = int(at.remainder) * width;
    at = split(at.quotient, p.row_tiles);
    const int i0 = int(at.remainder) * kTileRows;
    const int64_t image = at.quotient;
    __syncthreads();  // the last tile has been read
    load_tile(p.grad + image * p.from.n, 2 * i0 - 1, 2 * j0 - 1);
    __syncthreads();

    for (int unit = warp; unit < kTileRows * p.segments; unit += kWarps) {
      const int li = unit / p.segments, lj = unit % p.segments * 32, i = i0 + li;
      if (i >= p.ih || j0 + lj >= p.iw) continue;
      const uint32_t* const patch = tile + 2 * li * row_words + lj * Q::kPixelWords;
      const auto word = [&](int pixel, int w) { return patch[w / kR * row_words + pixel * Q::kPixelWords + w % kR]; };
      T* const result = p.result + image * p.to.n + i * p.to.h + (j0 + lj) * p.to.w;
      if constexpr (kLast) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          uint32_t a[kSteps][4], d[kSteps][4];
#pragma unroll
          for (int s = 0; s < kSteps; ++s)
#pragma unroll
            for (int k = 0; k < 4; ++k)
              make_operand<T, kSplit>(word(half * 16 + g + k % 2 * 8, 8 * s + k / 2 * 4 + q), &a[s][k], &d[s][k]);
#pragma unroll 1
          for (int group = 0; group < p.groups; ++group) {
            float acc[Q::kN][4];
#pragma unroll
            for (int u = 0; u < Q::kN; ++u)
#pragma unroll
              for (int k = 0; k < 4; ++k) acc[u][k] = bias_of(group * Q::kGroup + q * kV + 2 * u + k % 2);
#pragma unroll
            for (int s = 0; s < kSteps; ++s)
#pragma unroll
              for (int u = 0; u < Q::kN; ++u) {
                const uint2* const b2 =
                    reinterpret_cast<const uint2*>(weights) + ((group * kSteps + s) * kParts * Q::kN + u) * 32 + lane;
                const uint2 b = b2[0];
                if constexpr (kSplit) {
                  const uint2 rest = b2[Q::kN * 32];
                  split_product<T>(acc[u], a[s], d[s], b.x, b.y, rest.x, rest.y);
                } else {
                  matrix_product<T>(acc[u], a[s], b.x, b.y);
                }
              }
            const int channel = group * Q::kGroup + q * kV;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int pixel = half * 16 + g + 8 * r;
              if (j0 + lj + pixel >= p.iw) continue;
              float v[kV];
#pragma unroll
              for (int u = 0; u < Q::kN; ++u) v[2 * u] = acc[u][2 * r], v[2 * u + 1] = acc[u][2 * r + 1];
              activate_all(v, p.activation, p.slope);
              T* const to = result + pixel * p.to.w + channel;
              if (channel >= p.ci) continue;
              if (p.alignment == 16) {
                Raw<T, kV> raw;
                raw.pack(v);
                raw.store(to);
              } else {
                store_narrow(to, v, p.ci - channel, p.alignment);
              }
            }
          }
        }
      } else {
        uint32_t b[4][kSteps][2], d[4][kSteps][2];  // pixel 4 n + t is column n of product t
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int s = 0; s < kSteps; ++s)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              make_operand<T, kSplit>(word(4 * g + t, 8 * s + 4 * r + q), &b[t][s][r], &d[t][s][r]);
#pragma unroll 1
        for (int group = 0; group < p.groups; ++group) {
          float acc[4][4];
#pragma unroll
          for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int k = 0; k < 4; ++k) acc[t][k] = bias_of(group * 16 + g + k / 2 * 8);
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            const uint4* const a4 = reinterpret_cast<const uint4*>(weights) + (group * kSteps + s) * kParts * 32 + lane;
            const uint32_t a[4] = {a4->x, a4->y, a4->z, a4->w};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              if constexpr (kSplit) {
                const uint32_t rest[4] = {a4[32].x, a4[32].y, a4[32].z, a4[32].w};
                split_product<T>(acc[t], a, rest, b[t][s][0], b[t][s][1], d[t][s][0], d[t][s][1]);
              } else {
                matrix_product<T>(acc[t], a, b[t][s][0], b[t][s][1]);
              }
            }
          }
          const int pixel = 8 * q;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int channel = group * 16 + g + 8 * r;
            if (channel >= p.ci) continue;
            float v[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] = acc[k % 4][2 * r + k / 4];
            activate_all(v, p.activation, p.slope);
            T* const to = result + channel * p.to.c + pixel;
            const int left = p.iw - (j0 + lj + pixel);
#pragma unroll
            for (int k = 0; k < 8; k += kV) {
              if (k >= left) continue;
              if (p.alignment == 16) {
                Raw<T, kV> raw;
                raw.pack(v + k);
                raw.store(to + k);
              } else {
                store_narrow(to + k, v + k, left - k, p.alignment);
              }
            }
          }
        }
      }
    }
  }
}

template <class T, int kCO, bool kLast, bool kSplit>
const char* start(FewGradient<T>& p, void* stream) {
  using Q = GradientShape<T, kCO, kLast, kSplit>;
  p.groups = int(ceil_div(p.ci, Q::kGroup));
  const size_t shared = 4 * (size_t(Q::weight_words(p.groups)) + size_t(2 * kTileRows + 2) * Q::row_words(p.segments));
  const auto kernel = few_input_gradient<T, kCO, kLast, kSplit>;
  const int64_t fit = int64_t((220 << 10) / (shared + 1024)), most = fit < Q::kBlocks ? fit : Q::kBlocks;
  const int64_t blocks = min(p.tiles, max(most, int64_t(1)) * multiprocessors());
  AEUP_LAUNCH(kernel, blocks, kThreads, shared, stream, p);
  return nullptr;
}

int segments_of(const Convolution& c) { return c.iw <= 32 ? 1 : 2; }

template <class T, bool kLast, bool kSplit>
const char* run(const Convolution& c, void* stream) {
  FewGradient<T> p{};
  p.grad = static_cast<const T*>(c.grad), p.weight = static_cast<const T*>(c.weight);
  p.bias = static_cast<const T*>(c.bias), p.activation = c.activation, p.slope = float(c.slope);
  p.result = static_cast<T*>(c.result);
  p.ci = int(c.ci), p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow);
  p.from = strides_of(c.co, c.oh, c.ow, c.channels_last), p.to = strides_of(c.ci, c.ih, c.iw, c.channels_last);
  p.strides = weight_strides(c), p.window = window_of(c);
  p.segments = segments_of(c);
  p.column_tiles = int(ceil_div(c.iw, 32 * p.segments)), p.row_tiles = int(ceil_div(c.ih, kTileRows));
  p.tiles = c.n * p.row_tiles * p.column_tiles;
  // A line of a tile begins at the last column of the one before, or at -1.
  const int element = c.channels_last ? int(c.co) : 1, piece = 16 / int(sizeof(T));
  p.pieces = ((64 * p.segments + 1) * element - 1) / piece + 2;
  p.by_pieces = Divider(p.pieces);
  p.grad_alignment = alignment_of(c.grad, element * c.ow * int64_t(sizeof(T)));
  p.alignment = alignment_of(c.result, (c.channels_last ? c.ci : c.iw) * int64_t(sizeof(T)));
  return with_channels(c, [&](auto co) { return start<T, co(), kLast, kSplit>(p, stream); });
}

}  // namespace

int64_t few_input_gradient_shared(const Convolution& c) {
  const int64_t split = c.dtype == DType::f32 && !c.tf32 ? 2 : 1, size = element_size(c.dtype);
  const int64_t weights = ceil_div(c.ci, 32) * 32 * 16 * c.co * split * size;
  return weights + (2 * kTileRows + 2) * (64 * segments_of(c) + 2) * c.co * size;
}

const char* launch_few_input_gradient(const Convolution& c, void* stream) {
  return with_operands(c, [&](auto t, auto last, auto split) { return run<decltype(t), last(), split()>(c, stream); });
}

}  // namespace aeup
