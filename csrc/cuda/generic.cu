// Kernels for everything that no fast kernel takes.
// - Forward without antialias: one thread per output element, K x K taps straight from the index code.
// - Antialias and all gradients: two passes of one separable kernel along an axis, driven by per-axis tables that a
//   small kernel writes into the workspace. Planes go through in groups, so that the intermediate stays in L2.
#include "common.cuh"
#include "families.h"

namespace aeup {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMiddleBytes = 24 << 20;  // intermediate of one group of planes

// --- forward without antialias ---
template <class T, int K>
__global__ void __launch_bounds__(kBlock)
    direct(const T* x, T* y, Axis<Acc<T>> v, Axis<Acc<T>> h, int64_t c, int64_t total) {
  using S = Acc<T>;
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= total) return;
  // y [planes, oh, ow, c]; c = 1 for NCHW
  const Split pixel = split(i, c), row = split(pixel.quotient, h.out), plane = split(row.quotient, v.out);
  S wv[K], wh[K];
  const int64_t sv = taps<K>(v, plane.remainder, wv), sh = taps<K>(h, row.remainder, wh);
  const T* a = x + plane.quotient * v.in * h.in * c + pixel.remainder;
  if constexpr (K == 1) {
    Raw<T, 1> r;
    r.load(a + (sv * h.in + sh) * c);
    r.store(y + i);
  } else {
    int64_t at[K];
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = clamp_index(sh + k, h.in) * c;
    S sum = S(0);
#pragma unroll
    for (int r = 0; r < K; ++r) {
      const T* b = a + clamp_index(sv + r, v.in) * h.in * c;
      S line = S(0);
#pragma unroll
      for (int k = 0; k < K; ++k) line += wh[k] * load_one(b + at[k]);
      sum += wv[r] * line;
    }
    store_one(y + i, sum);
  }
}

// --- tables ---
// Output o reads the inputs lo[o] .. lo[o] + count[o] - 1 with weights[o * taps ..]; the outputs that read input i are
// first[i] .. end[i] - 1 (gradients only).
template <class S>
struct Table {
  int *lo, *count, *first, *end;
  S* weights;
  int64_t taps;
};
AEUP_HD int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class S>
int64_t widest(const Axis<S>& axis) {
  if (is_antialias(axis.rule)) return antialias_max_taps(axis);
  return axis.rule == Rule::linear ? 2 : axis.rule == Rule::cubic ? 4 : 1;
}
template <class S>
int64_t table_bytes(const Axis<S>& axis) {
  return 2 * padded(axis.out * 4) + 2 * padded(axis.in * 4) + padded(axis.out * widest(axis) * sizeof(S));
}
template <class S>
Table<S> table_at(const Axis<S>& axis, char* at) {
  Table<S> t;
  auto take = [&at](int64_t bytes) {
    char* const p = at;
    at += padded(bytes);
    return p;
  };
  t.lo = reinterpret_cast<int*>(take(axis.out * 4));
  t.count = reinterpret_cast<int*>(take(axis.out * 4));
  t.first = reinterpret_cast<int*>(take(axis.in * 4));
  t.end = reinterpret_cast<int*>(take(axis.in * 4));
  t.taps = widest(axis);
  t.weights = reinterpret_cast<S*>(take(axis.out * t.taps * sizeof(S)));
  return t;
}

