// The generic family where a group has few channels (depthwise above all): one thread per result, no tiles. Adjacent
// threads have adjacent results in memory.
#include "conv_generic.h"
#include "conv_partials.cuh"

namespace aeup {
namespace {

constexpr int kBlock = 256;
constexpr int kTaps = 16;  // taps of the weight gradient that a thread keeps in registers

// --- forward and input gradient ---
template <class T>
struct Direct {
  const T *source, *weight, *bias;
  T* result;
  AxisMap v, h;
  int groups, rows, reduction;  // channels of a group: of the result, of the source
  Strides from;
  int64_t wk, wm, wh, ww, wg;
  bool channels_last;
  int64_t total;
  Activation activation;
  double slope;
};

template <class T>
__global__ void __launch_bounds__(kBlock) direct(Direct<T> p) {
  using S = Acc<T>;
  const int64_t at = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= p.total) return;
  const int64_t channels = int64_t(p.groups) * p.rows;
  int64_t image, channel, y, x;
  if (p.channels_last) {
    const Split c = split(at, channels), w = split(c.quotient, p.h.results), h = split(w.quotient, p.v.results);
    channel = c.remainder, x = w.remainder, y = h.remainder, image = h.quotient;
  } else {
    const Split w = split(at, p.h.results), h = split(w.quotient, p.v.results), c = split(h.quotient, channels);
    channel = c.remainder, x = w.remainder, y = h.remainder, image = c.quotient;
  }
  const Split group = split(channel, p.rows);
  const bool phased = p.v.transposed;
  const int py = phased ? int(y % p.v.stride) : 0, px = phased ? int(x % p.h.stride) : 0;
  const PhaseTaps tv = p.v.taps(py), th = p.h.taps(px);
  const int y0 = int(phased ? y / p.v.stride : y) * tv.step + tv.base;
  const int x0 = int(phased ? x / p.h.stride : x) * th.step + th.base;
  const T* const source = p.source + image * p.from.n + group.quotient * p.reduction * p.from.c;
  const T* const weight = p.weight + group.quotient * p.wg + group.remainder * p.wm;
  S sum = S(0);
  for (int jh = 0; jh < tv.count; ++jh) {
    const int sy = y0 + jh * tv.delta;
    if (sy < 0 || sy >= p.v.sources) continue;
    for (int jw = 0; jw < th.count; ++jw) {
      const int sx = x0 + jw * th.delta;
      if (sx < 0 || sx >= p.h.sources) continue;
      const T* const s = source + sy * p.from.h + sx * p.from.w;
      const T* const w = weight + (tv.k0 + jh * tv.kstep) * p.wh + (th.k0 + jw * th.kstep) * p.ww;
      for (int k = 0; k < p.reduction; ++k) sum += load_one(s + k * p.from.c) * load_one(w + k * p.wk);
    }
  }
  if (p.bias) sum += load_one(p.bias + channel);
  store_one(p.result + at, activate(sum, p.activation, p.slope));
}

template <class T>
const char* run_map(const Convolution& c, Pass pass, void* stream) {
  const bool forward = pass == Pass::forward;
  const int64_t ci = c.ci / c.groups, co = c.co / c.groups;
  Direct<T> p{};
  p.source = static_cast<const T*>(forward ? c.input : c.grad);
  p.weight = static_cast<const T*>(c.weight);
  p.result = static_cast<T*>(c.result);
  p.v = axis_map(c, true, forward), p.h = axis_map(c, false, forward);
  p.groups = c.groups, p.rows = int(forward ? co : ci), p.reduction = int(forward ? ci : co);
  p.from = forward ? strides_of(c.ci, c.ih, c.iw, c.channels_last) : strides_of(c.co, c.oh, c.ow, c.channels_last);
  const WeightStrides w = weight_strides(c);
  p.wk = forward ? w.ci : w.co, p.wm = forward ? w.co : w.ci, p.wh = w.h, p.ww = w.w, p.wg = ci * w.ci;
  p.channels_last = c.channels_last;
  p.total = c.n * p.groups * p.rows * p.v.results * p.h.results;
  p.bias = static_cast<const T*>(c.bias), p.activation = c.activation, p.slope = c.slope;
  AEUP_LAUNCH(direct<T>, ceil_div(p.total, kBlock), kBlock, 0, stream, p);
  return nullptr;
}

// --- weight gradient ---
template <class T>
struct DirectWeight {
  const T *input, *grad;
  Acc<T>* partial;  // [splits][ci][taps][co / groups]
  Strides from, to;
  int ih, iw, oh, ow, kw, sh, sw, ph, pw, dh, dw, taps, chunks;
  int64_t rows, channels, pairs;  // ci / groups, co / groups, ci * co / groups
  int64_t pair_tiles, pixels, range, count;
};

// kChannels: the 32 lanes are 32 pairs (ci, co) and the 8 warps share the pixels; else a block is one pair, and its 256
// threads share the pixels.
template <class T, bool kChannels>
__global__ void __launch_bounds__(kBlock) direct_weight(DirectWeight<T> p) {
  using S = Acc<T>;
  constexpr int kStep = kChannels ? kBlock / 32 : kBlock;
  __shared__ S sums[kBlock];
  Split at = split(blockIdx.x, p.pair_tiles);
  const int64_t pair = kChannels ? at.remainder * 32 + threadIdx.x % 32 : at.remainder;
  at = split(at.quotient, p.chunks);
  const int tap0 = int(at.remainder) * kTaps;
  const int64_t begin = at.quotient * p.range, end = min(begin + p.range, p.pixels);
  const bool active = pair < p.pairs;
  const Split c = split(active ? pair : 0, p.channels);
  const T* const input = p.input + c.quotient * p.from.c;
  const T* const grad = p.grad + (c.quotient / p.rows * p.channels + c.remainder) * p.to.c;
  S acc[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) acc[t] = S(0);
  const int64_t first = begin + (kChannels ? threadIdx.x / 32 : threadIdx.x);
  for (int64_t q = first; active && q < end; q += kStep) {
    const Split w = split(q, p.iw), h = split(w.quotient, p.ih);
    const S x = load_one(input + h.quotient * p.from.n + h.remainder * p.from.h + w.remainder * p.from.w);
    const T* const g = grad + h.quotient * p.to.n;
    const int y0 = int(h.remainder) * p.sh - p.ph, x0 = int(w.remainder) * p.sw - p.pw;
    int kh = tap0 / p.kw, kw = tap0 % p.kw;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int y = y0 + kh * p.dh, z = x0 + kw * p.dw;
      if (tap0 + t < p.taps && y >= 0 && y < p.oh && z >= 0 && z < p.ow)
        acc[t] += x * load_one(g + y * p.to.h + z * p.to.w);
      if (++kw == p.kw) kw = 0, ++kh;
    }
  }
  S* const to = p.partial + at.quotient * p.count + (c.quotient * p.taps + tap0) * p.channels + c.remainder;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    sums[threadIdx.x] = acc[t];
    __syncthreads();
    for (int n = kBlock / 2; n >= (kChannels ? 32 : 1); n /= 2) {
      if (int(threadIdx.x) < n) sums[threadIdx.x] += sums[threadIdx.x + n];
      __syncthreads();
    }
    if (active && int(threadIdx.x) < (kChannels ? 32 : 1) && tap0 + t < p.taps)
      store_one(to + t * p.channels, sums[threadIdx.x]);
    __syncthreads();
  }
}

