// What the kernels for few output channels share: products on tensor cores, and the window of taps.
#pragma once
#include "conv_common.cuh"
#include "matrix.cuh"

namespace aeup {

// --- products of 16-byte pieces ---
// Operands come in words: two adjacent elements of bf16 or half, or one float, which is multiplied in tf32; kSplit: as
// the sum of two tf32 numbers, which leaves an error of the size of float32's own.
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
// ldmatrix: the operand's four 8 x 8 matrices of 16-bit (8 x 4 of 32-bit) elements, whose rows of 16 bytes the lanes
// name, matrix after matrix.
AEUP_DEV void load_matrices(const void* row, uint32_t* words) {
#ifdef AEUP_EMULATE
  const int lane = threadIdx.x % 32;
  if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail("misaligned ldmatrix", row, 16);
  for (int i = 0; i < 4; ++i)
    words[i] = reinterpret_cast<const uint32_t*>(
        __shfl_sync(~0u, reinterpret_cast<uintptr_t>(row), i * 8 + lane / 4))[lane % 4];
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
#endif
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

// --- pieces of 16 bytes of a line ---
// 16 bytes of a line that has `inside` elements left (zeros past them), where lines are aligned to 2, 4 or 8 bytes.
template <class T>
AEUP_DEV void load_narrow(const T* global, int inside, int alignment, uint32_t* words) {
  constexpr int kEach = 4 / int(sizeof(T));
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t e[2] = {0, 0};
    if (sizeof(T) == 4 || alignment >= 4) {
      if (w * kEach < inside)
        load_words<4>(global + w * kEach, &words[w]);
      else
        words[w] = 0;
    } else {
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        if (w * kEach + k < inside) e[k] = bits_at(global + w * kEach + k);
      words[w] = join<T>(e[0], e[1]);
    }
  }
}
template <class T>
AEUP_DEV void copy_narrow(void* shared, const T* global, int inside, int alignment) {
  constexpr int kEach = 4 / int(sizeof(T));
  uint32_t* const to = static_cast<uint32_t*>(shared);
  if (sizeof(T) == 4 || alignment >= 4) {
#pragma unroll
    for (int w = 0; w < 4; ++w) copy_or_zero<4>(to + w, global + w * kEach, w * kEach < inside);
  } else {
    uint32_t words[4];
    load_narrow(global, inside, alignment, words);
#pragma unroll
    for (int w = 0; w < 4; ++w) to[w] = words[w];
  }
}
// The first `inside` of 16 bytes of elements, to such a line.
template <class T>
AEUP_DEV void store_narrow(T* to, const float* v, int inside, int alignment) {
  constexpr int kV = 16 / int(sizeof(T)), kEach = 4 / int(sizeof(T));
  if (sizeof(T) == 4 || alignment >= 4) {
    Raw<T, kV> raw;
    raw.pack(v);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if (w * kEach < inside) store_words<4>(to + w * kEach, raw.w + w);
  } else {
#pragma unroll
    for (int k = 0; k < kV; ++k)
      if (k < inside) store_one(to + k, v[k]);
  }
}

// --- the window ---
// Stride 2 and at most 4 taps: o = 2 i - 1 + k with k = kernel index + shift in 0 .. 3 (shift = 1 - padding).
struct Window {
  int shift_h, shift_w, kh, kw;
};
inline Window window_of(const Convolution& c) { return {1 - c.ph, 1 - c.pw, c.kh, c.kw}; }
// Where output channel co has tap (th, tw) of the window in the weight of an input channel; -1: outside of the kernel.
AEUP_DEV int window_tap(const WeightStrides& s, const Window& v, int co, int th, int tw) {
  const int kh = th - v.shift_h, kw = tw - v.shift_w;
  const bool inside = unsigned(kh) < unsigned(v.kh) && unsigned(kw) < unsigned(v.kw);
  return inside ? int(co * s.co + kh * s.h + kw * s.w) : -1;
}

// --- results of the forward pass ---
// Where element e of a staged line is: lanes that read 8 elements each meet in fewer banks.
AEUP_HD int staged(int e) { return e + (e >> 3) * 2; }

template <int kV>
AEUP_DEV void activate_all(float (&v)[kV], Activation kind, float slope) {
  if (kind == Activation::none) return;
  if (kind == Activation::relu) {
#pragma unroll
    for (int k = 0; k < kV; ++k) v[k] = activate(v[k], Activation::relu, slope);
  } else if (kind == Activation::leaky_relu) {
#pragma unroll
    for (int k = 0; k < kV; ++k) v[k] = activate(v[k], Activation::leaky_relu, slope);
  } else {
#pragma unroll
    for (int k = 0; k < kV; ++k) v[k] = smooth_activation(v[k], kind);
  }
}

// --- which kernel ---
// f(T(), channels-last, products of split operands), the last two as types.
template <class F>
const char* with_operands(const Convolution& c, F f) {
  const auto by_layout = [&](auto t, auto split) {
    return c.channels_last ? f(t, std::true_type(), split) : f(t, std::false_type(), split);
  };
  switch (c.dtype) {
    case DType::f32: return c.tf32 ? by_layout(float(), std::false_type()) : by_layout(float(), std::true_type());
    case DType::f16: return by_layout(Half(), std::false_type());
    case DType::bf16: return by_layout(BFloat16(), std::false_type());
    default: return "unsupported dtype";
  }
}
// f(the number of output channels, as a type).
template <class F>
const char* with_channels(const Convolution& c, F f) {
  switch (c.co) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

}  // namespace aeup
