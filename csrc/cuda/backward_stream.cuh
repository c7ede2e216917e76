// Vertical first, for any scale and any alignment: a thread owns 16 bytes of a grad-output row, fetches them for the
// rows of its strip through a ring of cp.async slots that only it touches, and adds each row to its K open rows. When
// a grad-input row is complete (grad-output wide, float), the block puts it into shared memory and reduces it
// horizontally with weights transposed by the block itself.
#pragma once
#include "backward.cuh"

namespace aeup::back {

inline constexpr int kRing = 6;  // rows in flight

struct StreamArgs {
  const void* src;  // [planes, oh, out_row]
  void* dst;        // [planes, ih, in_row]
  Map v, u;
  int in_row, out_row, c;     // elements of a row and of a pixel
  int rows, strips, entries;  // vertical strips, rows of the vertical table
  int seg, segs;              // grad-input columns of a block
  int slab_vectors, slabs;    // 16-byte vectors of a pixel that a block takes; 0: all channels, rows taken as flat
  int pb, rounds, planes;     // planes that a block takes side by side, and how often it takes the next ones
  int loaders, pitch;         // vectors of a row segment, floats of its buffer
  int quads, capacity;        // weights of a column / 4, pixels that the buffer holds (NHWC)
  int repeat;                 // 1: all columns but two at each edge have the same weights
  int align;                  // bytes that are certain
};
struct StreamShared {  // byte offsets in shared memory
  size_t buffer, table, lows, strip, end;
};
AEUP_HD int table_stride(const StreamArgs& p) { return 4 * (p.quads | 1); }  // floats; odd in quads: no bank conflicts
template <int K>
AEUP_HD StreamShared stream_shared(const StreamArgs& p, int threads) {
  StreamShared s;
  s.buffer = size_t(kRing) * 16 * threads;
  s.table = s.buffer + size_t(2) * p.pb * p.pitch * 4;
  s.lows = s.table + size_t(p.repeat ? 5 : p.seg) * table_stride(p) * 4;
  s.strip = s.lows + size_t(p.seg + 3) / 4 * 16;
  s.end = s.strip + (size_t(p.entries) * (sizeof(Weights<K, float>) + 4) + 4 + 15) / 16 * 16;
  return s;
}

// Most threads of a block, and the least blocks of them on a multiprocessor that leave room for the registers.
constexpr int stream_threads(bool nhwc, size_t element) { return nhwc && element == 4 ? 512 : 256; }
constexpr int stream_blocks(int K, bool nhwc, int NQ, size_t element, bool aligned) {
  const bool narrow = element == 2;
  const int most = nhwc ? (narrow ? 3 : 2) : NQ == 0 || (K < 4 && (!narrow || K == 1)) ? 3 : 2;
  return narrow && !aligned ? most - 1 : most;
}

// Up to 16 bytes (count elements) of a row into a slot.
template <class T, bool aligned>
AEUP_DEV void fetch(uint4* slot, const T* x, int count, int align) {
  constexpr int V = 16 / int(sizeof(T));
  T* to = reinterpret_cast<T*>(slot);
  if constexpr (aligned) {
    copy_async<16>(slot, x);
  } else if (align == 8) {
#pragma unroll
    for (int i = 0; i < V; i += V / 2)
      if (i < count) copy_async<8>(to + i, x + i);
  } else if (align == 4) {
#pragma unroll
    for (int i = 0; i < V; i += V / 4)
      if (i < count) copy_async<4>(to + i, x + i);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) {
        uint32_t w;
        load_words<2>(x + i, &w);
        reinterpret_cast<uint16_t*>(slot)[i] = uint16_t(w);
      }
  }
}

