// The parts of the Hopper family, one file each.
#pragma once
#include <cuda.h>

#include "cuda/convolution.h"

namespace aeup {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A 16-bit tensor in device memory as a tensor map with boxes of 128-byte rows, 128-byte swizzle and zeros outside.
// Sizes innermost first; strides in elements, of dimensions 1 and up. Returns nullptr or an error.
const char* make_map(CUtensorMap* map, DType dtype, const void* data, int rank, const int64_t* size,
                     const int64_t* stride, const int* box);
// The same for any element of `bytes` bytes.
const char* make_map(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* data, int rank,
                     const int64_t* size, const int64_t* stride, const int* box);

struct GemmParams;
struct GemmConfig {
  int bm, bn;
};
constexpr GemmConfig kGemmConfigs[] = {{256, 128}, {128, 256}, {128, 128}, {256, 64}, {128, 64}, {256, 32}};
constexpr int kGemmConfigCount = 6;
const char* launch_gemm_forward(const GemmParams& p, int config, DType dtype, void* stream);
const char* launch_gemm_gradient(const GemmParams& p, int config, DType dtype, void* stream);

// Tiles for results in NCHW: bm channels and bn pixels.
constexpr GemmConfig kNchwConfigs[] = {{128, 128}, {64, 256}};
constexpr int kNchwConfigCount = 2;
const char* launch_gemm_nchw(const GemmParams& p, int config, int phases, bool forward, DType dtype, void* stream);

// Pixels of a tile: a box of at most `most` pixels (exactly, if `exact`) over n images of h x w, with few tiles.
struct Box {
  int n, h, w;
};
Box choose_box(int64_t n, int64_t h, int64_t w, int most, bool exact);

// Weight gradient. x [n, ih, iw, ci8] and grad [n, oh, ow, co8] channels-last with padded channels.
int64_t hopper_weight_gradient_workspace(const Convolution& c);
const char* hopper_weight_gradient(const Convolution& c, const void* x, const void* grad, void* workspace,
                                   void* stream);

// [n, c, pixels] -> [n, pixels, padded c], zeros in the padding; elements of 2 or 4 bytes. Or the way back,
// without the padding, of 2 bytes.
const char* to_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                             void* stream, int bytes = 2);
const char* from_channels_last(const void* from, void* to, int64_t n, int64_t c, int64_t pixels, int64_t padded,
                               void* stream);
// [rows, c] -> [rows, padded c].
const char* pad_channels(const void* from, void* to, int64_t rows, int64_t c, int64_t padded, void* stream,
                         int bytes = 2);
// [ci, co, taps] (contiguous) or [ci, taps, co] (channels-last) -> [taps, ci, padded co].
const char* pack_weight(const void* from, void* to, int64_t ci, int64_t co, int64_t taps, int64_t padded,
                        bool channels_last, void* stream);

// The weight with the phases as columns: [taps of a phase, ci, phases * co, padded to 8]; dilation 1, and a kernel that
// is a multiple of the stride.
const char* pack_phases(const Convolution& c, void* to, void* stream);

}  // namespace aeup
