// Runs the CUDA kernels of csrc/cuda on the host, for tests without a GPU. The .cu files are compiled as C++ with
// -DAEUP_EMULATE. Every CUDA thread is a fiber of one OS thread, so barriers have their real meaning:
// a thread runs until it reaches a barrier or ends. Blocks run one after the other; every second block runs its
// threads in reverse order. Dynamic shared memory starts as 0xff bytes (NaN). cp.async copies only at the wait.
// Every global access made through common.cuh is checked: inside a registered buffer, aligned, stores only once. Built
// with -fsanitize=thread, accesses that no barrier orders are found too (races.h).
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "races.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#ifdef AEUP_INSTRUMENTED
#define __shared__ static thread_local  // all in one range of addresses, which races.cpp can find
#define AEUP_QUIET __attribute__((no_sanitize("thread")))
#define AEUP_CALLER __builtin_return_address(0)
inline constexpr bool kInstrumented = true;
#else
#define __shared__ static
#define AEUP_QUIET
#define AEUP_CALLER nullptr
inline constexpr bool kInstrumented = false;
#endif
// Inlined also without optimisation: gcc does not report the store of a result that a call puts into memory itself.
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
__forceinline__ uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
__forceinline__ uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
__forceinline__ float2 make_float2(float a, float b) { return {a, b}; }
__forceinline__ float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
__forceinline__ float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
__forceinline__ unsigned __float_as_uint(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

namespace aeup::emu {

inline constexpr int kWarp = 32, kStack = 64 << 10;
inline constexpr size_t kMaxShared = 227 << 10;

AEUP_QUIET inline void move(void* to, const void* from, int bytes) {
  race::access(from, bytes, race::Access::load, AEUP_CALLER);
  race::access(to, bytes, race::Access::store, AEUP_CALLER);
  std::memcpy(to, from, bytes);
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
using Place = void* [5];  // of __builtin_setjmp: unlike swapcontext, it asks nothing of the system
struct Fiber {
  ucontext_t context;  // of its start
  Place left;
  bool started = false, after_previous;
  std::vector<char> stack;
  enum { ready, at_block, at_warp, at_exchange, waiting, done } state;  // at_exchange: at_warp that orders no memory
  std::function<bool()> met;                                            // what a waiting thread waits for
  std::vector<std::vector<Copy>> groups;                                // committed cp.async groups, oldest first
  std::vector<Copy> open;
  uint64_t exchange;
  uint32_t operands[6];  // of a matrix product
};
struct Buffer {
  const char *begin, *end;
  bool writable;
  std::vector<uint8_t>* stores;  // store count per byte, or null
};
struct Unit {                 // works beside the threads of a block (hopper/hopper_on_host.h)
  virtual void start() = 0;   // of a block
  virtual bool idle() = 0;    // no thread can go on: true if there was work to do
  virtual void finish() = 0;  // all threads have ended
};
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  std::vector<Buffer> buffers;
  std::function<void()> body;
  Place scheduler;
  Fiber* current = nullptr;
  std::string error;
  Unit* unit = nullptr;
  size_t shared_bytes = 0;                      // of the launch
  bool overlap_next = false, overlaps = false;  // launched to begin before the kernel before it has ended
  int64_t launches = 0;
  int64_t last_blocks = -1;  // run only so many blocks at the end of each grid, for tensors too large to compute
};
inline Machine machine;
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;

[[noreturn]] inline void fail(const char* what, const void* p, int bytes) {
  char text[256];
  std::snprintf(text, sizeof text, "%s at %p, %d bytes, block %u thread %u", what, p, bytes, block_index.x,
                thread_index.x);
  throw std::runtime_error(text);
}
AEUP_QUIET inline void check(const void* p, int bytes, bool store) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access", p, bytes);
  if (machine.overlaps && !machine.current->after_previous) fail("access before after_previous()", p, bytes);
  const char* a = static_cast<const char*>(p);
  for (Buffer& b : machine.buffers) {
    if (a < b.begin || a + bytes > b.end) continue;
    if (!store) return;
    if (!b.writable) fail("store to a read-only buffer", p, bytes);
    if (b.stores)
      for (int i = 0; i < bytes; ++i)
        if ((*b.stores)[a - b.begin + i]++) fail("second store to an element", p, bytes);
    return;
  }
  fail(store ? "store outside the buffers" : "load outside the buffers", p, bytes);
}

// Leaves this stack at `from` and goes on where another one was left.
__attribute__((noinline)) AEUP_QUIET inline void jump(Place& from, Place& to) {
  if (!__builtin_setjmp(from)) __builtin_longjmp(to, 1);
}
__attribute__((noinline)) AEUP_QUIET inline void begin(Place& from, const ucontext_t& to) {
  if (!__builtin_setjmp(from)) setcontext(&to);
}
AEUP_QUIET inline void yield_as(decltype(Fiber::state) state) {
  Fiber* f = machine.current;
  f->state = state;
  jump(f->left, machine.scheduler);
}
AEUP_QUIET inline void exchange() {
  yield_as(Fiber::at_exchange);
}  // shuffles and alike: all threads of the warp are here
inline void wait_until(std::function<bool()> met) {
  machine.current->met = std::move(met);
  yield_as(Fiber::waiting);
}
AEUP_QUIET inline void enter() {  // runs a thread of one block after the other
  for (;;) {
    try {
      machine.body();
    } catch (const std::exception& e) {
      if (machine.error.empty()) machine.error = e.what();
    }
    if (!machine.current->open.empty() && machine.error.empty()) machine.error = "cp.async never committed";
    yield_as(Fiber::done);
  }
}
AEUP_QUIET inline bool release(int first, int count, decltype(Fiber::state) state) {
  bool any = false;
  for (int t = first; t < first + count; ++t) {
    const auto s = machine.fibers[t].state;
    if (s != state && s != Fiber::done) return false;
    any |= s == state;
  }
  for (int t = first; t < first + count; ++t)
    if (machine.fibers[t].state == state) machine.fibers[t].state = Fiber::ready;
  if (any && state != Fiber::at_exchange) race::order(first, count);
  return any;
}
AEUP_QUIET inline void run_block(int threads) {
  Machine& m = machine;
  race::begin_block(threads);
  for (int t = 0; t < threads; ++t) {
    Fiber& f = m.fibers[t];
    f.state = Fiber::ready;
    f.after_previous = false;
    f.groups.clear();
    f.open.clear();
  }
  if (m.unit) m.unit->start();
  for (bool reverse = block_index.x & 1;;) {
    int alive = 0, ran = 0;
    for (int i = 0; i < threads; ++i) {
      const int t = reverse ? threads - 1 - i : i;
      Fiber& f = m.fibers[t];
      if (f.state == Fiber::done) continue;
      ++alive;
      if (f.state == Fiber::waiting && f.met()) f.state = Fiber::ready;
      if (f.state != Fiber::ready) continue;
      ++ran;
      thread_index = {unsigned(t) % block_size.x, unsigned(t) / block_size.x % block_size.y,
                      unsigned(t) / block_size.x / block_size.y};
      m.current = &f;
      race::run_thread(t);
      if (f.started) {
        jump(m.scheduler, f.left);
      } else {
        f.started = true;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
        begin(m.scheduler, f.context);
      }
      race::run_thread(-1);
      if (!m.error.empty()) return;
    }
    if (!alive) {
      if (m.unit) m.unit->finish();
      return;
    }
    if (release(0, threads, Fiber::at_block)) ++ran;
    for (int w = 0; w < threads; w += kWarp)
      for (const auto state : {Fiber::at_warp, Fiber::at_exchange})
        if (release(w, std::min(kWarp, threads - w), state)) ++ran;
    if (!ran && !(m.unit && m.unit->idle())) {
      if (m.error.empty()) m.error = "deadlock: threads wait at different barriers";
      return;
    }
  }
}
// nullptr, or the text of the first error.
AEUP_QUIET inline const char* run(dim3 grid, dim3 block, size_t shared, std::function<void()> body) {
  Machine& m = machine;
  const int threads = block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared > kMaxShared) {
    m.error = "invalid launch configuration";
    return m.error.c_str();
  }
  if (int(m.fibers.size()) < threads) m.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) m.fibers[t].stack.resize(kStack);
  if (!m.error.empty())  // threads were left in the middle of a block
    for (Fiber& f : m.fibers) f.started = false;
  m.error.clear();
  m.shared.resize(kMaxShared + 16);
  m.body = std::move(body);
  m.shared_bytes = shared;
  m.overlaps = m.overlap_next, m.overlap_next = false;
  grid_size = grid;
  block_size = block;
  ++m.launches;
  race::begin_launch(kInstrumented);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = m.last_blocks < 0 || m.last_blocks > grid.x ? 0 : grid.x - unsigned(m.last_blocks); x < grid.x;
           ++x) {
        block_index = {x, y, z};
        std::memset(m.shared.data(), 0xff, shared + 16);
        run_block(threads);
        if (!m.error.empty()) return m.error.c_str();
      }
  return race::found();
}
inline void* dynamic_shared() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(machine.shared.data()) + 15) / 16 * 16);
}