template <int K, class S>
AEUP_DEV void plain_row(const Axis<S>& axis, int64_t o, const Table<S>& t) {
  S w[K];
  const int64_t s = taps<K>(axis, o, w), lo = clamp_index(s, axis.in), hi = clamp_index(s + K - 1, axis.in);
  t.lo[o] = int(lo), t.count[o] = int(hi - lo + 1);
  for (int64_t i = lo; i <= hi; ++i) {  // an edge collects the taps that were clamped onto it
    S sum = S(0);
#pragma unroll
    for (int k = 0; k < K; ++k) sum += clamp_index(s + k, axis.in) == i ? w[k] : S(0);
    t.weights[o * K + i - lo] = sum;
  }
}
template <class S>
AEUP_DEV void table_row(const Axis<S>& axis, int64_t o, const Table<S>& t) {
  if (axis.rule == Rule::linear) return plain_row<2>(axis, o, t);
  if (axis.rule == Rule::cubic) return plain_row<4>(axis, o, t);
  if (!is_antialias(axis.rule)) return plain_row<1>(axis, o, t);
  Index n;
  const Index lo = antialias_range(axis, Index(o), &n);
  S total = S(0), *w = t.weights + o * t.taps;
  for (int64_t k = 0; k < n; ++k) total += antialias_weight(axis, o, lo + k);
  for (int64_t k = 0; k < n; ++k) {
    const S u = antialias_weight(axis, o, lo + k);
    w[k] = total != S(0) ? u / total : u;
  }
  t.lo[o] = int(lo), t.count[o] = int(n);
}
template <class S>
__global__ void __launch_bounds__(kBlock) tables(Axis<S> v, Table<S> tv, Axis<S> h, Table<S> th, bool transposed) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i < v.out) table_row(v, i, tv);
  if (i < h.out) table_row(h, i, th);
  if (!transposed) return;
  if (i < v.in) tv.first[i] = int(first_output_reading(v, i)), tv.end[i] = int(end_of_outputs_reading(v, i));
  if (i < h.in) th.first[i] = int(first_output_reading(h, i)), th.end[i] = int(end_of_outputs_reading(h, i));
}

// --- one pass: x [outer, from, inner] -> y [outer, to, inner] ---
template <class S, class X, class Y, bool kTransposed>
__global__ void __launch_bounds__(kBlock)
    pass(const X* x, Y* y, Table<S> t, int64_t from, int64_t to, int64_t inner, int64_t total) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= total) return;
  const Split in = split(i, inner), at = split(in.quotient, to);
  const X* a = x + at.quotient * from * inner + in.remainder;
  S sum = S(0);
  if constexpr (kTransposed) {
    const int me = int(at.remainder), end = t.end[me];
    for (int o = t.first[me]; o < end; ++o) {
      const int k = me - t.lo[o];
      if (k >= 0 && k < t.count[o]) sum += t.weights[o * t.taps + k] * load_one(a + o * inner);
    }
  } else {
    const int n = t.count[at.remainder];
    const S* w = t.weights + at.remainder * t.taps;
    a += t.lo[at.remainder] * inner;
    for (int k = 0; k < n; ++k) sum += w[k] * load_one(a + k * inner);
  }
  store_one(y + i, sum);
}

// The two passes of a problem: x [planes, fh, fw, c] -> middle -> y [planes, th, tw, c].
template <class S>
struct Plan {
  Axis<S> v, h;
  int64_t planes, c, fh, fw, th, tw, mh, mw, group, middle_bytes;
  bool rows_first;  // horizontal pass first: middle is [fh, tw], else [th, fw]
};
template <class S>
Plan<S> plan_of(const Problem& p) {
  Plan<S> q;
  q.v = make_axis<S>(p, true, true);
  q.h = make_axis<S>(p, false, true);
  q.planes = p.channels_last ? p.n : p.n * p.c;
  q.c = p.channels_last ? p.c : 1;
  q.fh = p.backward ? p.oh : p.ih, q.fw = p.backward ? p.ow : p.iw;
  q.th = p.backward ? p.ih : p.oh, q.tw = p.backward ? p.iw : p.ow;
  q.rows_first = double(q.fh) * double(q.tw) <= double(q.th) * double(q.fw);
  q.mh = q.rows_first ? q.fh : q.th, q.mw = q.rows_first ? q.tw : q.fw;
  const int64_t plane = q.mh * q.mw * q.c * int64_t(sizeof(S));
  q.group = kMiddleBytes / plane;
  if (q.group < 1) q.group = 1;
  if (q.group > q.planes) q.group = q.planes;
  q.middle_bytes = padded(q.group * plane);
  return q;
}

