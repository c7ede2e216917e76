// Which family of kernels serves a convolution.
#include "common.cuh"
#include "conv_launch.h"

namespace aeup {
namespace {

const ConvolutionFamily* const kFamilies[] = {&kHopperConvolution, &kHopperFloatConvolution, &kFewConvolution,
                                              &kGenericConvolution};

}  // namespace

const char* device_capability(int* major, int* minor) {
#ifdef AEUP_EMULATE
  *major = 9, *minor = 0;
#else
  static std::atomic<int> known[64];  // 16 * major + minor
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (device < 64) {
    const int both = known[device].load(std::memory_order_relaxed);
    if (both) return *major = both / 16, *minor = both % 16, nullptr;
  }
  e = cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (device < 64) known[device].store(16 * *major + *minor, std::memory_order_relaxed);
#endif
  return nullptr;
}

const ConvolutionFamily* choose_convolution(const Convolution& c, Pass pass, const std::string& name, int major,
                                            int minor, std::string* why) {
  bool known = name.empty();
  for (const ConvolutionFamily* family : kFamilies) {
    if (!name.empty() && name != family->name) continue;
    known = true;
    const char* reason = family->refuses(c, pass, major, minor);
    if (!reason) return family;
    if (why) why->append(why->empty() ? "" : "; ").append(family->name).append(": ").append(reason);
  }
  if (!known && why) {
    *why = "there is no family '" + name + "'; the families are";
    for (const ConvolutionFamily* family : kFamilies) why->append(" ").append(family->name);
  }
  return nullptr;
}

}  // namespace aeup
