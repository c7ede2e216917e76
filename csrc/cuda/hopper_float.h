// The parts of the Hopper family for float32, one file each.
#pragma once
#include "cuda/hopper.h"

namespace aeup {

constexpr GemmConfig kFloatConfigs[] = {{256, 128}, {128, 256}, {128, 128}, {256, 64}, {128, 64}, {256, 32}};
constexpr int kFloatConfigCount = 6, kFirstStrictConfig = 2;  // strict has two accumulators: not the largest tiles
const char* launch_float_tf32(const FloatParams& p, int config, bool nchw, void* stream);
const char* launch_float_strict(const FloatParams& p, int config, bool nchw, void* stream);

// Weight gradient. grad [n, oh, ow, co4] channels-last with padded channels; c.input in either layout.
int64_t float_weight_gradient_workspace(const Convolution& c);
const char* float_weight_gradient(const Convolution& c, const void* grad, void* workspace, void* stream);

}  // namespace aeup
