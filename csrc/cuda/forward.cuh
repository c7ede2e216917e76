// The row-sliding skeleton of the fast forward kernels. A thread owns V adjacent output elements and walks down a strip
// of output rows. Each input row is interpolated horizontally once, into a ring of K rows in registers; an output row
// is then K multiply-adds per element. Ring slots are static (the loop is unrolled by K): the vertical weights arrive
// rotated. Rows and columns beyond an edge are virtual: the edge row or column is read again.
// Odd strips walk upward, so that the strips on both sides of a boundary read its rows at about the same time (L2).
#pragma once
#include "common.cuh"

namespace aeup {

constexpr int kThreads = 128;

// x [planes, v.in, h.in, c] -> y [planes, v.out, h.out, c]; c = 1 for NCHW. S: index and weight type.
template <class S>
struct Sliding {
  const void* x;
  void* y;
  Axis<S> v, h;
  int64_t plane_in, plane_out;  // elements of a plane
  int row_in, row_out;          // elements of a row
  int planes, per_thread;       // planes that a thread does one after the other
  int threads, rows;            // threads of a strip: ceil(planes / per_thread) * groups; output rows of a strip
  Divider strips, groups, c;    // groups: threads across an output row
  Divider chunks;               // c / V (channels-last vectors only)
};

// Where a thread is: its strip (possibly counted from the bottom), its plane and its columns.
struct Place {
  int first_row, rows, plane, group;
  bool up, alive;
};
template <class S>
AEUP_DEV Place place_of(const Sliding<S>& p) {
  Place a;
  const int block = p.strips.divide(blockIdx.x), strip = int(blockIdx.x) - block * int(p.strips.divisor);
  const int thread = block * kThreads + int(threadIdx.x), out = int(p.v.out);
  a.first_row = strip * p.rows;
  a.rows = min(p.rows, out - a.first_row);
  a.up = strip & 1;
  if (a.up) a.first_row = out - a.first_row - a.rows;
  a.alive = thread < p.threads;
  const int q = p.groups.divide(thread);
  a.plane = q * p.per_thread;
  a.group = thread - q * int(p.groups.divisor);
  return a;
}

// --- modes with arithmetic (K = 2, 4) ---
// Source: struct R (raw input of one row), init(p, group) sets `base`, the element of a row where `load`'s pointer
// stands, load(row + base, R&), horizontal(R, S[V]). kManyPlanes: init is dear, a thread may do several planes.
// kAhead > 0: so many rows beyond the one being loaded are on their way to L2, by the source's ahead(row + base).
// kStaged: groups % 32 == 0, so that a warp's 32 V elements are contiguous; they become 16-byte stores through shared
// memory (V elements are no power of two of bytes).
template <class T, int K, int V, int A, int kMinBlocks, bool kStaged, class Source, int kAhead>
__global__ void __launch_bounds__(kThreads, kMinBlocks) slide(Sliding<Acc<T>> p) {
  using S = Acc<T>;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  Weights<K, S>* const weights = reinterpret_cast<Weights<K, S>*>(shared);
  int* const last_rows = reinterpret_cast<int*>(weights + p.rows);  // row that completes each output row
  const Place at = place_of(p);
  S unused[K];
  const int first = row_taps<K>(p.v, at.first_row, at.up, unused), bottom = int(p.v.in) - 1;
  const int step_in = at.up ? -p.row_in : p.row_in, step_out = at.up ? -p.row_out : p.row_out;
  const int start = min(max(first, 0), bottom), lane = int(threadIdx.x & 31);
  Source source;
  source.init(p, at.group);
  const T* x = static_cast<const T*>(p.x) + at.plane * p.plane_in +
               (int64_t(at.up ? bottom - start : start) * p.row_in + source.base);
  T* y = static_cast<T*>(p.y) + at.plane * p.plane_out +
         (int64_t(at.up ? int(p.v.out) - 1 - at.first_row : at.first_row) * p.row_out +
          (kStaged ? at.group - lane : at.group) * V);
  typename Source::R raw;
  if (at.alive) source.load(x, raw);  // in flight while the block makes its table
  if constexpr (kAhead > 0) {
#pragma unroll
    for (int i = 1; i <= kAhead; ++i)
      if (at.alive && start + i <= bottom) source.ahead(x + int64_t(i) * step_in);
  }
  strip_tables<K>(p.v, at.first_row, at.rows, at.up, first, K - 1, weights, last_rows);
  if (!at.alive) return;
  const int last = last_rows[at.rows - 1];
  [[maybe_unused]] unsigned char* const stage =
      shared + strip_tables_bytes<K, S>(p.rows) + (threadIdx.x / 32) * (32 * V * sizeof(T));

  const auto emit = [&](const S(&ring)[K][V], const Weights<K, S>& w, T* out) {
    S sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] = w.w[0] * ring[0][v];
#pragma unroll
      for (int i = 1; i < K; ++i) sum[v] = w.w[i] * ring[i][v] + sum[v];
    }
    Raw<T, V, A> q;
    q.pack(sum);
    if constexpr (kStaged) {
      constexpr int kVectors = 32 * V * int(sizeof(T)) / 16, kWords = V * int(sizeof(T)) / 4;
      uint32_t* const words = reinterpret_cast<uint32_t*>(stage);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[lane * kWords + i] = q.w[i];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kVectors; i += 32)
        if (i + lane < kVectors) store_words<16>(reinterpret_cast<uint4*>(out) + i + lane, words + 4 * (i + lane));
    } else {
      q.store(out);
    }
  };
  const auto one_plane = [&](const T* in, T* out) {
    int r = first, o = 0, due = last_rows[0];
    S ring[K][V];
    const auto row = [&](S(&slot)[V]) {  // the slot is a constant: the ring stays in registers
      source.horizontal(raw, slot);
      if (r < last) {  // in flight while the outputs that row r completes are made
        in += unsigned(r) < unsigned(bottom) ? step_in : 0;  // beyond an edge: the same row again
        source.load(in, raw);
        if constexpr (kAhead > 0)
          if (r >= 0 && r + 1 + kAhead <= min(last, bottom)) source.ahead(in + int64_t(kAhead) * step_in);
      }
      while (due == r) {
        emit(ring, weights[o], out);
        out += step_out;
        due = last_rows[++o];
      }
      return ++r > last;
    };
    while (true) {
      if (row(ring[0]) || row(ring[1])) return;
      if constexpr (K == 4)
        if (row(ring[2]) || row(ring[3])) return;
    }
  };
  if constexpr (!Source::kManyPlanes) {
    one_plane(x, y);
  } else {
    for (int planes = min(p.per_thread, p.planes - at.plane);;) {
      one_plane(x, y);
      if (--planes <= 0) return;
      x += p.plane_in;
      y += p.plane_out;
      source.load(x, raw);
    }
  }
}

