// The parts of the Hopper family for float32, one file each.
#pragma once
#include "cuda/hopper.h"

namespace aeup {

constexpr GemmConfig kFloatConfigs[] = {{256, 128}, {128, 256}, {128, 128}, {256, 64}, {128, 64}, {256, 32}};
constexpr int kFloatConfigCount = 6, kFirstStrictConfig = 2;  // strict has two accumulators: not the largest tiles
const char* launch_float_tf32(const GemmParams& p, int config, bool nchw, void* stream);
const char* launch_float_strict(const GemmParams& p, int config, bool nchw, void* stream);

// The weight [ci, co, taps] (contiguous) or [ci, taps, co] (channels-last) as rows of `pitch` elements along the
// summed channels: [taps, co, ci] for the forward, with `phases` [taps of a phase, phases * co, ci] (pack_phases'
// columns), [taps, ci, co] for the input gradient. Rounded to tf32; or `strict`: two planes, hi and lo, one after the
// other, each row's 32 channels in the order of strict_step. `pitch` is a multiple of 32; what is beyond the channels
// is zero.
const char* pack_float_forward(const Convolution& c, void* to, int64_t pitch, bool phases, bool strict, void* stream);
const char* pack_float_gradient(const Convolution& c, void* to, int64_t pitch, bool strict, void* stream);

}  // namespace aeup
