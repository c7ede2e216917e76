// Nearest upsampling by an integer scale and the convolution after it are one transposed convolution. Along one axis,
// with zero padding p: y[o] = sum_j w[j] u[o + j - p], and u[q] = x[i] where q = s i + r, 0 <= r < s. So output o takes
// input i by all w[j] with o + P = s i + t, t = r - j + k - 1, P = k - 1 - p: a transposed convolution of stride s and
// padding P whose kernel of k + s - 1 taps holds sums of w. Exact at the borders. Where P would be negative, `margin`
// zeros on both sides of the kernel make it 0. Shared by host and device.
#pragma once
#include <cstdint>

#include "resample.h"

namespace aeup {

struct TapRange {  // empty where last < first
  int first, last;
};
struct Fold {
  int kernel;  // k; 0: nothing is folded
  int scale, margin;

  AEUP_HD int taps() const { return kernel + scale - 1 + 2 * margin; }
  // The kernel indices that folded tap t is the sum of.
  AEUP_HD TapRange of_folded(int t) const {
    const int first = kernel - 1 + margin - t, last = first + scale - 1;
    return {first < 0 ? 0 : first, last < kernel ? last : kernel - 1};
  }
  // The folded taps that hold kernel index j: the transposed map, for gradients. Always `scale` of them.
  AEUP_HD TapRange of_kernel(int j) const {
    const int first = kernel - 1 + margin - j;
    return {first, first + scale - 1};
  }
  AEUP_HD int padding(int of_convolution) const { return kernel - 1 + margin - of_convolution; }
};
inline Fold fold_of(int64_t kernel, int64_t scale, int64_t padding) {
  return {int(kernel), int(scale), int(padding > kernel - 1 ? padding - (kernel - 1) : 0)};
}

}  // namespace aeup