// --- nearest (bits only) ---
// Source: struct R, init and load as above, expand(R, Raw<T, V>&).
template <class T, int V, class Source>
__global__ void __launch_bounds__(kThreads) slide_nearest(Sliding<float> p) {
  AEUP_DYNAMIC_SHARED(int, rows);
  const Place at = place_of(p);
  float unused;
  const int first = row_taps<1>(p.v, at.first_row, at.up, &unused);
  const int step_in = at.up ? -p.row_in : p.row_in, step_out = at.up ? -p.row_out : p.row_out;
  Source source;
  source.init(p, at.group);
  const T* x = static_cast<const T*>(p.x) + at.plane * p.plane_in +
               (int64_t(at.up ? int(p.v.in) - 1 : 0) * p.row_in + source.base);
  T* y = static_cast<T*>(p.y) + at.plane * p.plane_out +
         (int64_t(at.up ? int(p.v.out) - 1 - at.first_row : at.first_row) * p.row_out + at.group * V);
  typename Source::R raw;
  if (at.alive) source.load(x + int64_t(first) * step_in, raw);  // in flight while the block makes its table
  for (int i = threadIdx.x; i <= at.rows; i += kThreads)
    rows[i] = i == at.rows ? INT_MAX : row_taps<1>(p.v, at.first_row + i, at.up, &unused);
  __syncthreads();
  if (!at.alive) return;
  for (int planes = min(p.per_thread, p.planes - at.plane);;) {
    T* out = y;
    for (int o = 0; o < at.rows;) {
      Raw<T, V> q;
      source.expand(raw, q);
      int end = o + 1;
      while (rows[end] == rows[o]) ++end;
      if (end < at.rows) source.load(x + int64_t(rows[end]) * step_in, raw);
      for (; o < end; ++o, out += step_out) q.store(out);
    }
    if (--planes <= 0) return;
    x += p.plane_in;
    y += p.plane_out;
    source.load(x + int64_t(first) * step_in, raw);
  }
}

