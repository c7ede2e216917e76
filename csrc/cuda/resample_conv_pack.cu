// The weight [co, ci / groups, kh, kw] as [group][tap][row][reduction] for the GEMM of resample_conv_gemm.cuh.
#include "resample_conv_gemm.cuh"

namespace aeup {
namespace {

constexpr int kTile = 32;

template <class T>
struct Pack {
  const T* from;
  T* to;
  int64_t row, reduction, tap, group;  // of `from`: elements from one to the next
  int rows, channels, padded, taps, groups;
  int row_tiles;
  bool reversed, row_first;  // taps backwards; adjacent rows are nearer in `from` than adjacent channels
};

// A block moves 32 rows x 32 reduction channels of every tap through shared memory: reads run along what is near in
// `from`, writes along the reduction.
template <class T>
__global__ void __launch_bounds__(256) pack_resample_weight(Pack<T> p) {
  __shared__ T tile[kTile][kTile + 2];
  Split at = split(blockIdx.x, p.row_tiles);
  const int row0 = int(at.remainder) * kTile;
  at = split(at.quotient, p.groups);
  const int group = int(at.remainder), channel0 = int(at.quotient) * kTile;
  const int lane = threadIdx.x % kTile, line = threadIdx.x / kTile;
  for (int tap = 0; tap < p.taps; ++tap) {
#pragma unroll
    for (int i = 0; i < kTile; i += 256 / kTile) {
      const int r = p.row_first ? lane : line + i, k = p.row_first ? line + i : lane;
      const int row = row0 + r, channel = channel0 + k;
      Raw<T, 1> raw;
      raw.clear();
      if (row < p.rows && channel < p.channels)
        raw.load(p.from + group * p.group + tap * p.tap + row * p.row + channel * p.reduction);
      shared_store<int(sizeof(T))>(&tile[r][k], raw.w);
    }
    __syncthreads();
    const int64_t to_tap = p.reversed ? p.taps - 1 - tap : tap;
#pragma unroll
    for (int i = 0; i < kTile; i += 256 / kTile) {
      const int row = row0 + line + i, channel = channel0 + lane;
      if (row >= p.rows || channel >= p.padded) continue;
      Raw<T, 1> raw;
      shared_load<int(sizeof(T))>(&tile[line + i][lane], raw.w);
      raw.store(p.to + ((group * p.taps + to_tap) * p.rows + row) * p.padded + channel);
    }
    __syncthreads();
  }
}

template <class T>
const char* run(const ResampleConv& c, Pass pass, void* workspace, void* stream) {
  const bool forward = pass == Pass::forward, last = c.weight_channels_last;
  const int64_t ci = c.ci / c.groups, co = c.co / c.groups, taps = int64_t(c.kh) * c.kw;
  const int64_t step_ci = last ? 1 : taps, step_co = ci * taps;
  Pack<T> p{};
  p.from = static_cast<const T*>(c.weight), p.to = static_cast<T*>(workspace);
  p.row = forward ? step_co : step_ci, p.reduction = forward ? step_ci : step_co;
  p.tap = last ? ci : 1, p.group = co * step_co;
  p.rows = int(forward ? co : ci), p.channels = int(forward ? ci : co), p.padded = int(packed_reduction(c, pass));
  p.taps = int(taps), p.groups = c.groups;
  p.row_tiles = int(ceil_div(p.rows, kTile));
  p.reversed = !forward, p.row_first = !forward;
  const int64_t blocks = int64_t(p.row_tiles) * c.groups * ceil_div(p.padded, kTile);
  AEUP_LAUNCH((pack_resample_weight<T>), blocks, 256, 0, stream, p);
  return nullptr;
}

}  // namespace

const char* launch_pack_weight(const ResampleConv& c, Pass pass, void* workspace, void* stream) {
  if (!workspace) return "the packed weight needs a workspace";
  if (c.dtype == DType::f32) return run<float>(c, pass, workspace, stream);
  return c.dtype == DType::f16 ? run<Half>(c, pass, workspace, stream) : run<BFloat16>(c, pass, workspace, stream);
}

}  // namespace aeup
