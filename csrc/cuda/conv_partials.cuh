// The second stage of every sum over pixels: partial sums added in a fixed order.
#pragma once
#include "conv_common.cuh"
#include "fold.h"

namespace aeup {
namespace {  // shared memory is a static variable in the emulator, whose two libraries must not have it in common

// partial [splits][ci][taps][co / groups] -> result, in the weight's layout. A block adds kLanes elements, each by
// 256 / kLanes threads.
template <class T, class S, int kLanes>
__global__ void __launch_bounds__(256) add_partials(const S* partial, T* result, int64_t splits, int64_t count,
                                                    int64_t taps, int64_t co, bool channels_last) {
  constexpr int kParts = 256 / kLanes;
  __shared__ S sums[kParts][kLanes];
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  const int64_t i = int64_t(blockIdx.x) * kLanes + lane;
  S sum = S(0);
  if (i < count)
#pragma unroll 8
    for (int64_t s = part; s < splits; s += kParts) sum += load_one(partial + s * count + i);
  sums[part][lane] = sum;
  __syncthreads();
  for (int n = kParts / 2; n; n /= 2) {
    if (part < n) sums[part][lane] = sum += sums[part + n][lane];
    __syncthreads();
  }
  if (part || i >= count) return;
  if (channels_last) return store_one(result + i, sum);
  const Split c = split(i, co), tap = split(c.quotient, taps);
  store_one(result + (tap.quotient * co + c.remainder) * taps + tap.remainder, sum);
}
template <class T, class S>
const char* launch_add_partials(const S* partial, T* result, int64_t splits, int64_t count, int64_t taps, int64_t co,
                                bool channels_last, void* stream) {
  if (count >= 32 * int64_t(multiprocessors()))
    AEUP_LAUNCH((add_partials<T, S, 32>), ceil_div(count, 32), 256, 0, stream, partial, result, splits, count, taps, co,
                channels_last);
  else
    AEUP_LAUNCH((add_partials<T, S, 8>), ceil_div(count, 8), 256, 0, stream, partial, result, splits, count, taps, co,
                channels_last);
  return nullptr;
}
template <class T>
const char* launch_add_partials(const Convolution& c, const void* partial, int64_t splits, void* stream) {
  const int64_t co = c.co / c.groups, taps = int64_t(c.kh) * c.kw;
  if (c.folded()) return launch_fold_back(c, partial, splits, taps * co, co, stream);
  return launch_add_partials(static_cast<const Acc<T>*>(partial), static_cast<T*>(c.result), splits, c.ci * taps * co,
                             taps, co, c.weight_channels_last, stream);
}
}  // namespace

inline int64_t partial_bytes(const Convolution& c) {
  return c.ci * (c.co / c.groups) * c.kh * c.kw * (c.dtype == DType::f64 ? 8 : 4);
}
// How many ranges of pixels: `wanted` at most, with `least` pixels each, in 256 MiB.
inline int split_count(const Convolution& c, int64_t pixels, int64_t wanted, int64_t least) {
  int64_t n = min(wanted, pixels / least);
  n = min(n, (int64_t(256) << 20) / partial_bytes(c));
  return int(max(n, int64_t(1)));
}

}  // namespace aeup
