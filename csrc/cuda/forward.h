// Host entry points of the fast forward kernels, one file each; called by forward.cu with problems they serve.
#pragma once
#include "resample.h"

namespace aeup {

const char* launch_channels(const Problem& p, int bytes,
                            void* stream);  // NHWC, vectors of channels: forward_channels.cu
const char* launch_double(const Problem& p, int elements, void* stream);  // float64: forward_double.cu
const char* launch_rgb(const Problem& p, void* stream);                   // NHWC, 3 channels, x2: forward_polyphase.cu
const char* launch_polyphase(const Problem& p, int scale, void* stream);  // NCHW x2, x4, x8: forward_polyphase.cu
const char* launch_window(const Problem& p, int elements, void* stream);  // NCHW: forward_window.cu
const char* launch_gather(const Problem& p, int elements, void* stream);  // flat rows: forward_gather.cu
const char* launch_nearest_channels(const Problem& p, int bytes, void* stream);  // forward_nearest.cu
const char* launch_nearest_integer(const Problem& p, int scale, void* stream);
const char* launch_nearest_gather(const Problem& p, int bytes, void* stream);

}  // namespace aeup
