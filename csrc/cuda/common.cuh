// What every CUDA kernel shares: element types, 1..16-byte accesses with float (double) arithmetic, cp.async, the
// vertical table of a strip of rows, and the launch. Compiles as plain C++ under AEUP_EMULATE (tests/emulate).
#pragma once
#include <atomic>
#include <climits>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "resample.h"

#ifdef AEUP_EMULATE
#include "cuda_on_host.h"
#define AEUP_CHECK(p, bytes, store) aeup::emu::check(p, bytes, store)
#define AEUP_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(aeup::emu::dynamic_shared())
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define AEUP_CHECK(p, bytes, store)
// One symbol for all kernels of a file: extern __shared__ arrays of different types may not share a name.
extern __shared__ __align__(16) unsigned char aeup_shared[];
#define AEUP_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(aeup_shared)
#endif
#define AEUP_DEV __device__ __forceinline__

namespace aeup {

// --- elements ---
// Storage types: float, double, Half, BFloat16; uint8_t .. uint64_t where only bits move (nearest).
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;  // arithmetic and index type of T

inline int element_size(DType t) { return t == DType::u8 ? 1 : t == DType::f32 ? 4 : t == DType::f64 ? 8 : 2; }

// Calls f(T()) with the storage type of an arithmetic dtype (u8 has none: ok() is false).
template <class F>
const char* with_type(DType t, F f) {
  switch (t) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::f16: return f(Half());
    case DType::bf16: return f(BFloat16());
    default: return "uint8 has only the forward of nearest and nearest-exact";
  }
}

