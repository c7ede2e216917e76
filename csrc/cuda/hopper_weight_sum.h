// The second stage of the weight gradient on Hopper. Plain C++.
#pragma once
#include "convolution.h"

namespace aeup {

// Adds the partial sums in fixed order: [splits, ci, taps, co] float32, or c.dtype if `rounded` (one split) -> c.result
// in the weight's layout.
const char* hopper_weight_sum(const Convolution& c, const void* partial, bool rounded, int splits, void* stream);

}  // namespace aeup
