// One transposed convolution and its two gradients: sizes, layouts and the map of taps. Shared by host and device; no
// CUDA and no torch header.
//
// Along one axis, output o takes kernel index k of input i exactly when o + p = s*i + d*k (design: Dumoulin & Visin,
// arXiv 1603.07285, relationship 14). Outputs with the same (o + p) mod s form one phase, which uses only the k with
// d*k = o + p (mod s): a dense convolution of stride 1, so that no zero is multiplied.
#pragma once
#include <cstdint>

#include "fold.h"
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
  Activation activation;      // not of the weight gradient
  double slope;               // of leaky_relu
  // Where they have a kernel, the weight (and its gradient) is that of a convolution after nearest upsampling:
  // [co, ci / groups, fold_h.kernel, fold_w.kernel], contiguous or channels-last. Everything else here is of the
  // transposed convolution that it folds to; kernels add the weight up while they read it.
  Fold fold_h, fold_w;

  // Forward reads input, weight and bias (may be null) and writes result [n, co, oh, ow]. The input gradient reads
  // grad (of the output) and weight and writes [n, ci, ih, iw]; with a bias [ci] and an activation it is the
  // convolution of `grad` with that weight. The weight gradient reads input and grad and writes [ci, co / groups, kh,
  // kw] (folded: the convolution's weight) in the layout weight_channels_last.
  const void *input, *weight, *bias, *grad;
  const void* shared_grad;  // what the family's `share` made of grad for both gradients; null: each for itself
  void* result;

  bool folded() const { return fold_h.kernel != 0; }
  // From n, ci, co, ih, iw and groups: nearest upsampling by the scales, then a convolution of this kernel and padding.
  void fold(int64_t kernel_h, int64_t kernel_w, int64_t scale_h, int64_t scale_w, int64_t padding_h,
            int64_t padding_w) {
    fold_h = fold_of(kernel_h, scale_h, padding_h), fold_w = fold_of(kernel_w, scale_w, padding_w);
    kh = fold_h.taps(), kw = fold_w.taps();
    sh = int(scale_h), sw = int(scale_w);
    ph = fold_h.padding(int(padding_h)), pw = fold_w.padding(int(padding_w));
    dh = dw = 1;
    oh = ih * scale_h + 2 * padding_h - kernel_h + 1, ow = iw * scale_w + 2 * padding_w - kernel_w + 1;
  }
};

}  // namespace aeup
