// Fast forward in float64: vectors of channels, else flat rows.
#include "forward.h"
#include "forward_sources.cuh"

namespace aeup {
namespace {

template <int K>
const char* run(const Problem& p, int elements, void* stream) {
  const Tuning tuning = K == 2 ? Tuning{4, 2, 1, false} : Tuning{16, 4, 1, false};
  if (p.channels_last && elements == 2 && p.c % 2 == 0)
    return launch_slide<double, K, 2, 1, false, Channels<double, K, 2>>(p, tuning, stream);
  if (elements == 2) return launch_slide<double, K, 2, 1, false, Gather<double, K, 2>>(p, tuning, stream);
  return launch_slide<double, K, 1, 1, false, Gather<double, K, 1>>(p, tuning, stream);
}

}  // namespace

const char* launch_double(const Problem& p, int elements, void* stream) {
  return p.mode == Mode::bilinear ? run<2>(p, elements, stream) : run<4>(p, elements, stream);
}

}  // namespace aeup
