#include "cuda/conv_common.cuh"
#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"

namespace aeup {
namespace {

template <class T, int kConfig, class P>
const char* run(const P& p, void* stream) {
  constexpr int BM = kGemmConfigs[kConfig].bm, BN = kGemmConfigs[kConfig].bn;
  using S = GemmShape<BM, BN>;
  const int64_t grid = min(p.tiles, multiprocessors());
  return has_partial(p.splits, Activation(p.activation))
             ? launch_early<hopper_gemm<T, BM, BN, false, false, true, P>>(grid, S::kThreads, S::kBytes, stream, p)
             : launch_early<hopper_gemm<T, BM, BN, false, false, false, P>>(grid, S::kThreads, S::kBytes, stream, p);
}

template <class T, class P>
const char* dispatch(const P& p, int config, void* stream) {
  switch (config) {
    case 0: return run<T, 0>(p, stream);
    case 1: return run<T, 1>(p, stream);
    case 2: return run<T, 2>(p, stream);
    case 3: return run<T, 3>(p, stream);
    case 4: return run<T, 4>(p, stream);
    default: return run<T, 5>(p, stream);
  }
}

template <class T>
struct Epilogue {
  const T* bias;  // of the channels, or null
  Activation activation;
  float slope;
};
template <class T>
Epilogue<T> epilogue_of(const Convolution& c) {
  return {static_cast<const T*>(c.bias), c.activation, float(c.slope)};
}

// partial [splits, images, pixels, pitch] -> result [images, pixels, c], or `turned` [images, c, pixels]: tiles of
// 32 x 32.
template <class T>
__global__ void __launch_bounds__(256) add(const float* partial, T* result, int splits, int64_t images, int64_t pixels,
                                           int64_t pitch, int64_t c, bool turned, Epilogue<T> epilogue) {
  let_next_start();
  __shared__ float tile[32][33];
  const Split by_c = split(blockIdx.x, (c + 31) / 32), at = split(by_c.quotient, (pixels + 31) / 32);
  const int64_t c0 = by_c.remainder * 32, p0 = at.remainder * 32, first = at.quotient * pixels;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    const int64_t pixel = p0 + y + i, channel = c0 + x;
    float sum = 0;
    if (pixel < pixels && channel < c) {
#pragma unroll 4
      for (int s = 0; s < splits; ++s)
        sum += load_one(partial + ((s * images * pixels) + first + pixel) * pitch + channel);
      if (epilogue.bias) sum += load_one(epilogue.bias + channel);
      sum = activate(sum, epilogue.activation, epilogue.slope);
      if (!turned) store_one(result + (first + pixel) * c + channel, sum);
    }
    tile[y + i][x] = sum;
  }
  if (!turned) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    const int64_t pixel = p0 + x, channel = c0 + y + i;
    if (pixel < pixels && channel < c) store_one(result + first * c + channel * pixels + pixel, tile[x][y + i]);
  }
}

template <class T>
const char* add_of(const Convolution& c, const float* partial, int splits, bool turned, void* stream) {
  const int64_t images = turned ? c.n : 1, pixels = c.n * c.ih * c.iw / images;
  const int64_t blocks = images * ceil_div(pixels, 32) * ceil_div(c.ci, 32);
  AEUP_LAUNCH(add<T>, blocks, 256, 0, stream, partial, static_cast<T*>(c.result), splits, images, pixels,
              round_up(c.ci, 8), c.ci, turned, epilogue_of<T>(c));
  return nullptr;
}

}  // namespace

const char* add_ranges(const Convolution& c, const float* partial, int splits, void* stream) {
  const bool turned = !c.channels_last && c.ih * c.iw > 1;
  return c.dtype == DType::bf16 ? add_of<BFloat16>(c, partial, splits, turned, stream)
                                : add_of<Half>(c, partial, splits, turned, stream);
}

template <int kMaps>
const char* launch_gemm(const GradientParams<kMaps>& p, int config, DType dtype, void* stream) {
  return dtype == DType::bf16 ? dispatch<BFloat16>(p, config, stream) : dispatch<Half>(p, config, stream);
}
template const char* launch_gemm(const GradientParams<4>&, int, DType, void*);
template const char* launch_gemm(const GradientParams<kGemmMaps>&, int, DType, void*);

}  // namespace aeup
