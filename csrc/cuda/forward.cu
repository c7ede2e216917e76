// Which fast forward kernel serves a problem.
#include "common.cuh"
#include "families.h"
#include "forward.h"

namespace aeup {
namespace {

enum class Family {
  none,
  nearest_channels,
  nearest_integer,
  nearest_gather,
  channels,
  polyphase,
  rgb,
  window,
  gather,
  real64
};
struct Choice {
  Family family;
  int how;           // bytes or elements of a vector, or the scale
  const char* text;  // the kernel's name, or why there is none
};

Choice choose_nearest(const Problem& p) {
  const int64_t size = element_size(p.dtype), pixel = p.channels_last ? p.c * size : size;
  const int out = alignment_of(p.dst, p.ow * pixel);
  if (p.channels_last && p.c > 1) {
    const int unit = alignment_of(p.src, pixel) < alignment_of(p.dst, pixel) ? alignment_of(p.src, pixel)
                                                                             : alignment_of(p.dst, pixel);
    if (unit >= 8 && size <= unit) return {Family::nearest_channels, unit, "nearest_channels"};
  } else if (out == 16) {
    const int64_t s = integer_scale(make_axis<float>(p, false, true));
    const int64_t loaded = 16 / size > s && s > 0 ? 16 / s : size;
    if ((s == 2 || s == 4 || s == 8) && p.ow <= 1 << 22 && alignment_of(p.src) >= loaded)
      return {Family::nearest_integer, int(s), s == 2 ? "nearest_x2" : s == 4 ? "nearest_x4" : "nearest_x8"};
  }
  return {Family::nearest_gather, out,
          out == 16              ? "nearest_gather_16"
          : out >= 4 && size < 4 ? "nearest_gather_4"
                                 : "nearest_gather_1"};
}

template <class S>
Choice choose_linear(const Problem& p) {
  const int taps = taps_of(p.mode), size = element_size(p.dtype), full = 16 / size;
  const Axis<S> h = make_axis<S>(p, false, true);
  const int64_t pixel = p.channels_last ? p.c * size : size;
  const int out = alignment_of(p.dst, p.ow * pixel), src = alignment_of(p.src), fit = out / size;  // fit: elements
  if (p.ih > taps * p.oh) return {Family::none, 0, "the height shrinks by more than the number of taps"};
  const bool vectors = p.channels_last && p.c > 1;
  if (vectors) {
    const int a = alignment_of(p.dst, pixel), unit = src < a ? src : a;
    if (unit == 16 && size == 8) return {Family::real64, 2, "channels_16"};
    if (unit >= 8 && size < 8) return {Family::channels, unit, unit == 16 ? "channels_16" : "channels_8"};
  }
  const int64_t s = p.ow <= 1 << 22 && size < 8 ? integer_scale(h) : 0;
  if (vectors) {
    if (p.c == 3 && s == 2 && out == 16 && p.iw % 64 == 0 && src >= 2 * size) return {Family::rgb, 2, "rgb_x2"};
  } else if (fit == full) {
    if (s == 2 && src * 2 >= 16) return {Family::polyphase, 2, "polyphase_x2"};
    if (s == 4 || s == 8) return {Family::polyphase, int(s), s == 4 ? "polyphase_x4" : "polyphase_x8"};
  }
  if (p.iw < taps) return {Family::none, 0, "the width is smaller than the number of taps"};
  if (size == 8) return {Family::real64, fit, fit == 2 ? "gather_2" : "gather_1"};
  if (!vectors && p.iw <= 1 << 18) {
    // V neighbouring outputs start at most 2 (V = 4), or 3 (V = 8) columns apart, with room for rounding.
    if (size == 2 && taps == 2 && fit == 8 && 7 * h.scale < S(2.9) && p.iw >= 5) return {Family::window, 8, "window_8"};
    if (fit >= 4 && 3 * h.scale < S(1.9) && p.iw >= taps + 2) return {Family::window, 4, "window_4"};
  }
  if (size == 2 && taps == 2 && fit == 8) return {Family::gather, 8, "gather_8"};
  if (fit >= 4) return {Family::gather, 4, "gather_4"};
  return {Family::gather, 1, "gather_1"};
}

Choice choose(const Problem& p) {
  if (p.backward) return {Family::none, 0, "this is a gradient"};
  if (p.antialias) return {Family::none, 0, "antialias"};
  const double longest = double(p.iw > p.ow ? p.iw : p.ow) * (p.channels_last ? double(p.c) : 1);
  if (longest >= 2147483647.0) return {Family::none, 0, "a row has 2^31 elements or more"};
  const double rows = double(p.n) * double(p.channels_last ? 1 : p.c);
  if (rows * longest >= 2147483392.0) return {Family::none, 0, "2^31 threads or more for one output row of all planes"};
  if (taps_of(p.mode) == 1) return choose_nearest(p);
  return p.dtype == DType::f64 ? choose_linear<double>(p) : choose_linear<float>(p);
}

}  // namespace

const char* refuses_forward_fast(const Problem& p) {
  const Choice c = choose(p);
  return c.family == Family::none ? c.text : nullptr;
}

const char* forward_fast_kernel(const Problem& p) { return choose(p).text; }

const char* launch_forward_fast(const Problem& p, void* stream) {
  const Choice c = choose(p);
  switch (c.family) {
    case Family::nearest_channels: return launch_nearest_channels(p, c.how, stream);
    case Family::nearest_integer: return launch_nearest_integer(p, c.how, stream);
    case Family::nearest_gather: return launch_nearest_gather(p, c.how, stream);
    case Family::channels: return launch_channels(p, c.how, stream);
    case Family::polyphase: return launch_polyphase(p, c.how, stream);
    case Family::rgb: return launch_rgb(p, stream);
    case Family::window: return launch_window(p, c.how, stream);
    case Family::gather: return launch_gather(p, c.how, stream);
    case Family::real64: return launch_double(p, c.how, stream);
    default: return c.text;
  }
}

}  // namespace aeup
