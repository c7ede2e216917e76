// The separable banded map on the CPU: dst = V src H^T per plane, for every mode, direction and layout.
// Compiled once per instruction set (AEUP_ISA); csrc/cpu/dispatch.cpp chooses at run time.
//
// Each plane is walked row by row. Enlarging: a source row is interpolated horizontally once into a ring of rows in
// the first-level cache, a destination row is a weighted sum of ring rows. Reducing (gradients, antialias): the
// weighted sum of source rows comes first, then one horizontal pass. Wide channels-last rows are cut into segments
// of pixels so that the ring stays in that cache.

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/copy.h"
#include "cpu/make_plan.h"
#include "cpu/pixels.h"
#include "cpu/plan.h"
#include "cpu/vec.h"

namespace aeup {
namespace AEUP_ISA {
namespace {

constexpr int64_t kSmallWork = 1 << 16;  // elements x taps below which a second thread costs more than it brings
constexpr int64_t kSegment = 4096;       // elements of a row that a task keeps hot
// Destinations from this size on are written past the caches. malloc hands smaller ones out again, still in a cache.
constexpr int64_t kStreamBytes = 32 << 20;

// out[e] = sum_t w[t] * rows[t][e] for e in [0, n)
template <int N, class S, class D, class A>
void combine_n(const S* const* rows, const A* w, int count, D* out, int64_t n) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int taps = N ? N : count;
  int64_t e = 0;
  for (; e + 4 * L <= n; e += 4 * L) {
    V a0 = load(rows[0] + e) * w[0], a1 = load(rows[0] + e + L) * w[0], a2 = load(rows[0] + e + 2 * L) * w[0],
      a3 = load(rows[0] + e + 3 * L) * w[0];
    for (int t = 1; t < taps; ++t) {
      const S* r = rows[t] + e;
      a0 += load(r) * w[t];
      a1 += load(r + L) * w[t];
      a2 += load(r + 2 * L) * w[t];
      a3 += load(r + 3 * L) * w[t];
    }
    store(out + e, a0);
    store(out + e + L, a1);
    store(out + e + 2 * L, a2);
    store(out + e + 3 * L, a3);
  }
  auto one = [&](int64_t at) {
    V a = load(rows[0] + at) * w[0];
    for (int t = 1; t < taps; ++t) a += load(rows[t] + at) * w[t];
    store(out + at, a);
  };
  for (; e + L <= n; e += L) one(e);
  if (e == n) return;
  if (n >= L) return one(n - L);
  for (; e < n; ++e) {
    A a = to_arith(rows[0][e]) * w[0];
    for (int t = 1; t < taps; ++t) a += to_arith(rows[t][e]) * w[t];
    from_arith(a, out + e);
  }
}

template <class S, class D, class A>
void combine(const S* const* rows, const A* w, int count, D* out, int64_t n) {
  switch (count) {
    case 0: return std::fill(out, out + n, D{});
    case 1: return combine_n<1>(rows, w, 1, out, n);
    case 2: return combine_n<2>(rows, w, 2, out, n);
    case 3: return combine_n<3>(rows, w, 3, out, n);
    case 4: return combine_n<4>(rows, w, 4, out, n);
    case 8: return combine_n<8>(rows, w, 8, out, n);
    default: return combine_n<0>(rows, w, count, out, n);
  }
}

template <class A, bool near>
Vec<A> lookup_taps(const typename Plan<A>::Block& b, const A* x, const int32_t* index, const A* weight) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> a{};
  if (b.ragged) {
    for (int t = 0; t < b.taps; ++t) {
      const Vec<A> w = load(weight + t * L), v = lookup<near>(x, index + t * L);
      a += w * (w != 0 ? v : Vec<A>{});
    }
  } else {
    for (int t = 0; t < b.taps; ++t) a += load(weight + t * L) * lookup<near>(x, index + t * L);
  }
  return a;
}

// Horizontal pass over a whole row whose pixels are narrower than a register. `row` may be read two registers past
// its end; a destination that is scratch (padded) takes whole registers.
template <class D, class A>
void horizontal_lookup(const Plan<A>& plan, const A* row, D* out, bool out_is_padded) {
  constexpr int64_t L = kLanes<A>;
  const int64_t n = plan.h.dst * plan.channels;
  int64_t e = 0;
  for (const auto& b : plan.blocks) {
    const int32_t* index = &plan.index[b.at * L];
    const A* weight = &plan.weight[b.at * L];
    const Vec<A> a = b.near ? lookup_taps<A, true>(b, row + b.base, index, weight)
                            : lookup_taps<A, false>(b, row + b.base, index, weight);
    if (out_is_padded || e + L <= n) {
      store(out + e, a);
    } else {
      store_first(out + e, a, int(n - e));
    }
    e += L;
  }
}

template <int64_t S, class A>
void split(const A* row, int64_t step, int64_t c, int64_t pixels, A* phase, int64_t stride) {
  const int64_t s = S ? S : step;
  if (c == 1) {
    for (int64_t m = 0; m < pixels; ++m) {
      for (int64_t q = 0; q < s; ++q) phase[q * stride + m] = row[m * s + q];
    }
  } else {
    for (int64_t m = 0; m < pixels; ++m) {
      for (int64_t q = 0; q < s; ++q) {
        for (int64_t i = 0; i < c; ++i) phase[q * stride + m * c + i] = row[(m * s + q) * c + i];
      }
    }
  }
}

// `row` starts with the zeros that stand before the first source pixel and is followed by zeros.
template <class D, class A>
void horizontal_phases(const Plan<A>& plan, const A* row, A* phase, D* out) {
  constexpr int64_t L = kLanes<A>;
  const int64_t c = plan.channels, n = plan.h.dst * c, s = plan.step;
  if (s == 2 && c == 1) {  // every other element, in registers
    static constexpr int32_t even[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int64_t e = 0; e < n; e += L) {
      Vec<A> a{};
      for (int64_t r = 0; r < plan.reach; ++r) {
        a += load(&plan.weight[r * plan.padded + e]) * lookup<true>(row + 2 * e + plan.shift + r, even);
      }
      if (e + L <= n) {
        store(out + e, a);
      } else {
        store_first(out + e, a, int(n - e));
      }
    }
    return;
  }
  switch (s) {
    case 2: split<2>(row, s, c, plan.columns, phase, plan.phase_stride); break;
    case 4: split<4>(row, s, c, plan.columns, phase, plan.phase_stride); break;
    case 8: split<8>(row, s, c, plan.columns, phase, plan.phase_stride); break;
    default: split<0>(row, s, c, plan.columns, phase, plan.phase_stride);
  }
  for (int64_t e = 0; e < n; e += L) {
    Vec<A> a{};
    int64_t q = plan.shift, m = 0;  // shift < step
    for (int64_t r = 0; r < plan.reach; ++r) {
      a += load(&plan.weight[r * plan.padded + e]) * load(phase + q * plan.phase_stride + m + e);
      if (++q == s) {
        q = 0;
        m += c;
      }
    }
    if (e + L <= n) {
      store(out + e, a);
    } else {
      store_first(out + e, a, int(n - e));
    }
  }
}

// Bilinear enlargement of wide pixels needs no ring.
template <class A>
bool in_blocks(const Plan<A>& plan) {
  return plan.kind == Horizontal::pixels && !plan.rows_first && plan.v.taps <= 2 && plan.h.taps <= 2 && !plan.v.gaps &&
         !plan.h.gaps;
}

// The gradient of nearest: plain sums of disjoint blocks.
template <class A>
bool in_sums(const Plan<A>& plan) {
  return plan.kind == Horizontal::pixels && plan.v.sums && plan.h.sums && plan.v.taps * plan.h.taps <= 9;
}

// A row of Plan::pairs, n results.
template <class T>
void add_row_pairs(const T* upper, const T* lower, T* out, int64_t n) {
  using A = typename Arith<T>::type;
  constexpr int64_t L = kLanes<A>;
  int64_t e = 0;
  for (; e + L <= n; e += L) {
    const T *u = upper + 2 * e, *l = lower + 2 * e;
    store(out + e, add_pairs(load(u) + load(l), load(u + L) + load(l + L)));
  }
  for (; e < n; ++e) {
    const A left = to_arith(upper[2 * e]) + to_arith(lower[2 * e]);
    from_arith(left + (to_arith(upper[2 * e + 1]) + to_arith(lower[2 * e + 1])), out + e);
  }
}

// Scratch of one thread.
template <class A>
struct Scratch {
  std::vector<A> ring, wide, phase;
  std::vector<int64_t> held;
  std::vector<const A*> rows;
};

template <class T, class A>
struct Walk {
  const Plan<A>& plan;
  const T* src;
  T* dst;
  int64_t planes, strip_rows, strips, segment, segments;
  bool stream;

