// Fast forward for flat rows: channels-last with any number of channels, NCHW with any scale, any alignment.
#include "forward.h"
#include "forward_sources.cuh"

namespace aeup {
namespace {

template <class T, int K, int V>
const char* run(const Problem& p, void* stream) {
  constexpr bool small = sizeof(T) == 2, ahead = K == 4 && V == 4 && small;
  constexpr int rows = K == 2 ? 8 : small ? 32 : 19, kBlocks = K * V >= 16 ? 5 : 1;
  const Tuning tuning = ahead ? Tuning{64, K, 1, false, 2} : Tuning{rows, K, V > 1 ? 4 : 1, false};
  return launch_slide<T, K, V, kBlocks, false, Gather<T, K, V>, ahead ? 2 : 0>(p, tuning, stream);
}
template <class T>
const char* pick(const Problem& p, int elements, void* stream) {
  if (p.mode == Mode::bilinear) {
    if (sizeof(T) == 2 && elements == 8) return run<T, 2, sizeof(T) == 2 ? 8 : 4>(p, stream);
    return elements == 4 ? run<T, 2, 4>(p, stream) : run<T, 2, 1>(p, stream);
  }
  return elements == 4 ? run<T, 4, 4>(p, stream) : run<T, 4, 1>(p, stream);
}

}  // namespace

const char* launch_gather(const Problem& p, int elements, void* stream) {
  switch (p.dtype) {
    case DType::f32: return pick<float>(p, elements, stream);
    case DType::f16: return pick<Half>(p, elements, stream);
    default: return pick<BFloat16>(p, elements, stream);
  }
}

}  // namespace aeup
