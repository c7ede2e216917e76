// What the Hopper kernels ask of the CUDA runtime, for the host: the entry point that encodes tensor maps.
#pragma once
#include <cstring>

#include "cuda.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled")) return *result = cudaDriverEntryPointSymbolNotFound, cudaSuccess;
  *f = reinterpret_cast<void*>(&aeup::emu::encode_map);
  return *result = cudaDriverEntryPointSuccess, cudaSuccess;
}