  int64_t tasks() const { return planes * strips * segments; }

  void run(int64_t begin, int64_t end) const {
    Scratch<A> scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / (strips * segments), strip = task / segments % strips, part = task % segments;
      const int64_t r0 = strip * strip_rows, r1 = std::min(plan.v.dst, r0 + strip_rows);
      const int64_t d0 = part * segment, d1 = std::min(plan.h.dst, d0 + segment);
      const int64_t c = plan.channels;
      const T* x = src + plane * plan.v.src * plan.h.src * c;
      T* y = dst + plane * plan.v.dst * plan.h.dst * c;
      if (plan.pairs) {
        for (int64_t o = r0; o < r1; ++o) {
          const T* upper = x + 2 * o * plan.h.src;
          add_row_pairs(upper, upper + plan.h.src, y + o * plan.h.dst, plan.h.dst);
        }
      } else if (in_sums(plan)) {
        for (int64_t o = r0; o < r1; ++o) {
          const int64_t in = plan.h.src * c;
          sum_pixels(plan, x + plan.v.first[o] * in, plan.v.count[o], in, y + (o * plan.h.dst + d0) * c, d0, d1);
        }
      } else if (plan.rows_first) {
        vertical_first(x, y, r0, r1, d0, d1, scratch);
      } else if (in_blocks(plan)) {
        blocks_of_two(x, y, r0, r1, d0, d1, scratch);
      } else {
        horizontal_first(x, y, r0, r1, d0, d1, scratch);
      }
    }
    if (stream) stream_fence();
  }

