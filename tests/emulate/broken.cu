// Tiny kernels, right and with one thing left out, for the test of races.cpp (../test_races.py).
#include "common.cuh"
#include "device.h"

namespace aeup {
namespace {

constexpr int kBlock = 64;

// The sum of a block's elements, with the barrier or without.
template <bool kBarrier>
__global__ void sum_block(const float* from, float* to) {
  __shared__ float sums[kBlock];
  const int t = threadIdx.x;
  sums[t] = load_one(from + blockIdx.x * kBlock + t);
  __syncthreads();
  for (int n = kBlock / 2; n; n /= 2) {
    if (t < n) sums[t] += sums[t + n];
    if (kBarrier) __syncthreads();
  }
  if (t == 0) store_one(to + blockIdx.x, sums[0]);
}
// Neighbours through dynamic shared memory, twice: the second round overwrites what the first may still read.
template <bool kBarrier>
__global__ void twice(const float* from, float* to) {
  AEUP_DYNAMIC_SHARED(float, line);
  const int t = threadIdx.x;
  float value = load_one(from + t);
  for (int round = 0; round < 2; ++round) {
    line[t] = value;
    __syncthreads();
    value += line[(t + 1) % kBlock];
    if (kBarrier) __syncthreads();
  }
  store_one(to + t, value);
}
// Between the lanes of a warp: what __syncwarp orders, and a shuffle does not.
template <bool kBarrier>
__global__ void reversed(const float* from, float* to) {
  __shared__ float line[kBlock];
  const int t = threadIdx.x, warp = t / 32 * 32;
  line[t] = load_one(from + t);
  if (kBarrier)
    __syncwarp();
  else
    (void)__shfl_xor_sync(~0u, line[t], 1);
  store_one(to + t, line[warp + 31 - t % 32]);
}
// A ring of two pieces by cp.async. kWait: groups that may be in flight where the piece is read.
template <int kWait, bool kBarrier>
__global__ void copied(const float* from, float* to) {
  AEUP_DYNAMIC_SHARED(float, ring);
  const int t = threadIdx.x, pieces = 4;
  const auto fetch = [&](int piece) {
    if (piece < pieces) copy_async<4>(ring + piece % 2 * kBlock + t, from + piece * kBlock + t);
    copy_commit();
  };
  fetch(0);
  float sum = 0;
  for (int piece = 0; piece < pieces; ++piece) {
    fetch(piece + 1);
    copy_wait<kWait>();
    __syncthreads();
    sum += ring[piece % 2 * kBlock + (t ^ 1)];
    if (kBarrier) __syncthreads();
  }
  store_one(to + t, sum);
}
// Blocks of one launch that use each other's results; the second launch of the right one comes after the first.
__global__ void fill(float* to) { store_one(to + blockIdx.x * kBlock + threadIdx.x, 1.f); }
__global__ void shift(const float* from, float* to) {
  const int i = blockIdx.x * kBlock + threadIdx.x;
  store_one(to + i, load_one(from + (i + kBlock) % (2 * kBlock)));
}
__global__ void fill_and_shift(float* between, float* to) {
  const int i = blockIdx.x * kBlock + threadIdx.x;
  store_one(between + i, 1.f);
  __syncthreads();
  store_one(to + i, load_one(between + (i + kBlock * (blockIdx.x > 0)) % (2 * kBlock)));
}
// One element more than the launch has.
template <bool kInside>
__global__ void past(const float* from, float* to) {
  AEUP_DYNAMIC_SHARED(float, line);
  const int t = threadIdx.x + (kInside ? kBlock : kBlock + 1);
  line[t] = load_one(from + threadIdx.x);
  store_one(to + threadIdx.x, line[t]);
}
// Half of the table is never filled.
template <bool kAll>
__global__ void table(const float* from, float* to) {
  __shared__ float line[kBlock];
  const int t = threadIdx.x;
  if (kAll || t % 2) line[t] = load_one(from + t);
  __syncthreads();
  store_one(to + t, line[kBlock - 1 - t]);
}

const char* run(const std::string& name, bool right, const float* from, float* to, float* between) {
  const auto one = [&](auto kernel, int64_t blocks) {
    return launch(kernel, blocks, kBlock, 2 * kBlock * 4, nullptr, from, to);
  };
  if (name == "block") return right ? one(sum_block<true>, 2) : one(sum_block<false>, 2);
  if (name == "overwritten") return right ? one(twice<true>, 1) : one(twice<false>, 1);
  if (name == "warp") return right ? one(reversed<true>, 1) : one(reversed<false>, 1);
  if (name == "copy read early") return right ? one(copied<1, true>, 1) : one(copied<2, true>, 1);
  if (name == "copy issued early") return right ? one(copied<1, true>, 1) : one(copied<1, false>, 1);
  if (name == "past") return right ? one(past<true>, 1) : one(past<false>, 1);
  if (name == "table") return right ? one(table<true>, 1) : one(table<false>, 1);
  if (name != "blocks") return "no such kernel";
  if (!right) return launch(fill_and_shift, int64_t(2), kBlock, 0, nullptr, between, to);
  if (const char* error = launch(fill, int64_t(2), kBlock, 0, nullptr, between)) return error;
  return launch(shift, int64_t(2), kBlock, 0, nullptr, static_cast<const float*>(between), to);
}

}  // namespace
}  // namespace aeup

// from: 256 floats; to: 128. Returns null, or what was found.
extern "C" const char* aeup_race(const char* name, bool right, const float* from, float* to) {
  emulated::Device device(512);
  device.reads(from, 1024);
  aeup::emu::machine.buffers.push_back({reinterpret_cast<char*>(to), reinterpret_cast<char*>(to + 128), true, nullptr});
  const char* error = aeup::run(name, right, from, to, static_cast<float*>(device.at));
  emulated::reply = error ? error : "";
  return error ? emulated::reply.c_str() : nullptr;
}