AEUP_DEV float bf16_low(uint32_t w) { return __uint_as_float(w << 16); }
AEUP_DEV float bf16_high(uint32_t w) { return __uint_as_float(w & 0xffff0000u); }
#ifdef AEUP_EMULATE
inline uint32_t bf16_pair(float a, float b) { return emu::bf16_of(a) | uint32_t(emu::bf16_of(b)) << 16; }
inline uint32_t half_pair(float a, float b) { return emu::half_of(a) | uint32_t(emu::half_of(b)) << 16; }
inline float half_low(uint32_t w) { return emu::of_half(uint16_t(w)); }
inline float half_high(uint32_t w) { return emu::of_half(uint16_t(w >> 16)); }
#else
AEUP_DEV uint32_t bf16_pair(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
AEUP_DEV uint32_t half_pair(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
AEUP_DEV float half_low(uint32_t w) { return __low2float(*reinterpret_cast<const __half2*>(&w)); }
AEUP_DEV float half_high(uint32_t w) { return __high2float(*reinterpret_cast<const __half2*>(&w)); }
#endif

// --- accesses ---
// One access of B = 1, 2, 4, 8 or 16 bytes, aligned to B, to or from words (B < 4: the low bits of one word).
template <int B>
AEUP_DEV void load_words(const void* p, uint32_t* w) {
  AEUP_CHECK(p, B, false);
#ifdef AEUP_EMULATE
  if constexpr (B < 4) w[0] = 0;
  emu::move(w, p, B);
#else
  if constexpr (B == 16) {
    const uint4 t = __ldg(static_cast<const uint4*>(p));
    w[0] = t.x, w[1] = t.y, w[2] = t.z, w[3] = t.w;
  } else if constexpr (B == 8) {
    const uint2 t = __ldg(static_cast<const uint2*>(p));
    w[0] = t.x, w[1] = t.y;
  } else if constexpr (B == 4) {
    w[0] = __ldg(static_cast<const unsigned*>(p));
  } else if constexpr (B == 2) {
    w[0] = __ldg(static_cast<const unsigned short*>(p));
  } else {
    w[0] = __ldg(static_cast<const unsigned char*>(p));
  }
#endif
}
template <int B>
AEUP_DEV void store_words(void* p, const uint32_t* w) {
  AEUP_CHECK(p, B, true);
#ifdef AEUP_EMULATE
  emu::move(p, w, B);
#else
  if constexpr (B == 16) {
    __stwb(static_cast<uint4*>(p), make_uint4(w[0], w[1], w[2], w[3]));  // plain stores are split into words at times
  } else if constexpr (B == 8) {
    *static_cast<uint2*>(p) = make_uint2(w[0], w[1]);
  } else if constexpr (B == 4) {
    *static_cast<unsigned*>(p) = w[0];
  } else if constexpr (B == 2) {
    *static_cast<unsigned short*>(p) = static_cast<unsigned short>(w[0]);
  } else {
    *static_cast<unsigned char*>(p) = static_cast<unsigned char>(w[0]);
  }
#endif
}
constexpr int widest_access(int bytes) {
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}
// V adjacent elements as bits, moved by accesses of A bytes (the alignment that is certain; A >= sizeof(T)).
template <class T, int V, int A = widest_access(V * int(sizeof(T)))>
struct Raw {
  static constexpr int per = A / int(sizeof(T)), accesses = V / per, words = A < 4 ? 1 : A / 4;
  static_assert(A % sizeof(T) == 0 && V % per == 0, "the access must hold whole elements");
  uint32_t w[accesses * words];

  AEUP_DEV void load(const T* p) {
#pragma unroll
    for (int i = 0; i < accesses; ++i) load_words<A>(p + i * per, w + i * words);
  }
  AEUP_DEV void store(T* p) const {
#pragma unroll
    for (int i = 0; i < accesses; ++i) store_words<A>(p + i * per, w + i * words);
  }
  AEUP_DEV void clear() {
#pragma unroll
    for (int i = 0; i < accesses * words; ++i) w[i] = 0;
  }
  AEUP_DEV void unpack(Acc<T>* f) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        f[i] = __uint_as_float(w[i]);
      } else if constexpr (std::is_same_v<T, double>) {
#ifdef AEUP_EMULATE
        std::memcpy(f + i, w + 2 * i, 8);
#else
        f[i] = __hiloint2double(int(w[2 * i + 1]), int(w[2 * i]));
#endif
      } else {
        const uint32_t u = w[A < 4 ? i : i / 2];
        const bool high = A >= 4 && i % 2;
        if constexpr (std::is_same_v<T, BFloat16>) f[i] = high ? bf16_high(u) : bf16_low(u);
        if constexpr (std::is_same_v<T, Half>) f[i] = high ? half_high(u) : half_low(u);
      }
    }
  }
  AEUP_DEV void pack(const Acc<T>* f) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        w[i] = __float_as_uint(f[i]);
      } else if constexpr (std::is_same_v<T, double>) {
#ifdef AEUP_EMULATE
        std::memcpy(w + 2 * i, f + i, 8);
#else
        w[2 * i] = uint32_t(__double2loint(f[i])), w[2 * i + 1] = uint32_t(__double2hiint(f[i]));
#endif
      } else if (A < 4) {
        w[i] = std::is_same_v<T, BFloat16> ? bf16_pair(float(f[i]), 0.f) : half_pair(float(f[i]), 0.f);
      } else if (i % 2 == 0) {
        w[i / 2] = std::is_same_v<T, BFloat16> ? bf16_pair(float(f[i]), float(f[i + 1]))
                                               : half_pair(float(f[i]), float(f[i + 1]));
      }
    }
  }
};
template <class T>
AEUP_DEV Acc<T> load_one(const T* p) {
  Raw<T, 1> r;
  Acc<T> f;
  r.load(p);
  r.unpack(&f);
  return f;
}
template <class T>
AEUP_DEV void store_one(T* p, Acc<T> f) {
  Raw<T, 1> r;
  r.pack(&f);
  r.store(p);
}

AEUP_DEV uint32_t round_tf32(float x) {  // to nearest, ties away from zero
#ifdef AEUP_EMULATE
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
#else
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
#endif
}

