// The input gradient: the resampled image's gradient (a convolution of the output's gradient with the reversed kernel)
// for a tile, kept in shared memory in float32, then the adjoint of the resampling as a gather from it.
//
// A block owns a rectangle of input pixels and goes through the tiles of the resampled image that read them, in order:
// no atomics, the same bits on every run. Tiles at the rim are computed by two blocks.
#pragma once
#include "conv_launch.h"
#include "resample_conv_gemm.cuh"

namespace aeup {

constexpr int kMaxInputs = 16;  // rows, and columns, of a block's input pixels

template <class T>
struct ResampleInput {
  ConvGemm<T> gemm;
  T* result;
  Strides to;
  Axis<float> v, h;  // of the resampling
  int taps;
  int dy, dx;              // from a row of the resampled image to the first row of grad that it reads
  int inputs_h, inputs_w;  // of a block
  int tiles_h, tiles_w;
  bool wide;       // four adjacent channels in one access
  int sums_bytes;  // where the block's input sums begin
};

// weights[u][i]: with which row u0 + u reads input i0 + i; range[i]: the rows of the tile that do.
template <int kOutputs>
struct Adjoint {
  float weights[kOutputs][kMaxInputs];
  int begin[kMaxInputs], end[kMaxInputs];
};
template <int kOutputs>
AEUP_DEV void fill_adjoint_weights(const Axis<float>& axis, int taps_count, int u0, int i0, int u,
                                   Adjoint<kOutputs>* a) {
#pragma unroll
  for (int i = 0; i < kMaxInputs; ++i) a->weights[u][i] = 0.f;
  if (u0 + u >= axis.out) return;
  float w[4];
  const int start = taps_at(axis, taps_count, u0 + u, w);
  for (int k = 0; k < taps_count; ++k) {
    const int i = clamp_index(start + k, axis.in) - i0;
    if (i >= 0 && i < kMaxInputs) a->weights[u][i] += w[k];
  }
}
template <int kOutputs>
AEUP_DEV void fill_adjoint_ranges(int i, Adjoint<kOutputs>* a) {
  int begin = kOutputs, end = 0;
  for (int u = 0; u < kOutputs; ++u)
    if (a->weights[u][i] != 0.f) begin = min(begin, u), end = u + 1;
  a->begin[i] = begin, a->end[i] = end;
}

template <class Q>
__global__ void __launch_bounds__(kBlock, 2) resample_conv_input(ResampleInput<typename Q::T> p) {
  using T = typename Q::T;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ TileTaps table;
  __shared__ Adjoint<Q::kHeight> rows;
  __shared__ Adjoint<kTileWidth> columns;
  static_assert(sizeof(table) + sizeof(rows) + sizeof(columns) <= kMostStatic);
  Split at = split(blockIdx.x, p.gemm.column_tiles);
  const int row0 = int(at.remainder) * Q::kColumns;
  at = split(at.quotient, p.gemm.groups);
  const int group = int(at.remainder);
  at = split(at.quotient, p.tiles_w);
  const int j0 = int(at.remainder) * p.inputs_w, width = min(p.inputs_w, p.h.in - j0);
  at = split(at.quotient, p.tiles_h);
  const int i0 = int(at.remainder) * p.inputs_h, height = min(p.inputs_h, p.v.in - i0);
  const int64_t image = at.quotient;
  const int channels = min(Q::kColumns, p.gemm.weight.rows - row0);
  T* const result = p.result + image * p.to.n + (int64_t(group) * p.gemm.weight.rows + row0) * p.to.c;
  const bool last = p.gemm.map.last;
  float* const sums = reinterpret_cast<float*>(shared);
  float4* const totals = reinterpret_cast<float4*>(shared + p.sums_bytes);
  constexpr int kQuads = Q::kColumns / 4, kPitchFloats = stage_pitch<Q>(true);
  const int pixels = height * width;

  // The tiles of the resampled image that read these inputs; one at least, so that every input is stored.
  const int u_begin = first_output_reading(p.v, i0), v_begin = first_output_reading(p.h, j0);
  const int u_end = max(end_of_outputs_reading(p.v, i0 + height - 1), u_begin + 1);
  const int v_end = max(end_of_outputs_reading(p.h, j0 + width - 1), v_begin + 1);
  for (int u0 = u_begin; u0 < u_end; u0 += Q::kHeight) {
    for (int v0 = v_begin; v0 < v_end; v0 += kTileWidth) {
      const bool first = u0 == u_begin && v0 == v_begin, done = u0 + Q::kHeight >= u_end && v0 + kTileWidth >= v_end;
      {
        float acc[4][Q::kFragments][4];
        convolve<Q, true>(p.gemm, image, group, row0, u0 + p.dy, v0 + p.dx, shared, &table, acc);
        stage_sums<Q>(acc, true, sums);
      }
      const int tid = threadIdx.x;
      if (tid < Q::kHeight)
        fill_adjoint_weights(p.v, p.taps, u0, i0, tid, &rows);
      else if (tid >= 64 && tid < 64 + kTileWidth)
        fill_adjoint_weights(p.h, p.taps, v0, j0, tid - 64, &columns);
      __syncthreads();
      if (tid < kMaxInputs)
        fill_adjoint_ranges(tid, &rows);
      else if (tid >= 64 && tid < 64 + kMaxInputs)
        fill_adjoint_ranges(tid - 64, &columns);
      __syncthreads();
      for (int item = tid; item < pixels * kQuads; item += kBlock) {
        const int pixel = last ? item / kQuads : item % pixels, quad = last ? item % kQuads : item / pixels;
        const int i = pixel / width, j = pixel - i * width;
        if (quad * 4 >= channels) continue;
        const bool some = rows.begin[i] < rows.end[i] && columns.begin[j] < columns.end[j];
        if (!some && !first && !done) continue;
        float total[4] = {0, 0, 0, 0};
        if (!first) {
          const float4 t = totals[item];
          total[0] = t.x, total[1] = t.y, total[2] = t.z, total[3] = t.w;
        }
        const int v_low = columns.begin[j], v_high = columns.end[j];
        for (int u = rows.begin[i]; u < rows.end[i]; ++u) {
          float line[4] = {0, 0, 0, 0};
          for (int v = v_low; v < v_high; ++v) {
            const float4 g = *reinterpret_cast<const float4*>(sums + (u * kTileWidth + v) * kPitchFloats + quad * 4);
            const float w = columns.weights[v][j];
            line[0] += w * g.x, line[1] += w * g.y, line[2] += w * g.z, line[3] += w * g.w;
          }
          const float w = rows.weights[u][i];
#pragma unroll
          for (int e = 0; e < 4; ++e) total[e] += w * line[e];
        }
        if (!done) {
          totals[item] = make_float4(total[0], total[1], total[2], total[3]);
          continue;
        }
        T* const to = result + (i0 + i) * p.to.h + (j0 + j) * p.to.w + quad * 4 * p.to.c;
        if (p.wide) {
          Raw<T, 4> raw;
          raw.pack(total);
          raw.store(to);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (quad * 4 + e < channels) store_one(to + e * p.to.c, total[e]);
        }
      }
      __syncthreads();
    }
  }
}

// Outputs that read `inputs` adjacent inputs, at most (an estimate: the kernel looks).
inline int adjoint_span(const Axis<float>& axis, int taps_count, int inputs) {
  double span = axis.out;
  if (const Index s = integer_scale(axis))
    span = double(s) * (inputs + taps_count - 1) + (s & (s - 1) ? 1 : 0);
  else if (axis.scale > 0)
    span = std::ceil((inputs + taps_count - 1) / double(axis.scale)) + 1;
  return span < axis.out ? int(span) : axis.out;
}
// The rectangle of inputs that makes the fewest tiles for the slowest multiprocessor, with sums of `most` inputs; then
// the fewest blocks.
template <class Q, class T>
void choose_inputs(ResampleInput<T>& p, int64_t blocks_per_rectangle, int64_t most) {
  double best = 0;
  for (int i = 1; i <= kMaxInputs && i <= p.v.in; ++i)
    for (int j = 1; j <= kMaxInputs && j <= p.h.in && (i * j <= most || i * j == 1); ++j) {
      const double tiles = double(ceil_div(adjoint_span(p.v, p.taps, i), Q::kHeight)) *
                           double(ceil_div(adjoint_span(p.h, p.taps, j), kTileWidth));
      const double blocks = double(ceil_div(p.v.in, i)) * double(ceil_div(p.h.in, j)) * blocks_per_rectangle;
      const double cost = std::ceil(blocks / (2 * multiprocessors())) * tiles;
      const bool fewer = cost == best && i * j > p.inputs_h * p.inputs_w;
      if (best == 0 || cost < best || fewer) best = cost, p.inputs_h = i, p.inputs_w = j;
    }
}

template <class Q>
const char* start_resample_input(const ResampleConv& c, void* workspace, void* stream) {
  using T = typename Q::T;
  ResampleInput<T> p{};
  p.gemm.map = map_of<T>(c, true, Q::kHeight), p.gemm.weight = gemm_weight<T>(c, Pass::input_gradient, workspace);
  p.gemm.taps = c.kh * c.kw, p.gemm.kw = c.kw, p.gemm.groups = c.groups;
  p.gemm.column_tiles = int(ceil_div(p.gemm.weight.rows, Q::kColumns));
  const Problem map = resample_problem(c);
  p.v = make_axis<float>(map, true, true), p.h = make_axis<float>(map, false, true), p.taps = taps_of(c.mode);
  p.dy = c.ph - (c.kh - 1), p.dx = c.pw - (c.kw - 1);
  p.result = static_cast<T*>(c.result), p.to = strides_of(c.ci, c.ih, c.iw, c.channels_last);
  const int64_t bytes = int64_t(sizeof(T));
  p.wide = c.channels_last && alignment_of(c.result, c.ci * bytes | c.ci / c.groups * bytes) >= 4 * bytes;
  const int64_t per_rectangle = c.n * c.groups * p.gemm.column_tiles;
  p.sums_bytes = int(max(operand_bytes<Q>(p.gemm.map), int64_t(stage_bytes<Q>(true))));
  int major = 0, minor = 0;
  if (const char* error = device_capability(&major, &minor)) return error;
  const int64_t limit = shared_limit(major, minor), half = limit / 2 - (4 << 10);  // two blocks on a multiprocessor
  choose_inputs<Q>(p, per_rectangle, ((p.sums_bytes < half ? half : limit) - p.sums_bytes) / (4 * Q::kColumns));
  p.tiles_h = int(ceil_div(c.ih, p.inputs_h)), p.tiles_w = int(ceil_div(c.iw, p.inputs_w));
  const double blocks = double(p.tiles_h) * p.tiles_w * double(per_rectangle);
  if (blocks > double(kMaxGrid)) return "the result has too many tiles";
  const int shared = p.sums_bytes + p.inputs_h * p.inputs_w * Q::kColumns * 4;
  AEUP_LAUNCH((resample_conv_input<Q>), int64_t(blocks), kBlock, size_t(shared), stream, p);
  return nullptr;
}

}  // namespace aeup
