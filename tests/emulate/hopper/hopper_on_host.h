// Hopper's asynchronous units on the host (see cuda_on_host.h), in place of the PTX of csrc/cuda/hopper.cuh and
// wgmma*.cuh: mbarriers with phases and transaction bytes, tensor-map copies, wgmma. Everything asynchronous happens as
// late as the rules allow, so that what is used too early, or given back too early, is seen:
// - a copy fills its destination with 0xff (NaN) when it is issued, and with data once no thread can go on; copies
//   complete in the order of issue, or in the opposite one in every second block;
// - a product reads shared memory at the wgmma.wait_group that its group has to be complete at. Until the last product
//   on an accumulator is complete, the accumulator's registers are NaN, and stores to them are lost;
// - a warp multiplies its own 16 rows, whatever the other warps of its warpgroup do.
// Sums in a product: in float64, then cut off to float32, as tensor cores cut off what they add.
// Reported as errors: descriptors other than 128-byte swizzle, products whose operands differ in a warp, no wgmma.fence
// after a wait, products of what ordinary stores wrote (no kernel has the proxy fence for it), barriers used before
// their fence, more arrivals than a phase has, boxes that are not those of the map, copies and products that a block
// leaves behind. Deadlocks are found by the scheduler.
#pragma once
#include "cuda.h"
#include "cuda/common.cuh"

#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL

namespace aeup::emu {

inline constexpr uint32_t kWindow = 0x410;  // shared address of the dynamic shared memory: aligned to 16 bytes only
inline constexpr int kNamedBarriers = 16;

struct Barrier {  // of 8 bytes, in shared memory
  static constexpr uint16_t kUnfenced = 0x5bad, kReady = 0x5ba1;
  uint16_t tag;
  uint8_t arrivals, pending;  // of a phase; still missing
  int32_t bytes_phase;        // transaction bytes that are still missing, times 2, plus the phase's parity
};
static_assert(sizeof(Barrier) == 8);

struct BoxCopy {
  CUtensorMap map;
  char* to;
  uint64_t* barrier;
  int at[5];
};

struct Product {  // as a thread gives it; a: of registers if `registers`
  float* d;
  int columns;
  Operand kind;
  bool registers, transpose_a, transpose_b, accumulate;
  uint64_t a, b;
  uint32_t words[4];
};
struct Accumulator {  // in flight
  float* registers;
  std::vector<float> values;
  int products;
};
struct Lane {  // a thread's view of its warpgroup's products
  std::vector<std::vector<Product>> groups;
  std::vector<Product> open;
  std::vector<Accumulator> accumulators;
  bool fenced;
};
struct Named {
  int arrived;
  int64_t generation;
};

struct Hopper : Unit {
  std::vector<BoxCopy> copies;
  std::vector<Lane> lanes;
  std::vector<int> waiting;   // threads of each warp that have reached its wait
  std::vector<char> written;  // 16 bytes of shared memory: by ordinary stores
  Named named[kNamedBarriers];

  void start() override;
  bool idle() override;
  void finish() override;
};
extern Hopper hopper;

inline int thread_number() { return thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z); }
inline char* shared_at(uint32_t address, int bytes) {
  if (address < kWindow || address + bytes > kWindow + machine.shared_bytes || address % bytes)
    fail("outside the shared memory, or misaligned: shared address", reinterpret_cast<void*>(uintptr_t(address)),
         bytes);
  return static_cast<char*>(dynamic_shared()) + (address - kWindow);
}
inline uint32_t address_of(const void* p) {
  return uint32_t(static_cast<const char*>(p) - static_cast<const char*>(dynamic_shared())) + kWindow;
}
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

Barrier& barrier_at(uint64_t* bar, uint16_t tag = Barrier::kReady);
void arrive(uint64_t* bar, int32_t bytes);
void issue(const BoxCopy& copy, int rank);
void multiply(const Product& product);
void commit();
void wait(int pending);
void ordinary_store(uint32_t address, const void* from, int bytes);

}  // namespace aeup::emu

inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
inline float __expf(float x) { return expf(x); }

namespace aeup {

inline uint32_t shared_address(const void* p) { return emu::address_of(p); }

inline void barrier_init(uint64_t* bar, int arrivals) {
  emu::barrier_at(bar, 0) = {emu::Barrier::kUnfenced, uint8_t(arrivals), uint8_t(arrivals), 0};
}
inline void barrier_init_fence() {
  char* const all = static_cast<char*>(emu::dynamic_shared());
  for (size_t i = 0; i + 8 <= emu::machine.shared_bytes; i += 8) {
    auto* const b = reinterpret_cast<emu::Barrier*>(all + i);
    if (b->tag == emu::Barrier::kUnfenced) b->tag = emu::Barrier::kReady;
  }
}
inline void barrier_expect(uint64_t* bar, uint32_t bytes) { emu::arrive(bar, int32_t(bytes)); }
inline void barrier_arrive(uint64_t* bar) { emu::arrive(bar, 0); }
inline void barrier_wait(uint64_t* bar, uint32_t parity) {
  emu::Barrier& b = emu::barrier_at(bar);
  const auto passed = [&b, parity] { return uint32_t(b.bytes_phase & 1) != parity; };
  if (!passed()) emu::wait_until(passed);
  race::acquire(bar);
}
inline void copy_box(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3) {
  emu::issue({*map, static_cast<char*>(dst), bar, {c0, c1, c2, c3, 0}}, 4);
}
inline void copy_box(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2) {
  emu::issue({*map, static_cast<char*>(dst), bar, {c0, c1, c2, 0, 0}}, 3);
}
inline void prefetch_map(const CUtensorMap*) {}

inline void wgmma_fence() { emu::hopper.lanes[emu::thread_number()].fenced = true; }
inline void wgmma_commit() { emu::commit(); }
template <int kPending>
void wgmma_wait() {
  emu::wait(kPending);
}
template <int N>
void hold(float (&)[N]) {}

template <class T, int kTransposeA, int kTransposeB, int N>
void wgmma(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
  const auto kind = std::is_same_v<T, BFloat16> ? emu::Operand::bf16 : emu::Operand::half;
  emu::multiply({d, 2 * N, kind, false, kTransposeA != 0, kTransposeB != 0, accumulate != 0, a, b, {}});
}
template <int N>
void wgmma_tf32(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
  emu::multiply({d, 2 * N, emu::Operand::tf32, false, false, false, accumulate != 0, a, b, {}});
}
template <int N>
void wgmma_tf32(float (&d)[N], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emu::multiply({d, 2 * N, emu::Operand::tf32, true, false, false, accumulate != 0, 0, b, {a[0], a[1], a[2], a[3]}});
}

template <class E>
E load_shared(uint32_t address) {
  E v;
  std::memcpy(&v, emu::shared_at(address, sizeof(E)), sizeof(E));
  return v;
}
inline void store_shared(uint32_t address, float a, float b) {
  const float pair[2] = {a, b};
  emu::ordinary_store(address, pair, 8);
}
// stmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8.
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const int lane = threadIdx.x % 32;
  const uint32_t words[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)  // the word of this lane: row lane / 4 of the matrix
    emu::ordinary_store(__shfl_sync(~0u, address, 8 * i + lane / 4) + lane % 4 * 4, words + i, 4);
}
inline void named_barrier(int id, int threads) {
  emu::Named& b = emu::hopper.named[id];
  const int64_t mine = b.generation;
  race::release(&b);
  if (++b.arrived == threads)
    b.arrived = 0, ++b.generation;
  else
    emu::wait_until([&b, mine] { return b.generation != mine; });
  race::acquire(&b);
}
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
inline float at_least(float v, float bound) { return v != v ? v : v > bound ? v : bound; }

}  // namespace aeup
