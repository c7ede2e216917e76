// Host entry points of the CUDA kernels of convolutions. Plain C++: no CUDA and no torch header.
#pragma once
#include <string>

#include "convolution.h"

namespace aeup {

// The compute capability of the current device, asked for once per device. Returns nullptr or the text of the error.
const char* device_capability(int* major, int* minor);

// The family `name`, or the first that serves where `name` is empty; nullptr where none does. `why` gets one
// "family: reason" for each that was asked and refused, joined by "; ".
const ConvolutionFamily* choose_convolution(const Convolution& c, Pass pass, const std::string& name, int major,
                                            int minor, std::string* why);

// The gradient before the activation (of the same sizes as grad), and the bias's. `output` is what the activation gave
// for relu, leaky_relu, tanh and sigmoid, and what it got for silu and gelu.
struct EpilogueGradient {
  int64_t n, c, pixels;  // grad, output and before: [n, c, pixels], or [n, pixels, c] with channels_last
  DType dtype;
  bool channels_last;
  Activation activation;
  double slope;
  const void *grad, *output;  // output: null where activation is none
  void *before, *bias;        // before: null where activation is none; bias [c]: null where it is not wanted
  // Not 0: grad and output are [n, c, pixels], and before, also without an activation, is rows of this many bytes
  // [n, pixels][channels, then zeros], each at a multiple of 16 bytes; elements of 2 or 4 bytes.
  int64_t pitch;
};
int64_t epilogue_gradient_workspace(const EpilogueGradient& e);
const char* launch_epilogue_gradient(const EpilogueGradient& e, void* workspace, void* stream);

}  // namespace aeup