template <class T, bool kTransposed>
const char* two_passes(const Problem& p, char* workspace, void* stream) {
  using S = Acc<T>;
  const Plan<S> q = plan_of<S>(p);
  S* const middle = reinterpret_cast<S*>(workspace);
  const Table<S> tv = table_at(q.v, workspace + q.middle_bytes);
  const Table<S> th = table_at(q.h, workspace + q.middle_bytes + table_bytes(q.v));
  int64_t longest = q.v.out > q.h.out ? q.v.out : q.h.out;
  if (kTransposed && q.v.in > longest) longest = q.v.in;
  if (kTransposed && q.h.in > longest) longest = q.h.in;
  AEUP_LAUNCH(tables<S>, ceil_div(longest, kBlock), kBlock, 0, stream, q.v, tv, q.h, th, kTransposed);
  for (int64_t at = 0; at < q.planes; at += q.group) {
    const int64_t n = q.planes - at < q.group ? q.planes - at : q.group;
    const T* x = static_cast<const T*>(p.src) + at * q.fh * q.fw * q.c;
    T* y = static_cast<T*>(p.dst) + at * q.th * q.tw * q.c;
    const int64_t in_middle = n * q.mh * q.mw * q.c, in_y = n * q.th * q.tw * q.c;
    const auto along_w = [&](auto kernel, auto* from, auto* to, int64_t total) {
      return launch(kernel, ceil_div(total, kBlock), kBlock, 0, stream, from, to, th, q.fw, q.tw, q.c, total);
    };
    const auto along_h = [&](auto kernel, auto* from, auto* to, int64_t total) {
      return launch(kernel, ceil_div(total, kBlock), kBlock, 0, stream, from, to, tv, q.fh, q.th, q.mw * q.c, total);
    };
    const S* const m = middle;
    const auto first = pass<S, T, S, kTransposed>;
    const auto second = pass<S, S, T, kTransposed>;
    if (const char* e = q.rows_first ? along_w(first, x, middle, in_middle) : along_h(first, x, middle, in_middle))
      return e;
    if (const char* e = q.rows_first ? along_h(second, m, y, in_y) : along_w(second, m, y, in_y)) return e;
  }
  return nullptr;
}

template <class T, int K>
const char* launch_direct(const Problem& p, void* stream) {
  using S = Acc<T>;
  const int64_t total = p.n * p.c * p.oh * p.ow;
  AEUP_LAUNCH((direct<T, K>), ceil_div(total, kBlock), kBlock, 0, stream, static_cast<const T*>(p.src),
              static_cast<T*>(p.dst), make_axis<S>(p, true, true), make_axis<S>(p, false, true),
              p.channels_last ? p.c : 1, total);
  return nullptr;
}
bool one_pass(const Problem& p) { return !p.backward && !p.antialias; }

}  // namespace

const char* generic_kernel(const Problem& p) {
  if (one_pass(p)) return "generic_direct";
  return p.backward ? "generic_two_pass_backward" : "generic_two_pass_forward";
}

int64_t generic_workspace(const Problem& p) {
  if (one_pass(p)) return 0;
  const auto bytes = [&p](auto s) {
    const auto q = plan_of<decltype(s)>(p);
    return q.middle_bytes + table_bytes(q.v) + table_bytes(q.h);
  };
  return p.dtype == DType::f64 ? bytes(double()) : bytes(float());
}

const char* launch_generic(const Problem& p, void* workspace, void* stream) {
  if (!one_pass(p)) {
    if (!workspace) return "the generic kernels need a workspace";
    return with_type(p.dtype, [&](auto t) {
      using T = decltype(t);
      char* const at = static_cast<char*>(workspace);
      return p.backward ? two_passes<T, true>(p, at, stream) : two_passes<T, false>(p, at, stream);
    });
  }
  if (taps_of(p.mode) == 1) {
    switch (element_size(p.dtype)) {
      case 1: return launch_direct<uint8_t, 1>(p, stream);
      case 2: return launch_direct<uint16_t, 1>(p, stream);
      case 4: return launch_direct<uint32_t, 1>(p, stream);
      default: return launch_direct<uint64_t, 1>(p, stream);
    }
  }
  return with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    return p.mode == Mode::bilinear ? launch_direct<T, 2>(p, stream) : launch_direct<T, 4>(p, stream);
  });
}

}  // namespace aeup
