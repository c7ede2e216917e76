// exp and what is made of it, of a SIMD register of floats, within a few units in the last place; of doubles by the
// standard library, lane by lane. The polynomials are minimax fits of our own; NaN stays NaN.
#pragma once
#include <cmath>

#include "cpu/vec.h"

namespace aeup {
namespace AEUP_ISA {

template <class F>
inline Vec<double> by_lane(Vec<double> x, F f) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

// e^x, or with sign -1 e^-x. Saturates at e^-87 and e^88.
template <int sign = 1>
inline VF vexp(VF x) {
  constexpr float least = sign > 0 ? -87.f : -88.f, most = sign > 0 ? 88.f : 87.f;
#if defined(__AVX512F__)  // of two operands the second where one is NaN
  x = _mm512_min_ps(VF{} + most, _mm512_max_ps(VF{} + least, x));
#else
  x = x < least ? VF{} + least : x;
  x = x > most ? VF{} + most : x;
#endif
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  const VF shifted = x * (sign * 1.44269504f) + kRound, n = shifted - kRound;
  const VF r = (x - n * (sign * 0.693359375f)) + n * (sign * 2.12194440e-4f);  // sign * (sign * x - n log 2)
  VF q = r * 1.3813142e-3f + sign * 8.3694188e-3f;
  q = q * r + 4.1668456e-2f;
  q = q * r + sign * 1.6666515e-1f;
  q = q * r + 4.9999994e-1f;
  q = q * r + sign * 1.f;
  const VF e = q * r + 1.f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(e, n);
#else
  const VI power = (reinterpret_cast<VI>(shifted) + 127) << 23;  // the whole number lies in the lowest bits
  return e * reinterpret_cast<VF>(power);
#endif
}
inline VF vlogistic(VF x) {
  const VF d = 1.f + vexp<-1>(x);
#if defined(__AVX512F__)  // an estimate to 14 bits and one step of Newton's: a division takes twice as long
  const VF r = _mm512_rcp14_ps(d);
  return r + r * (1.f - d * r);
#else
  return 1.f / d;
#endif
}
inline Vec<double> vlogistic(Vec<double> x) {
  return by_lane(x, [](double v) { return 1.0 / (1.0 + std::exp(-v)); });
}

inline VF with_sign(VF magnitude, VF of) {
  const VU sign = reinterpret_cast<VU>(of) & 0x80000000u;
  return reinterpret_cast<VF>(reinterpret_cast<VU>(magnitude) | sign);
}
inline VF magnitude(VF x) { return reinterpret_cast<VF>(reinterpret_cast<VU>(x) & 0x7fffffffu); }

inline VF vtanh(VF x) {
  const VF a = magnitude(x), t = x * x;
  VF p = t * -5.7170370e-3f + 2.0650579e-2f;
  p = p * t - 5.3743497e-2f;
  p = p * t + 1.3331491e-1f;
  p = p * t - 3.3333284e-1f;
  const VF near = x + x * (t * p);
  const VF far = with_sign(1.f - 2.f / (vexp(a + a) + 1.f), x);
  return a < 0.625f ? near : far;
}
inline Vec<double> vtanh(Vec<double> x) {
  return by_lane(x, [](double v) { return std::tanh(v); });
}

// From 1 on: erfc = exp of a polynomial.
inline VF verf(VF x) {
  const VF a = magnitude(x), t = x * x;
  VF p = t * 7.8538577e-5f - 8.0101925e-4f;
  p = p * t + 5.1883277e-3f;
  p = p * t - 2.6853811e-2f;
  p = p * t + 1.1283585e-1f;
  p = p * t - 3.7612626e-1f;
  const VF near = x * p * t + x * 1.1283791f;
  const VF b = a > 4.f ? VF{} + 4.f : a;
  VF q = b * 1.8557490e-4f - 2.9396159e-3f;
  q = q * b + 2.1805352e-2f;
  q = q * b - 1.0303743e-1f;
  q = q * b - 6.3822562e-1f;
  q = q * b - 1.1270400f;
  q = q * b - 3.5370892e-4f;
  const VF far = with_sign(1.f - vexp(q), x);
  return a < 1.f ? near : far;
}
inline Vec<double> verf(Vec<double> x) {
  return by_lane(x, [](double v) { return std::erf(v); });
}
inline VF normal_density(VF x) { return 0.39894228f * vexp(x * x * -0.5f); }
inline Vec<double> normal_density(Vec<double> x) {
  return by_lane(x, [](double v) { return 0.39894228040143267794 * std::exp(-0.5 * v * v); });
}

}  // namespace AEUP_ISA
}  // namespace aeup
