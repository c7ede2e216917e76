// The weight of the float32 family: rounded, split and laid out along the summed channels.
#include "cuda/float_pack.cuh"
#include "cuda/fold.h"
#include "cuda/hopper_pack.h"

namespace aeup {
namespace {

constexpr int kTile = 32, kThreads = 256;

struct Columns {  // row (y * kw + x) * co + c of the source: its place in [taps of a phase, phases, co]
  int co, kh, kw, sh, sw, ph, pw;  // sh = sw = 1: [taps, co]
};

// from [ci, rows], rows = co * taps in either order -> to [rows in their places, pitch].
template <bool kStrict>
__global__ void __launch_bounds__(kThreads)
    pack_rows(const float* from, float* to, int ci, int rows, int pitch, int row_tiles, bool channels_last, Columns k) {
  __shared__ float tile[kTile][kTile + 1];
  const int r0 = blockIdx.x % row_tiles * kTile, i0 = blockIdx.x / row_tiles * kTile;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
#pragma unroll
  for (int e = 0; e < kTile; e += kThreads / 32) {
    const int i = i0 + y + e, r = r0 + x;
    tile[y + e][x] = i < ci && r < rows ? load_one(from + int64_t(i) * rows + r) : 0.f;
  }
  __syncthreads();
  const int64_t plane = int64_t(rows) * pitch;
#pragma unroll
  for (int e = 0; e < kTile; e += kThreads / 32) {
    const int r = r0 + y + e;
    if (r >= rows) break;
    const int taps = k.kh * k.kw, tap = channels_last ? r / k.co : r % taps, c = channels_last ? r % k.co : r / taps;
    const int kh = tap / k.kw, kw = tap % k.kw;
    // Output phase q takes the kernel indices that are q + p (mod s), the smallest first.
    const int qh = ((kh - k.ph) % k.sh + k.sh) % k.sh, qw = ((kw - k.pw) % k.sw + k.sw) % k.sw;
    const int step = kh / k.sh * (k.kw / k.sw) + kw / k.sw, row = (step * k.sh * k.sw + qh * k.sw + qw) * k.co + c;
    store_split<kStrict>(to, plane, int64_t(row) * pitch + (kStrict ? i0 + float_position(x) : i0 + x), tile[x][y + e]);
  }
}

// A block packs 64 output channels of one input channel, all taps: -> to [taps, ci, pitch].
template <bool kStrict>
__global__ void __launch_bounds__(kThreads)
    pack_lines(const float* from, float* to, int ci, int co, int taps, int pitch, bool channels_last) {
  AEUP_DYNAMIC_SHARED(float, line);  // [64 * taps]
  const int i = blockIdx.x, c0 = blockIdx.y * 64, count = co - c0 < 64 ? co - c0 : 64;
  const int wide = pitch - c0 < 64 ? pitch - c0 : 64;
  const int64_t plane = int64_t(taps) * ci * pitch;
  if (!channels_last) {
    const float* source = from + (int64_t(i) * co + c0) * taps;
    for (int e = threadIdx.x; e < count * taps; e += kThreads) line[e] = load_one(source + e);
    __syncthreads();
  }
  for (int e = threadIdx.x; e < wide * taps; e += kThreads) {
    const int tap = e / wide, c = e % wide;
    const float v = c >= count      ? 0.f
                    : channels_last ? load_one(from + (int64_t(i) * taps + tap) * co + c0 + c)
                                    : line[c * taps + tap];
    store_split<kStrict>(to, plane, (int64_t(tap) * ci + i) * pitch + c0 + (kStrict ? float_position(c) : c), v);
  }
}

FoldedPlace::Form form_of(bool strict) { return strict ? FoldedPlace::tf32_pair : FoldedPlace::tf32; }

}  // namespace

const char* pack_float_forward(const Convolution& c, void* to, int64_t pitch, bool phases, bool strict, void* stream) {
  if (c.folded()) {
    const int64_t row = c.co * pitch, all = row * c.kh * c.kw, count = phases ? c.sh * c.sw : 1;
    FoldedPlace place{form_of(strict), true, 0, count * row, row, 1, pitch, pitch, all};
    if (phases) place.sh = c.sh, place.sw = c.sw, place.ph = c.ph, place.pw = c.pw;
    return launch_fold(c, place, to, stream);
  }
  const Columns k{int(c.co), c.kh, c.kw, phases ? c.sh : 1, phases ? c.sw : 1, phases ? c.ph : 0, phases ? c.pw : 0};
  const int64_t rows = c.co * c.kh * c.kw, row_tiles = ceil_div(rows, kTile), tiles = row_tiles * (pitch / kTile);
  const auto* from = static_cast<const float*>(c.weight);
  auto* packed = static_cast<float*>(to);
  if (strict)
    AEUP_LAUNCH(pack_rows<true>, tiles, kThreads, 0, stream, from, packed, int(c.ci), int(rows), int(pitch),
                int(row_tiles), c.weight_channels_last, k);
  else
    AEUP_LAUNCH(pack_rows<false>, tiles, kThreads, 0, stream, from, packed, int(c.ci), int(rows), int(pitch),
                int(row_tiles), c.weight_channels_last, k);
  return nullptr;
}

const char* pack_float_gradient(const Convolution& c, void* to, int64_t pitch, bool strict, void* stream) {
  const int taps = c.kh * c.kw;
  if (c.folded()) {
    const int64_t tap = c.ci * pitch;
    return launch_fold(c, {form_of(strict), false, 0, tap, 0, pitch, 1, pitch, tap * taps}, to, stream);
  }
  const dim3 grid{unsigned(c.ci), unsigned(ceil_div(pitch, 64))};
  const size_t shared = c.weight_channels_last ? 0 : size_t(64) * taps * 4;
  AEUP_LAUNCH((strict ? pack_lines<true> : pack_lines<false>), grid, kThreads, shared, stream,
              static_cast<const float*>(c.weight), static_cast<float*>(to), int(c.ci), int(c.co), taps, int(pitch),
              c.weight_channels_last);
  return nullptr;
}

}  // namespace aeup
