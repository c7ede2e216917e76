// Host entry points of group normalisation with the activation after it.
#pragma once
#include "norm.h"

namespace aeup {

int64_t group_norm_workspace(const GroupNorm& g);  // bytes, of either pass; 0 for an empty input
const char* launch_group_norm(const GroupNorm& g, void* workspace, void* stream);
const char* launch_group_norm_backward(const GroupNorm& g, void* workspace, void* stream);

}  // namespace aeup