// NHWC: taps lie a pixel apart in the buffer; else (NCHW) a window is `quads` aligned float4. NQ > 0: quads, weights
// in registers. A thread makes up to NE elements of a grad-input row. aligned: every row is, to 16 bytes.
template <class T, int K, bool NHWC, int NQ, int NE, bool aligned>
__global__ void __launch_bounds__(stream_threads(NHWC, sizeof(T)), stream_blocks(K, NHWC, NQ, sizeof(T), aligned))
    stream_rows(const StreamArgs p) {
  constexpr int V = 16 / int(sizeof(T));
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  const int t = threadIdx.x, bd = blockDim.x;
  const StreamShared at = stream_shared<K>(p, bd);
  uint4* ring = reinterpret_cast<uint4*>(shared) + t;
  float* buffer = reinterpret_cast<float*>(shared + at.buffer);
  float* table = reinterpret_cast<float*>(shared + at.table);
  int* lows = reinterpret_cast<int*>(shared + at.lows);
  auto* weights = reinterpret_cast<Weights<K, float>*>(shared + at.strip);
  int* firsts = reinterpret_cast<int*>(weights + p.entries);

  unsigned b = blockIdx.x;
  const Strip strip = strip_of<K>(p.v, int(b % unsigned(p.strips)), p.rows);
  b /= unsigned(p.strips);
  const int j0 = int(b % unsigned(p.segs)) * p.seg, j1 = min(p.u.in, j0 + p.seg);
  b /= unsigned(p.segs);
  const int c0 = p.slab_vectors ? int(b % unsigned(p.slabs)) * p.slab_vectors * V : 0;
  int plane0 = int(b / unsigned(p.slabs)) * p.rounds * p.pb;
  AEUP_EXPECT(strip.n < p.entries, "vertical table too short");

  // The grad-output pixels [o0, o1) of the segment, and where they lie in the buffer.
  const int o0 = p.segs == 1 ? 0 : outputs_before<K>(p.u, j0 - K + 1);
  const int o1 = p.segs == 1 ? p.u.out : outputs_before<K>(p.u, j1);
  const bool flat = !NHWC || p.slab_vectors == 0;
  const int c = NHWC ? p.c : 1, apart = flat ? c : p.slab_vectors * V;  // elements of a pixel in the buffer
  const int begin = flat ? o0 * c / V * V : 0, lead = flat ? o0 * c - begin : 0;
  AEUP_EXPECT((flat ? o1 * c - begin : (o1 - o0) * apart) <= p.loaders * V, "row segment too long");

  // What this thread fetches.
  const int pf = t / p.loaders, gf = t - pf * p.loaders;
  const bool writes = pf < p.pb;
  int from, count;  // first element in the row, number of elements
  if (flat) {
    from = begin + gf * V;
    count = from < o1 * c ? min(V, p.out_row - from) : 0;
  } else {
    const int pixel = gf / p.slab_vectors, channel = c0 + (gf - pixel * p.slab_vectors) * V;
    from = (o0 + pixel) * c + channel;
    count = o0 + pixel < o1 ? max(0, min(V, c - channel)) : 0;
  }
  if (!writes) count = 0;
  const int64_t plane_out = int64_t(p.v.out) * p.out_row, plane_in = int64_t(p.v.in) * p.in_row;
  const int64_t step = strip.up ? -int64_t(p.out_row) : int64_t(p.out_row);
  const int first_row = strip.up ? p.v.out - 1 - strip.o0 : strip.o0;
  const T* x = static_cast<const T*>(p.src) + (plane0 + pf) * plane_out + int64_t(first_row) * p.out_row + from;

  const auto fetches = [&] { return count > 0 && pf < p.planes - plane0; };
  const T* from_row;  // the row to fetch next
  const auto fill_ring = [&] {
    from_row = x;
    const bool yes = fetches();
#pragma unroll
    for (int d = 0; d < kRing; ++d) {
      if (yes && d < strip.n) fetch<T, aligned>(ring + d * bd, from_row, count, p.align);
      copy_commit();
      from_row += step;
    }
  };
  if (!aligned || count < V) {  // what is never fetched stays zero
#pragma unroll
    for (int d = 0; d < kRing; ++d) ring[d * bd] = make_uint4(0, 0, 0, 0);
  }
  fill_ring();  // on its way while the tables are made

  // The horizontal weights: lows[j] = first output that reads column j, table[row of j][output - start of j].
  const int stride = table_stride(p);
  const auto start_of = [&](int low) {  // first output of a column's window
    return NHWC ? min(low, o0 + p.capacity - 4 * p.quads) : begin + ((low - begin) & ~3);
  };
  const auto row_of = [&](int j) { return !p.repeat ? j - j0 : (j < 2 ? j : (j < p.u.in - 2 ? 2 : j - p.u.in + 5)); };
  {
    const int rows = p.repeat ? 5 : p.seg, all = 2 * p.pb * p.pitch + rows * stride;  // buffer and table
    for (int i = t; i < all; i += bd) buffer[i] = 0;
    for (int i = t; i < j1 - j0; i += bd) lows[i] = o1;
  }
  __syncthreads();
  const auto last_tap = [&](int o) {  // the last that has a weight
    float w[K];
    const int s = int(taps<K>(p.u.axis, o, w));
    return K == 2 && w[K - 1] == 0.f ? s : s + K - 1;
  };
  for (int o = o0 + t; o < o1; o += bd) {
    const int before = o == o0 ? j0 - 1 : last_tap(o - 1), last = min(last_tap(o), j1 - 1);
    for (int j = max(before + 1, j0); j <= last; ++j) lows[j - j0] = o;
  }
  __syncthreads();
  for (int o = o0 + t; o < o1; o += bd) {
    float w[K];
    const int s = int(taps<K>(p.u.axis, o, w));
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int j = max(0, min(s + k, p.u.in - 1));
      if (j < j0 || j >= j1 || w[k] == 0.f) continue;
      const int row = row_of(j), i = o - start_of(lows[j - j0]);
      AEUP_EXPECT(i >= 0 && i < 4 * p.quads, "window too narrow");
      if (!p.repeat || row != 2 || j == max(j0, 2)) table[row * stride + i] += w[k];
    }
  }
  const int base = strip.i0 - K + 1;
  strip_tables<K>(p.v.axis, strip.o0, strip.n, strip.up, base, 0, weights, firsts);

  // What this thread makes of each row: element t + e * bd of the segments of the block's planes.
  const int wide = NHWC ? (flat ? c : min(apart, c - c0)) : 1, made = (j1 - j0) * wide;
  struct Place {
    int plane, read, row, write;  // float in the buffer, row of the table, element after the block's first row
  };
  const auto place = [&](int e) {
    const int i = t + e * bd, q = i / made, k = i - q * made, jj = k / wide, ch = k - jj * wide;
    const bool ok = q < p.pb;
    const int start = ok ? start_of(lows[jj]) : o0;
    return Place{ok ? q : INT_MAX, ok ? q * p.pitch + (NHWC ? lead + (start - o0) * apart + ch : start - begin) : 0,
                 ok ? row_of(j0 + jj) * stride : 0, ok ? q * int(plane_in) + (j0 + jj) * c + c0 + ch : 0};
  };
  int read[NE], row[NE], write[NE];
  float4 w[NQ > 0 ? NE * NQ : 1];
