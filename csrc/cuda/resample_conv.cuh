// What the kernels of resample_conv*.cu share: the resampled tile made in shared memory, and its products with weights
// on tensor cores.
//
// A block handles 64 bytes of channels of a pixel at a time (kChunk). The window of the input that its tile needs comes
// by cp.async, in the input's own layout. From it threads make the tile with the convolution's halo as
// [pixel][channel], in the type that is multiplied; zero outside of the resampled image. All taps of the kernel then
// read the one tile, shifted by the tap.
#pragma once
#include "conv_common.cuh"
#include "few.cuh"
#include "resample_conv.h"

namespace aeup {

// Pixels of a tile, and rows of weights, are kPitch bytes apart: 8 neighbours lie in different banks for ldmatrix.
constexpr int kChunk = 64, kPitch = 80;
constexpr int kTileWidth = 16, kMaxKernel = 7, kMaxTile = 16 + kMaxKernel - 1;
constexpr int kBlock = 128;                     // threads of all these kernels
constexpr int64_t kMaxSide = int64_t(1) << 22;  // float32 still tells half pixels apart: windows are small

// --- shared memory, matrices ---
template <int B>
AEUP_DEV void shared_load(const void* p, uint32_t* w) {
  if constexpr (B == 16) {
    const uint4 t = *static_cast<const uint4*>(p);
    w[0] = t.x, w[1] = t.y, w[2] = t.z, w[3] = t.w;
  } else if constexpr (B == 8) {
    const uint2 t = *static_cast<const uint2*>(p);
    w[0] = t.x, w[1] = t.y;
  } else if constexpr (B == 4) {
    w[0] = *static_cast<const uint32_t*>(p);
  } else {
    w[0] = *static_cast<const uint16_t*>(p);
  }
}
template <int B>
AEUP_DEV void shared_store(void* p, const uint32_t* w) {
  if constexpr (B == 16) {
    *static_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
  } else if constexpr (B == 8) {
    *static_cast<uint2*>(p) = make_uint2(w[0], w[1]);
  } else if constexpr (B == 4) {
    *static_cast<uint32_t*>(p) = w[0];
  } else {
    *static_cast<uint16_t*>(p) = uint16_t(w[0]);
  }
}
template <int B>
AEUP_DEV void shared_clear(void* p) {
  const uint32_t zero[4] = {0, 0, 0, 0};
  shared_store<B>(p, zero);
}
// B bytes from global to shared memory, asynchronously where the hardware can.
template <int B>
AEUP_DEV void copy_piece(void* shared, const void* global) {
  if constexpr (B >= 4) {
    copy_async<B>(shared, global);
  } else {
    uint32_t w[1];
    load_words<B>(global, w);
    shared_store<B>(shared, w);
  }
}
// --- the map from a source to the tile ---
struct AxisTap {
  int start;  // first tap, INT_MIN outside of the resampled image
  float w[4];
};
struct TileTaps {
  AxisTap rows[kMaxTile], columns[kMaxTile];
};
// The source is the input, or the output's gradient, which is taken as it is (one tap, scale 1).
template <class T>
struct Map {
  const T* source;  // [n, groups * channels, v.in, h.in]
  Strides from;
  Axis<float> v, h;
  int taps, channels;     // taps of an axis; channels of a group
  bool last;              // channels-last
  int th, tw;             // the tile with its halo
  int rows, columns;      // the window of the source
  int line, plane;        // bytes of a row of the window; of a channel of it (NCHW)
  int piece;              // bytes of a copy: 16, 4, or one element
  int strips;             // of rows, which different threads make
  Divider pieces, lines;  // by pieces of a line, by rows
  AEUP_HD int64_t window_bytes() const {
    return last ? int64_t(rows) * line : int64_t(plane) * (kChunk / int(sizeof(T)));
  }
  AEUP_HD int tile_bytes() const { return th * tw * kPitch; }
};

template <class S>
AEUP_DEV int taps_at(const Axis<S>& axis, int taps_count, int u, S* w) {
  if (taps_count == 1) return taps<1>(axis, u, w);
  return taps_count == 2 ? taps<2>(axis, u, w) : taps<4>(axis, u, w);
}
// The first row (column) of the window of a tile from u0 on.
AEUP_DEV int window_start(const Axis<float>& axis, int taps_count, int u0) {
  float w[4];
  return clamp_index(taps_at(axis, taps_count, clamp_index(u0, axis.out), w), axis.in);
}
struct Origin {
  int y, x;
};
template <class T>
AEUP_DEV Origin window_origin(const Map<T>& m, int u0, int v0) {
  const int x = window_start(m.h, m.taps, v0), per = m.piece / int(sizeof(T));
  return {window_start(m.v, m.taps, u0), m.last ? x : x - x % per};
}
// The block's threads fill the tables of a tile whose first row is u0 and first column v0, halo included.
template <class T>
AEUP_DEV void fill_taps(const Map<T>& m, int u0, int v0, TileTaps* t) {
  for (int i = threadIdx.x; i < m.th + m.tw; i += kBlock) {
    const bool row = i < m.th;
    const Axis<float>& axis = row ? m.v : m.h;
    const int u = row ? u0 + i : v0 + i - m.th;
    AxisTap& tap = row ? t->rows[i] : t->columns[i - m.th];
    tap.start = u >= 0 && u < axis.out ? taps_at(axis, m.taps, u, tap.w) : INT_MIN;
  }
}

template <class T, int B>
AEUP_DEV void load_window_by(const Map<T>& m, const T* image, Origin at, int channel0, unsigned char* window) {
  constexpr int kSize = int(sizeof(T)), kPer = B / kSize;
  const int per_line = m.line / B;
  if (m.last) {
    constexpr int kPixel = kChunk / B;
#pragma unroll 1
    for (int i = threadIdx.x; i < m.rows * per_line; i += kBlock) {
      const int row = m.pieces.divide(i), rest = i - row * per_line, y = at.y + row, x = at.x + rest / kPixel;
      const int channel = channel0 + rest % kPixel * kPer;
      if (y >= m.v.in || x >= m.h.in) continue;
      if (channel < m.channels)
        copy_piece<B>(window + i * B, image + y * m.from.h + x * m.from.w + channel);
      else
        shared_clear<B>(window + i * B);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunk / kSize * m.rows * per_line; i += kBlock) {
      const int line = m.pieces.divide(i), c = m.lines.divide(line), row = line - c * m.rows;
      const int piece = i - line * per_line, y = at.y + row, x = at.x + piece * kPer;
      if (y >= m.v.in || x >= m.h.in) continue;
      unsigned char* const to = window + c * m.plane + row * m.line + piece * B;
      if (channel0 + c < m.channels)
        copy_piece<B>(to, image + (channel0 + c) * m.from.c + y * m.from.h + x);
      else
        shared_clear<B>(to);
    }
  }
}
// `image`: the first of the group's channels. What lies outside of the source is not written, and never read.
template <class T>
AEUP_DEV void load_window(const Map<T>& m, const T* image, Origin at, int channel0, unsigned char* window) {
  if (m.piece == 16) return load_window_by<T, 16>(m, image, at, channel0, window);
  if (sizeof(T) == 4 || m.piece == 4) return load_window_by<T, 4>(m, image, at, channel0, window);
  if constexpr (sizeof(T) == 2) load_window_by<T, 2>(m, image, at, channel0, window);
}

// A thread owns a column of the tile and some channels and walks down a strip of its rows: each row of the window is
// interpolated horizontally once, into a ring of K rows in registers. kRound: to tf32.
template <class T, int K, bool kLast, bool kRound>
AEUP_DEV void make_strips(const Map<T>& m, const TileTaps& t, const unsigned char* window, Origin at,
                          unsigned char* tile) {
  constexpr int kSize = int(sizeof(T)), kV = kLast ? 4 : 2, kVectors = kChunk / kSize / kV;
  // NHWC: adjacent threads at adjacent channels; NCHW: 8 columns x 4 pairs of channels, 32 different banks.
  const int columns = kLast ? m.tw : (m.tw + 7) / 8 * 8, jobs = columns * kVectors;
  const int strip_rows = (m.th + m.strips - 1) / m.strips;
  for (int job = threadIdx.x; job < jobs * m.strips; job += kBlock) {
    const int strip = job / jobs, j = job - strip * jobs;
    const int column = kLast ? j / kVectors : j / (8 * kVectors) * 8 + j % 8;
    const int channel = (kLast ? j % kVectors : j / 8 % kVectors) * kV;
    if (column >= m.tw) continue;
    const AxisTap& h = t.columns[column];
    const bool inside = h.start != INT_MIN;
    const unsigned char* from[K];
    float wh[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int x = inside ? clamp_index(h.start + k, m.h.in) - at.x : 0;
      from[k] = window + (kLast ? x * kChunk + channel * kSize : channel * m.plane + x * kSize);
      wh[k] = K == 1 || !inside ? 1.f : h.w[k];
    }
    float ring[K][kV];
    int base = INT_MIN;  // row of ring[0]
    const int first = strip * strip_rows, end = min(first + strip_rows, m.th);
#pragma unroll 1
    for (int r = first; r < end; ++r) {
      const AxisTap& v = t.rows[r];
      float value[kV];
#pragma unroll
      for (int e = 0; e < kV; ++e) value[e] = 0.f;
      if (inside && v.start != INT_MIN) {
        if (base == INT_MIN) base = v.start - K;
#pragma unroll 1
        while (base < v.start) {
          ++base;
#pragma unroll
          for (int k = 0; k + 1 < K; ++k)
#pragma unroll
            for (int e = 0; e < kV; ++e) ring[k][e] = ring[k + 1][e];
          const int line = (clamp_index(base + K - 1, m.v.in) - at.y) * m.line;
#pragma unroll
          for (int e = 0; e < kV; ++e) ring[K - 1][e] = 0.f;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            float x[kV];
            if constexpr (kLast) {
              Raw<T, kV> raw;
              shared_load<kV * kSize>(from[k] + line, raw.w);
              raw.unpack(x);
            } else {
#pragma unroll
              for (int e = 0; e < kV; ++e) {
                Raw<T, 1> raw;
                shared_load<kSize>(from[k] + line + e * m.plane, raw.w);
                raw.unpack(x + e);
              }
            }
#pragma unroll
            for (int e = 0; e < kV; ++e) ring[K - 1][e] = K == 1 ? x[e] : ring[K - 1][e] + wh[k] * x[e];
          }
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int e = 0; e < kV; ++e) value[e] = K == 1 ? ring[0][e] : value[e] + v.w[k] * ring[k][e];
      }
      Raw<T, kV> raw;
      raw.pack(value);
      if constexpr (kRound)
#pragma unroll
        for (int e = 0; e < kV; ++e) raw.w[e] = round_tf32(value[e]);
      shared_store<kV * kSize>(tile + (r * m.tw + column) * kPitch + channel * kSize, raw.w);
    }
  }
}
// kPlain: the map has one tap.
template <class T, bool kRound, bool kPlain>
AEUP_DEV void make_tile(const Map<T>& m, const TileTaps& t, const unsigned char* window, Origin at,
                        unsigned char* tile) {
  if constexpr (kPlain) {
    if (m.last) return make_strips<T, 1, true, kRound>(m, t, window, at, tile);
    return make_strips<T, 1, false, kRound>(m, t, window, at, tile);
  }
  if (m.last) {
    if (m.taps == 1) return make_strips<T, 1, true, kRound>(m, t, window, at, tile);
    if (m.taps == 2) return make_strips<T, 2, true, kRound>(m, t, window, at, tile);
    return make_strips<T, 4, true, kRound>(m, t, window, at, tile);
  }
  if (m.taps == 1) return make_strips<T, 1, false, kRound>(m, t, window, at, tile);
  if (m.taps == 2) return make_strips<T, 2, false, kRound>(m, t, window, at, tile);
  return make_strips<T, 4, false, kRound>(m, t, window, at, tile);
}

