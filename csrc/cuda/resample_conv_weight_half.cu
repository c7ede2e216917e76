// Resampling and convolution, weight gradient, for float16 and bfloat16.
#include "resample_conv_families.h"
#include "resample_conv_weight.cuh"

namespace aeup {

const char* launch_resample_weight_half(const ResampleConv& c, void* workspace, void* stream) {
  if (c.dtype == DType::f16) return start_resample_weight<Half, false>(c, workspace, stream);
  return start_resample_weight<BFloat16, false>(c, workspace, stream);
}

}  // namespace aeup
