// The forward kernel: convolve(), then bias, activation and stores by way of shared memory.
#pragma once
#include "resample_conv_gemm.cuh"

namespace aeup {

template <class T>
struct ResampleForward {
  ConvGemm<T> gemm;
  const T* bias;
  T* result;
  Strides to;
  int oh, ow, ph, pw;
  int tiles_h, tiles_w;
  bool wide;  // whole vectors of 16 bytes, aligned
  Activation activation;
  float slope;
};
template <class Q>
__global__ void __launch_bounds__(kBlock, 2) resample_conv_forward(ResampleForward<typename Q::T> p) {
  using T = typename Q::T;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ TileTaps table;
  static_assert(sizeof(table) <= kMostStatic);
  Split at = split(blockIdx.x, p.gemm.column_tiles);
  const int row0 = int(at.remainder) * Q::kColumns;
  at = split(at.quotient, p.gemm.groups);
  const int group = int(at.remainder);
  at = split(at.quotient, p.tiles_w);
  const int x0 = int(at.remainder) * kTileWidth;
  at = split(at.quotient, p.tiles_h);
  const int y0 = int(at.remainder) * Q::kHeight;
  const int64_t image = at.quotient;

  float acc[4][Q::kFragments][4];
  convolve<Q, false>(p.gemm, image, group, row0, y0 - p.ph, x0 - p.pw, shared, &table, acc);

  const bool last = p.gemm.map.last;
  float* const sums = reinterpret_cast<float*>(shared);
  stage_sums<Q>(acc, last, sums);
  __syncthreads();
  const int channels = min(Q::kColumns, p.gemm.weight.rows - row0), pitch = stage_pitch<Q>(last);
  const int64_t channel0 = int64_t(group) * p.gemm.weight.rows + row0;
  const T* const bias = p.bias ? p.bias + channel0 : nullptr;
  T* const result = p.result + image * p.to.n + channel0 * p.to.c;
  // A unit is V adjacent results: of channels of a pixel, or of pixels of a channel.
  const auto store = [&](auto width) {
    constexpr int V = decltype(width)::value;
    for (int i = threadIdx.x; i < Q::kPixels * Q::kColumns / V; i += kBlock) {
      const int line = last ? i / (Q::kColumns / V) : i / (Q::kPixels / V);
      const int first = (last ? i % (Q::kColumns / V) : i % (Q::kPixels / V)) * V;
      const int channel = last ? first : line, pixel = last ? line : first;
      const int y = y0 + pixel / kTileWidth, x = x0 + pixel % kTileWidth;
      if (channel >= channels || y >= p.oh || x >= p.ow) continue;
      constexpr int kAt = V % 4 ? 1 : 4;  // V is 1, or whole float4, aligned
      Raw<float, V> staged;
      float value[V];
#pragma unroll
      for (int e = 0; e < V; e += kAt) shared_load<4 * kAt>(sums + line * pitch + first + e, staged.w + e);
      staged.unpack(value);
      if (bias)
#pragma unroll
        for (int e = 0; e < V; ++e) value[e] += load_one(bias + channel + (last ? e : 0));
      if (p.activation != Activation::none)
#pragma unroll
        for (int e = 0; e < V; ++e) value[e] = activate(value[e], p.activation, p.slope);
      Raw<T, V> raw;
      raw.pack(value);
      raw.store(result + y * p.to.h + x * p.to.w + channel * p.to.c);
    }
  };
  if (p.wide)
    store(std::integral_constant<int, 16 / int(sizeof(T))>());
  else
    store(std::integral_constant<int, 1>());
}

template <class Q>
const char* start_resample_forward(const ResampleConv& c, void* workspace, void* stream) {
  using T = typename Q::T;
  ResampleForward<T> p{};
  p.gemm.map = map_of<T>(c, false, Q::kHeight), p.gemm.weight = gemm_weight<T>(c, Pass::forward, workspace);
  p.gemm.taps = c.kh * c.kw, p.gemm.kw = c.kw, p.gemm.groups = c.groups;
  p.gemm.column_tiles = int(ceil_div(p.gemm.weight.rows, Q::kColumns));
  p.bias = static_cast<const T*>(c.bias), p.result = static_cast<T*>(c.result);
  p.to = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.oh = int(c.oh), p.ow = int(c.ow), p.ph = c.ph, p.pw = c.pw;
  p.tiles_h = int(ceil_div(c.oh, Q::kHeight)), p.tiles_w = int(ceil_div(c.ow, kTileWidth));
  const int64_t bytes = int64_t(sizeof(T));
  p.wide = c.channels_last ? alignment_of(c.result, c.co * bytes | c.co / c.groups * bytes) == 16
                           : alignment_of(c.result, c.ow * bytes) == 16;
  p.activation = c.activation, p.slope = c.slope;
  const double blocks = double(c.n) * p.tiles_h * p.tiles_w * c.groups * p.gemm.column_tiles;
  if (blocks > double(kMaxGrid)) return "the result has too many tiles";
  const int shared = int(max(operand_bytes<Q>(p.gemm.map), int64_t(stage_bytes<Q>(c.channels_last))));
  AEUP_LAUNCH((resample_conv_forward<Q>), int64_t(blocks), kBlock, size_t(shared), stream, p);
  return nullptr;
}

}  // namespace aeup
