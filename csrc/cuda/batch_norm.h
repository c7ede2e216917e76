// Host entry points of batch normalisation with the activation after it.
#pragma once
#include "norm.h"

namespace aeup {

int64_t batch_norm_workspace(const BatchNorm& b);  // bytes, of either pass; 0 for an empty input
const char* launch_batch_norm(const BatchNorm& b, void* workspace, void* stream);
const char* launch_batch_norm_backward(const BatchNorm& b, void* workspace, void* stream);

}  // namespace aeup
