// Resampling followed by a convolution of stride 1, as one map: the resampled tile is made on chip, inside the
// convolution. Plain C++: no CUDA and no torch header.
#pragma once
#include "../convolution.h"

namespace aeup {

struct ResampleConv {
  // input [n, ci, ih, iw], resampled to [n, ci, uh, uw] (never in memory), output [n, co, oh, ow] with
  // oh = uh + 2 ph - kh + 1.
  int64_t n, ci, co, ih, iw, uh, uw, oh, ow;
  int kh, kw, ph, pw, groups;
  Mode mode;
  bool align_corners;
  double scale_h, scale_w;    // as in Problem
  DType dtype;                // of all tensors
  bool channels_last;         // of input, output and their gradients; dense
  bool weight_channels_last;  // weight [co, ci / groups, kh, kw]: dense, contiguous or channels-last
  bool tf32;                  // float32 may be multiplied in tf32
  Activation activation;      // forward only
  double slope;               // of leaky_relu

  // As in Convolution.
  const void *input, *weight, *bias, *grad;
  void* result;
};

// Why no kernel serves this pass on a device of that capability; nullptr where one does.
const char* refuses_resample_conv(const ResampleConv& c, Pass pass, int major, int minor);
// Name of the kernel that launch_resample_conv takes.
const char* resample_conv_label(const ResampleConv& c, Pass pass);
// Bytes of device memory that the launch wants, 256-byte aligned.
int64_t resample_conv_workspace(const ResampleConv& c, Pass pass);
// Runs on the current device in `stream` (a cudaStream_t), does not synchronise and allocates nothing. Returns nullptr
// or the text of the error.
const char* launch_resample_conv(const ResampleConv& c, Pass pass, void* workspace, void* stream);

}  // namespace aeup
