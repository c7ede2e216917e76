// The fast gathered backward kernels of 2-D interpolation (csrc/cuda/backward*.cu). Plain C++: no CUDA, no torch
// header.
#pragma once

#include "resample.h"

namespace aeup::cuda {

// Name of the kernel that serves p's backward, or nullptr; then *why_not is one static sentence with the reason.
// Asks no device and launches nothing.
const char* backward_fast_kernel(const Problem& p, const char** why_not);

// Runs that kernel on stream (a cudaStream_t) and the current device. nullptr on success, else the error's text.
const char* launch_backward_fast(const Problem& p, void* stream);

}  // namespace aeup::cuda
