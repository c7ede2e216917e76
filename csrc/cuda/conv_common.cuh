// What the convolution kernels share: the taps of an axis, the addresses of a layout, the activations.
#pragma once
#include "common.cuh"
#include "convolution.h"

namespace aeup {

// --- taps of one axis ---
// Result t of a phase takes, for j = 0 .. count - 1, kernel index k0 + j * kstep of source t * step + base + j * delta;
// in the tensor it is result first + t * stride, and the phase has `size` of them.
struct PhaseTaps {
  int count, k0, kstep, base, delta, step, first, stride, size;
};
// The map of an axis: of the transposed convolution (results are outputs, o + p = s * i + d * k: min(s, out) phases),
// or of its gradient for the input (an ordinary convolution with stride s: one phase).
struct AxisMap {
  int results, sources, stride, padding, dilation, kernel;
  int divisor, period, inverse;  // g = gcd(s, d); s / g; (d / g)^-1 mod s / g
  bool transposed;
  AEUP_HD int phases() const { return transposed ? (stride < results ? stride : results) : 1; }
  AEUP_HD PhaseTaps taps(int phase) const {
    if (!transposed) return {kernel, 0, 1, -padding, dilation, stride, 0, 1, results};
    PhaseTaps t = {0, 0, period, 0, -(dilation / divisor), 1, phase, stride, (results - phase + stride - 1) / stride};
    const int r = int((int64_t(phase) + padding) % stride);
    if (r % divisor) return t;
    t.k0 = int(int64_t(r / divisor) * inverse % period);
    t.count = t.k0 < kernel ? (kernel - 1 - t.k0) / period + 1 : 0;
    t.base = int((int64_t(phase) + padding - int64_t(dilation) * t.k0) / stride);
    return t;
  }
};
inline AxisMap axis_map(const Convolution& c, bool vertical, bool transposed) {
  AxisMap m{};
  const int in = int(vertical ? c.ih : c.iw), out = int(vertical ? c.oh : c.ow);
  m.results = transposed ? out : in, m.sources = transposed ? in : out;
  m.stride = vertical ? c.sh : c.sw, m.padding = vertical ? c.ph : c.pw;
  m.dilation = vertical ? c.dh : c.dw, m.kernel = vertical ? c.kh : c.kw;
  m.transposed = transposed;
  int64_t a = m.stride, b = m.dilation, x = 0, y = 1;  // Euclid: b * y = gcd (mod stride)
  while (b) {
    const int64_t q = a / b, r = a - q * b, z = x - q * y;
    a = b, b = r, x = y, y = z;
  }
  m.divisor = int(a), m.period = int(m.stride / a);
  m.inverse = int(((x % m.period) + m.period) % m.period);
  return m;
}

// --- addresses of [n, c, h, w] in elements ---
struct Strides {
  int64_t n, c, h, w;
};
inline Strides strides_of(int64_t c, int64_t h, int64_t w, bool channels_last) {
  return channels_last ? Strides{h * w * c, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}
// Weight [ci, co / groups, kh, kw].
struct WeightStrides {
  int64_t ci, co, h, w;
};
inline WeightStrides weight_strides(const Convolution& c) {
  const int64_t co = c.co / c.groups, taps = int64_t(c.kh) * c.kw;
  return c.weight_channels_last ? WeightStrides{taps * co, 1, c.kw * co, co} : WeightStrides{co * taps, taps, c.kw, 1};
}

// --- activations ---
template <class S>
__device__ __noinline__ S smooth_activation(S x, Activation kind) {
  if (kind == Activation::silu) return x / (S(1) + exp(-x));
  if (kind == Activation::gelu) return S(0.5) * x * (S(1) + erf(x * S(0.70710678118654752440)));
  if (kind == Activation::tanh) return tanh(x);
  return S(1) / (S(1) + exp(-x));
}
template <class S>
AEUP_DEV S activate(S x, Activation kind, double slope) {
  if (kind == Activation::none) return x;
  if (kind == Activation::relu) return x < S(0) ? S(0) : x;
  if (kind == Activation::leaky_relu) return x < S(0) ? x * S(slope) : x;
  return smooth_activation(x, kind);
}
template <class S>
__device__ __noinline__ S smooth_derivative(S v, Activation kind) {
  if (kind == Activation::silu) {
    const S s = S(1) / (S(1) + exp(-v));
    return s * (S(1) + v * (S(1) - s));
  }
  const S cdf = S(0.5) * (S(1) + erf(v * S(0.70710678118654752440)));
  return cdf + v * S(0.39894228040143267794) * exp(S(-0.5) * v * v);
}
// The gradient before the activation, from the one after it and the activation's result (silu, gelu: its argument). As
// torch's, relu's is not a product: 0 where the result is, whatever the gradient, and the gradient where that is NaN.
template <class S>
AEUP_DEV S gradient_before(S grad, S v, Activation kind, S slope) {
  if (kind == Activation::relu) return v <= S(0) ? S(0) : grad;
  if (kind == Activation::leaky_relu) return v > S(0) ? grad : grad * slope;
  if (kind == Activation::tanh) return grad * (S(1) - v * v);
  if (kind == Activation::sigmoid) return grad * (v * (S(1) - v));
  return grad * smooth_derivative(v, kind);
}

}  // namespace aeup
