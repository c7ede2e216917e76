// Resampling and convolution, forward, for float32: tf32 products, or three of them where tf32 is not allowed.
#include "resample_conv_families.h"
#include "resample_conv_forward.cuh"

namespace aeup {

const char* launch_resample_forward_float(const ResampleConv& c, void* workspace, void* stream) {
  const auto start = [&](auto q) { return start_resample_forward<decltype(q)>(c, workspace, stream); };
  return c.tf32 ? with_gemm_tile<float, false, true>(c.co / c.groups, start)
                : with_gemm_tile<float, true, true>(c.co / c.groups, start);
}

}  // namespace aeup
