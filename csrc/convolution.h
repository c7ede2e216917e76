// One transposed convolution and its two gradients: sizes, layouts and the map of taps. Shared by host and device; no
// CUDA and no torch header.
//
// Along one axis, output o takes kernel index k of input i exactly when o + p = s*i + d*k (design: Dumoulin & Visin,
// arXiv 1603.07285, relationship 14). Outputs with the same (o + p) mod s form one phase, which uses only the k with
// d*k = o + p (mod s): a dense convolution of stride 1, so that no zero is multiplied.
#pragma once
#include <cstdint>

#include "resample.h"

namespace aeup {

enum class Pass : int { forward, input_gradient, weight_gradient };
enum class Activation : int { none, relu, leaky_relu, silu, gelu, tanh, sigmoid };

struct Convolution {
  int64_t n, ci, co, ih, iw, oh, ow;  // input [n, ci, ih, iw], output [n, co, oh, ow]
  int kh, kw, sh, sw, ph, pw, dh, dw, groups;
  DType dtype;                // of all tensors
  bool channels_last;         // of input, output and their gradients; dense
  bool weight_channels_last;  // weight [ci, co / groups, kh, kw]: dense, contiguous or channels-last
  bool tf32;                  // float32 may be multiplied in tf32
  Activation activation;      // forward only
  float slope;                // of leaky_relu

  // Forward reads input, weight and bias (may be null) and writes result [n, co, oh, ow]. The input gradient reads
  // grad (of the output) and weight and writes [n, ci, ih, iw]; the weight gradient reads input and grad and writes
  // [ci, co / groups, kh, kw] in the layout weight_channels_last.
  const void *input, *weight, *bias, *grad;
  void* result;
};

}  // namespace aeup
