// Shared by the fast gathered backward kernels: which grad-output rows and columns reach a grad-input element, the
// strips of rows, and the shape of the launch.
//
// All kernels walk down the grad-output rows and add each, times its K vertical weights, to the K open grad-input
// rows, which are accumulators in registers. A row is stored when its last tap has come. Taps above and below the
// image go to virtual rows -K/2 .. -1 and H .. H + K/2 - 1 that are folded onto the edge rows at the end, so that no
// weight is zero where torch reads nothing: an Inf in the output's gradient stays where torch leaves it.
#pragma once
#include "backward.h"
#include "common.cuh"

namespace aeup::back {

inline constexpr int kMaxSide = 1 << 20;  // the float index arithmetic stays within one output of exact
#ifdef AEUP_EMULATE
inline int64_t max_threads = 0x7fffffff;
#else
inline constexpr int64_t max_threads = 0x7fffffff;  // of one launch: 32-bit thread and plane numbers
#endif

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// One axis and what speeds up its inversion.
struct Map {
  Axis<float> axis;
  float per;  // outputs per input pixel
  int in, out;
  int integer;  // s where the axis is the exact enlargement by the power of two s, else 0
};
inline Map make_map(const Problem& p, bool vertical) {
  Map m;
  m.axis = make_axis<float>(p, vertical, true);
  m.per = m.axis.scale > 0 ? 1 / m.axis.scale : 0;
  m.in = int(m.axis.in), m.out = int(m.axis.out);
  const int64_t s = integer_scale(m.axis);
  m.integer = s > 0 && s <= 64 && (s & (s - 1)) == 0 ? int(s) : 0;
  return m;
}

// Number of outputs whose first tap lies before x. The outputs that read any of the inputs i0 .. i1 - 1 are
// [outputs_before(i0 - K + 1), outputs_before(i1)). An estimate, corrected by the forward map itself.
template <int K>
AEUP_HD int outputs_before(const Map& m, int x) {
  constexpr int lead = K == 4 ? 1 : 0;  // the first tap is floor(position) - lead
  if (x > m.in - 1 - lead) return m.out;
  if (x < (K == 4 ? -1 : 1)) return 0;
  const bool centred = K == 1 ? m.axis.rule == Rule::floor_centre : !m.axis.align_corners;
  const float shift = K > 1 && centred ? 0.5f : 0.f;
  const float guess = std::ceil((float(x + lead) + shift) * m.per - (centred ? 0.5f : 0.f));
  int o = guess <= 0.f ? 0 : (guess >= float(m.out) ? m.out : int(guess));
  if (m.integer) return o;
  float w[K];
  while (o > 0 && int(taps<K>(m.axis, o - 1, w)) >= x) --o;
  while (o < m.out && int(taps<K>(m.axis, o, w)) < x) ++o;
  return o;
}

// First output with a weight on input i: for linear maps, those before pixel 0 read input 1 with weight zero.
template <int K>
AEUP_DEV int first_output_of(const Map& m, int i) {
  int o = outputs_before<K>(m, i - K + 1);
  if constexpr (K == 2) {
    float w[2];
    if (i == 1)
      while (o < m.out && taps<2>(m.axis, o, w) == 0 && w[1] == 0.f) ++o;
  }
  return o;
}

// Most outputs whose position lies in an interval of `length` input pixels (host). A position is off by less than
// 2^-22 of its size, so each end of the interval by less than out * 2^-22 outputs.
inline int most_outputs(const Map& m, int length) {
  if (m.integer) return m.integer * length;
  return int(std::ceil(double(length) / double(m.axis.scale) + double(m.out) / (1 << 21)));
}

// Grad-input rows [i0, i1) and the n grad-output rows from o0 that reach them; odd strips count both from the bottom
// and so walk upward: the two strips at a border touch the rows that they share at the same time, in L2.
struct Strip {
  int i0, i1, o0, n;
  bool up;
};
template <int K>
AEUP_DEV Strip strip_of(const Map& m, int index, int rows) {
  Strip s;
  s.up = index & 1;
  s.i0 = index * rows;
  s.i1 = min(m.in, s.i0 + rows);
  s.o0 = outputs_before<K>(m, s.i0 - K + 1);
  const int end = outputs_before<K>(m, s.i1);
  s.n = end - s.o0;
  if (s.up) {
    const int t = m.in - s.i1;
    s.i1 = m.in - s.i0, s.i0 = t, s.o0 = m.out - end;
  }
  return s;
}
// Rows of the vertical table of a strip.
inline int strip_entries(const Map& m, int K, int rows) { return most_outputs(m, rows + K - 1) + 1; }

#ifdef AEUP_EMULATE
#define AEUP_EXPECT(ok, what) \
  if (!(ok)) throw std::runtime_error(what)
#else
#define AEUP_EXPECT(ok, what)
#endif

// The virtual rows: r < 0 goes to row 0, in .. in + K/2 - 1 to row in - 1. `slot` is the slot of row r.
template <int K, int slot, int N>
AEUP_DEV void fold_edges(float (&acc)[K][N], int r, int in) {
  if constexpr (K > 1) {
    if (r == in - 1) {
#pragma unroll
      for (int m = 1; m <= K / 2; ++m)
#pragma unroll
        for (int v = 0; v < N; ++v) acc[slot][v] += acc[(slot + m) % K][v];
    } else if (r < 0) {
#pragma unroll
      for (int m = 1; m <= K / 2; ++m)
        if (r == -m) {
#pragma unroll
          for (int v = 0; v < N; ++v) acc[(slot + m) % K][v] += acc[slot][v];
        }
    }
  }
}

// --- host ---

// At most `want` rows, so that the vertical table of twice as many stays below about 20 KiB.
inline int bounded_rows(const Map& m, int want) {
  const int most = int(512 / (m.per > 1 ? m.per : 1));
  return smaller(smaller(want, m.in), most < 2 ? 2 : most);
}
// Rows per strip near `want`, so that columns * strips blocks are whole waves of `slots` blocks, or more and shorter
// strips, down to `least` rows, where the device is not full.
inline int fit_rows(int h, int want, int least, int64_t columns, int64_t slots) {
  if (want >= h) want = h;
  if (least >= want) return want;
  const int64_t blocks = columns * ceil_div(h, want);
  if (blocks > 12 * slots) return want;  // the last wave hardly counts
  const int64_t waves = (blocks + slots / 2) / slots, strips = (waves < 1 ? 1 : waves) * slots / columns;
  if (strips < 1) return want;
  const int rows = int(ceil_div(h, strips));
  if (waves < 2) return rows < least ? least : (rows > 2 * want ? want : rows);
  return 2 * rows < want || rows > 2 * want ? want : rows;
}

// One predicate and one launcher per family; nullptr means that the family serves p (has run).
const char* refuses_row_x2(const Problem& p);  // NCHW, and NHWC with 1 or 3 channels
const char* launch_row_x2(const Problem& p, void* stream);
const char* refuses_pair_x2(const Problem& p);  // NHWC
const char* launch_pair_x2(const Problem& p, void* stream);
const char* refuses_matrix(const Problem& p);  // NCHW, 16 bits, scales up to 16
const char* launch_matrix(const Problem& p, void* stream);
const char* refuses_window(const Problem& p);  // NHWC, scales up to 3
const char* launch_window(const Problem& p, void* stream);
const char* refuses_stream(const Problem& p);  // both layouts, any scale
const char* launch_stream_nchw(const Problem& p, void* stream);
const char* launch_stream_nhwc(const Problem& p, void* stream);

// Calls f with the storage type of a dtype that the fast kernels have and with the number of taps.
template <class F>
const char* with_kernel(const Problem& p, F f) {
  const auto taps = [&](auto t) -> const char* {
    if (p.mode == Mode::bicubic) return f(t, std::integral_constant<int, 4>());
    if (p.mode == Mode::bilinear) return f(t, std::integral_constant<int, 2>());
    return f(t, std::integral_constant<int, 1>());
  };
  if (p.dtype == DType::f32) return taps(float());
  return p.dtype == DType::f16 ? taps(Half()) : taps(BFloat16());
}
inline int64_t planes_of(const Problem& p) { return p.channels_last ? p.n : p.n * p.c; }
inline int64_t pixel_of(const Problem& p) { return p.channels_last ? p.c : 1; }  // elements of a pixel

}  // namespace aeup::back
