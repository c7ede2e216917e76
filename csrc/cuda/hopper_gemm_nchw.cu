#include "cuda/hopper.h"
#include "cuda/hopper_gemm_nchw.cuh"

namespace aeup {
namespace {

template <class T, int BM, int BN, int kPhases, bool kForward, bool kSmooth>
const char* run(const GemmParams& p, void* stream) {
  using S = NchwShape<BM, BN>;
  const int64_t grid = p.tiles < multiprocessors() ? p.tiles : multiprocessors();
  return launch_early<hopper_gemm_nchw<T, BM, BN, kPhases, kForward, kSmooth>>(grid, S::kThreads, S::kBytes, stream, p);
}

template <class T, int kPhases, bool kForward, bool kSmooth>
const char* by_channels(const GemmParams& p, int config, void* stream) {
  static_assert(kNchwConfigCount == 2);
  return config == 0 ? run<T, 128, 128, kPhases, kForward, kSmooth>(p, stream)
                     : run<T, 64, 128, kPhases, kForward, kSmooth>(p, stream);
}

template <class T>
const char* by_pass(const GemmParams& p, int config, int phases, bool forward, void* stream) {
  if (!forward) return by_channels<T, 1, false, false>(p, config, stream);
  if (p.activation > int(Activation::relu))
    return phases == 2 ? by_channels<T, 2, true, true>(p, config, stream)
                       : by_channels<T, 1, true, true>(p, config, stream);
  return phases == 2 ? by_channels<T, 2, true, false>(p, config, stream)
                     : by_channels<T, 1, true, false>(p, config, stream);
}

}  // namespace

const char* launch_gemm_nchw(const GemmParams& p, int config, int phases, bool forward, DType dtype, void* stream) {
  return dtype == DType::bf16 ? by_pass<BFloat16>(p, config, phases, forward, stream)
                              : by_pass<Half>(p, config, phases, forward, stream);
}

}  // namespace aeup
