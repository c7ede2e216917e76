// Host entry points of the CUDA kernels. Plain C++: no CUDA and no torch header.
#pragma once
#include "resample.h"

namespace aeup {

// Runs the forward or the backward map of `p` on the current device, in `stream` (a cudaStream_t). `workspace` is
// device memory of at least interpolate_cuda_workspace(p) bytes, 16-byte aligned (may be null for 0 bytes). Does not
// synchronise and allocates nothing. Returns nullptr, or the text of the error.
const char* launch_interpolate_cuda(const Problem& p, void* workspace, void* stream);

int64_t interpolate_cuda_workspace(const Problem& p);

// Name of the kernel that launch_interpolate_cuda takes; "none" for an empty output, nullptr where nothing serves `p`.
const char* interpolate_cuda_kernel(const Problem& p);

// Why the fast kernels of this direction do not serve `p`; nullptr where they do.
const char* interpolate_cuda_refusal(const Problem& p);

}  // namespace aeup