#pragma unroll
  for (int e = 0; e < NE; ++e) {
    const Place at_e = place(e);
    read[e] = at_e.read, row[e] = at_e.row, write[e] = at_e.write;
    if constexpr (NQ > 0) {
#pragma unroll
      for (int m = 0; m < NQ; ++m) w[e * NQ + m] = reinterpret_cast<const float4*>(table + row[e])[m];
    }
  }
  T* y = static_cast<T*>(p.dst) + plane0 * plane_in + int64_t(strip.up ? p.v.in - 1 - strip.i0 : strip.i0) * p.in_row;
  const int64_t step_in = strip.up ? -int64_t(p.in_row) : int64_t(p.in_row);

  const auto horizontal = [&](const float* line, int e) __attribute__((always_inline)) {
    float sum = 0;
    const float* a = line + read[e];
    if constexpr (NQ > 0 && !NHWC) {
#pragma unroll
      for (int m = 0; m < NQ; ++m) {
        const float4 f = reinterpret_cast<const float4*>(a)[m], u = w[e * NQ + m];
        sum = fmaf(u.x, f.x, sum), sum = fmaf(u.y, f.y, sum), sum = fmaf(u.z, f.z, sum), sum = fmaf(u.w, f.w, sum);
      }
    } else {
      const float4* us = reinterpret_cast<const float4*>(table + row[e]);
#pragma unroll(K == 4 ? 2 : 4)
      for (int m = 0; m < p.quads; ++m) {
        const float4 u = us[m];
        float4 f;
        if constexpr (NHWC) {
          f = {a[0], a[apart], a[2 * apart], a[3 * apart]};
          a += 4 * apart;
        } else {
          f = reinterpret_cast<const float4*>(a)[m];
        }
        sum = fmaf(u.x, f.x, sum), sum = fmaf(u.y, f.y, sum), sum = fmaf(u.z, f.z, sum), sum = fmaf(u.w, f.w, sum);
      }
    }
    return sum;
  };

  float acc[K][V];
  int parity = 0;
  for (int round = 0; round < p.rounds && plane0 < p.planes; ++round) {
    const int left = p.planes - plane0;  // planes from here on
    const bool more = fetches();
    unsigned active = 0;  // bit e: element e exists
#pragma unroll
    for (int e = 0; e < NE; ++e) active |= unsigned((t + e * bd) / made < min(p.pb, left)) << e;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int v = 0; v < V; ++v) acc[k][v] = 0;
    T* y_row = y;
    int r = base, o = 0, next = firsts[0], slot = 0;
    const auto one = [&](auto slot_of_row) __attribute__((always_inline)) {
      constexpr int k = decltype(slot_of_row)::value;
      while (next == r) {
        copy_wait<kRing - 1>();
        Raw<T, V> raw;
        const uint4 bits = ring[slot * bd];
        raw.w[0] = bits.x, raw.w[1] = bits.y, raw.w[2] = bits.z, raw.w[3] = bits.w;
        float f[V];
        raw.unpack(f);
        const Weights<K, float> wv = weights[o];
        if (more && o + kRing < strip.n) fetch<T, aligned>(ring + slot * bd, from_row, count, p.align);
        copy_commit();
        from_row += step;
        next = firsts[++o];
        slot = slot == kRing - 1 ? 0 : slot + 1;
#pragma unroll
        for (int q = 0; q < K; ++q)
#pragma unroll
          for (int v = 0; v < V; ++v) acc[q][v] = K == 1 ? acc[q][v] + f[v] : fmaf(wv.w[q], f[v], acc[q][v]);
      }
      fold_edges<K, k, V>(acc, r, p.v.in);
      if (r >= strip.i0) {
        float* line = buffer + parity * p.pb * p.pitch;
        parity ^= 1;
        if (writes) {
          float4* put = reinterpret_cast<float4*>(line + pf * p.pitch + gf * V);
#pragma unroll
          for (int v = 0; v < V; v += 4)
            put[v / 4] = make_float4(acc[k][v], acc[k][v + 1], acc[k][v + 2], acc[k][v + 3]);
        }
        __syncthreads();  // one barrier per row: the two lines are used in turn
        unsigned again = 0;
#pragma unroll
        for (int e = 0; e < NE; ++e)
          if (active >> e & 1) {
            const float sum = horizontal(line, e);
            if (sum == sum)
              store_one<T>(y_row + write[e], sum);
            else
              again |= 1u << e;
          }
        if (again) {  // perhaps a zero weight met an Inf that the element does not read: once more without those
#pragma unroll 1
          for (int e = 0; e < NE; ++e) {
            if (!(again >> e & 1)) continue;
            const Place at_e = place(e);
            float sum = 0;
#pragma unroll 1
            for (int m = 0; m < 4 * p.quads; ++m) {
              const float u = table[at_e.row + m];
              if (u != 0.f) sum = fmaf(u, line[at_e.read + m * apart], sum);
            }
            store_one<T>(y_row + at_e.write, sum);
          }
        }
        y_row += step_in;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) acc[k][v] = 0;
      return ++r >= strip.i1;
    };
    while (true) {
      if (one(std::integral_constant<int, 0>())) break;
      if constexpr (K > 1)
        if (one(std::integral_constant<int, 1>())) break;
      if constexpr (K > 2) {
        if (one(std::integral_constant<int, 2>())) break;
        if (one(std::integral_constant<int, 3>())) break;
      }
    }
    plane0 += p.pb, x += p.pb * plane_out, y += p.pb * plane_in;
    if (round + 1 < p.rounds) fill_ring();
  }
  copy_wait<0>();
}

