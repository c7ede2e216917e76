#include "conv_common.cuh"
#include "float_pack.cuh"
#include "fold.h"

namespace aeup {
namespace {

constexpr int kMostShared = 48 << 10;

// --- the weight ---
constexpr int kFoldThreads = 256, kLanes = 32, kPitch = kLanes + 1;

template <class T>
struct FoldParams {
  const T* from;  // [groups * co, ci, kernel]
  T* to;
  int ci, co;  // of a group
  Fold h, w;
  bool channels_last;
  FoldedPlace place;
  int slow;  // a tile: kLanes of the channels that are contiguous in the result x `slow` of the others
  int slow_tiles, lane_tiles;
};

// Steps of 32 through pairs (high, low < length), without divisions.
struct Walk {
  int length, step_high, step_low, high, low;
  AEUP_DEV Walk(int length, int first)
      : length(length), step_high(32 / length), step_low(32 % length), high(first / length), low(first % length) {}
  AEUP_DEV void next() {
    high += step_high, low += step_low;
    if (low >= length) low -= length, ++high;
  }
};

// A block folds a tile of channels, all taps: from shared memory, [slow][kernel index][lane], if kStaged.
template <class T, int kForm, bool kStaged>
__global__ void __launch_bounds__(kFoldThreads) fold(FoldParams<T> p) {
  using S = Acc<T>;
  let_next_start();
  AEUP_DYNAMIC_SHARED(S, tile);
  const FoldedPlace& place = p.place;
  const bool along_ci = place.along_ci;
  Split at = split(blockIdx.x, p.slow_tiles);
  const int slow0 = int(at.remainder) * p.slow;
  at = split(at.quotient, p.lane_tiles);
  const int lane0 = int(at.remainder) * kLanes, group = int(at.quotient);
  const int lanes = along_ci ? p.ci : p.co, slows = min(p.slow, (along_ci ? p.co : p.ci) - slow0);
  const int count = max(0, min(kLanes, lanes - lane0)), size = p.h.kernel * p.w.kernel;
  const int i0 = along_ci ? lane0 : slow0, c0 = along_ci ? slow0 : lane0;
  // Kernel index j of channels (i0 + i, c0 + c) is at from + c * size * ci + i * of_i + j * of_j.
  const T* const from =
      p.from + (int64_t(group) * p.co + c0) * size * p.ci + int64_t(i0) * (p.channels_last ? 1 : size);
  const int64_t of_c = int64_t(size) * p.ci, of_i = p.channels_last ? 1 : size, of_j = p.channels_last ? p.ci : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int ni = along_ci ? count : slows, nc = along_ci ? slows : count;
  if (kStaged && count > 0) {
    const Walk first(p.channels_last ? ni : size, lane);
    const int tile_i = along_ci ? 1 : size * kPitch, tile_c = along_ci ? size * kPitch : 1;
    for (int c = warp; c < nc; c += kFoldThreads / 32) {
      const T* const row = from + c * of_c;
      Walk w = first;
#pragma unroll 4
      for (int rest = lane; rest < ni * size; rest += 32, w.next()) {
        const int i = p.channels_last ? w.low : w.high, j = p.channels_last ? w.high : w.low;
        tile[c * tile_c + i * tile_i + j * kPitch] = load_one(row + i * of_i + j * of_j);
      }
    }
  }
  __syncthreads();

  // Each pair of warps takes every fourth tap.
  const int taps_w = p.w.taps(), taps = p.h.taps() * taps_w, phases = place.sh * place.sw;
  for (int tap = warp / 2; tap < taps; tap += kFoldThreads / 64) {
    const int y = tap / taps_w, x = tap % taps_w;
    const int qh = ((y - place.ph) % place.sh + place.sh) % place.sh;
    const int qw = ((x - place.pw) % place.sw + place.sw) % place.sw, q = qh * place.sw + qw;
    const int step = y / place.sh * (taps_w / place.sw) + x / place.sw;
    if (lane0 + lane >= (along_ci || q == phases - 1 ? place.padded : lanes)) continue;
    const TapRange v = p.h.of_folded(y), h = p.w.of_folded(x);
    const int64_t of_slow = along_ci ? place.of_co : place.of_ci;
    int64_t to = group * place.of_group + step * place.of_step + q * place.of_phase + slow0 * of_slow + lane0 +
                 (kForm == FoldedPlace::tf32_pair ? float_position(lane) : lane);
    constexpr int kAtOnce = 4;
    to += warp % 2 * kAtOnce * of_slow;
    for (int slow = warp % 2 * kAtOnce; slow < slows; slow += 2 * kAtOnce, to += 2 * kAtOnce * of_slow) {
      S sum[kAtOnce] = {};
      if (lane < count)
        for (int jy = v.first; jy <= v.last; ++jy)
          for (int j = jy * p.w.kernel + h.first; j <= jy * p.w.kernel + h.last; ++j)
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const int s = min(slow + k, slows - 1);
              sum[k] += kStaged    ? tile[(s * size + j) * kPitch + lane]
                        : along_ci ? load_one(from + s * of_c + lane * of_i + j * of_j)
                                   : load_one(from + lane * of_c + s * of_i + j * of_j);
            }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (slow + k >= slows) continue;
        if constexpr (kForm == FoldedPlace::plain)
          store_one(p.to + to + k * of_slow, sum[k]);
        else
          store_split<kForm == FoldedPlace::tf32_pair>(p.to, place.plane, to + k * of_slow, sum[k]);
      }
    }
  }
}