  void horizontal_first(const T* x, T* y, int64_t r0, int64_t r1, int64_t d0, int64_t d1, Scratch<A>& scratch) const {
    const int64_t c = plan.channels, n = (d1 - d0) * c, pad = 2 * kLanes<A>, width = n + pad, slots = plan.v.taps;
    const int64_t in = plan.h.src * c;
    scratch.ring.resize(slots * width);
    scratch.held.assign(slots, -1);
    scratch.rows.resize(slots);
    scratch.wide.resize(std::max(wide_elements(in), n));
    scratch.phase.resize(plan.step * plan.phase_stride);
    T* staged = reinterpret_cast<T*>(scratch.wide.data());  // an output row on its way past the caches
    for (int64_t o = r0; o < r1; ++o) {
      const int64_t f = plan.v.first[o];
      const int count = plan.v.count[o];
      for (int t = 0; t < count; ++t) {
        const int64_t r = f + t, slot = r % slots;
        A* into = &scratch.ring[slot * width];
        scratch.rows[t] = into;
        if (scratch.held[slot] == r) continue;
        scratch.held[slot] = r;
        const T* row = x + r * in;
        if (plan.kind == Horizontal::pixels) {
          horizontal_pixels(plan, row, 0, into, d0, d1);
        } else {
          A* wide = widen(row, in, scratch);
          narrow_pass(wide, into, true, scratch);
        }
      }
      T* out = y + (o * plan.h.dst + d0) * c;
      combine(scratch.rows.data(), &plan.v.weight[o * plan.v.taps], count, stream ? staged : out, n);
      if (stream) stream_copy(out, staged, n * int64_t(sizeof(T)));
    }
  }

