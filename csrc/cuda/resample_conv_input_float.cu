// Resampling and convolution, input gradient, for float32.
#include "resample_conv_families.h"
#include "resample_conv_input.cuh"

namespace aeup {

const char* launch_resample_input_float(const ResampleConv& c, void* workspace, void* stream) {
  const auto start = [&](auto q) { return start_resample_input<decltype(q)>(c, workspace, stream); };
  return c.tf32 ? with_gemm_tile<float, false, false>(c.ci / c.groups, start)
                : with_gemm_tile<float, true, false>(c.ci / c.groups, start);
}

}  // namespace aeup
