// A stand-in for CUDA's runtime: what was asked of it last, and what it shall answer.
#pragma once
#include <cuda_runtime.h>

struct Runtime {
  int device;                               // current; 1 is a small GPU of an older kind
  cudaError_t launch, set;                  // what the calls give
  int cleared, sets, queries, occupancies;  // calls
  cudaLaunchConfig_t config;
  bool early;
  int arguments;
  size_t bytes[3];  // of the arguments to copy
  unsigned char copied[3][8192];
};
extern Runtime runtime;
