// Batch normalisation with the activation after it, on the CPU: csrc/cpu/dispatch.cpp.
#pragma once
#include "cpu/parallel.h"
#include "norm.h"

namespace aeup {

AEUP_FOR_EACH_ISA(void batch_norm(const BatchNorm& b, ParallelFor parallel);
                  void batch_norm_backward(const BatchNorm& b, ParallelFor parallel);)
void batch_norm_cpu(const BatchNorm& b, ParallelFor parallel);
void batch_norm_backward_cpu(const BatchNorm& b, ParallelFor parallel);

}  // namespace aeup
