// Horizontal passes where a pixel has at least one register of channels: taps are whole vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/plan.h"
#include "cpu/vec.h"

namespace aeup {
namespace AEUP_ISA {

// Horizontal pass over pixels [d0, d1) where a pixel has at least one register of channels. `row` is the source pixel
// `origin`, `out` the destination pixel d0.
template <class S, class D, class A>
void horizontal_pixels(const Plan<A>& plan, const S* row, int64_t origin, D* out, int64_t d0, int64_t d1) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const Band<A>& h = plan.h;
  const int64_t c = plan.channels;
  for (int64_t d = d0; d < d1; ++d, out += c) {
    const S* x = row + (h.first[d] - origin) * c;
    const A* w = &h.weight[d * h.taps];
    const int taps = h.count[d];
    if (taps == 0) {
      std::fill(out, out + c, D{});
      continue;
    }
    int64_t e = 0;
    for (; e + 2 * L <= c; e += 2 * L) {
      V a0 = load(x + e) * w[0], a1 = load(x + e + L) * w[0];
      for (int t = 1; t < taps; ++t) {
        a0 += load(x + t * c + e) * w[t];
        a1 += load(x + t * c + e + L) * w[t];
      }
      store(out + e, a0);
      store(out + e + L, a1);
    }
    while (e < c) {  // the last register overlaps the one before it
      const int64_t at = std::min(e, c - L);
      V a = load(x + at) * w[0];
      for (int t = 1; t < taps; ++t) a += load(x + t * c + at) * w[t];
      store(out + at, a);
      e = at + L;
    }
  }
}

// One pixel as the plain sum of `rows` x `columns` source pixels (R and Q where the compiler may know them).
template <int R, int Q, class T>
inline void sum_pixel(const T* x, int rows, int columns, int64_t in, int64_t c, T* out) {
  using A = typename Arith<T>::type;
  constexpr int64_t L = kLanes<A>;
  for (int64_t i = 0; i < c; i += L) {
    const int64_t e = std::min(i, c - L);
    Vec<A> a{};
    for (int t = 0; t < (R ? R : rows); ++t) {
      for (int u = 0; u < (Q ? Q : columns); ++u) a += load(x + t * in + u * c + e);
    }
    store(out + e, a);
  }
}

// Pixels [d0, d1) of a destination row that is a plain sum of blocks: `rows` source rows from `row` on, `in` apart.
template <class T, class A>
void sum_pixels(const Plan<A>& plan, const T* row, int rows, int64_t in, T* out, int64_t d0, int64_t d1) {
  const int64_t c = plan.channels;
  for (int64_t d = d0; d < d1; ++d, out += c) {
    const T* x = row + plan.h.first[d] * c;
    const int columns = plan.h.count[d];
    switch (rows * 16 + columns) {  // neither is more than 9
      case 2 * 16 + 2: sum_pixel<2, 2>(x, rows, columns, in, c, out); break;
      case 2 * 16 + 3: sum_pixel<2, 3>(x, rows, columns, in, c, out); break;
      case 3 * 16 + 2: sum_pixel<3, 2>(x, rows, columns, in, c, out); break;
      case 3 * 16 + 3: sum_pixel<3, 3>(x, rows, columns, in, c, out); break;
      default: sum_pixel<0, 0>(x, rows, columns, in, c, out);
    }
  }
}

// One or two neighbouring destinations that read the same two sources.
template <class A>
struct Two {
  int64_t near, far;
  int many;
  A w[2][2];  // [destination][source]
};
template <class A>
inline Two<A> two(const Band<A>& band, int64_t d, int64_t end) {
  Two<A> t;
  t.near = band.first[d];
  t.far = t.near + band.count[d] - 1;
  t.many = d + 1 < end && band.first[d + 1] == band.first[d] && band.count[d + 1] == band.count[d] ? 2 : 1;
  for (int i = 0; i < 2; ++i) {
    const A* w = &band.weight[(d + (i < t.many ? i : 0)) * band.taps];
    // A lone tap is read twice at half its weight: a second tap of weight 0 would turn an Inf into a NaN.
    t.w[i][0] = band.count[d] == 2 ? w[0] : w[0] / 2;
    t.w[i][1] = band.count[d] == 2 ? w[1] : w[0] / 2;
  }
  return t;
}

// R x Q destination pixels from the four corners near/far x x.near/x.far.
template <int R, int Q, class T, class A>
inline void corners(const T* near, const T* far, const Two<A>& rows, const Two<A>& columns, T* const* out, int64_t c) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const T *n0 = near + columns.near * c, *n1 = near + columns.far * c;
  const T *f0 = far + columns.near * c, *f1 = far + columns.far * c;
  for (int64_t i = 0; i < c; i += L) {
    const int64_t e = std::min(i, c - L);
    const V a0 = load(n0 + e), a1 = load(n1 + e), b0 = load(f0 + e), b1 = load(f1 + e);
    for (int r = 0; r < R; ++r) {
      const V left = a0 * rows.w[r][0] + b0 * rows.w[r][1], right = a1 * rows.w[r][0] + b1 * rows.w[r][1];
      for (int q = 0; q < Q; ++q) store(out[r] + q * c + e, left * columns.w[q][0] + right * columns.w[q][1]);
    }
  }
}

// Pixels [d0, d1) of rows.many destination rows from the source rows `near` and `far`.
template <class T, class A>
void bilinear_pixels(const Plan<A>& plan, const T* near, const T* far, const Two<A>& rows, T* const* rows_out,
                     int64_t d0, int64_t d1) {
  const int64_t c = plan.channels;
  T* out[2] = {rows_out[0], rows_out[1]};
  for (int64_t d = d0; d < d1;) {
    const Two<A> columns = two(plan.h, d, d1);
    if (rows.many == 2) {
      columns.many == 2 ? corners<2, 2>(near, far, rows, columns, out, c)
                        : corners<2, 1>(near, far, rows, columns, out, c);
    } else {
      columns.many == 2 ? corners<1, 2>(near, far, rows, columns, out, c)
                        : corners<1, 1>(near, far, rows, columns, out, c);
    }
    out[0] += columns.many * c;
    out[1] += columns.many * c;
    d += columns.many;
  }
}

}  // namespace AEUP_ISA
}  // namespace aeup