template <class T, int kForm>
const char* start_fold(FoldParams<T>& p, int groups, void* stream) {
  const bool along_ci = p.place.along_ci;
  const int slows = along_ci ? p.co : p.ci, lanes = max(along_ci ? p.ci : p.co, int(p.place.padded));
  const int64_t row = int64_t(p.h.kernel) * p.w.kernel * kPitch * sizeof(Acc<T>);  // of shared memory
  p.lane_tiles = int(ceil_div(lanes, kLanes));
  const auto blocks = [&](int slow) { return ceil_div(slows, slow) * p.lane_tiles * groups; };
  for (p.slow = 16; p.slow > 1 && (p.slow * row > kMostShared || p.slow >= 2 * slows); p.slow /= 2) {
  }
  while (p.slow > 2 && blocks(p.slow) < 2 * multiprocessors()) p.slow /= 2;
  p.slow_tiles = int(ceil_div(slows, p.slow));
  if (p.slow * row <= kMostShared)
    AEUP_LAUNCH((fold<T, kForm, true>), blocks(p.slow), kFoldThreads, size_t(p.slow * row), stream, p);
  else if constexpr (kForm == FoldedPlace::plain)
    AEUP_LAUNCH((fold<T, kForm, false>), blocks(p.slow), kFoldThreads, 0, stream, p);
  else
    return "the kernel has too many elements";
  return nullptr;
}

// --- its gradient ---
constexpr int kBackThreads = 512;

template <class T>
struct BackParams {
  const Acc<T>* partial;
  T* to;  // [groups * co, ci, kernel]
  int64_t splits, count, ci_stride, tap_stride;
  int ci, co;  // of a group
  Fold h, w;
  bool channels_last;
  int log_i, log_c, tiles_i, tiles_c;  // a tile: 2^log_i x 2^log_c channels
  int lanes;                           // elements that are added at a time, each by kBackThreads / lanes threads
};
// Elements of shared memory for a tap, padded against bank conflicts.
AEUP_HD int back_row(int log_i, int log_c) { return (1 << log_i) * ((1 << log_c) + 1) + 1; }