  // Bilinear on pixels: no ring, the four corners stay in registers.
  void blocks_of_two(const T* x, T* y, int64_t r0, int64_t r1, int64_t d0, int64_t d1, Scratch<A>& scratch) const {
    const int64_t c = plan.channels, n = (d1 - d0) * c, in = plan.h.src * c, out = plan.h.dst * c;
    scratch.wide.resize(2 * n);
    for (int64_t o = r0; o < r1;) {
      const Two<A> rows = two(plan.v, o, r1);
      T* to[2] = {y + o * out + d0 * c, y + (o + rows.many - 1) * out + d0 * c};
      T* staged[2] = {reinterpret_cast<T*>(scratch.wide.data()), reinterpret_cast<T*>(scratch.wide.data()) + n};
      bilinear_pixels(plan, x + rows.near * in, x + rows.far * in, rows, stream ? staged : to, d0, d1);
      if (stream) {
        for (int r = 0; r < rows.many; ++r) stream_copy(to[r], staged[r], n * int64_t(sizeof(T)));
      }
      o += rows.many;
    }
  }

  void vertical_first(const T* x, T* y, int64_t r0, int64_t r1, int64_t d0, int64_t d1, Scratch<A>& scratch) const {
    const int64_t c = plan.channels, in = plan.h.src * c;
    int64_t p0 = 0, p1 = plan.h.src;  // source pixels that [d0, d1) reads
    if (plan.kind == Horizontal::pixels) {
      p0 = plan.h.first[d0];
      p1 = p0;
      for (int64_t d = d0; d < d1; ++d) {
        p0 = std::min<int64_t>(p0, plan.h.count[d] ? plan.h.first[d] : p0);
        p1 = std::max<int64_t>(p1, plan.h.first[d] + plan.h.count[d]);
      }
    }
    const int64_t n = (p1 - p0) * c, before = lead_elements(), size = wide_elements(n);
    scratch.wide.assign(2 * size, A(0));
    scratch.phase.resize(plan.step * plan.phase_stride);
    std::vector<const T*> rows(plan.v.taps);
    const auto vertical = [&](int64_t d) {
      const int count = plan.v.count[d];
      for (int t = 0; t < count; ++t) rows[t] = x + (plan.v.first[d] + t) * in + p0 * c;
      combine(rows.data(), &plan.v.weight[d * plan.v.taps], count, &scratch.wide[d % 2 * size + before], n);
    };
    // Rows are read side by side, which hides from the processor that memory is read in sequence.
    const auto announce = [&](int64_t d) {
      const int64_t from = plan.v.first[d - 1] + plan.v.count[d - 1], to = plan.v.first[d] + plan.v.count[d];
      for (int64_t r = std::max<int64_t>(from, plan.v.first[d]); r < to; ++r) {
        const char* row = reinterpret_cast<const char*>(x + r * in + p0 * c);
        for (int64_t i = 0; i < n * int64_t(sizeof(T)); i += 64) __builtin_prefetch(row + i);
      }
    };
    // One row ahead: a load that straddles two stores has to wait until both have left for the cache.
    vertical(r0);
    for (int64_t d = r0; d < r1; ++d) {
      if (d + 2 < plan.v.dst) announce(d + 2);
      if (d + 1 < r1) vertical(d + 1);
      const A* wide = &scratch.wide[d % 2 * size];
      T* out = y + (d * plan.h.dst + d0) * c;
      if (plan.kind == Horizontal::pixels) {
        horizontal_pixels(plan, wide, p0, out, d0, d1);
      } else {
        narrow_pass(wide, out, false, scratch);
      }
    }
  }