// --- host: the map of a call ---
// Bytes of dynamic shared memory that a block may have, 5 KiB being kept for the tables.
inline int64_t shared_limit(int major, int minor) {
  const int64_t kib = major == 8 ? (minor == 0 || minor == 7 ? 163 : 99) : major >= 12 ? 99 : 227;
  return (kib - 5) << 10;
}
inline Problem resample_problem(const ResampleConv& c) {
  Problem p{};
  p.n = c.n, p.c = c.ci, p.ih = c.ih, p.iw = c.iw, p.oh = c.uh, p.ow = c.uw;
  p.scale_h = c.scale_h, p.scale_w = c.scale_w, p.mode = c.mode, p.dtype = c.dtype;
  p.align_corners = c.align_corners, p.channels_last = c.channels_last;
  return p;
}
// Source pixels that `outputs` adjacent outputs read, at most; a pixel more for float32's rounding at each end.
inline int window_size(const Axis<float>& axis, int outputs, int taps_count) {
  const double reach = double(outputs - 1) * axis.scale + taps_count + 3;
  return reach < axis.in ? int(reach) : axis.in;
}
// `gradient`: the output's gradient as it is. The tile has `height` rows and kTileWidth columns without its halo.
template <class T>
Map<T> map_of(const ResampleConv& c, bool gradient, int height) {
  constexpr int kSize = int(sizeof(T));
  Map<T> m{};
  const int64_t h = gradient ? c.oh : c.ih, w = gradient ? c.ow : c.iw, channels = gradient ? c.co : c.ci;
  m.source = static_cast<const T*>(gradient ? c.grad : c.input);
  m.from = strides_of(channels, h, w, c.channels_last);
  if (gradient) {
    m.v = {Index(h), Index(h), 1.f, Rule::floor_scaled, false, true}, m.taps = 1;
    m.h = {Index(w), Index(w), 1.f, Rule::floor_scaled, false, true};
  } else {
    const Problem p = resample_problem(c);
    m.v = make_axis<float>(p, true, true), m.h = make_axis<float>(p, false, true), m.taps = taps_of(c.mode);
  }
  m.channels = int(channels / c.groups), m.last = c.channels_last;
  m.th = height + c.kh - 1, m.tw = kTileWidth + c.kw - 1;
  m.rows = window_size(m.v, m.th, m.taps), m.columns = window_size(m.h, m.tw, m.taps);
  m.piece = m.last ? alignment_of(m.source, channels * kSize | m.channels * kSize) : alignment_of(m.source, w * kSize);
  m.piece = m.piece == 16 ? 16 : m.piece >= 4 ? 4 : kSize;
  if (m.last) {
    m.line = m.columns * kChunk;
  } else {
    m.line = (m.columns * kSize + (m.piece - kSize) + 15) / 16 * 16;
    // An odd number of 16 bytes: pairs of channels in other banks. Far more than fits: refused.
    m.plane = int(min((int64_t(m.rows) * m.line + 47) / 64 * 64, int64_t(1) << 24)) + 16;
  }
  m.pieces = Divider(m.line / m.piece), m.lines = Divider(m.rows);
  // Strips that keep all threads busy: rows walked, with those that start a strip, by the longest thread.
  const int vectors = kChunk / kSize / (m.last ? 4 : 2), columns = m.last ? m.tw : (m.tw + 7) / 8 * 8;
  double best = 0;
  for (int s = 1; s <= 8 && s <= m.th; ++s) {
    const double cost = double(ceil_div(int64_t(s) * columns * vectors, kBlock)) * (ceil_div(m.th, s) + m.taps);
    if (s == 1 || cost < best) best = cost, m.strips = s;
  }
  return m;
}

}  // namespace aeup
