// The sum over the ranges of pixels of a weight gradient, and its way into the weight's layout.
#include "cuda/hopper.cuh"
#include "cuda/hopper_weight_sum.h"

namespace aeup {
namespace {

constexpr int kThreads = 256, kMost = 4096;  // kMost: elements of a block, all taps of some output channels

struct Sum {
  const void* from;  // [splits, ci, taps, co]
  void* to;          // [ci, taps, co] if channels_last, else [ci, co, taps]
  int64_t step;      // ci * taps * co
  int splits, taps, co;
  int chunk, chunks;  // output channels of a block
  int lanes;          // a power of two: the threads that share a split
  bool channels_last;
  Divider by_chunks, by_width, by_taps;  // width: accesses of `chunk` channels
};
constexpr int kShared = (kMost + kMost / 16) * 4;

// E adjacent output channels at a time.
template <class T, class From, int E>
__global__ void __launch_bounds__(kThreads) weight_sum(const __grid_constant__ Sum p) {
  AEUP_DYNAMIC_SHARED(float, tile);  // [taps, chunk + 1]
  __shared__ float parts_of[kThreads * E];
  static_assert(sizeof(parts_of) <= kMostStatic);
  const int i = p.by_chunks.divide(blockIdx.x), c0 = (blockIdx.x - i * p.chunks) * p.chunk;
  const int lane = threadIdx.x & (p.lanes - 1), part = threadIdx.x / p.lanes, parts = kThreads / p.lanes;
  const int width = p.chunk / E, items = p.taps * width;
  const From* const from = static_cast<const From*>(p.from) + int64_t(i) * p.taps * p.co + c0;
  T* const to = static_cast<T*>(p.to) + (int64_t(i) * p.co + c0) * p.taps;
  after_previous();
  for (int e = lane; e - lane < items; e += p.lanes) {
    const int tap = p.by_width.divide(e), c = (e - tap * width) * E;
    const bool inside = e < items && c0 + c < p.co;
    float sum[E] = {};
    if (inside) {
      const From* mine = from + int64_t(tap) * p.co + c;
      constexpr int kAtOnce = 4;
      for (int s = part; s < p.splits; s += kAtOnce * parts) {
        Raw<From, E> raw[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          if (s + n * parts < p.splits)
            raw[n].load(mine + (s + n * parts) * p.step);
          else
            raw[n].clear();
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          float v[E];
          raw[n].unpack(v);
#pragma unroll
          for (int k = 0; k < E; ++k) sum[k] += v[k];
        }
      }
    }
    if (parts > 1) {  // then this is the only round
#pragma unroll
      for (int k = 0; k < E; ++k) parts_of[k * kThreads + threadIdx.x] = sum[k];
      __syncthreads();
      for (int n = parts / 2; n; n /= 2) {
        if (part < n)
#pragma unroll
          for (int k = 0; k < E; ++k)
            parts_of[k * kThreads + threadIdx.x] = sum[k] += parts_of[k * kThreads + threadIdx.x + n * p.lanes];
        __syncthreads();
      }
    }
    if (part || !inside) continue;
    if (p.channels_last) {
      Raw<T, E> raw;
      raw.pack(sum);
      raw.store(static_cast<T*>(p.to) + (int64_t(i) * p.taps + tap) * p.co + c0 + c);
    } else {
#pragma unroll
      for (int k = 0; k < E; ++k) tile[tap * (p.chunk + 1) + c + k] = sum[k];
    }
  }
  if (p.channels_last) return;
  __syncthreads();
  const int count = min(p.chunk, p.co - c0) * p.taps;
  for (int e = threadIdx.x * E; e < count; e += kThreads * E) {
    float v[E];
    int c = p.by_taps.divide(e), tap = e - c * p.taps;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      v[k] = tile[tap * (p.chunk + 1) + c];
      if (++tap == p.taps) tap = 0, ++c;
    }
    Raw<T, E> raw;
    raw.pack(v);
    raw.store(to + e);
  }
}

template <class T, class From, int E>
const char* start(Sum& p, int64_t ci, void* stream) {
  const int64_t channels = ceil_div(p.co, E) * E;
  p.chunk = 64;
  while (p.chunk > 16 && (p.chunk * p.taps > kMost || ci * ceil_div(channels, p.chunk) < 4 * multiprocessors() ||
                          p.chunk >= 2 * channels))
    p.chunk /= 2;
  p.chunks = int(ceil_div(channels, p.chunk));
  const int width = p.chunk / E;
  for (p.lanes = kThreads; p.lanes / 2 >= p.taps * width && kThreads / p.lanes < p.splits; p.lanes /= 2) {
  }
  p.by_chunks = Divider(p.chunks), p.by_width = Divider(width), p.by_taps = Divider(p.taps);
  return launch_early<weight_sum<T, From, E>>(ci * p.chunks, kThreads, kShared, stream, p);
}
template <class T>
const char* start(Sum& p, int64_t ci, bool rounded, void* stream) {
  // A chunk is a multiple of 16 channels: its elements start at a multiple of 4 wherever co is one.
  const bool wide = p.co % 4 == 0 && reinterpret_cast<uintptr_t>(p.to) % 8 == 0;
  if (rounded) return wide ? start<T, T, 4>(p, ci, stream) : start<T, T, 1>(p, ci, stream);
  return wide ? start<T, float, 4>(p, ci, stream) : start<T, float, 1>(p, ci, stream);
}

}  // namespace

const char* hopper_weight_sum(const Convolution& c, const void* partial, bool rounded, int splits, void* stream) {
  Sum p{};
  p.from = partial, p.to = c.result;
  p.splits = splits, p.taps = c.kh * c.kw, p.co = int(c.co);
  p.step = c.ci * p.taps * c.co;
  p.channels_last = c.weight_channels_last;
  return c.dtype == DType::bf16 ? start<BFloat16>(p, c.ci, rounded, stream) : start<Half>(p, c.ci, rounded, stream);
}

}  // namespace aeup
