#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"

namespace aeup {
namespace {

template <class T, int kConfig, bool kSmooth>
const char* run(const ForwardParams& p, void* stream) {
  constexpr int BM = kGemmConfigs[kConfig].bm, BN = kGemmConfigs[kConfig].bn;
  using S = GemmShape<BM, BN>;
  const int64_t grid = min(p.tiles, multiprocessors());
  return launch_early<hopper_gemm<T, BM, BN, true, kSmooth, false, ForwardParams>>(grid, S::kThreads, S::kBytes, stream,
                                                                                   p);
}

template <class T, bool kSmooth>
const char* dispatch(const ForwardParams& p, int config, void* stream) {
  switch (config) {
    case 0: return run<T, 0, kSmooth>(p, stream);
    case 1: return run<T, 1, kSmooth>(p, stream);
    case 2: return run<T, 2, kSmooth>(p, stream);
    case 3: return run<T, 3, kSmooth>(p, stream);
    case 4: return run<T, 4, kSmooth>(p, stream);
    default: return run<T, 5, kSmooth>(p, stream);
  }
}

}  // namespace

const char* launch_gemm(const ForwardParams& p, int config, DType dtype, void* stream) {
  if (p.activation > int(Activation::relu))
    return dtype == DType::bf16 ? dispatch<BFloat16, true>(p, config, stream) : dispatch<Half, true>(p, config, stream);
  return dtype == DType::bf16 ? dispatch<BFloat16, false>(p, config, stream) : dispatch<Half, false>(p, config, stream);
}

}  // namespace aeup
