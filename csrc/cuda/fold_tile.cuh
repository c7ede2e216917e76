// What folding a weight and folding its gradient back share: tiles of channels in shared memory.
#pragma once
#include "folded_place.cuh"

namespace aeup {

constexpr int kMostShared = 48 << 10;
constexpr int kMostCommon = INT_MAX / (9 * 32);  // ci: offsets in a tile are of 32 bits

// Nearest x2 and a 3x3 convolution, almost every case: its loops are unrolled. Else the sizes are those of the launch.
inline bool is_common(const Fold& f) { return f.kernel == 3 && f.scale == 2 && f.margin == 0; }
template <bool kCommon>
AEUP_DEV Fold fold_or(const Fold& given) {
  return kCommon ? Fold{3, 2, 0} : given;
}

// Adjacent channels of a thread, which it holds as S; eight threads side by side have the lanes of a tile.
template <class S>
constexpr int kVector = 16 / int(sizeof(S));
template <class S>
constexpr int kLanes = 8 * kVector<S>;
template <class S>
struct alignas(2 * sizeof(S)) Pair {
  S v[2];
};

// A tile of channels in shared memory: [row][kernel index][lane]. Pairs along the lanes are free of bank conflicts, and
// elements along the rows or the kernel indices have at most two or three for one bank.
AEUP_HD constexpr int pitch_of(int lanes) { return lanes + 4; }
AEUP_HD constexpr int row_of(int size, int pitch) { return size * pitch + 2; }

// Element e of a tile of 2^log_i x 2^log_c channels, all in the order in which the weight's layout has them adjacent:
// [kernel index][c][i], or [c][i][kernel index].
struct Element {
  int i, c, j;
};
template <bool kCommon>
AEUP_DEV Element element_of(int e, bool channels_last, int log_i, int log_c, const Divider& size) {
  const int in_i = (1 << log_i) - 1, in_c = (1 << log_c) - 1;
  if (channels_last) return {e & in_i, e >> log_i & in_c, e >> (log_i + log_c)};
  const int q = kCommon ? int(unsigned(e) / 9) : size.divide(e);
  return {q & in_i, q >> log_i, e - q * (kCommon ? 9 : int(size.divisor))};
}

// The offsets in a tile of V adjacent elements of the layout, where the first is at `at` and has kernel index j.
template <bool kCommon, int V>
AEUP_DEV void offsets_of(int at, int j, int size, bool channels_last, int of_i, int pitch, int* to) {
  if (channels_last) {
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = at + k * of_i;
  } else if (kCommon) {  // V < 9: of two channels at most
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = (k < 9 - j ? at : at + of_i - 9 * pitch) + k * pitch;
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      to[k] = at;
      at += ++j < size ? pitch : (j = 0, of_i - (size - 1) * pitch);
    }
  }
}

}  // namespace aeup
