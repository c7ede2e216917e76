// The parts of the generic family, one file each. Plain C++.
#pragma once
#include "convolution.h"

namespace aeup {

// conv_gemm.cu: forward and input gradient as an implicit GEMM by phases on fused multiply-adds.
int64_t conv_gemm_workspace(const Convolution& c, Pass pass);
const char* launch_conv_gemm(const Convolution& c, Pass pass, void* workspace, void* stream);

// conv_weight.cu: the weight gradient as a GEMM over pixels, in two stages.
int64_t conv_weight_workspace(const Convolution& c);
const char* launch_conv_weight(const Convolution& c, void* workspace, void* stream);

// conv_direct.cu: few channels per group, depthwise above all. Every pass.
bool conv_direct_serves(const Convolution& c, Pass pass);
int64_t conv_direct_workspace(const Convolution& c, Pass pass);
const char* launch_conv_direct(const Convolution& c, Pass pass, void* workspace, void* stream);

}  // namespace aeup
