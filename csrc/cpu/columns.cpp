// Compiled once per instruction set (AEUP_ISA); csrc/cpu/dispatch.cpp chooses at run time.
#include "cpu/columns.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/vec.h"

namespace aeup {
namespace AEUP_ISA {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
int64_t floor_div(int64_t a, int64_t b) { return -ceil_div(-a, b); }

template <class F>
void over(ParallelFor parallel, int64_t n, F f) {  // f(begin, end)
  parallel(n, [](int64_t b, int64_t e, void* x) { (*static_cast<F*>(x))(b, e); }, &f);
}

template <int stride, class T>
void take(const T* from, T* to, int64_t n, int64_t any_stride) {
  const int64_t step = stride ? stride : any_stride;
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
}
template <int stride, class T>
void put(const T* from, T* to, int64_t n, int64_t any_stride) {
  const int64_t step = stride ? stride : any_stride;
  for (int64_t i = 0; i < n; ++i) to[i * step] = from[i];
}
// The phases [w / s] of a row one after another, each at `from + phase * size`, side by side.
template <class T>
void interleave(const T* from, int64_t size, T* to, int64_t w, int64_t s) {
  if (s == 2) {
    const T *even = from, *odd = from + size;
    for (int64_t j = 0; j < w / 2; ++j) to[2 * j] = even[j], to[2 * j + 1] = odd[j];
    if (w % 2) to[w - 1] = even[w / 2];
    return;
  }
  for (int64_t f = 0; f < std::min(s, w); ++f) {
    const int64_t count = (w - f + s - 1) / s;
    if (s == 1) {
      std::memcpy(to, from, size_t(count) * sizeof(T));
    } else if (s == 4) {
      put<4>(from + f * size, to + f, count, s);
    } else {
      put<0>(from + f * size, to + f, count, s);
    }
  }
}

// The pixels of the small side [first, last) whose tap is inside the large one, on one axis.
struct Inside {
  int64_t first, last;
  Inside(int64_t small, int64_t large, int64_t s, int64_t at) {  // the tap of pixel 0 is at `at`
    first = std::clamp<int64_t>(ceil_div(-at, s), 0, small);
    last = std::clamp<int64_t>(ceil_div(large - at, s), first, small);
  }
};

// --- NCHW: rows of pixels ---

template <class T>
void to_planes(const Taps& t, ParallelFor parallel) {
  const T* const image = static_cast<const T*>(t.image);
  T* const columns = static_cast<T*>(t.columns);
  const int64_t pixels = t.ih * t.iw;
  over(parallel, t.c * t.kh, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / t.kh, down = task % t.kh * t.dh - t.ph;
      for (int64_t row = 0; row < t.n * t.ih; ++row) {
        const int64_t n = row / t.ih, iy = row % t.ih, y = iy * t.sh + down;
        const bool missing = y < 0 || y >= t.h;
        const T* const from = image + ((n * t.c + c) * t.h + (missing ? 0 : y)) * t.w;
        for (int64_t b = 0; b < t.kw; ++b) {
          T* const to = columns + (task * t.kw + b) * t.n * pixels + n * pixels + iy * t.iw;
          const int64_t at = b * t.dw - t.pw;
          const Inside in(t.iw, t.w, t.sw, at);
          const int64_t first = missing ? t.iw : in.first, last = missing ? t.iw : in.last;
          std::fill(to, to + first, T{});
          const T* const source = from + first * t.sw + at;
          if (t.sw == 1) {
            std::memcpy(to + first, source, size_t(last - first) * sizeof(T));
          } else if (t.sw == 2) {
            take<2>(source, to + first, last - first, 2);
          } else {
            take<0>(source, to + first, last - first, t.sw);
          }
          std::fill(to + last, to + t.iw, T{});
        }
      }
    }
  });
}

// Two taps a row, each a pixel of its own: no sums.
template <class T>
void pair_up(const T* even, const T* odd, T* to, int64_t n, const T* bias) {
  if (!bias) {
    for (int64_t j = 0; j < n; ++j) to[2 * j] = even[j], to[2 * j + 1] = odd[j];
    return;
  }
  const auto added = to_arith(*bias);
  for (int64_t j = 0; j < n; ++j) {
    from_arith(to_arith(even[j]) + added, to + 2 * j), from_arith(to_arith(odd[j]) + added, to + 2 * j + 1);
  }
}
template <class T>
void from_separate_planes(const Taps& t, ParallelFor parallel) {
  T* const image = static_cast<T*>(t.image);
  const T* const columns = static_cast<const T*>(t.columns);
  const T* const bias = static_cast<const T*>(t.bias);
  const int64_t pixels = t.ih * t.iw, next = t.n * pixels;
  over(parallel, t.n * t.c, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / t.c, c = plane % t.c;
      for (int64_t y = 0; y < t.h; ++y) {
        const T* const from = columns + ((c * t.kh + y % t.sh) * 2 * t.n + n) * pixels + y / t.sh * t.iw;
        pair_up(from, from + next, image + (plane * t.h + y) * t.w, t.iw, bias ? bias + c : nullptr);
      }
    }
  });
}