// --- host ---

// Cuts the rows into segments and slabs for blocks of about `want`, at most `most` threads that make `made` elements
// each, and returns the number of threads.
inline int shape_block(StreamArgs& a, const Problem& p, int K, int want, int most, int made) {
  const int es = element_size(p.dtype), V = 16 / es;
  const int64_t pixel = int64_t(a.c) * es;
  const bool slabs = a.c > 1 && ((pixel > 128 && pixel % 16 == 0) || pixel > 512);
  if (slabs) {
    a.slabs = int(ceil_div(a.c, 8 * V));
    a.slab_vectors = int(ceil_div(ceil_div(a.c, a.slabs), V));
    a.slabs = int(ceil_div(a.c, a.slab_vectors * V));
  }
  a.align = alignment_of(p.src, slabs ? pixel : int64_t(a.out_row) * es);
  int64_t each = 0;  // threads of a plane
  const auto cut = [&](int segs) {
    a.seg = int(ceil_div(a.u.in, segs)), a.segs = int(ceil_div(a.u.in, a.seg));
    const int64_t reach = most_outputs(a.u, a.seg + K - 1), pixels = a.segs == 1 || reach > a.u.out ? a.u.out : reach;
    const int64_t loaders = slabs ? pixels * a.slab_vectors : (pixels * a.c + (a.segs == 1 ? 0 : V - 1) + V - 1) / V;
    const int64_t makers = ceil_div(int64_t(a.seg) * (slabs ? a.slab_vectors * V : a.c), made);
    a.loaders = int(loaders);
    each = loaders > makers ? loaders : makers;
    return each <= most;
  };
  int segs = 1;
  while (!cut(segs)) {
    if (segs >= a.u.in) {
      if (a.slab_vectors < 2) return 0;
      a.slab_vectors /= 2, a.slabs = int(ceil_div(a.c, a.slab_vectors * V)), segs = 1;
      continue;
    }
    const int64_t guess = segs * each / most;  // never past the smallest number that fits
    segs = guess > segs + 1 && guess <= a.u.in ? int(guess) : segs + 1;
  }
  a.pb = a.segs == 1 && each < want ? int(want / each) : 1;
  if (a.pb > planes_of(p)) a.pb = int(planes_of(p));
  if (a.pb * p.ih * a.in_row > 0x7fffffff) a.pb = 1;  // 32-bit offsets among the planes of a block
  return int(ceil_div(a.pb * each, 32)) * 32;
}

