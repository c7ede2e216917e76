// Horizontal first: a thread owns N grad-input elements of a row, reduces each grad-output row horizontally in
// registers and adds it to its K open grad-input rows. No shared memory but the vertical table, no barrier after it.
#pragma once
#include "backward.cuh"

namespace aeup::back {

inline constexpr int kWalkBlock = 128;

struct WalkArgs {
  const void* src;  // [planes, oh, out_row]
  void* dst;        // [planes, ih, in_row]
  Map v, u;
  int in_row, out_row;  // elements of a row
  int groups, chunks;   // threads along a row; in NHWC, along the channels of a pixel
  int c;                // elements of a pixel
  unsigned threads;     // planes * groups
  int rows, strips, entries;
};

// S: how a thread reads and reduces one grad-output row. D rows are in flight, P more on their way to L2. MB: least
// blocks on a multiprocessor.
template <class S, int D, int MB, int P>
__global__ void __launch_bounds__(kWalkBlock, MB) walk_rows(const WalkArgs p) {
  using T = typename S::T;
  constexpr int K = S::K, N = S::N;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  auto* weights = reinterpret_cast<Weights<K, float>*>(shared);
  int* firsts = reinterpret_cast<int*>(weights + p.entries);
  float* table = reinterpret_cast<float*>(shared + strip_tables_bytes<K, float>(p.entries));
  const unsigned block = blockIdx.x / unsigned(p.strips), first = block * kWalkBlock, id = first + threadIdx.x;
  const Strip strip = strip_of<K>(p.v, int(blockIdx.x - block * unsigned(p.strips)), p.rows);
  AEUP_EXPECT(strip.n < p.entries, "vertical table too short");
  const int n = strip.n, base = strip.i0 - K + 1;
  const bool mine = id < p.threads;
  const auto vertical_table = [&] {
    strip_tables<K>(p.v.axis, strip.o0, n, strip.up, base, 0, weights, firsts);
    return mine;
  };
  if constexpr (S::sparse) {
    if constexpr (P > 0) {  // the first rows are on their way to L2 while the tables are made
      const unsigned plane = id / unsigned(p.groups);
      const int row = strip.up ? p.v.out - 1 - strip.o0 : strip.o0, step = strip.up ? -1 : 1;
      const T* x = static_cast<const T*>(p.src) + (int64_t(plane) * p.v.out + row) * p.out_row +
                   S::first_read(p, int(id - plane * unsigned(p.groups)));
#pragma unroll 1
      for (int i = 0; i < D + P; ++i)
        if (mine && i < n) S::ahead(x + int64_t(i * step) * p.out_row, p.c);
    }
    S::fill_table(p, first, table);
    if (!vertical_table()) return;
  }

  const unsigned plane = id / unsigned(p.groups), g = id - plane * unsigned(p.groups);
  const int64_t step_in = strip.up ? -int64_t(p.out_row) : int64_t(p.out_row);
  const int64_t step_out = strip.up ? -int64_t(p.in_row) : int64_t(p.in_row);
  const int o_first = strip.up ? p.v.out - 1 - strip.o0 : strip.o0,
            r_first = strip.up ? p.v.in - 1 - strip.i0 : strip.i0;
  S s(p, int(g), first, id, table);
  const T* x = static_cast<const T*>(p.src) + (int64_t(plane) * p.v.out + o_first) * p.out_row + s.read_at(p, int(g));
  T* y = static_cast<T*>(p.dst) + (int64_t(plane) * p.v.in + r_first) * p.in_row + s.write_at(p, int(g));

  float acc[K][N];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int v = 0; v < N; ++v) acc[k][v] = 0;
  typename S::Row raw0, raw1;
  raw0.clear();
  if (D == 2) raw1.clear();
  if (mine && n > 0) s.load(x, raw0);
  if (D == 2 && mine && n > 1) s.load(x + step_in, raw1);
  if constexpr (P > 0 && !S::sparse) {
#pragma unroll
    for (int i = D; i < D + P; ++i)
      if (mine && i < n) s.ahead(x + i * step_in);
  }
  x += D * step_in;  // the row to load next
  if constexpr (!S::sparse) {
    if (!vertical_table()) return;  // made while the first rows are on their way
  }
  int r = base, o = 0, next = firsts[0];

