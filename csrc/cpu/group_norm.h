// Group normalisation with the activation after it, on the CPU: csrc/cpu/dispatch.cpp.
#pragma once
#include "cpu/parallel.h"
#include "norm.h"

namespace aeup {

AEUP_FOR_EACH_ISA(void group_norm(const GroupNorm& g, ParallelFor parallel);
                  void group_norm_backward(const GroupNorm& g, ParallelFor parallel);)
void group_norm_cpu(const GroupNorm& g, ParallelFor parallel);
void group_norm_backward_cpu(const GroupNorm& g, ParallelFor parallel);

}  // namespace aeup
