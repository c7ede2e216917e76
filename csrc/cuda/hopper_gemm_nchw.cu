#include "cuda/hopper.h"
#include "cuda/hopper_gemm_nchw.cuh"

namespace aeup {
namespace {

template <class T, int kConfig, int kPhases, bool kForward, bool kSmooth, class P>
const char* run(const P& p, void* stream) {
  constexpr int BM = kNchwConfigs[kConfig].bm, BN = kNchwConfigs[kConfig].columns;
  using S = NchwShape<BM, BN>;
  const int64_t grid = min(p.tiles, multiprocessors());
  return launch_early<hopper_gemm_nchw<T, BM, BN, kPhases, kForward, kSmooth, P>>(grid, S::kThreads, S::kBytes, stream,
                                                                                  p);
}

template <class T, int kPhases, bool kForward, bool kSmooth, class P>
const char* by_channels(const P& p, int config, void* stream) {
  switch (config) {
    case 0:  // without the long activations, which would double the size of all these kernels
      if constexpr (!kSmooth) return run<T, 0, kPhases, kForward, kSmooth>(p, stream);
      return "no such tile";
    case 1: return run<T, 1, kPhases, kForward, kSmooth>(p, stream);
    default: return run<T, 2, kPhases, kForward, kSmooth>(p, stream);
  }
}

template <class T>
const char* forward(const ForwardParams& p, int config, int phases, void* stream) {
  if (p.activation > int(Activation::relu))
    return phases == 2 ? by_channels<T, 2, true, true>(p, config, stream)
                       : by_channels<T, 1, true, true>(p, config, stream);
  return phases == 2 ? by_channels<T, 2, true, false>(p, config, stream)
                     : by_channels<T, 1, true, false>(p, config, stream);
}

}  // namespace

const char* launch_gemm_nchw(const ForwardParams& p, int config, int phases, DType dtype, void* stream) {
  return dtype == DType::bf16 ? forward<BFloat16>(p, config, phases, stream) : forward<Half>(p, config, phases, stream);
}
template <int kMaps>
const char* launch_gemm_nchw(const GradientParams<kMaps>& p, int config, DType dtype, void* stream) {
  return dtype == DType::bf16 ? by_channels<BFloat16, 1, false, false>(p, config, stream)
                              : by_channels<Half, 1, false, false>(p, config, stream);
}
template const char* launch_gemm_nchw(const GradientParams<4>&, int, DType, void*);
template const char* launch_gemm_nchw(const GradientParams<kGemmMaps>&, int, DType, void*);

}  // namespace aeup
