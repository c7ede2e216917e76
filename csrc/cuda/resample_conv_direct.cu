// Resampling and convolution without tensor cores, for float64 and for groups of a few channels: a thread per result
// (weight gradient: a block), the resampled values made where they are used.
#include "conv_partials.cuh"
#include "resample_conv_families.h"
#include "resample_conv_gemm.cuh"

namespace aeup {
namespace {

template <class T>
struct Direct {
  const T *input, *weight, *bias, *grad;
  T* result;
  Acc<T>* partial;  // weight gradient: [splits][co][taps][ci / groups]
  Strides in, out;  // of the input, of the output
  int64_t w_co, w_ci, w_h, w_w;
  Axis<Acc<T>> v, h;
  int64_t n, total;                            // total: results
  int ci, co, groups, oh, ow, kh, kw, ph, pw;  // ci, co of a group
  int64_t pixels, range, splits;
  bool last;
  Activation activation;
  double slope;
};

// The resampled image at (u, v), rounded to T as torch stores it.
template <class T, int K>
AEUP_DEV Acc<T> resampled(const Direct<T>& p, const T* plane, int u, int v) {
  using S = Acc<T>;
  S wv[K], wh[K], sum = S(0);
  const int y = taps<K>(p.v, u, wv), x = taps<K>(p.h, v, wh);
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const T* const row = plane + clamp_index(y + i, p.v.in) * p.in.h;
    S line = S(0);
#pragma unroll
    for (int j = 0; j < K; ++j) line += wh[j] * load_one(row + clamp_index(x + j, p.h.in) * p.in.w);
    sum += wv[i] * line;
  }
  Raw<T, 1> raw;
  raw.pack(&sum);
  raw.unpack(&sum);
  return sum;
}
struct Place {
  int64_t image;
  int c, y, x;
};
AEUP_DEV Place place_of(int64_t i, int c, int h, int w, bool last) {
  Split a = split(i, last ? c : w), b = split(a.quotient, last ? w : h), d = split(b.quotient, last ? h : c);
  if (last) return {d.quotient, int(a.remainder), int(d.remainder), int(b.remainder)};
  return {d.quotient, int(d.remainder), int(b.remainder), int(a.remainder)};
}

template <class T, int K>
__global__ void __launch_bounds__(kBlock) resample_direct_forward(Direct<T> p) {
  using S = Acc<T>;
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.total) return;
  const Place at = place_of(i, p.co * p.groups, p.oh, p.ow, p.last);
  const T* const image = p.input + at.image * p.in.n + int64_t(at.c / p.co) * p.ci * p.in.c;
  const T* const weight = p.weight + at.c * p.w_co;
  S sum = S(0);
  for (int j = 0; j < p.kh; ++j) {
    const int u = at.y + j - p.ph;
    if (u < 0 || u >= p.v.out) continue;
    for (int k = 0; k < p.kw; ++k) {
      const int v = at.x + k - p.pw;
      if (v < 0 || v >= p.h.out) continue;
      const T* const w = weight + j * p.w_h + k * p.w_w;
      for (int c = 0; c < p.ci; ++c) sum += load_one(w + c * p.w_ci) * resampled<T, K>(p, image + c * p.in.c, u, v);
    }
  }
  if (p.bias) sum += load_one(p.bias + at.c);
  store_one(p.result + i, activate(sum, p.activation, p.slope));
}

template <class T, int K>
__global__ void __launch_bounds__(kBlock) resample_direct_input(Direct<T> p) {
  using S = Acc<T>;
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.total) return;
  const Place at = place_of(i, p.ci * p.groups, p.v.in, p.h.in, p.last);
  const int group = at.c / p.ci;
  const T* const grad = p.grad + at.image * p.out.n + int64_t(group) * p.co * p.out.c;
  const T* const weight = p.weight + int64_t(group) * p.co * p.w_co + at.c % p.ci * p.w_ci;
  const int u_end = end_of_outputs_reading(p.v, at.y), v_end = end_of_outputs_reading(p.h, at.x);
  const int v_begin = first_output_reading(p.h, at.x);
  S total = S(0);
  for (int u = first_output_reading(p.v, at.y); u < u_end; ++u) {
    S line = S(0);
    for (int v = v_begin; v < v_end; ++v) {
      S sum = S(0);  // the resampled image's gradient
      for (int j = 0; j < p.kh; ++j) {
        const int y = u + p.ph - j;
        if (y < 0 || y >= p.oh) continue;
        for (int k = 0; k < p.kw; ++k) {
          const int x = v + p.pw - k;
          if (x < 0 || x >= p.ow) continue;
          for (int c = 0; c < p.co; ++c)
            sum += load_one(weight + c * p.w_co + j * p.w_h + k * p.w_w) *
                   load_one(grad + y * p.out.h + x * p.out.w + c * p.out.c);
        }
      }
      line += weight_of<K>(p.h, v, at.x) * sum;
    }
    total += weight_of<K>(p.v, u, at.y) * line;
  }
  store_one(p.result + i, total);
}