constexpr int quads_in_registers(int K) { return K == 1 ? 2 : K == 2 ? 3 : 4; }
constexpr int made_by_thread(bool large, int element) { return large || element == 4 ? 2 : 3; }  // NE

struct StreamPlan {
  StreamArgs a;
  int threads, want;  // want: rows of a strip
  bool large;         // NCHW: the weights do not fit the registers
  const char* refused;
};
// float4 of a column's window in NCHW, which starts at a multiple of 16 bytes.
inline int nchw_quads(const Map& u, int K) {
  if (u.integer && u.integer % 4 == 0) {
    const int ahead = K == 1   ? 0
                      : K == 2 ? u.integer / 2
                               : 3 * u.integer / 2;  // column j reads from integer * j - ahead
    return int(ceil_div((4 - ahead % 4) % 4 + K * u.integer, 4));
  }
  return int(ceil_div(most_outputs(u, K) + 3, 4));
}
inline StreamPlan plan_stream(const Problem& p) {
  StreamPlan plan{};
  StreamArgs& a = plan.a;
  const int K = taps_of(p.mode), es = element_size(p.dtype), V = 16 / es;
  const bool nhwc = pixel_of(p) > 1, narrow = es == 2;
  a.src = p.src, a.dst = p.dst;
  a.v = make_map(p, true), a.u = make_map(p, false);
  a.c = int(pixel_of(p));
  a.in_row = int(p.iw * a.c), a.out_row = int(p.ow * a.c);
  a.slabs = 1;
  a.repeat = a.u.integer && a.u.integer % 4 == 0 && a.u.in > 5;
  if (nhwc) {
    a.quads = int(ceil_div(most_outputs(a.u, K), 4));
    plan.threads = shape_block(a, p, K, narrow ? 256 : 384, narrow ? 256 : 480, made_by_thread(true, es));
    const int apart = a.slab_vectors ? a.slab_vectors * V : a.c, pixels = (a.loaders * V + apart - 1) / apart;
    a.capacity = pixels > 4 * a.quads ? pixels : 4 * a.quads;
    a.pitch = (V + a.capacity * apart + 3) / 4 * 4;
    plan.want = narrow ? 16 : 32;  // here and below: as in the fastest prototypes on an H100
  } else {
    a.quads = nchw_quads(a.u, K);
    plan.large = a.quads > quads_in_registers(K);
    if (!plan.large) a.quads = quads_in_registers(K);
    plan.threads = shape_block(a, p, K, 128, stream_threads(false, es), made_by_thread(plan.large, es));
    a.pitch = a.loaders * V + 4 * a.quads;
    const bool steep = a.v.per >= 4;
    plan.want = K == 1 ? 3 : K == 2 ? (steep ? 4 : 8) : steep ? 16 : narrow ? 56 : 8;
  }
  if (!plan.threads) {
    plan.refused = "a column and its neighbours do not fit a block";
    return plan;
  }
  plan.want = bounded_rows(a.v, plan.want);
  a.entries = strip_entries(a.v, K, 2 * plan.want);
  const size_t bytes = K == 1   ? stream_shared<1>(a, plan.threads).end
                       : K == 2 ? stream_shared<2>(a, plan.threads).end
                                : stream_shared<4>(a, plan.threads).end;
  if (bytes > (96 << 10)) plan.refused = "a row segment needs more than 96 KiB of shared memory";
  return plan;
}

