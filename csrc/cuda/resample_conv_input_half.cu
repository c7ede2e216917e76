// Resampling and convolution, input gradient, for float16 and bfloat16.
#include "resample_conv_families.h"
#include "resample_conv_input.cuh"

namespace aeup {

const char* launch_resample_input_half(const ResampleConv& c, void* workspace, void* stream) {
  const auto start = [&](auto t) {
    return with_gemm_tile<decltype(t), false, false>(
        c.ci / c.groups, [&](auto q) { return start_resample_input<decltype(q)>(c, workspace, stream); });
  };
  return c.dtype == DType::f16 ? start(Half()) : start(BFloat16());
}

}  // namespace aeup
