// The launchers behind resample_conv.cu. Those on tensor cores (half: float16 and bfloat16; float: float32) take the
// weight packed in the workspace where packs_weight() says so, or have it for partial sums.
#pragma once
#include "resample_conv.h"

namespace aeup {

const char* launch_resample_forward_half(const ResampleConv& c, void* workspace, void* stream);
const char* launch_resample_forward_float(const ResampleConv& c, void* workspace, void* stream);
const char* launch_resample_input_half(const ResampleConv& c, void* workspace, void* stream);
const char* launch_resample_input_float(const ResampleConv& c, void* workspace, void* stream);
const char* launch_resample_weight_half(const ResampleConv& c, void* workspace, void* stream);
const char* launch_resample_weight_float(const ResampleConv& c, void* workspace, void* stream);

// resample_conv_direct.cu: every dtype, without tensor cores.
const char* launch_resample_direct(const ResampleConv& c, Pass pass, void* workspace, void* stream);
int64_t resample_direct_workspace(const ResampleConv& c, Pass pass);

}  // namespace aeup