int64_t chunks_of(const Convolution& c) { return ceil_div(int64_t(c.kh) * c.kw, kTaps); }
int64_t pair_tiles_of(const Convolution& c) {
  const int64_t pairs = c.ci * (c.co / c.groups);
  return c.channels_last ? ceil_div(pairs, 32) : pairs;
}
int splits_of(const Convolution& c) {
  const int64_t wanted = ceil_div(8 * int64_t(multiprocessors()), pair_tiles_of(c) * chunks_of(c));
  return split_count(c, c.n * c.ih * c.iw, wanted, c.channels_last ? 256 : 2048);
}

template <class T>
const char* run_weight(const Convolution& c, void* workspace, void* stream) {
  if (!workspace) return "the weight gradient needs a workspace";
  const int splits = splits_of(c);
  DirectWeight<T> p{};
  p.input = static_cast<const T*>(c.input), p.grad = static_cast<const T*>(c.grad);
  p.partial = static_cast<Acc<T>*>(workspace);
  p.from = strides_of(c.ci, c.ih, c.iw, c.channels_last), p.to = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.ih = int(c.ih), p.iw = int(c.iw), p.oh = int(c.oh), p.ow = int(c.ow), p.kw = c.kw;
  p.sh = c.sh, p.sw = c.sw, p.ph = c.ph, p.pw = c.pw, p.dh = c.dh, p.dw = c.dw;
  if (int64_t(c.kh) * c.kw >= kMaxAxis) return "the kernel has too many elements";
  p.taps = c.kh * c.kw, p.chunks = int(chunks_of(c));
  p.rows = c.ci / c.groups, p.channels = c.co / c.groups, p.pairs = c.ci * p.channels;
  p.pair_tiles = pair_tiles_of(c);
  p.pixels = c.n * c.ih * c.iw, p.range = ceil_div(p.pixels, splits), p.count = p.pairs * p.taps;
  const int64_t blocks = p.pair_tiles * p.chunks * splits;
  if (c.channels_last)
    AEUP_LAUNCH((direct_weight<T, true>), blocks, kBlock, 0, stream, p);
  else
    AEUP_LAUNCH((direct_weight<T, false>), blocks, kBlock, 0, stream, p);
  return launch_add_partials<T>(c, workspace, splits, stream);
}

}  // namespace

// Tiles of 32 rows or 8 source channels would be mostly empty.
bool conv_direct_serves(const Convolution& c, Pass pass) {
  const int64_t ci = c.ci / c.groups, co = c.co / c.groups;
  if (c.groups == 1) return false;
  if (pass == Pass::weight_gradient) return ci * co <= 64;
  return (pass == Pass::forward ? co : ci) < 16 || ci * co < 128;
}

int64_t conv_direct_workspace(const Convolution& c, Pass pass) {
  return pass == Pass::weight_gradient ? splits_of(c) * partial_bytes(c) : 0;
}

const char* launch_conv_direct(const Convolution& c, Pass pass, void* workspace, void* stream) {
  return with_type(c.dtype, [&](auto t) {
    using T = decltype(t);
    return pass == Pass::weight_gradient ? run_weight<T>(c, workspace, stream) : run_map<T>(c, pass, stream);
  });
}

}  // namespace aeup