// A block makes the gradient of a tile of channels, all kernel indices; if kStaged, adds the partial sums in shared
// memory first, [tap][ci][co].
template <class T, bool kStaged>
__global__ void __launch_bounds__(kBackThreads) fold_back(BackParams<T> p) {
  using S = Acc<T>;
  AEUP_DYNAMIC_SHARED(S, sums);
  __shared__ S parts_of[kBackThreads];
  static_assert(sizeof(parts_of) <= kMostStatic);
  Split at = split(blockIdx.x, p.tiles_i);
  const int i0 = int(at.remainder) << p.log_i;
  at = split(at.quotient, p.tiles_c);
  const int c0 = int(at.remainder) << p.log_c, group = int(at.quotient);
  const int ni = min(1 << p.log_i, p.ci - i0), nc = min(1 << p.log_c, p.co - c0);
  const int taps_w = p.w.taps(), taps = p.h.taps() * taps_w;
  const int row = back_row(p.log_i, p.log_c), pitch = (1 << p.log_c) + 1;
  const S* const from = p.partial + (int64_t(group) * p.ci + i0) * p.ci_stride + c0;
  if (kStaged) {
    const int lane = threadIdx.x % p.lanes, part = threadIdx.x / p.lanes, parts = kBackThreads / p.lanes;
    for (int e = lane; e - lane < taps << (p.log_i + p.log_c); e += p.lanes) {
      const int tap = e >> (p.log_i + p.log_c), i = e >> p.log_c & ((1 << p.log_i) - 1), c = e & ((1 << p.log_c) - 1);
      S sum = S(0);
      if (tap < taps && i < ni && c < nc) {
        const S* const mine = from + i * p.ci_stride + tap * p.tap_stride + c;
#pragma unroll 8
        for (int64_t s = part; s < p.splits; s += parts) sum += load_one(mine + s * p.count);
      }
      if (parts > 1) {  // then this is the only round
        parts_of[threadIdx.x] = sum;
        __syncthreads();
        for (int n = parts / 2; n; n /= 2) {
          if (part < n) parts_of[threadIdx.x] = sum += parts_of[threadIdx.x + n * p.lanes];
          __syncthreads();
        }
      }
      if (part == 0 && tap < taps) sums[tap * row + i * pitch + c] = sum;
    }
    __syncthreads();
  }

  const int size = p.h.kernel * p.w.kernel;
  const Walk first(p.channels_last ? ni : size, threadIdx.x % 32);
  for (int c = threadIdx.x / 32; c < nc; c += kBackThreads / 32) {
    T* const to = p.to + (int64_t(group) * p.co + c0 + c) * size * p.ci + int64_t(i0) * (p.channels_last ? 1 : size);
    Walk w = first;
    for (int rest = threadIdx.x % 32; rest < ni * size; rest += 32, w.next()) {
      const int i = p.channels_last ? w.low : w.high, j = p.channels_last ? w.high : w.low, jy = j / p.w.kernel;
      const int y0 = p.h.of_kernel(jy).first, x0 = p.w.of_kernel(j - jy * p.w.kernel).first;
      S sum = S(0);
      for (int y = y0; y < y0 + p.h.scale; ++y)
        for (int x = x0; x < x0 + p.w.scale; ++x) {
          const int tap = y * taps_w + x;
          if (kStaged) {
            sum += sums[tap * row + i * pitch + c];
          } else {
            const S* const mine = from + i * p.ci_stride + tap * p.tap_stride + c;
            for (int64_t s = 0; s < p.splits; ++s) sum += load_one(mine + s * p.count);
          }
        }
      store_one(to + (p.channels_last ? int64_t(j) * p.ci + i : int64_t(i) * size + j), sum);
    }
  }
}