// --- cp.async: 4, 8 or 16 bytes from global to shared memory; groups complete in order ---
template <int B>
AEUP_DEV void copy_async(void* shared, const void* global) {
#ifdef AEUP_EMULATE
  emu::copy_async(shared, global, B);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (B == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(B) : "memory");
#endif
}
AEUP_DEV void copy_commit() {
#ifdef AEUP_EMULATE
  emu::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>  // wait until at most N groups of this thread are in flight
AEUP_DEV void copy_wait() {
#ifdef AEUP_EMULATE
  emu::copy_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// A hint: the 32-byte sector that holds this element is read soon.
AEUP_DEV void prefetch_l2(const void* global) {
#ifdef AEUP_EMULATE
  AEUP_CHECK(global, 1, false);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

// --- vertical table of a strip ---
template <int K, class S>
struct alignas(K * sizeof(S) > 16 ? 16 : K * sizeof(S)) Weights {
  S w[K];
};
// First tap and weights of output row o; `up`: both axes are counted from the bottom (strips that walk upward).
template <int K, class S>
AEUP_DEV int row_taps(const Axis<S>& axis, int o, bool up, S* w) {
  S u[K];
  const int s = int(taps<K>(axis, up ? axis.out - 1 - o : o, u));
#pragma unroll
  for (int k = 0; k < K; ++k) w[k] = up ? u[K - 1 - k] : u[k];
  return up ? int(axis.in) - K - s : s;
}
// The block fills, for the n output rows from o0: rows[i] = first tap + add (rows[n] = INT_MAX), and weights rotated
// so that weights[i].w[q] belongs to the input row r with (r - base) % K == q; base <= the first tap of o0. Ends with a
// barrier. rows has n + 1 entries.
template <int K, class S>
AEUP_DEV void strip_tables(const Axis<S>& axis, int o0, int n, bool up, int base, int add, Weights<K, S>* weights,
                           int* rows) {
  for (int i = threadIdx.x; i <= n; i += blockDim.x) {
    if (i == n) {
      rows[i] = INT_MAX;
      continue;
    }
    S w[K];
    const int s = row_taps<K>(axis, o0 + i, up, w);
    rows[i] = s + add;
#pragma unroll
    for (int k = 0; k < K; ++k) weights[i].w[unsigned(s - base + k) % K] = w[k];
  }
  __syncthreads();
}
template <int K, class S>
constexpr size_t strip_tables_bytes(int n) {  // weights first, then rows
  return (n * sizeof(Weights<K, S>) + (n + 1) * sizeof(int) + 15) / 16 * 16;
}

// --- index arithmetic ---
struct Split {
  int64_t quotient;
  int64_t remainder;
};
// i / d and i % d for i >= 0, d > 0: 32-bit division where both fit.
AEUP_HD Split split(int64_t i, int64_t d) {
  if (((uint64_t(i) | uint64_t(d)) >> 32) == 0) {
    const uint32_t q = uint32_t(i) / uint32_t(d);
    return {int64_t(q), int64_t(uint32_t(i) - q * uint32_t(d))};
  }
  const int64_t q = i / d;
  return {q, i - q * d};
}
// Division of n in [0, 2^31) by a divisor in [1, 2^31) known on the host: one high multiply and a shift.
struct Divider {
  uint32_t divisor, magic, shift;
  Divider() = default;
  explicit Divider(int64_t d) : divisor(uint32_t(d)), magic(0), shift(0) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    magic = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }
  AEUP_HD int divide(int n) const {
    return int((uint32_t((uint64_t(uint32_t(n)) * magic) >> 32) + uint32_t(n)) >> shift);
  }
};
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Largest power of two, at most 16, that divides the address and the numbers of bytes given.
inline int alignment_of(const void* p, int64_t bytes = 0) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(p) | uint64_t(bytes) | 16;
  return int(bits & (~bits + 1));
}

// --- launch ---
inline constexpr int64_t kMaxGrid = 0x7fffffff;
inline constexpr size_t kMostStatic = 8 << 10;  // bytes of static shared arrays beside dynamic shared memory
// Programmatic dependent launch, where the device has it: a kernel launched for it may start once all blocks of the one
// before it in the stream called let_next_start(), and touches global memory only after after_previous(), when that one
// has ended and its stores are visible.
AEUP_DEV void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
AEUP_DEV void after_previous() {
#ifdef AEUP_EMULATE
  emu::after_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef AEUP_EMULATE
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, int block, size_t shared, void*, A... args) {
  return emu::run(grid, dim3(unsigned(block)), shared, [=] { kernel(args...); });
}
template <auto kKernel, class... A>
const char* launch_after(int64_t grid, int block, void* stream, A... args) {
  emu::overlap_next();
  return launch(kKernel, dim3(unsigned(grid)), block, 0, stream, args...);
}
inline int multiprocessors() { return 1; }
template <class... P>
int blocks_per_multiprocessor(void (*)(P...), int, size_t) {
  return 4;
}
#else
// Without it, a block on the current device has at most 48 KiB of shared memory, static arrays included. Asked for once
// per kernel and device, and again for more.
inline cudaError_t allow_shared(const void* kernel, size_t shared) {
  if (shared + kMostStatic <= (48 << 10)) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;  // bytes
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex);
    size_t& most = allowed[{kernel, device}];
    if (shared <= most) return cudaSuccess;
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (e == cudaSuccess) most = shared;
  }
  if (e != cudaSuccess) cudaGetLastError();  // reported here: do not leave it for the next caller
  return e;
}
template <class T>
using Given = std::enable_if_t<true, T>;  // a parameter's type, from the kernel alone
// nullptr, or the text of the CUDA error. The arguments are not copied: they may be kilobytes. `early`: see
// after_previous().
template <class... P>
const char* start(void (*kernel)(P...), dim3 grid, int block, size_t shared, void* stream, bool early,
                  const Given<P>&... args) {
  const auto* const code = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t e = allow_shared(code, shared)) return cudaGetErrorString(e);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(unsigned(block));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap, config.numAttrs = early;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  const cudaError_t e = cudaLaunchKernelExC(&config, code, pointers);
  if (e != cudaSuccess) cudaGetLastError();  // reported here: do not leave it for the next caller
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}
template <class... P>
const char* launch(void (*kernel)(P...), dim3 grid, int block, size_t shared, void* stream, const Given<P>&... args) {
  return start(kernel, grid, block, shared, stream, false, args...);
}
// The second of two kernels: set up while the first still runs, where the code of both is for compute capability 9.0
// and later; older code does not wait in after_previous().
template <auto kKernel, class... A>
const char* launch_after(int64_t grid, int block, void* stream, const A&... args) {
  static std::atomic<int> waits[64];  // by device: 0 unknown, 1 no, 2 yes
  int device = 0, known = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device < 64) known = waits[device].load(std::memory_order_relaxed);
  if (!known) {
    cudaFuncAttributes f;
    known = cudaFuncGetAttributes(&f, kKernel) == cudaSuccess && f.ptxVersion >= 90 && f.binaryVersion >= 90 ? 2 : 1;
    if (device < 64) waits[device].store(known, std::memory_order_relaxed);
  }
  if (grid > kMaxGrid) return "grid too large";
  return start(kKernel, dim3(unsigned(grid)), block, 0, stream, known == 2, args...);
}
// Multiprocessors of the current device, asked for once per device.
inline int multiprocessors() {
  static std::atomic<int> known[64];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 132;
  if (device < 64 && (count = known[device].load(std::memory_order_relaxed)) > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) return 132;
  if (device < 64) known[device].store(count, std::memory_order_relaxed);
  return count;
}
template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), int block, size_t shared) {
  int count = 0;
  if (allow_shared(reinterpret_cast<const void*>(kernel), shared) != cudaSuccess) return 1;  // the launch reports it
  const cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, block, shared);
  return e == cudaSuccess && count > 0 ? count : 1;
}
#endif
template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t grid, int block, size_t shared, void* stream, const A&... args) {
  if (grid > kMaxGrid) return "grid too large";
  return launch(kernel, dim3(unsigned(grid)), block, shared, stream, args...);
}
// Blocks of this kernel that run at the same time, asked for once per device and shape of the block, as long as
// `known`, which belongs to the kernel, has room.
using Residents = std::atomic<uint64_t>[8];
template <class Kernel>
int resident_blocks(Kernel kernel, Residents& known, int block, size_t shared) {
  int device = 0;
#ifndef AEUP_EMULATE
  if (cudaGetDevice(&device) != cudaSuccess) device = 0;
#endif
  const uint64_t key = uint64_t(block) << 40 | uint64_t(shared) << 16 | uint64_t(device & 255) << 8;
  std::atomic<uint64_t>& slot = known[key * 0x9e3779b97f4a7c15 >> 61];
  const uint64_t k = slot.load(std::memory_order_relaxed);
  int count = int(k & 255);
  if ((k & ~uint64_t(255)) != key) {
    count = blocks_per_multiprocessor(kernel, block, shared);
    slot.store(key | uint64_t(count & 255), std::memory_order_relaxed);
  }
  return count * multiprocessors();
}
// Usage: AEUP_LAUNCH(kernel, grid, block, shared bytes, stream, args...); returns from the caller on an error.
#define AEUP_LAUNCH(kernel, grid, block, shared, stream, ...)                                  \
  do {                                                                                         \
    const char* aeup_error = ::aeup::launch(kernel, grid, block, shared, stream, __VA_ARGS__); \
    if (aeup_error) return aeup_error;                                                         \
  } while (0)

}  // namespace aeup
