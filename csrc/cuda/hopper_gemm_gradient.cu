#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"

namespace aeup {
namespace {

template <class T, int kConfig>
const char* run(const GemmParams& p, void* stream) {
  constexpr int BM = kGemmConfigs[kConfig].bm, BN = kGemmConfigs[kConfig].bn;
  using S = GemmShape<BM, BN>;
  const int64_t grid = p.tiles < multiprocessors() ? p.tiles : multiprocessors();
  return launch_early<hopper_gemm<T, BM, BN, false, false>>(grid, S::kThreads, S::kBytes, stream, p);
}

template <class T>
const char* dispatch(const GemmParams& p, int config, void* stream) {
  switch (config) {
    case 0: return run<T, 0>(p, stream);
    case 1: return run<T, 1>(p, stream);
    case 2: return run<T, 2>(p, stream);
    case 3: return run<T, 3>(p, stream);
    case 4: return run<T, 4>(p, stream);
    default: return run<T, 5>(p, stream);
  }
}

}  // namespace

const char* launch_gemm_gradient(const GemmParams& p, int config, DType dtype, void* stream) {
  return dtype == DType::bf16 ? dispatch<BFloat16>(p, config, stream) : dispatch<Half>(p, config, stream);
}

}  // namespace aeup
