// The parts of the Hopper family, one file each.
#pragma once
#include <cuda.h>

#include "cuda/convolution.h"
#include "cuda/hopper_pack.h"

namespace aeup {

// A 16-bit tensor in device memory as a tensor map with boxes of 128-byte rows, 128-byte swizzle and zeros outside.
// Sizes innermost first; strides in elements, of dimensions 1 and up. Returns nullptr or an error.
const char* make_map(CUtensorMap* map, DType dtype, const void* data, int rank, const int64_t* size,
                     const int64_t* stride, const int* box);
// The same for any element of `bytes` bytes.
const char* make_map(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* data, int rank,
                     const int64_t* size, const int64_t* stride, const int* box);

// The pixels of each phase of a gradient in memory [n, oh, ow, channels], row a and column b of the stride's in
// maps[a * sw + b]. A phase without pixels has the first one's map: no tap within the gradient asks for it.
const char* map_phases(CUtensorMap* maps, CUtensorMapDataType type, int bytes, const void* grad, const Convolution& c,
                       int64_t channels, const int* box);
inline CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// hopper_gemm.cuh. The forward reads the source through one map, the input gradient through one for each phase.
constexpr int kGemmMaps = 16, kGemmTaps = 256 + 1, kGemmGroups = 64;
template <int kMaps, int kGroups>
struct GemmParams;
using ForwardParams = GemmParams<1, kGemmGroups>;
template <int kMaps>
using GradientParams = GemmParams<kMaps, 1>;
using FloatParams = GemmParams<kGemmMaps, kGemmGroups>;
struct GemmConfig {
  int bm, bn;
};
constexpr GemmConfig kGemmConfigs[] = {{256, 128}, {128, 256}, {128, 128}, {256, 64}, {128, 64}, {256, 32}};
constexpr int kGemmConfigCount = 6;
const char* launch_gemm(const ForwardParams& p, int config, DType dtype, void* stream);
template <int kMaps>  // 4 or kGemmMaps
const char* launch_gemm(const GradientParams<kMaps>& p, int config, DType dtype, void* stream);

// The activations of the kernels' short epilogue.
inline bool is_bound(Activation a) { return a <= Activation::relu; }
// Whether the input gradient leaves float32 sums of ranges for add_ranges. Other activations take that way: the kernel
// would be longer for all calls, or there twice.
inline bool has_partial(int splits, Activation a) { return splits > 1 || !is_bound(a); }
// The sums of ranges, float32 [splits, n, ih, iw, ci8], added in order, with bias and activation.
const char* add_ranges(const Convolution& c, const float* partial, int splits, void* stream);

// Tiles for results in NCHW: bm channels and bn pixels, `columns` of them in a product.
struct NchwConfig {
  int bm, bn, columns;
};
constexpr NchwConfig kNchwConfigs[] = {{128, 256, 256}, {128, 128, 128}, {64, 256, 128}};
constexpr int kNchwConfigCount = 3, kNchwPlainConfig = 0;  // the latter only for activations that are bounds
const char* launch_gemm_nchw(const ForwardParams& p, int config, int phases, DType dtype, void* stream);
template <int kMaps>  // 4 or kGemmMaps
const char* launch_gemm_nchw(const GradientParams<kMaps>& p, int config, DType dtype, void* stream);

// Pixels of a tile: a box of at most `most` pixels (exactly, if `exact`) over n images of h x w, with few tiles.
struct Box {
  int n, h, w;
};
Box choose_box(int64_t n, int64_t h, int64_t w, int most, bool exact);

// Weight gradient. x [n, ih, iw, ci8] and grad [n, oh, ow, co8] channels-last with padded channels.
int64_t hopper_weight_gradient_workspace(const Convolution& c);
const char* hopper_weight_gradient(const Convolution& c, const void* x, const void* grad, void* workspace,
                                   void* stream);

}  // namespace aeup