template <class T>
const char* start_back(const Convolution& c, BackParams<T>& p, void* stream) {
  const int64_t taps = int64_t(c.kh) * c.kw;
  const auto bytes = [&] { return taps * back_row(p.log_i, p.log_c) * int64_t(sizeof(Acc<T>)); };
  const auto blocks = [&] { return ceil_div(p.ci, 1 << p.log_i) * ceil_div(p.co, 1 << p.log_c) * c.groups; };
  p.log_i = p.log_c = 4;
  while (1 << p.log_c >= 2 * p.co) --p.log_c;
  while (p.log_i && (1 << p.log_i >= 2 * p.ci || bytes() > kMostShared || blocks() < multiprocessors())) --p.log_i;
  while (p.log_c && bytes() > kMostShared) --p.log_c;
  p.tiles_i = int(ceil_div(p.ci, 1 << p.log_i)), p.tiles_c = int(ceil_div(p.co, 1 << p.log_c));
  const int64_t elements = taps << (p.log_i + p.log_c);
  for (p.lanes = kBackThreads; p.lanes / 2 >= elements; p.lanes /= 2) {
  }
  if (bytes() <= kMostShared)
    AEUP_LAUNCH((fold_back<T, true>), blocks(), kBackThreads, size_t(bytes()), stream, p);
  else
    AEUP_LAUNCH((fold_back<T, false>), blocks(), kBackThreads, 0, stream, p);
  return nullptr;
}

}  // namespace

const char* launch_fold(const Convolution& c, const FoldedPlace& place, void* to, void* stream) {
  return with_type(c.dtype, [&](auto t) -> const char* {
    using T = decltype(t);
    FoldParams<T> p{};
    p.from = static_cast<const T*>(c.weight), p.to = static_cast<T*>(to);
    p.ci = int(c.ci / c.groups), p.co = int(c.co / c.groups);
    p.h = c.fold_h, p.w = c.fold_w, p.channels_last = c.weight_channels_last, p.place = place;
    if constexpr (std::is_same_v<T, float>) {
      if (place.form == FoldedPlace::tf32) return start_fold<float, FoldedPlace::tf32>(p, c.groups, stream);
      if (place.form == FoldedPlace::tf32_pair) return start_fold<float, FoldedPlace::tf32_pair>(p, c.groups, stream);
    }
    return start_fold<T, FoldedPlace::plain>(p, c.groups, stream);
  });
}

int64_t fold_workspace(Convolution* c, Pass pass) {
  if (!c->folded() || pass == Pass::weight_gradient) return 0;
  c->fold_h = c->fold_w = Fold{};
  c->weight_channels_last = true;
  const int64_t bytes = c->ci * (c->co / c->groups) * c->kh * c->kw * element_size(c->dtype);
  return ceil_div(bytes, 256) * 256;
}

const char* fold_weight(Convolution* c, Pass pass, void** workspace, void* stream) {
  const Convolution given = *c;
  const int64_t bytes = fold_workspace(c, pass);
  if (!bytes) return nullptr;
  if (!*workspace) return "the folded weight needs a workspace";
  const int64_t taps = int64_t(c->kh) * c->kw, ci = c->ci / c->groups, co = c->co / c->groups;
  const FoldedPlace place{FoldedPlace::plain, false, ci * taps * co, co, 0, taps * co, 1, co};
  c->weight = *workspace;
  *workspace = static_cast<char*>(*workspace) + bytes;
  return launch_fold(given, place, const_cast<void*>(c->weight), stream);
}

const char* launch_fold_back(const Convolution& c, const void* partial, int64_t splits, int64_t ci_stride,
                             int64_t tap_stride, void* stream) {
  return with_type(c.dtype, [&](auto t) {
    using T = decltype(t);
    BackParams<T> p{};
    p.partial = static_cast<const Acc<T>*>(partial), p.to = static_cast<T*>(c.result);
    p.splits = splits, p.count = c.ci * (c.co / c.groups) * c.kh * c.kw;
    p.ci_stride = ci_stride, p.tap_stride = tap_stride;
    p.ci = int(c.ci / c.groups), p.co = int(c.co / c.groups);
    p.h = c.fold_h, p.w = c.fold_w, p.channels_last = c.weight_channels_last;
    return start_back<T>(c, p, stream);
  });
}

}  // namespace aeup