template <class T>
void from_planes(const Taps& t, ParallelFor parallel) {
  if (t.kw == 2 && t.sw == 2 && t.kh == t.sh && t.pw == 0 && t.ph == 0 && t.w == 2 * t.iw && t.h == t.sh * t.ih)
    return from_separate_planes<T>(t, parallel);
  T* const image = static_cast<T*>(t.image);
  const T* const columns = static_cast<const T*>(t.columns);
  const T* const bias = static_cast<const T*>(t.bias);
  const int64_t pixels = t.ih * t.iw, size = (t.w + t.sw - 1) / t.sw;
  over(parallel, t.n * t.c, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(t.sw * size);
    std::vector<T> phases(t.sw * size);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / t.c, c = plane % t.c;
      const float start = bias ? to_arith(bias[c]) : 0.0f;
      for (int64_t y = 0; y < t.h; ++y) {
        std::fill(sums.begin(), sums.end(), start);
        for (int64_t a = 0; a < t.kh; ++a) {
          const int64_t above = y + t.ph - a * t.dh;
          if (above < 0 || above % t.sh || above / t.sh >= t.ih) continue;
          for (int64_t b = 0; b < t.kw; ++b) {
            const int64_t at = b * t.dw - t.pw, turn = floor_div(at, t.sw);  // output turn * sw + phase, of pixel 0
            const Inside in(t.iw, t.w, t.sw, at);
            if (in.first == in.last) continue;
            const T* const from =
                columns + ((c * t.kh + a) * t.kw + b) * t.n * pixels + n * pixels + above / t.sh * t.iw + in.first;
            float* const sum = &sums[size_t((at - turn * t.sw) * size + turn + in.first)];
#pragma GCC ivdep
            for (int64_t x = 0; x < in.last - in.first; ++x) sum[x] += to_arith(from[x]);
          }
        }
        for (size_t i = 0; i < sums.size(); ++i) from_arith(sums[i], &phases[i]);
        interleave(phases.data(), size, image + (plane * t.h + y) * t.w, t.w, t.sw);
      }
    }
  });
}

// --- NHWC: pixels of channels ---

template <class T>
void to_pixels(const Taps& t, ParallelFor parallel) {
  const T* const image = static_cast<const T*>(t.image);
  const int64_t adjacent = t.dw == 1 ? t.kw : 1;  // taps whose channels are side by side
  over(parallel, t.n * t.ih, [&](int64_t begin, int64_t end) {
    T* to = static_cast<T*>(t.columns) + begin * t.iw * t.kh * t.kw * t.c;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / t.ih, top = row % t.ih * t.sh - t.ph;
      for (int64_t ix = 0; ix < t.iw; ++ix) {
        for (int64_t a = 0; a < t.kh; ++a) {
          const int64_t y = top + a * t.dh;
          const bool missing = y < 0 || y >= t.h;
          for (int64_t b = 0; b < t.kw; b += adjacent, to += adjacent * t.c) {
            const int64_t x = ix * t.sw - t.pw + b * t.dw;
            const int64_t first = missing ? adjacent : std::clamp<int64_t>(-x, 0, adjacent);
            const int64_t last = missing ? adjacent : std::clamp<int64_t>(t.w - x, first, adjacent);
            std::fill(to, to + first * t.c, T{});
            if (last > first) {
              const T* const from = image + ((n * t.h + y) * t.w + x + first) * t.c;
              std::memcpy(to + first * t.c, from, size_t((last - first) * t.c) * sizeof(T));
            }
            std::fill(to + last * t.c, to + adjacent * t.c, T{});
          }
        }
      }
    }
  });
}

template <class T>
void from_pixels(const Taps& t, ParallelFor parallel) {
  const T* const columns = static_cast<const T*>(t.columns);
  const T* const bias = static_cast<const T*>(t.bias);
  over(parallel, t.n * t.h, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(t.c), start(t.c);
    for (int64_t c = 0; bias && c < t.c; ++c) start[c] = to_arith(bias[c]);
    T* to = static_cast<T*>(t.image) + begin * t.w * t.c;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / t.h, y = row % t.h;
      for (int64_t x = 0; x < t.w; ++x, to += t.c) {
        const float* before = start.data();
        for (int64_t a = 0; a < t.kh; ++a) {
          const int64_t above = y + t.ph - a * t.dh;
          if (above < 0 || above % t.sh || above / t.sh >= t.ih) continue;
          for (int64_t b = 0; b < t.kw; ++b) {
            const int64_t left = x + t.pw - b * t.dw;
            if (left < 0 || left % t.sw || left / t.sw >= t.iw) continue;
            const int64_t pixel = (n * t.ih + above / t.sh) * t.iw + left / t.sw;
            const T* const from = columns + ((pixel * t.kh + a) * t.kw + b) * t.c;
            float* const sum = sums.data();
#pragma GCC ivdep
            for (int64_t c = 0; c < t.c; ++c) sum[c] = before[c] + to_arith(from[c]);
            before = sum;
          }
        }
        for (int64_t c = 0; c < t.c; ++c) from_arith(before[c], to + c);
      }
    }
  });
}

}  // namespace

void to_columns(const Taps& t, ParallelFor parallel) {
  if (t.dtype == DType::bf16) return t.channels_last ? to_pixels<bf16>(t, parallel) : to_planes<bf16>(t, parallel);
  return t.channels_last ? to_pixels<float>(t, parallel) : to_planes<float>(t, parallel);
}
void from_columns(const Taps& t, ParallelFor parallel) {
  if (t.dtype == DType::bf16) return t.channels_last ? from_pixels<bf16>(t, parallel) : from_planes<bf16>(t, parallel);
  return t.channels_last ? from_pixels<float>(t, parallel) : from_planes<float>(t, parallel);
}

}  // namespace AEUP_ISA
}  // namespace aeup