template <class T, int K, bool NHWC, int NQ, int NE, bool aligned>
const char* launch_stream(const Problem& p, const StreamPlan& plan, void* stream) {
  static std::atomic<uint64_t> known{0};
  const auto kernel = stream_rows<T, K, NHWC, NQ, NE, aligned>;
  StreamArgs a = plan.a;
  const int threads = plan.threads, want = plan.want;
  const int64_t planes = planes_of(p), across = int64_t(a.segs) * a.slabs;
  const auto shared = [&](int rows) {
    a.rows = rows;
    a.entries = strip_entries(a.v, K, rows);
    return stream_shared<K>(a, threads).end;
  };
  const int64_t slots = resident_blocks(kernel, known, threads, shared(smaller(want, a.v.in)));
  const int64_t groups = ceil_div(planes, a.pb);
  const int64_t blocks = groups * across * ceil_div(a.v.in, want) / (8 * slots);
  a.rounds = blocks < 1 ? 1 : blocks > 4 ? 4 : int(blocks);
  const size_t bytes = shared(fit_rows(a.v.in, want, K == 4 ? 4 : 2, ceil_div(groups, a.rounds) * across, slots));
  a.strips = int(ceil_div(a.v.in, a.rows));
  const int64_t by_grid = kMaxGrid / (a.strips * across);  // groups of rounds * pb planes in a launch
  if (by_grid < 1) return "the grid of the backward kernel is too large";
  const int64_t group = int64_t(a.rounds) * a.pb, by_number = max_threads / 2 / group;
  const int64_t at_once = (by_number < 1 ? 1 : by_grid < by_number ? by_grid : by_number) * group;
  for (int64_t done = 0; done < planes; done += at_once) {
    a.planes = int(planes - done < at_once ? planes - done : at_once);
    a.src = static_cast<const T*>(p.src) + done * a.v.out * a.out_row;
    a.dst = static_cast<T*>(p.dst) + done * a.v.in * a.in_row;
    const int64_t grid = ceil_div(a.planes, a.rounds * a.pb) * across * a.strips;
    AEUP_LAUNCH(kernel, grid, threads, bytes, stream, a);
  }
  return nullptr;
}

}  // namespace aeup::back
