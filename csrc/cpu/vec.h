// One SIMD register of the instruction set that this file is compiled for, with conversions from and to the storage
// types. Included by files that are compiled once per instruction set, inside the namespace AEUP_ISA.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace aeup {
namespace AEUP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A>
using Vec __attribute__((vector_size(kVectorBytes), may_alias)) = A;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));
template <class U>
using Lanes16 __attribute__((vector_size(kVectorBytes / 4 * sizeof(U)), may_alias)) = U;  // as many U as floats in Vec

using VF = Vec<float>;
using VI = Vec<int32_t>;
using VU = Vec<uint32_t>;

// The arithmetic type of a storage type.
template <class T>
struct Arith {
  using type = float;
};
template <>
struct Arith<double> {
  using type = double;
};

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits;
  float f;
  if (rest >= 0x7c00) {
    bits = 0x7f800000u | (rest & 0x3ff) << 13;
  } else {  // scale by 2^112: exact, subnormals included
    bits = rest << 13;
    std::memcpy(&f, &bits, 4);
    f *= 5.192296858534828e33f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_f16(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000) {  // subnormal in f16: adding 0.5 rounds at bit 2^-24
    float a;
    std::memcpy(&a, &bits, 4);
    a += 0.5f;
    std::memcpy(&bits, &a, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | ((bits - 0x38000000) >> 13));
}
inline uint16_t float_to_bf16(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float to_arith(float x) { return x; }
inline double to_arith(double x) { return x; }
inline float to_arith(uint8_t x) { return x; }
inline float to_arith(f16 x) { return f16_to_float(x.bits); }
inline float to_arith(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void from_arith(float f, float* p) { *p = f; }
inline void from_arith(double f, double* p) { *p = f; }
inline void from_arith(float f, f16* p) { p->bits = float_to_f16(f); }
inline void from_arith(float f, bf16* p) { p->bits = float_to_bf16(f); }
inline void from_arith(float f, uint8_t* p) { *p = uint8_t((f < 0 ? 0 : (f > 255 ? 255 : f)) + 0.5f); }

template <class V>
inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline VF load(const float* p) { return load_raw<VF>(p); }
inline Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
// Written out for each instruction set: GCC 12 makes several instructions of __builtin_convertvector where the
// processor has one, and of bytes, code for each lane.
inline VF load(const bf16* p) {
#if defined(__AVX512F__)
  const VI wide = reinterpret_cast<VI>(_mm512_cvtepu16_epi32(load_raw<__m256i>(p)));
#elif defined(__AVX2__)
  const VI wide = reinterpret_cast<VI>(_mm256_cvtepu16_epi32(load_raw<__m128i>(p)));
#else
  const VI wide = __builtin_convertvector(load_raw<Lanes16<uint16_t>>(p), VI);
#endif
  return reinterpret_cast<VF>(wide << 16);
}
inline VF load(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_raw<__m128i>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(load_raw<Lanes16<uint8_t>>(p), VI), VF);
#endif
}
inline VF load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<VF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = f16_to_float(p[i].bits);
  return v;
#endif
}

inline void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, VF v) {
  VU bits = reinterpret_cast<VU>(v);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  bits = (v != v) ? VU{} + 0x7fc0 : bits;
#if defined(__AVX512F__)
  const auto narrow = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits));
#elif defined(__AVX2__)
  const __m256i twice = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(bits));
  const auto narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(twice, 0x08));
#else
  const auto narrow = __builtin_convertvector(bits, Lanes16<uint16_t>);
#endif
  std::memcpy(p, &narrow, sizeof narrow);
}
inline void store(uint8_t* p, VF v) {
  v = v < 0 ? VF{} : v;
  v = v > 255 ? VF{} + 255 : v;
#if defined(__AVX512F__)
  const auto narrow = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v + 0.5f));
#elif defined(__AVX2__)
  const __m256i whole = _mm256_cvttps_epi32(v + 0.5f);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const int64_t narrow = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
