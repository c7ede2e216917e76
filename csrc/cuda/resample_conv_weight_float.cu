// Resampling and convolution, weight gradient, for float32.
#include "resample_conv_families.h"
#include "resample_conv_weight.cuh"

namespace aeup {

const char* launch_resample_weight_float(const ResampleConv& c, void* workspace, void* stream) {
  return c.tf32 ? start_resample_weight<float, false>(c, workspace, stream)
                : start_resample_weight<float, true>(c, workspace, stream);
}

}  // namespace aeup