// --- host: the grid ---
// How long a strip is. Short strips balance better and keep their halo in L2; long ones interpolate fewer rows twice.
// The lengths are those that prototypes on an H100 found.
struct Tuning {
  int rows;         // wanted length of a strip, in output rows
  int fewest;       // never shorter, to fill a small device
  int per_thread;   // planes of a thread where there are many
  bool any_length;  // any length that fills the device a whole number of times; else only near `rows`
  int waves = 8;    // from this many waves of blocks on, the length stays as wanted
};

template <class S>
void fit(Sliding<S>* p, const Tuning& t, int64_t resident) {
  constexpr int64_t kLongest = 96, kStart = 10;  // kStart: cost of starting a strip, in rows
  const int64_t out = p->v.out, groups = p->groups.divisor;
  const auto across = [&] { return ceil_div(ceil_div(p->planes, p->per_thread) * groups, kThreads); };
  int64_t strips = ceil_div(out, t.rows);
  p->per_thread = t.per_thread;
  while (p->per_thread > 1 && across() * strips < 6 * resident) p->per_thread /= 2;
  if (strips * across() < resident) {
    const int64_t fill = resident / across(), most = ceil_div(out, t.fewest);
    strips = fill < most ? fill : most;
  } else if (strips * across() < t.waves * resident) {
    const int64_t low = t.any_length ? t.fewest : t.rows * 2 / 3, high = t.any_length ? kLongest : t.rows * 3 / 2;
    int64_t least = INT64_MAX;
    for (int64_t wave = 1; wave <= t.waves; ++wave) {
      const int64_t s = wave * resident / across(), rows = s ? ceil_div(out, s) : high + 1;
      if (rows > high || rows < low || wave * (rows + kStart) >= least) continue;
      least = wave * (rows + kStart);
      strips = s;
    }
  }
  if (strips < 1) strips = 1;
  p->rows = int(ceil_div(out, strips));
  p->strips = Divider(ceil_div(out, p->rows));
  p->threads = int(ceil_div(p->planes, p->per_thread) * groups);
}

template <class S>
Sliding<S> sliding_of(const Problem& p, int v) {
  const int64_t c = p.channels_last ? p.c : 1;
  Sliding<S> s;
  s.x = p.src, s.y = p.dst;
  s.v = make_axis<S>(p, true, true), s.h = make_axis<S>(p, false, true);
  s.planes = int(p.channels_last ? p.n : p.n * p.c);
  s.row_in = int(p.iw * c), s.row_out = int(p.ow * c);
  s.plane_in = p.ih * s.row_in, s.plane_out = p.oh * s.row_out;
  s.groups = Divider(s.row_out / v), s.c = Divider(c), s.chunks = Divider(c < v ? 1 : c / v);
  s.per_thread = 1;
  return s;
}
template <class S>
int64_t grid_of(const Sliding<S>& s) {
  return ceil_div(s.threads, kThreads) * s.strips.divisor;
}

template <class T, int K, int V, int kMinBlocks, bool kStaged, class Source, int kAhead = 0>
const char* launch_slide(const Problem& p, const Tuning& tuning, void* stream) {
  using S = Acc<T>;
  const auto kernel = slide<T, K, V, widest_access(V * int(sizeof(T))), kMinBlocks, kStaged, Source, kAhead>;
  const size_t staged = kStaged ? size_t(kThreads) * V * sizeof(T) : 0;
  static Residents known;
  Sliding<S> s = sliding_of<S>(p, V);
  fit(&s, tuning, resident_blocks(kernel, known, kThreads, staged + strip_tables_bytes<K, S>(tuning.rows)));
  AEUP_LAUNCH(kernel, grid_of(s), kThreads, (strip_tables_bytes<K, S>(s.rows) + staged), stream, s);
  return nullptr;
}

template <class T, int V, class Source>
const char* launch_nearest(const Problem& p, const Tuning& tuning, void* stream) {
  const auto kernel = slide_nearest<T, V, Source>;
  static Residents known;
  Sliding<float> s = sliding_of<float>(p, V);
  fit(&s, tuning, resident_blocks(kernel, known, kThreads, 1024));
  AEUP_LAUNCH(kernel, grid_of(s), kThreads, (size_t(s.rows) + 1) * sizeof(int), stream, s);
  return nullptr;
}

}  // namespace aeup