#else
  const auto narrow = __builtin_convertvector(__builtin_convertvector(v + 0.5f, VI), Lanes16<uint8_t>);
#endif
  std::memcpy(p, &narrow, sizeof narrow);
}
inline void store(f16* p, VF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_f16(v[i]);
#endif
}

// The first n lanes; the others of a load are `otherwise`.
template <class T, class V>
inline V load_first(const T* p, int n, V otherwise) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_loadu_ps(otherwise, __mmask16((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 8)
    return _mm512_mask_loadu_pd(otherwise, __mmask8((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 2) {
    const __mmask16 first = __mmask16((1u << n) - 1);
    const __m256i raw = _mm256_maskz_loadu_epi16(first, p);
    return _mm512_mask_blend_ps(first, otherwise, load(reinterpret_cast<const T*>(&raw)));
  }
#endif
  constexpr int lanes = kVectorBytes / sizeof(typename Arith<T>::type);
  T all[lanes] = {};
  std::memcpy(all, p, n * sizeof(T));
  V v = load(all);
  for (int i = n; i < lanes; ++i) v[i] = otherwise[i];
  return v;
}
template <class T, class V>
inline void store_first(T* p, V v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
#endif
  T lanes[kVectorBytes / sizeof(typename Arith<T>::type)];
  store(lanes, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), load_raw<__m256i>(lanes));
#endif
  std::memcpy(p, lanes, n * sizeof(T));
}

// Lane i of the result is p[index[i]]. `near`: all indices are below twice the number of lanes.
template <bool near>
inline VF lookup(const float* p, const int32_t* index) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_loadu_si512(index);
  if (near) {
    return reinterpret_cast<VF>(_mm512_permutex2var_ps(_mm512_loadu_ps(p), at, _mm512_loadu_ps(p + 16)));
  }
  return reinterpret_cast<VF>(_mm512_i32gather_ps(at, p, 4));
#elif defined(__AVX2__)
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  if (near) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), at);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p + 8), at);
    return reinterpret_cast<VF>(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28))));
  }
  return reinterpret_cast<VF>(_mm256_i32gather_ps(p, at, 4));
#else
  VF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = p[index[i]];
  return v;
#endif
}
template <bool near>
inline Vec<double> lookup(const double* p, const int32_t* index) {
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = p[index[i]];
  return v;
}

// Sums of neighbours: lane i of the result is elements 2i and 2i + 1 of a and b side by side.
inline VF add_pairs(VF a, VF b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
#elif defined(__AVX2__)
  const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(a, b));  // of a and b by turns, two at a time
  return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8));
#else
  VF v;
  for (int i = 0; i < kLanes<float>; ++i) {
    const VF& from = 2 * i < kLanes<float> ? a : b;
    v[i] = from[2 * i % kLanes<float>] + from[2 * i % kLanes<float> + 1];
  }
  return v;
#endif
}
inline Vec<double> add_pairs(Vec<double> a, Vec<double> b) {
  constexpr int L = kLanes<double>;
  Vec<double> v;
  for (int i = 0; i < L; ++i) v[i] = 2 * i < L ? a[2 * i % L] + a[2 * i % L + 1] : b[2 * i % L] + b[2 * i % L + 1];
  return v;
}

// Copies n bytes past the caches: a large output would only push everything else out of them.
inline void stream_copy(void* to, const void* from, int64_t n) {
#if defined(__AVX2__)
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
  int64_t head = -reinterpret_cast<intptr_t>(d) & (kVectorBytes - 1);
  if (head > n) head = n;
  std::memcpy(d, s, head);
  int64_t i = head;
  for (; i + kVectorBytes <= n; i += kVectorBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(d + i), _mm512_loadu_si512(s + i));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(d + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i)));
#endif
  }
  std::memcpy(d + i, s + i, n - i);
#else
  std::memcpy(to, from, n);
#endif
}
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace AEUP_ISA
}  // namespace aeup