  const auto add = [&](typename S::Row& raw) __attribute__((always_inline)) {
    float h[N];
    s.reduce(raw, h);
    if constexpr (S::sparse) {  // zero weights on elements that are not read: an Inf there must not count
      float sum = h[0];
#pragma unroll
      for (int v = 1; v < N; ++v) sum += h[v];
      if (sum != sum) s.reduce_nonfinite(x - D * step_in, table, h);
    }
    const Weights<K, float> w = weights[o];
    ++o;
    if (o + D - 1 < n) s.load(x, raw);
    if constexpr (P > 0)
      if (o + D - 1 + P < n) s.ahead(x + P * step_in);
    x += step_in;
    next = firsts[o];
#pragma unroll
    for (int q = 0; q < K; ++q)
#pragma unroll
      for (int v = 0; v < N; ++v) acc[q][v] = K == 1 ? acc[q][v] + h[v] : fmaf(w.w[q], h[v], acc[q][v]);
  };
  const auto row = [&](auto slot) __attribute__((always_inline)) {
    constexpr int k = decltype(slot)::value;
    while (next == r) {
      if (D == 1 || !(o & 1))
        add(raw0);
      else
        add(raw1);
    }
    fold_edges<K, k, N>(acc, r, p.v.in);
    if (r >= strip.i0) {
      s.store(y, p, acc[k]);
      y += step_out;
    }
#pragma unroll
    for (int v = 0; v < N; ++v) acc[k][v] = 0;
    return ++r >= strip.i1;
  };
  while (true) {
    if (row(std::integral_constant<int, 0>())) return;
    if constexpr (K > 1)
      if (row(std::integral_constant<int, 1>())) return;
    if constexpr (K > 2) {
      if (row(std::integral_constant<int, 2>())) return;
      if (row(std::integral_constant<int, 3>())) return;
    }
  }
}

// The cubic weights at a quarter, a = -0.75: of the taps at distance 1.25, 0.25, 0.75, 1.75.
struct Quarter {
  static constexpr float c0 = -27.f / 256, c1 = 225.f / 256, c2 = 67.f / 256, c3 = -9.f / 256;
};
// Weight of the t-th of the 2K outputs (2 for K = 1) that read an input pixel at x2, edges aside.
template <int K>
AEUP_DEV constexpr float x2_weight(int t) {
  if (K == 1) return 1.f;
  if (K == 2) return t == 0 || t == 3 ? 0.25f : 0.75f;
  const int m = t < 4 ? t : 7 - t;
  return m == 0 ? Quarter::c3 : m == 1 ? Quarter::c0 : m == 2 ? Quarter::c2 : Quarter::c1;
}
// The same for the first pixel of the row (from_left; t counts from its window's start), which collects the taps
// clamped onto it, and for the last one, by symmetry, with t counted from the window's end.
template <int K>
AEUP_DEV constexpr float x2_edge_weight(int t) {
  if (K == 2 && t == 1) return 1.f;
  if (K == 4 && t == 3) return Quarter::c1 + Quarter::c2 + Quarter::c3;
  if (K == 4 && t == 4) return Quarter::c1 + Quarter::c0;
  if (K == 4 && t == 5) return Quarter::c2 + Quarter::c3;
  return x2_weight<K>(t);
}
template <int K>
AEUP_DEV constexpr bool x2_edge_differs(int t) {
  return K == 2 ? t == 1 : K == 4 && t >= 3 && t <= 5;
}

// Runs one instance over all planes, in as many launches as its 32-bit thread numbers need.
template <class S, int D, int MB, int P = 0>
const char* launch_walk(const Problem& p, WalkArgs a, int want, size_t table, void* stream) {
  static Residents known;
  constexpr int K = S::K;
  const auto kernel = walk_rows<S, D, MB, P>;
  const int64_t planes = planes_of(p), most = max_threads > a.groups ? max_threads / a.groups : 1;
  want = bounded_rows(a.v, want);
  a.rows = want;
  const auto shared = [&] {
    a.entries = strip_entries(a.v, K, a.rows);
    return strip_tables_bytes<K, float>(a.entries) + table;
  };
  const int64_t slots = resident_blocks(kernel, known, kWalkBlock, shared());
  const int64_t columns = ceil_div((planes < most ? planes : most) * a.groups, kWalkBlock);
  a.rows = fit_rows(a.v.in, want, K == 4 ? 4 : 2, columns, slots);
  a.strips = int(ceil_div(a.v.in, a.rows));
  const size_t bytes = shared();
  const int64_t by_grid = kMaxGrid / a.strips * kWalkBlock / a.groups, at_once = by_grid < most ? by_grid : most;
  if (at_once < 1) return "the grid of the backward kernel is too large";
  using T = typename S::T;
  for (int64_t done = 0; done < planes; done += at_once) {
    const int64_t now = planes - done < at_once ? planes - done : at_once;
    a.src = static_cast<const T*>(p.src) + done * a.v.out * a.out_row;
    a.dst = static_cast<T*>(p.dst) + done * a.v.in * a.in_row;
    a.threads = unsigned(now * a.groups);
    AEUP_LAUNCH(kernel, ceil_div(now * a.groups, kWalkBlock) * a.strips, kWalkBlock, bytes, stream, a);
  }
  return nullptr;
}
inline WalkArgs walk_args(const Problem& p) {
  WalkArgs a{};
  a.src = p.src, a.dst = p.dst;
  a.v = make_map(p, true), a.u = make_map(p, false);
  a.c = int(pixel_of(p));
  a.in_row = int(p.iw * a.c), a.out_row = int(p.ow * a.c);
  a.chunks = 1;
  return a;
}

}  // namespace aeup::back