  // Elements of a widened row, and the zeros before its first one.
  int64_t lead_elements() const { return plan.lead * plan.channels; }
  int64_t wide_elements(int64_t n) const {
    const int64_t read = plan.step * std::max(plan.columns * plan.channels, plan.padded) + plan.shift + plan.reach;
    return std::max(lead_elements() + n, read) + 2 * kLanes<A>;
  }

  // The row as A, with what the narrow passes need around it.
  A* widen(const T* row, int64_t n, Scratch<A>& scratch) const {
    const int64_t before = lead_elements(), size = wide_elements(n);
    if (int64_t(scratch.wide.size()) < size) scratch.wide.resize(size);
    A* wide = scratch.wide.data();
    std::fill(wide, wide + before, A(0));
    const A one = A(1);
    combine(&row, &one, 1, wide + before, n);
    std::fill(wide + before + n, wide + size, A(0));
    return wide;
  }

  template <class D>
  void narrow_pass(const A* wide, D* out, bool padded, Scratch<A>& scratch) const {
    if (plan.kind == Horizontal::phases) {
      horizontal_phases(plan, wide, scratch.phase.data(), out);
    } else {
      horizontal_lookup(plan, wide, out, padded);
    }
  }
};

template <class T>
void banded(const Problem& p, int64_t threads, ParallelFor parallel) {
  using A = typename Arith<T>::type;
  const std::shared_ptr<const Plan<A>> plan = plan_for<A>(p);
  const int64_t c = plan->channels, planes = p.channels_last ? p.n : p.n * p.c;
  const int64_t bytes = planes * plan->v.dst * plan->h.dst * c * int64_t(sizeof(T));
  Walk<T, A> walk{*plan,
                  static_cast<const T*>(p.src),
                  static_cast<T*>(p.dst),
                  planes,
                  plan->v.dst,
                  1,
                  plan->h.dst,
                  1,
                  !plan->rows_first && bytes >= kStreamBytes};
  if (plan->kind == Horizontal::pixels && !in_blocks(*plan) && !in_sums(*plan)) {
    const int64_t widest = plan->rows_first ? std::max<int64_t>(1, plan->h.src / std::max<int64_t>(1, plan->h.dst)) : 1;
    walk.segment = std::min(plan->h.dst, std::max<int64_t>(1, kSegment / (c * widest)));
    walk.segments = (plan->h.dst + walk.segment - 1) / walk.segment;
  }
  const int64_t elements = planes * std::max(plan->v.dst * plan->h.dst, plan->v.src * plan->h.src) * c;
  const int64_t taps = p.mode == Mode::bicubic ? 4 : p.mode == Mode::bilinear ? 2 : 1;
  if (elements * taps < kSmallWork || threads < 2) return walk.run(0, walk.tasks());
  if (walk.tasks() < 4 * threads) {  // few planes: cut them into strips of rows
    const int64_t want = (4 * threads + walk.tasks() - 1) / walk.tasks();
    walk.strip_rows = std::max<int64_t>(8, (plan->v.dst + want - 1) / want);
    walk.strips = (plan->v.dst + walk.strip_rows - 1) / walk.strip_rows;
  }
  parallel(walk.tasks(), [](int64_t b, int64_t e, void* w) { static_cast<Walk<T, A>*>(w)->run(b, e); }, &walk);
}

}  // namespace

void interpolate(const Problem& p, int64_t threads, ParallelFor parallel) {
  const bool nearest = p.mode == Mode::nearest || p.mode == Mode::nearest_exact;
  if (nearest && !p.backward) return copy_pixels(p, threads, parallel, kStreamBytes);
  switch (p.dtype) {
    case DType::f32: return banded<float>(p, threads, parallel);
    case DType::f64: return banded<double>(p, threads, parallel);
    case DType::f16: return banded<f16>(p, threads, parallel);
    case DType::bf16: return banded<bf16>(p, threads, parallel);
    case DType::u8: return banded<uint8_t>(p, threads, parallel);
  }
}

}  // namespace AEUP_ISA
}  // namespace aeup
