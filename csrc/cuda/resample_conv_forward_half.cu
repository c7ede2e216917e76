// Resampling and convolution, forward, for float16 and bfloat16.
#include "resample_conv_families.h"
#include "resample_conv_forward.cuh"

namespace aeup {

const char* launch_resample_forward_half(const ResampleConv& c, void* workspace, void* stream) {
  const auto start = [&](auto t) {
    return with_gemm_tile<decltype(t), false, true>(
        c.co / c.groups, [&](auto q) { return start_resample_forward<decltype(q)>(c, workspace, stream); });
  };
  return c.dtype == DType::f16 ? start(Half()) : start(BFloat16());
}

}  // namespace aeup
