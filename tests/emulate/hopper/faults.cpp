// Kernels that break a rule of the asynchronous units: the emulator must say so (test_hopper_emulated.py).
#include "cuda/hopper.cuh"
#include "family.h"

namespace aeup {
namespace {

enum class Fault : int {
  none,
  deadlock,
  early_product,
  early_accumulator,
  early_release,
  no_fence,
  no_barrier_fence,
  ordinary_store,
  too_many_arrivals,
  wrong_bytes,
  unfinished_copy,
};

// One warpgroup: out [64, 32] = a [64, 64] b [32, 64]^T, of bfloat16, `rounds` times, through one stage.
void one_stage(CUtensorMap map_a, CUtensorMap map_b, float* out, int rounds, Fault fault) {
  AEUP_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* const a = memory + (-shared_address(memory) & 1023);
  unsigned char* const b = a + 8192;
  auto* const full = reinterpret_cast<uint64_t*>(a + 12288);
  uint64_t* const empty = full + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    barrier_init(full, 1), barrier_init(empty, 4);
    if (fault != Fault::no_barrier_fence) barrier_init_fence();
  }
  __syncthreads();
  if (warp == 4) {
    for (int i = 0; lane == 0 && i < rounds + (fault == Fault::unfinished_copy); ++i) {
      barrier_wait(empty, (i + 1) % 2);
      barrier_expect(full, 12288 + (fault == Fault::wrong_bytes));
      copy_box(a, &map_a, full, 0, 0, 0);
      copy_box(b, &map_b, full, 0, 0, 0);
      if (fault == Fault::too_many_arrivals) barrier_arrive(full);
    }
    return;
  }
  float acc[16];
  for (int i = 0; i < rounds; ++i) {
    if (fault != Fault::early_product) barrier_wait(fault == Fault::deadlock ? empty : full, i % 2);
    if (fault == Fault::ordinary_store) store_shared(shared_address(a) + threadIdx.x * 64, 1.f, 1.f);
    if (fault == Fault::early_release && lane == 0) barrier_arrive(empty);
    if (fault != Fault::no_fence) wgmma_fence();
    for (int k = 0; k < 4; ++k)
      wgmma<BFloat16, 0, 0>(acc, operand(shared_address(a), 16, 1024) + k * 2,
                            operand(shared_address(b), 16, 1024) + k * 2, i + k > 0);
    wgmma_commit();
    if (fault == Fault::early_accumulator && i + 1 == rounds) break;
    if (fault == Fault::early_release) named_barrier(1, 128);  // time for the next copies
    wgmma_wait<0>();
    if (fault != Fault::early_release && lane == 0) barrier_arrive(empty);
  }
  for (int i = 0; i < 16; ++i)
    store_one(out + (warp * 16 + lane / 4 + i % 4 / 2 * 8) * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2, acc[i]);
  if (fault == Fault::early_accumulator) wgmma_wait<0>();
}

}  // namespace
}  // namespace aeup

extern "C" const char* aeup_emulate_fault(const void* a, const void* b, float* out, int rounds, int fault) {
  using namespace aeup;
  emulated::Device device(0);
  device.reads(a, 8192), device.reads(b, 4096), device.writes(out, 8192);
  CUtensorMap maps[2];
  for (int i = 0; i < 2; ++i) {
    const cuuint64_t size[3] = {64, i ? 32u : 64u, 1}, stride[2] = {128, 8192};
    const cuuint32_t box[3] = {64, i ? 32u : 64u, 1}, steps[3] = {1, 1, 1};
    if (emu::encode_map(maps + i, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(i ? b : a), size, stride, box,
                        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
      return "a tensor map was refused";
  }
  const char* error =
      launch(one_stage, 1, 160, 12288 + 64 + 1024, nullptr, maps[0], maps[1], out, rounds, Fault(fault));
  return error ? emulated::answer(error) : device.all_stored();
}
