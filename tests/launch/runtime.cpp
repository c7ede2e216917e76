#include "runtime.h"

#include <cstring>

Runtime runtime;

extern "C" {
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** arguments) {
  runtime.config = *config;
  runtime.early = config->numAttrs == 1 && config->attrs[0].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                  config->attrs[0].val.programmaticStreamSerializationAllowed;
  for (int i = 0; i < runtime.arguments; ++i) std::memcpy(runtime.copied[i], arguments[i], runtime.bytes[i]);
  return runtime.launch;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return ++runtime.sets, runtime.set; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* f, const void*) {
  ++runtime.queries;
  std::memset(f, 0, sizeof(*f));
  f->ptxVersion = f->binaryVersion = runtime.device == 1 ? 80 : 90;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = runtime.device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return *value = device == 1 ? 100 : 132, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  return ++runtime.occupancies, *count = runtime.device == 1 ? 2 : 3, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* f, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, f, block, shared, 0);
}
const char* cudaGetErrorString(cudaError_t) { return "a CUDA error"; }
cudaError_t cudaGetLastError() { return ++runtime.cleared, cudaSuccess; }

// What the compiler's own code calls as the program starts,
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
// and what kernel<<<...>>> would: never here.
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
void __cudaLaunchKernel() {}
void __cudaGetKernel() {}
void __cudaInitModule() {}
void __cudaPushCallConfiguration() {}
void __cudaPopCallConfiguration() {}
}
