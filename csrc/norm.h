// One batch or group normalisation with the activation after it, or its gradients: sizes, layout, operands. Shared by
// the CPU and CUDA. No CUDA and no torch header.
#pragma once
#include "convolution.h"

namespace aeup {

// output = activation(weight * (input - mean) * invstd + bias). weight, bias and their gradients: [c]; mean and invstd
// are float, double where the tensors are; the arrays [c] too, or with `narrow` all of the tensors' dtype.
struct AnyNorm {
  int64_t n, c, pixels;  // input, output, their gradients: [n, c, pixels], or [n, pixels, c] with channels_last
  DType dtype;
  bool channels_last;
  bool narrow;
  Activation activation;
  double slope, eps;
  int blocks;  // CUDA: that run at once; 0: as the device has it

  const void *input, *weight, *bias;  // weight, bias: may be null (1, 0)
  void *mean, *invstd;                // the forward writes them, the backward reads them
  void* output;                       // forward
  // Backward: gradients that are not wanted are null.
  const void* grad;
  void *input_grad, *weight_grad, *bias_grad;

  // One channel, or one pixel per image, is both layouts.
  bool channels_adjacent() const { return c > 1 && (channels_last || pixels == 1); }
};

// Statistics per channel: mean, invstd [c].
struct BatchNorm : AnyNorm {
  bool training;  // the statistics are the input's, else the running ones
  double momentum;
  // Forward. Running statistics [c] and counter (of batches): read, and in training what they become, at the same
  // address or another. They and the counter may be null in training; outside it only the counter.
  const void *running_mean, *running_var;
  void *next_mean, *next_var;
  const int64_t* counter;
  int64_t* next_counter;
};

// Statistics per sample and group of c / groups adjacent channels: mean, invstd [n, groups].
struct GroupNorm : AnyNorm {
  int64_t groups;
};

}  // namespace aeup
