// Products on tensor cores (mma.sync, compute capability 8.0) and what brings their operands.
#pragma once
#include "common.cuh"

namespace aeup {

// c += a b, fragments as in the PTX manual, "Matrix fragments for mma.m16n8k16" (floats: m16n8k8, in tf32).
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
// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8 and gets word l % 4 of row
// l / 4 of each; transposed (16-bit elements): the elements 2 (l % 4) and the next of column l / 4.
template <bool kTransposed>
AEUP_DEV void load_matrices(const void* row, uint32_t (&w)[4]) {
#ifdef AEUP_EMULATE
  emu::load_matrices(row, kTransposed, w);
#else
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
#endif
}

// By cp.async: B = 4 or 16 bytes from global to shared memory, or zeros.
template <int B>
AEUP_DEV void copy_or_zero(void* shared, const void* global, bool inside) {
#ifdef AEUP_EMULATE
  if (inside) return copy_async<B>(shared, global);
  for (int i = 0; i < B / 4; ++i) static_cast<uint32_t*>(shared)[i] = 0;
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? B : 0;
  if constexpr (B == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(B), "r"(bytes) : "memory");
#endif
}

}  // namespace aeup
