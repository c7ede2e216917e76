// What the kernels for few output channels share: products on tensor cores, and the window of taps.
#pragma once
#include "conv_common.cuh"

namespace aeup {

// --- products of 16-byte pieces ---
// Operands come in words: two adjacent elements of bf16 or half, or one float, which is multiplied in tf32; kSplit: as
// the sum of two tf32 numbers, which leaves an error of the size of float32's own.
template <class T>
AEUP_DEV void matrix_product(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
#ifdef AEUP_EMULATE
  emu::matrix_product(std::is_same_v<T, BFloat16> ? emu::Operand::bf16
                      : std::is_same_v<T, Half>   ? emu::Operand::half
                                                  : emu::Operand::tf32,
                      c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
// The word as an operand, and with kSplit what is left of it as another.
template <class T, bool kSplit>
AEUP_DEV void make_operand(uint32_t word, uint32_t* high, uint32_t* low) {
  if constexpr (std::is_same_v<T, float>) {
    *high = round_tf32(__uint_as_float(word));
    if constexpr (kSplit) *low = round_tf32(__uint_as_float(word) - __uint_as_float(*high));
  } else {
    *high = word;
  }
}
// c += a . b of split operands: the small products first, and the sum added to c in float32, since the tensor cores
// truncate where they accumulate.
template <class T>
AEUP_DEV void split_product(float* c, const uint32_t* a, const uint32_t* a_rest, uint32_t b0, uint32_t b1,
                            uint32_t b0_rest, uint32_t b1_rest) {
  float sum[4] = {0, 0, 0, 0};
  matrix_product<T>(sum, a_rest, b0, b1);
  matrix_product<T>(sum, a, b0_rest, b1_rest);
  matrix_product<T>(sum, a, b0, b1);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}
// The bits of elements (each the low part of a word) put together in one word.
template <class T>
AEUP_DEV uint32_t join(uint32_t first, uint32_t second) {
  return sizeof(T) == 4 ? first : (first & 0xffffu) | second << 16;
}
template <class T>
AEUP_DEV uint32_t bits_at(const T* p) {
  Raw<T, 1> raw;
  raw.load(p);
  return raw.w[0];
}

template <class T>
AEUP_DEV uint32_t shared_bits(const T* p) {
  if constexpr (sizeof(T) == 2)
    return p->bits;
  else
    return __float_as_uint(*p);
}

// --- the window ---
// Stride 2 and at most 4 taps: o = 2 i - 1 + k with k = kernel index + shift in 0 .. 3 (shift = 1 - padding).
struct Window {
  int shift_h, shift_w, kh, kw;
};
inline Window window_of(const Convolution& c) { return {1 - c.ph, 1 - c.pw, c.kh, c.kw}; }

// The bits of weight [ci, co] at tap (th, tw) of the window; 0 outside of the kernel.
template <class T>
AEUP_DEV uint32_t window_weight(const T* w, const WeightStrides& s, const Window& v, int ci, int co, int th, int tw) {
  const int kh = th - v.shift_h, kw = tw - v.shift_w;
  if (kh < 0 || kh >= v.kh || kw < 0 || kw >= v.kw) return 0;
  return bits_at(w + ci * s.ci + co * s.co + kh * s.h + kw * s.w);
}

// The block fills tile [rows][columns][co] (row_elements from row to row) with the output's gradient of one image from
// row y0 and column x0; zero outside of it.
template <class T, int kCO, bool kLast, int kWarps>
AEUP_DEV void load_gradient_tile(const T* grad, const Strides& s, int oh, int ow, int y0, int x0, int rows, int columns,
                                 int row_elements, T* tile) {
  const int lane = threadIdx.x % 32, lines = kLast ? rows : rows * kCO, length = kLast ? columns * kCO : columns;
  const int low = kLast ? x0 * kCO : x0, high = kLast ? ow * kCO : ow;
  for (int l = threadIdx.x / 32; l < lines; l += kWarps) {
    const int row = kLast ? l : l / kCO, co = kLast ? 0 : l % kCO, y = y0 + row;
    const T* const from = grad + y * s.h + co * s.c + low;
    T* const to = tile + row * row_elements + co;
    const bool inside = y >= 0 && y < oh;
#pragma unroll 4
    for (int e = lane; e < length; e += 32) {
      const uint32_t bits = inside && low + e >= 0 && low + e < high ? bits_at(from + e) : 0u;
      if constexpr (sizeof(T) == 2)
        to[kLast ? e : e * kCO].bits = uint16_t(bits);
      else
        to[kLast ? e : e * kCO] = __uint_as_float(bits);
    }
  }
}

}  // namespace aeup
