// Kernel families behind launch_interpolate_cuda. For each: `refuses` says why it does not serve a problem (nullptr if
// it does), `kernel` names the kernel for an accepted problem, `launch` runs it and returns nullptr or an error text.
// The fast backward kernels have their own header, backward.h.
#pragma once
#include "resample.h"

namespace aeup {

// csrc/cuda/forward*.cu. No workspace.
const char* refuses_forward_fast(const Problem& p);
const char* forward_fast_kernel(const Problem& p);
const char* launch_forward_fast(const Problem& p, void* stream);

// csrc/cuda/generic.cu: every valid problem.
const char* generic_kernel(const Problem& p);
int64_t generic_workspace(const Problem& p);
const char* launch_generic(const Problem& p, void* workspace, void* stream);

}  // namespace aeup