// A block: one element of the weight, one range of the output's pixels.
template <class T, int K>
__global__ void __launch_bounds__(kBlock) resample_direct_weight(Direct<T> p) {
  using S = Acc<T>;
  __shared__ S sums[kBlock];
  const Split part = split(blockIdx.x, p.total), element = split(part.remainder, p.ci);
  const Split tap = split(element.quotient, p.kh * p.kw);
  const int co = int(tap.quotient), ci = int(element.remainder);
  const int j = int(tap.remainder) / p.kw, k = int(tap.remainder) % p.kw;
  const T* const plane = p.input + (int64_t(co / p.co) * p.ci + ci) * p.in.c;
  const int64_t begin = part.quotient * p.range, end = min(begin + p.range, p.pixels);
  S sum = S(0);
  for (int64_t q = begin + threadIdx.x; q < end; q += kBlock) {
    const Split column = split(q, p.ow), row = split(column.quotient, p.oh);
    const int u = int(row.remainder) + j - p.ph, v = int(column.remainder) + k - p.pw;
    if (u < 0 || u >= p.v.out || v < 0 || v >= p.h.out) continue;
    const T* const g = p.grad + row.quotient * p.out.n + row.remainder * p.out.h + column.remainder * p.out.w;
    sum += load_one(g + co * p.out.c) * resampled<T, K>(p, plane + row.quotient * p.in.n, u, v);
  }
  sums[threadIdx.x] = sum;
  for (int n = kBlock / 2; n; n /= 2) {
    __syncthreads();
    if (threadIdx.x < n) sums[threadIdx.x] = sum += sums[threadIdx.x + n];
  }
  if (threadIdx.x == 0) store_one(p.partial + int64_t(blockIdx.x), sum);
}

int64_t weight_elements(const ResampleConv& c) { return c.co * (c.ci / c.groups) * c.kh * c.kw; }
int64_t weight_splits(const ResampleConv& c) {
  const int64_t wanted = ceil_div(8 * int64_t(multiprocessors()), weight_elements(c));
  return max(int64_t(1), min(wanted, c.n * c.oh * c.ow / (4 * kBlock)));
}

template <class T, int K>
const char* start(Direct<T>& p, const ResampleConv& c, Pass pass, void* stream) {
  if (pass == Pass::forward) {
    p.total = c.n * c.co * c.oh * c.ow;
    AEUP_LAUNCH((resample_direct_forward<T, K>), ceil_div(p.total, kBlock), kBlock, 0, stream, p);
  } else if (pass == Pass::input_gradient) {
    p.total = c.n * c.ci * c.ih * c.iw;
    AEUP_LAUNCH((resample_direct_input<T, K>), ceil_div(p.total, kBlock), kBlock, 0, stream, p);
  } else {
    if (!p.partial) return "the weight gradient needs a workspace";
    p.total = weight_elements(c), p.splits = weight_splits(c);
    p.range = ceil_div(p.pixels, p.splits);
    AEUP_LAUNCH((resample_direct_weight<T, K>), p.total * p.splits, kBlock, 0, stream, p);
    return launch_add_partials<T>(p.partial, p.result, p.splits, p.total, int64_t(c.kh) * c.kw, int64_t(p.ci),
                                  c.weight_channels_last, stream);
  }
  return nullptr;
}

template <class T>
const char* run(const ResampleConv& c, Pass pass, void* workspace, void* stream) {
  Direct<T> p{};
  p.input = static_cast<const T*>(c.input), p.weight = static_cast<const T*>(c.weight);
  p.bias = static_cast<const T*>(c.bias), p.grad = static_cast<const T*>(c.grad), p.result = static_cast<T*>(c.result);
  p.partial = static_cast<Acc<T>*>(workspace);
  p.in = strides_of(c.ci, c.ih, c.iw, c.channels_last), p.out = strides_of(c.co, c.oh, c.ow, c.channels_last);
  p.n = c.n, p.groups = c.groups, p.ci = int(c.ci / c.groups), p.co = int(c.co / c.groups);
  const int64_t taps_count = int64_t(c.kh) * c.kw;
  p.w_co = p.ci * taps_count, p.w_ci = c.weight_channels_last ? 1 : taps_count;
  p.w_w = c.weight_channels_last ? p.ci : 1, p.w_h = c.kw * p.w_w;
  const Problem map = resample_problem(c);
  p.v = make_axis<Acc<T>>(map, true, true), p.h = make_axis<Acc<T>>(map, false, true);
  p.oh = int(c.oh), p.ow = int(c.ow), p.kh = c.kh, p.kw = c.kw, p.ph = c.ph, p.pw = c.pw;
  p.pixels = c.n * c.oh * c.ow, p.last = c.channels_last;
  p.activation = c.activation, p.slope = c.slope;
  switch (taps_of(c.mode)) {
    case 1: return start<T, 1>(p, c, pass, stream);
    case 2: return start<T, 2>(p, c, pass, stream);
    default: return start<T, 4>(p, c, pass, stream);
  }
}

}  // namespace

int64_t resample_direct_workspace(const ResampleConv& c, Pass pass) {
  if (pass != Pass::weight_gradient) return 0;
  return weight_splits(c) * weight_elements(c) * (c.dtype == DType::f64 ? 8 : 4);
}

const char* launch_resample_direct(const ResampleConv& c, Pass pass, void* workspace, void* stream) {
  return with_type(c.dtype, [&](auto t) { return run<decltype(t)>(c, pass, workspace, stream); });
}

}  // namespace aeup
