// The matrix of a convolution's taps, on the CPU: a transposed convolution and its gradients are matrix products with
// it (Chellapilla, Puri and Simard, 2006, "High performance convolutional neural networks for document processing").
// csrc/cpu/dispatch.cpp chooses the instruction set.
#pragma once
#include "cpu/parallel.h"
#include "resample.h"

namespace aeup {

// Pixel (iy, ix) of the small side touches pixel (iy * sh - ph + a * dh, ix * sw - pw + b * dw) of the large one by tap
// (a, b), where there is one.
struct Taps {
  int64_t n, c, h, w;  // the large side: image [n, c, h, w], or [n, h, w, c] with channels_last
  int64_t ih, iw, kh, kw, sh, sw, ph, pw, dh, dw;
  bool channels_last;  // columns: [c, kh, kw, n, ih, iw], or [n, ih, iw, kh, kw, c]
  DType dtype;         // f32 or bf16
  void *image, *columns;
  const void* bias;  // [c], or null
};

// columns = image, tap by tap; zeros where the tap is outside. And its adjoint: image = bias + the sum over taps.
AEUP_FOR_EACH_ISA(void to_columns(const Taps& t, ParallelFor parallel);
                  void from_columns(const Taps& t, ParallelFor parallel);)
void to_columns_cpu(const Taps& t, ParallelFor parallel);
void from_columns_cpu(const Taps& t, ParallelFor parallel);

}  // namespace aeup
