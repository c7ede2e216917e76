// The families of CUDA kernels for Convolution. Plain C++: no CUDA and no torch header. Each family has one predicate
// per pass that says why not; convolution.cu takes the first that serves.
#pragma once
#include "../convolution.h"

namespace aeup {

// A family: `refuses` gives a reason or nullptr (`major`.`minor` is the device's compute capability); `workspace` the
// bytes of device memory that `launch` wants, 256-byte aligned; `launch` runs on the current device in `stream` (a
// cudaStream_t), does not synchronise and allocates nothing, and returns nullptr or the text of the error.
struct ConvolutionFamily {
  const char* name;
  const char* (*refuses)(const Convolution& c, Pass pass, int major, int minor);
  int64_t (*workspace)(const Convolution& c, Pass pass);
  const char* (*launch)(const Convolution& c, Pass pass, void* workspace, void* stream);
  // Where the gradients bring grad into channels-last rows, with zeros up to whole 16 bytes: the bytes of them all (0:
  // they take it as it is), and what makes them. From an NCHW grad the epilogue's gradient writes them at once.
  int64_t (*shared)(const Convolution& c) = nullptr;
  const char* (*share)(const Convolution& c, void* to, void* stream) = nullptr;
};

extern const ConvolutionFamily kHopperConvolution;       // hopper_*.cu: implicit GEMM on wgmma with tensor maps, sm_90a
extern const ConvolutionFamily kHopperFloatConvolution;  // hopper_float_*.cu: the same for float32, by tf32 products
extern const ConvolutionFamily kFewConvolution;          // few_*.cu: 1 to 4 output channels, bound by memory
extern const ConvolutionFamily kGenericConvolution;      // conv_generic.cu: every argument and dtype

}  // namespace aeup
