// Nearest resampling moves pixels and never looks at their values: one implementation per element size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/plan.h"
#include "cpu/vec.h"

namespace aeup {
namespace AEUP_ISA {

constexpr int64_t kSmallBytes = 1 << 18;  // below, a second thread costs more than it brings

struct Copy {
  const char* src;
  char* dst;
  int64_t planes, ih, iw, oh, ow, pixel;  // pixel: bytes that stay together
  std::vector<int32_t> rows, columns;     // source of each output row and column
  int64_t doubled;                        // columns[o] == o / 2 throughout
  int64_t segment, segments, strip, strips;
  bool stream;
};

template <class U, class U2>
inline void double_pixels(const char* from, char* to, int64_t n) {  // each U of n twice
  constexpr int shift = 8 * sizeof(U);
  for (int64_t i = 0; i < n; ++i) {
    U x;
    std::memcpy(&x, from + i * sizeof(U), sizeof(U));
    const U2 xx = U2(x) | U2(x) << shift;
    std::memcpy(to + i * sizeof(U2), &xx, sizeof(U2));
  }
}

template <class U>
inline void gather_pixels(const char* from, char* to, const int32_t* columns, int64_t n) {
  for (int64_t o = 0; o < n; ++o) std::memcpy(to + o * sizeof(U), from + columns[o] * int64_t(sizeof(U)), sizeof(U));
}

// A pixel of at least sizeof(R) bytes; the last register overlaps the one before it.
template <class R>
inline void copy_pixel(const char* from, char* to, int64_t bytes) {
  const int64_t last = bytes - int64_t(sizeof(R));
  for (int64_t i = 0; i < last; i += sizeof(R)) {
    const R r = load_raw<R>(from + i);
    std::memcpy(to + i, &r, sizeof(R));
  }
  const R r = load_raw<R>(from + last);
  std::memcpy(to + last, &r, sizeof(R));
}
template <class R>
inline void copy_columns(const char* from, char* to, const int32_t* columns, int64_t n, int64_t pixel) {
  for (int64_t o = 0; o < n; ++o) copy_pixel<R>(from + columns[o] * pixel, to + o * pixel, pixel);
}

inline void build_row(const Copy& c, const char* from, char* to, int64_t d0, int64_t n) {
  const int32_t* columns = c.columns.data() + d0;
  if (c.doubled && d0 % 2 == 0 && n % 2 == 0 && c.pixel <= 4) {
    from += d0 / 2 * c.pixel;
    if (c.pixel == 1) return double_pixels<uint8_t, uint16_t>(from, to, n / 2);
    if (c.pixel == 2) return double_pixels<uint16_t, uint32_t>(from, to, n / 2);
    if (c.pixel == 4) return double_pixels<uint32_t, uint64_t>(from, to, n / 2);
  }
  switch (c.pixel) {
    case 1: return gather_pixels<uint8_t>(from, to, columns, n);
    case 2: return gather_pixels<uint16_t>(from, to, columns, n);
    case 4: return gather_pixels<uint32_t>(from, to, columns, n);
    case 8: return gather_pixels<uint64_t>(from, to, columns, n);
    default: break;
  }
  if (c.pixel > 8) return copy_columns<uint64_t>(from, to, columns, n, c.pixel);
  if (c.pixel > 4) return copy_columns<uint32_t>(from, to, columns, n, c.pixel);
  return copy_columns<uint16_t>(from, to, columns, n, c.pixel);
}

// Wide pixels go straight to their places, in the order of the output: its pages are met once and in sequence.
inline void copy_wide_pixels(const Copy& c, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const char* from = c.src + (row / c.oh * c.ih + c.rows[row % c.oh]) * c.iw * c.pixel;
    char* to = c.dst + row * c.ow * c.pixel;
    for (int64_t o = 0; o < c.ow; ++o, to += c.pixel) {
      if (c.stream) {
        stream_copy(to, from + c.columns[o] * c.pixel, c.pixel);
      } else {
        copy_pixel<Vec<int32_t>>(from + c.columns[o] * c.pixel, to, c.pixel);
      }
    }
  }
  if (c.stream) stream_fence();
}

inline void copy_tasks(const Copy& c, int64_t begin, int64_t end) {
  std::vector<char> row(c.segment * c.pixel + kVectorBytes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / (c.strips * c.segments), s = task / c.segments % c.strips, part = task % c.segments;
    const int64_t r0 = s * c.strip, r1 = std::min(c.oh, r0 + c.strip);
    const int64_t d0 = part * c.segment, n = std::min(c.ow, d0 + c.segment) - d0;
    int64_t held = -1;
    for (int64_t o = r0; o < r1; ++o) {
      if (c.rows[o] != held) {
        held = c.rows[o];
        build_row(c, c.src + (plane * c.ih + held) * c.iw * c.pixel, row.data(), d0, n);
      }
      char* to = c.dst + ((plane * c.oh + o) * c.ow + d0) * c.pixel;
      if (c.stream) {
        stream_copy(to, row.data(), n * c.pixel);
      } else {
        std::memcpy(to, row.data(), n * c.pixel);
      }
    }
  }
  if (c.stream) stream_fence();
}

template <class S>
std::vector<int32_t> sources(const Axis<S>& axis) {
  std::vector<int32_t> from(axis.out);
  for (int64_t o = 0; o < axis.out; ++o) from[o] = int32_t(nearest_source(axis, o));
  return from;
}

inline void copy_pixels(const Problem& p, int64_t threads, ParallelFor parallel, int64_t stream_bytes) {
  const int64_t size = p.dtype == DType::f64 ? 8 : (p.dtype == DType::f32 ? 4 : (p.dtype == DType::u8 ? 1 : 2));
  const int64_t pixel = p.channels_last ? p.c * size : size, planes = p.channels_last ? p.n : p.n * p.c;
  Copy c{static_cast<const char*>(p.src),
         static_cast<char*>(p.dst),
         planes,
         p.ih,
         p.iw,
         p.oh,
         p.ow,
         pixel,
         {},
         {},
         0,
         p.ow,
         1,
         p.oh,
         1,
         planes * p.oh * p.ow * pixel >= stream_bytes};
  if (p.dtype == DType::f64) {
    c.rows = sources(make_axis<double>(p, true, false));
    c.columns = sources(make_axis<double>(p, false, false));
  } else {
    c.rows = sources(make_axis<float>(p, true, false));
    c.columns = sources(make_axis<float>(p, false, false));
  }
  c.doubled = p.ow == 2 * p.iw;
  for (int64_t o = 0; o < p.ow && c.doubled; ++o) c.doubled = c.columns[o] == o / 2;
  const bool small = planes * p.oh * p.ow * pixel < kSmallBytes || threads < 2;
  if (pixel >= kVectorBytes) {
    if (small) return copy_wide_pixels(c, 0, planes * p.oh);
    return parallel(
        planes * p.oh, [](int64_t b, int64_t e, void* x) { copy_wide_pixels(*static_cast<Copy*>(x), b, e); }, &c);
  }
  c.segment = std::min(p.ow, std::max<int64_t>(2, 16384 / pixel / 2 * 2));
  c.segments = (p.ow + c.segment - 1) / c.segment;
  const int64_t tasks = planes * c.segments;
  if (small) return copy_tasks(c, 0, tasks);
  if (tasks < 4 * threads) {
    c.strip = std::max<int64_t>(8, (p.oh * tasks + 4 * threads - 1) / (4 * threads));
    c.strips = (p.oh + c.strip - 1) / c.strip;
  }
  parallel(tasks * c.strips, [](int64_t b, int64_t e, void* x) { copy_tasks(*static_cast<Copy*>(x), b, e); }, &c);
}

}  // namespace AEUP_ISA
}  // namespace aeup
