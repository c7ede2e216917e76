// Fast forward for channels-last tensors whose channels fill vectors: any scale.
#include "forward.h"
#include "forward_sources.cuh"

namespace aeup {
namespace {

template <class T, int K, int V>
const char* run(const Problem& p, void* stream) {
  constexpr bool small = sizeof(T) == 2, wide = V * sizeof(T) == 16;
  constexpr bool capped = K == 4 && small && wide;
  const Tuning tuning = capped   ? Tuning{33, 4, 1, false, 2}
                        : K == 2 ? Tuning{small ? 8 : 4, 2, 1, false}
                                 : Tuning{small ? 64 : 43, 4, 1, true};
  return launch_slide<T, K, V, capped ? 6 : 1, false, Channels<T, K, V>, capped ? 2 : 0>(p, tuning, stream);
}
template <class T>
const char* pick(const Problem& p, int bytes, void* stream) {
  constexpr int V = 16 / int(sizeof(T));
  if (bytes == 16) return p.mode == Mode::bilinear ? run<T, 2, V>(p, stream) : run<T, 4, V>(p, stream);
  return p.mode == Mode::bilinear ? run<T, 2, V / 2>(p, stream) : run<T, 4, V / 2>(p, stream);
}

}  // namespace

const char* launch_channels(const Problem& p, int bytes, void* stream) {
  switch (p.dtype) {
    case DType::f32: return pick<float>(p, bytes, stream);
    case DType::f16: return pick<Half>(p, bytes, stream);
    default: return pick<BFloat16>(p, bytes, stream);
  }
}

}  // namespace aeup
