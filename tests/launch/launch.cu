// The host code of common.cuh that launches, on the runtime of runtime.cpp. Prints what is wrong.
#include <cstdio>
#include <cstring>

#include "cuda/common.cuh"
#include "runtime.h"

#define CHECK(x)                                               \
  do {                                                         \
    if (!(x)) ++failed, std::printf("%d: %s\n", __LINE__, #x); \
  } while (0)

namespace {

int failed = 0;

struct alignas(64) Parameters {  // kilobytes, as of the Hopper kernels
  unsigned char bytes[2048];
};
__global__ void three(int64_t a, const float* p, bool flag) {
  if (flag) const_cast<float*>(p)[a] = 1;
}
__global__ void large(const __grid_constant__ Parameters, bool) {}
__global__ void second(const __grid_constant__ Parameters) {}

template <class E>
E argument(int i) {
  E value;
  std::memcpy(&value, runtime.copied[i], sizeof(E));
  return value;
}
void arguments(int count, size_t a, size_t b = 0, size_t c = 0) {
  runtime.arguments = count;
  runtime.bytes[0] = a, runtime.bytes[1] = b, runtime.bytes[2] = c;
}
int stream;
const char* run(int64_t grid, size_t shared) {
  static const float data = 0;
  AEUP_LAUNCH(three, grid, 96, shared, &stream, -5, &data, true);  // an int for the kernel's int64_t
  return nullptr;
}

void arguments_and_sizes() {
  arguments(3, 8, 8, 1);
  CHECK(!run(77, 0));
  CHECK(argument<int64_t>(0) == -5 && argument<const float*>(1) && argument<bool>(2));
  const cudaLaunchConfig_t& c = runtime.config;
  CHECK(c.gridDim.x == 77 && c.gridDim.y == 1 && c.gridDim.z == 1 && c.blockDim.x == 96 && c.blockDim.y == 1);
  CHECK(c.stream == reinterpret_cast<cudaStream_t>(&stream) && c.dynamicSmemBytes == 0 && c.numAttrs == 0);
  CHECK(run(int64_t(1) << 31, 0) && runtime.cleared == 0);
  arguments(2, sizeof(Parameters), 1);
  Parameters p;
  for (size_t i = 0; i < sizeof(p.bytes); ++i) p.bytes[i] = static_cast<unsigned char>(i * i + i / 256);
  CHECK(!aeup::launch(large, dim3(2, 3), 128, 0, &stream, p, true));
  CHECK(!std::memcmp(&p, runtime.copied[0], sizeof(p)) && argument<bool>(1) && c.gridDim.y == 3);
}
void errors() {
  runtime.launch = cudaErrorInvalidValue;
  CHECK(run(1, 0) && runtime.cleared == 1);
  runtime.launch = cudaSuccess;
}
void shared_memory() {  // asked for once per device, and again for more or after an error
  const auto sets = [](size_t shared, int device) {
    const int before = runtime.sets;
    runtime.device = device;
    CHECK(!run(1, shared) && runtime.config.dynamicSmemBytes == shared);
    return runtime.sets - before;
  };
  CHECK(sets(40 << 10, 0) == 0);
  CHECK(sets(100 << 10, 0) == 1 && sets(100 << 10, 0) == 0 && sets(90 << 10, 0) == 0 && sets(101 << 10, 0) == 1);
  CHECK(sets(90 << 10, 1) == 1 && sets(101 << 10, 0) == 0);
  runtime.set = cudaErrorInvalidValue;
  const int cleared = runtime.cleared;
  CHECK(run(1, 200 << 10) && runtime.cleared == cleared + 1);
  runtime.set = cudaSuccess;
  CHECK(sets(200 << 10, 0) == 1);
}
void after_another() {  // early where the code waits
  Parameters p;
  arguments(0, 0);
  for (const int device : {0, 1, 0, 1}) {
    runtime.device = device;
    CHECK(!(aeup::launch_after<second>(5, 64, &stream, p)));
    CHECK(runtime.early == (device == 0) && runtime.config.numAttrs == unsigned(device == 0));
  }
  CHECK(runtime.queries == 2);
}
void residents() {
  static aeup::Residents known;
  for (const int device : {0, 1, 0, 1}) {
    runtime.device = device;
    CHECK(aeup::resident_blocks(three, known, 128, 1000) == (device == 0 ? 3 * 132 : 2 * 100));
  }
  CHECK(runtime.occupancies == 2);
}

}  // namespace

int main() {
  arguments_and_sizes();
  errors();
  shared_memory();
  after_another();
  residents();
  return failed;
}
