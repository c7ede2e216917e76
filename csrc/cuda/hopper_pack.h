// What stands in front of and behind the tensor-map kernels: other layouts of pixels, packed weights. Plain C++.
#pragma once
#include "convolution.h"

namespace aeup {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// [n, c, pixels] -> [n, pixels, padded c], zeros in the padding; elements of 2 or 4 bytes. Or the way back,
// without the padding, of 2 bytes.
const char* to_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                             void* stream, int bytes = 2);
const char* from_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                               void* stream);
// [rows, c] -> [rows, padded c].
const char* pad_channels(const void* from, void* to, int64_t rows, int64_t c, int64_t padded, void* stream,
                         int bytes = 2);

// The weight of 16-bit elements, one group; folded where it must be:
// [taps, ci, co padded to 8];
const char* pack_weight(const Convolution& c, void* to, void* stream);
// or with the phases as columns: [taps of a phase, ci, phases * co, padded to 8]; dilation 1, and a kernel that is a
// multiple of the stride.
const char* pack_phases(const Convolution& c, void* to, void* stream);

// The float32 weight, folded where it must be, as rows of `pitch` elements along the summed channels: [taps, co, ci]
// for the forward, with `phases` [taps of a phase, phases * co, ci] (pack_phases' columns), [taps, ci, co] for the
// input gradient. Rounded to tf32; or `strict`: two planes, hi and lo, one after the other, each row's 32 channels in
// the order of strict_step (float_position). `pitch` is a multiple of 32; what is beyond the channels is zero.
const char* pack_float_forward(const Convolution& c, void* to, int64_t pitch, bool phases, bool strict, void* stream);
const char* pack_float_gradient(const Convolution& c, void* to, int64_t pitch, bool strict, void* stream);

}  // namespace aeup