// Of a kernel that may begin before the one before it has ended (programmatic dependent launch).
inline void overlap_next() { machine.overlap_next = true; }  // the next launch
inline void after_previous() { machine.current->after_previous = true; }

// --- cp.async ---
AEUP_QUIET inline void copy_async(void* to, const void* from, int bytes) {
  check(from, bytes, false);
  if (reinterpret_cast<uintptr_t>(to) % bytes) fail("misaligned cp.async", to, bytes);
  race::access(from, bytes, race::Access::load, AEUP_CALLER);
  race::access(to, bytes, race::Access::copy_issued, AEUP_CALLER);
  std::memset(to, 0xff, bytes);
  machine.current->open.push_back({to, from, bytes});
}
AEUP_QUIET inline void copy_commit() {
  machine.current->groups.push_back(std::move(machine.current->open));
  machine.current->open.clear();
}
AEUP_QUIET inline void copy_wait(int keep) {
  auto& groups = machine.current->groups;
  while (int(groups.size()) > keep) {
    for (const Copy& c : groups.front()) {
      std::memcpy(c.to, c.from, c.bytes);
      race::access(c.to, c.bytes, race::Access::copy_done, AEUP_CALLER);
    }
    groups.erase(groups.begin());
  }
}

// --- 16-bit floats, round to nearest even ---
AEUP_QUIET inline uint16_t bf16_of(float f) {
  const uint32_t u = __float_as_uint(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
AEUP_QUIET inline float of_half(uint16_t h) {
  const int e = h >> 10 & 31, m = h & 1023;
  const float v = e == 31 ? (m ? NAN : INFINITY) : std::ldexp(float(e ? m + 1024 : m), (e ? e : 1) - 25);
  return h & 0x8000 ? -v : v;
}
AEUP_QUIET inline uint16_t half_of(float f) {
  const uint16_t sign = uint16_t(__float_as_uint(f) >> 16 & 0x8000);
  const float a = std::fabs(f);
  if (a != a) return 0x7fff;
  if (a >= 65520.f) return sign | 0x7c00;
  int e;
  std::frexp(a, &e);  // a = m 2^e, m in [0.5, 1)
  const int low = (a == 0 || e < -13) ? -24 : e - 11;
  const int n = int(std::nearbyint(std::ldexp(a, -low)));  // 0 .. 2048
  return uint16_t(sign | (low == -24 ? n : ((low + 24) << 10) + n));
}

enum class Operand { bf16, half, tf32 };
AEUP_QUIET inline float operand(Operand kind, uint32_t word, int part) {
  if (kind == Operand::tf32) return __uint_as_float(word & 0xffffe000u);
  const uint16_t bits = uint16_t(word >> 16 * part);
  return kind == Operand::half ? of_half(bits) : __uint_as_float(uint32_t(bits) << 16);
}
void matrix_product(Operand kind, float* c, const uint32_t* a, uint32_t b0, uint32_t b1);
}  // namespace aeup::emu

#define threadIdx aeup::emu::thread_index
#define blockIdx aeup::emu::block_index
#define blockDim aeup::emu::block_size
#define gridDim aeup::emu::grid_size
inline void __syncthreads() { aeup::emu::yield_as(aeup::emu::Fiber::at_block); }
inline void __syncwarp(unsigned = ~0u) { aeup::emu::yield_as(aeup::emu::Fiber::at_warp); }
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  using namespace aeup::emu;
  const int me = thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z);
  std::memcpy(&machine.current->exchange, &v, sizeof(T));
  aeup::emu::exchange();
  T r;
  const Fiber& from = machine.fibers[me / kWarp * kWarp + (lane & 31)];
  if (from.state == Fiber::done) fail("shuffle from a thread that has ended", nullptr, 0);
  std::memcpy(&r, &from.exchange, sizeof(T));
  aeup::emu::exchange();
  return r;
}
template <class T>
T __shfl_down_sync(unsigned m, T v, int d) {
  const int lane = threadIdx.x & 31;
  return __shfl_sync(m, v, lane + d < 32 ? lane + d : lane);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, int d) {
  const int lane = threadIdx.x & 31;
  return __shfl_sync(m, v, lane - d >= 0 ? lane - d : lane);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int d) {
  return __shfl_sync(m, v, int(threadIdx.x & 31) ^ d);
}
namespace aeup::emu {
// mma.sync m16n8k16 (bf16, half) or m16n8k8 (tf32), fragments as in the PTX manual: c += a b.
AEUP_QUIET inline void matrix_product(Operand kind, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  const int me = thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z);
  const int g = me % kWarp / 4, q = me % 4, per = kind == Operand::tf32 ? 1 : 2;
  uint32_t* mine = machine.current->operands;
  std::memcpy(mine, a, 16);
  mine[4] = b0, mine[5] = b1;
  exchange();
  const Fiber* const warp = machine.fibers.data() + me / kWarp * kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    for (int k = 0; k < 8 * per; ++k) {
      const int lane = k / per % 4, high = k / per / 4;  // who holds the word of k, and which of its two
      const uint32_t x = warp[row % 8 * 4 + lane].operands[row / 8 + 2 * high];
      const uint32_t y = warp[column * 4 + lane].operands[4 + high];
      c[i] += operand(kind, x, k % per) * operand(kind, y, k % per);
    }
  }
  exchange();
}
// ldmatrix.x4: lane l gives row l % 8 of matrix l / 8 (8 x 8 elements of 16 bits).
AEUP_QUIET inline void load_matrices(const void* row, bool transposed, uint32_t* w) {
  const int me = thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z);
  const int first = me / kWarp * kWarp, lane = me % kWarp;
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("misaligned ldmatrix", row, 16);
  race::access(row, 16, race::Access::load, AEUP_CALLER);
  machine.current->exchange = reinterpret_cast<uintptr_t>(row);
  exchange();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = transposed ? lane % 4 * 2 + e : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + e;
      std::memcpy(pair + e, reinterpret_cast<const uint16_t*>(machine.fibers[first + 8 * i + r].exchange) + c, 2);
    }
    w[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
  exchange();
}
}  // namespace aeup::emu
