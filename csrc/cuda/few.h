// The parts of the family for few output channels, one file each. Plain C++.
#pragma once
#include "convolution.h"

namespace aeup {

// Bytes of shared memory of a block, at most.
int64_t few_forward_shared(const Convolution& c);
int64_t few_input_gradient_shared(const Convolution& c);
int64_t few_weight_gradient_shared(const Convolution& c);

const char* launch_few_forward(const Convolution& c, void* stream);
// The part of it that walks down wide images.
int64_t few_walk_shared(const Convolution& c);
const char* launch_few_walk(const Convolution& c, void* stream);

const char* launch_few_input_gradient(const Convolution& c, void* stream);

int64_t few_weight_gradient_workspace(const Convolution& c);
const char* launch_few_weight_gradient(const Convolution& c, void* workspace, void* stream);

}  // namespace aeup
