// Vertical first, for any scale and any alignment: a thread owns 16 bytes (VP times) of a grad-output row, fetches them
// for the rows of its strip through a ring of cp.async slots that only it touches, and adds each row to its K open
// rows. When a grad-input row is complete (grad-output wide, float), its team (a warp where that is enough, else the
// block) puts it into shared memory and reduces it horizontally with weights transposed by the block itself.
#pragma once
#include "backward_stream_plan.cuh"

namespace aeup::back {

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
// in registers. A thread makes up to NE elements of a grad-input row. aligned: every row is, to 16 bytes. kRing: rows
// in flight.
template <class T, int K, bool NHWC, int NQ, int NE, bool aligned, int kRing>
__global__ void __launch_bounds__(stream_threads(NHWC, sizeof(T)), stream_blocks(K, NHWC, NQ == 0, sizeof(T), aligned))
    stream_rows(const StreamArgs p) {
  constexpr int V = 16 / int(sizeof(T)), VP = stream_vectors(K, NHWC, sizeof(T)), N = VP * V;
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  const int thread = threadIdx.x, threads = blockDim.x;
  const bool by_warp = p.team == 32;
  const int bd = p.team, team = by_warp ? thread / 32 : 0, t = by_warp ? thread & 31 : thread;
  const StreamShared at = stream_shared<K>(p, kRing * VP);
  uint4* ring = reinterpret_cast<uint4*>(shared) + team * kRing * VP * bd + t;
  float* const buffers = reinterpret_cast<float*>(shared + at.buffer);
  float* const buffer = buffers + team * 2 * p.pb * p.pitch;
  float* table = reinterpret_cast<float*>(shared + at.table);
  int* lows = reinterpret_cast<int*>(shared + at.lows);
  auto* weights = reinterpret_cast<Weights<K, float>*>(shared + at.strip);
  int* firsts = reinterpret_cast<int*>(weights + p.entries);

  int b = int(blockIdx.x);
  const auto next_of = [&](const Divider& d) {
    const int whole = d.divide(b), rest = b - whole * int(d.divisor);
    b = whole;
    return rest;
  };
  const Strip strip = strip_of<K>(p.v, next_of(p.by_strips), p.rows);
  const int j0 = next_of(p.by_segs) * p.seg, j1 = min(p.u.in, j0 + p.seg);
  const int c0 = next_of(p.by_slabs) * p.slab_vectors * V;
  int plane0 = (b * p.rounds * p.teams + team) * p.pb;
  AEUP_EXPECT(strip.n < p.entries, "vertical table too short");

  // The grad-output pixels [o0, o1) of the segment, and where they lie in the buffer.
  const int o0 = p.segs == 1 ? 0 : outputs_before<K>(p.u, j0 - K + 1);
  const int o1 = p.segs == 1 ? p.u.out : outputs_before<K>(p.u, j1);
  const bool flat = !NHWC || p.slab_vectors == 0;
  const int c = NHWC ? p.c : 1, apart = flat ? c : p.slab_vectors * V;  // elements of a pixel in the buffer
  const int begin = flat ? o0 * c / V * V : 0, lead = flat ? o0 * c - begin : 0;
  AEUP_EXPECT((flat ? o1 * c - begin : (o1 - o0) * apart) <= p.loaders * N, "row segment too long");

  // What this thread fetches: vectors gf + m * loaders of the segment.
  const int pf = p.by_loaders.divide(t), gf = t - pf * p.loaders;
  const bool writes = pf < p.pb;
  int from[VP], count[VP];  // first element in the row, number of elements
#pragma unroll
  for (int m = 0; m < VP; ++m) {
    const int g = gf + m * p.loaders;
    if (flat) {
      from[m] = begin + g * V;
      count[m] = from[m] < o1 * c ? min(V, p.out_row - from[m]) : 0;
    } else {
      const int pixel = g / p.slab_vectors, channel = c0 + (g - pixel * p.slab_vectors) * V;
      from[m] = (o0 + pixel) * c + channel;
      count[m] = o0 + pixel < o1 ? max(0, min(V, c - channel)) : 0;
    }
    if (!writes) count[m] = 0;
  }
  const int64_t plane_out = int64_t(p.v.out) * p.out_row, plane_in = int64_t(p.v.in) * p.in_row;
  const int64_t step = strip.up ? -int64_t(p.out_row) : int64_t(p.out_row);
  const int first_row = strip.up ? p.v.out - 1 - strip.o0 : strip.o0;
  const T* x = static_cast<const T*>(p.src) + (plane0 + pf) * plane_out + int64_t(first_row) * p.out_row;

  const T* from_row = x;  // the row to fetch next
  bool more = false;      // this thread has a plane in this round
  const auto fetch_row = [&](int slot, int row) __attribute__((always_inline)) {
#pragma unroll
    for (int m = 0; m < VP; ++m)
      if (more && count[m] > 0 && row < strip.n)
        fetch<T, aligned>(ring + (slot * VP + m) * bd, from_row + from[m], count[m], p.align);
    copy_commit();
    from_row += step;
  };
  const auto fill_ring = [&] {
    from_row = x;
    more = pf < p.planes - plane0;
#pragma unroll
    for (int d = 0; d < kRing; ++d) fetch_row(d, d);
  };
#pragma unroll
  for (int m = 0; m < VP; ++m)
    if (!aligned || count[m] < V || pf >= p.planes - plane0) {  // what is never fetched stays zero
#pragma unroll
      for (int d = 0; d < kRing; ++d) ring[(d * VP + m) * bd] = make_uint4(0, 0, 0, 0);
    }
  fill_ring();  // on its way while the tables are made

  // The horizontal weights: lows[j] = first output that reads column j, table[row of j][output - start of j].
  const int stride = table_stride(p);
  const auto start_of = [&](int low) {  // first output of a column's window
    return NHWC ? min(low, o0 + p.capacity - 4 * p.quads) : begin + ((low - begin) & ~3);
  };
  const auto row_of = [&](int j) { return !p.repeat ? j - j0 : (j < 2 ? j : (j < p.u.in - 2 ? 2 : j - p.u.in + 5)); };
  {
    const int lines = 2 * p.teams * p.pb, rows = p.repeat ? 5 : p.seg;
    // Not unrolled, like all that runs once: the code would take longer to fetch than to execute.
#pragma unroll 1
    for (int line = 0; line < lines; ++line)  // the ends, which no row fills
#pragma unroll 1
      for (int i = p.loaders * N + thread; i < p.pitch; i += threads) buffers[line * p.pitch + i] = 0;
#pragma unroll 1
    for (int i = thread; i < rows * stride; i += threads) table[i] = 0;
#pragma unroll 1
    for (int i = thread; i < j1 - j0; i += threads) lows[i] = o1;
  }
  __syncthreads();
  const auto last_tap = [&](int o) {  // the last that has a weight
    float w[K];
    const int s = int(taps<K>(p.u.axis, o, w));
    return K == 2 && w[K - 1] == 0.f ? s : s + K - 1;
  };
#pragma unroll 1
  for (int o = o0 + thread; o < o1; o += threads) {
    const int before = o == o0 ? j0 - 1 : last_tap(o - 1), last = min(last_tap(o), j1 - 1);
    for (int j = max(before + 1, j0); j <= last; ++j) lows[j - j0] = o;
  }
  __syncthreads();
#pragma unroll 1
  for (int o = o0 + thread; o < o1; o += threads) {
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

  // What this thread makes of each row: element t + e * bd of the segments of the team's planes.
  const int wide = NHWC ? (flat ? c : min(apart, c - c0)) : 1, made = (j1 - j0) * wide;
  struct Place {
    int plane, read, row, write;  // float in the buffer, row of the table, element after the team's first row
  };
  const auto plane_of = [&](int i) {  // pb > 1 only where a block has all columns
    return p.pb == 1 ? int(i >= made) : NHWC ? i / made : p.by_seg.divide(i);
  };
  const auto place = [&](int e) {
    const int i = t + e * bd, q = plane_of(i), k = i - q * made, jj = k / wide, ch = k - jj * wide;
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
    float sum = 0, odd = 0;
    const float* a = line + read[e];
    if constexpr (NQ > 0 && !NHWC) {
#pragma unroll
      for (int m = 0; m < NQ; ++m) {
        const float4 f = reinterpret_cast<const float4*>(a)[m], u = w[e * NQ + m];
        sum = fmaf(u.x, f.x, sum), odd = fmaf(u.y, f.y, odd), sum = fmaf(u.z, f.z, sum), odd = fmaf(u.w, f.w, odd);
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
        sum = fmaf(u.x, f.x, sum), odd = fmaf(u.y, f.y, odd), sum = fmaf(u.z, f.z, sum), odd = fmaf(u.w, f.w, odd);
      }
    }
    return sum + odd;
  };

  float acc[K][N];
  int parity = 0;
  for (int round = 0; round < p.rounds && plane0 < p.planes; ++round) {
    const int left = p.planes - plane0;  // planes from here on
    unsigned active = 0;                 // bit e: element e exists
#pragma unroll
    for (int e = 0; e < NE; ++e) active |= unsigned(plane_of(t + e * bd) < min(p.pb, left)) << e;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int v = 0; v < N; ++v) acc[k][v] = 0;
    T* y_row = y;
    int r = base, o = 0, next = firsts[0], slot = 0;
    const auto one = [&](auto slot_of_row) __attribute__((always_inline)) {
      constexpr int k = decltype(slot_of_row)::value;
      while (next == r) {
        copy_wait<kRing - 1>();
        float f[N];
#pragma unroll
        for (int m = 0; m < VP; ++m) {
          Raw<T, V> raw;
          const uint4 bits = ring[(slot * VP + m) * bd];
          raw.w[0] = bits.x, raw.w[1] = bits.y, raw.w[2] = bits.z, raw.w[3] = bits.w;
          raw.unpack(f + m * V);
        }
        const Weights<K, float> wv = weights[o];
        fetch_row(slot, o + kRing);
        next = firsts[++o];
        slot = slot == kRing - 1 ? 0 : slot + 1;
#pragma unroll
        for (int q = 0; q < K; ++q)
#pragma unroll
          for (int v = 0; v < N; ++v) acc[q][v] = K == 1 ? acc[q][v] + f[v] : fmaf(wv.w[q], f[v], acc[q][v]);
      }
      fold_edges<K, k, N>(acc, r, p.v.in);
      if (r >= strip.i0) {
        float* line = buffer + parity * p.pb * p.pitch;
        parity ^= 1;
        if (writes) {
#pragma unroll
          for (int i = 0; i < N; i += 4)
            *reinterpret_cast<float4*>(line + pf * p.pitch + (gf + i / V * p.loaders) * V + i % V) =
                make_float4(acc[k][i], acc[k][i + 1], acc[k][i + 2], acc[k][i + 3]);
        }
        if (by_warp)  // one barrier per row: the two lines are used in turn
          __syncwarp();
        else
          __syncthreads();
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
            float sum = 0, odd = 0;
#pragma unroll 1
            for (int m = 0; m < 4 * p.quads; m += 2) {
              const float u = table[at_e.row + m], v = table[at_e.row + m + 1];
              if (u != 0.f) sum = fmaf(u, line[at_e.read + m * apart], sum);
              if (v != 0.f) odd = fmaf(v, line[at_e.read + (m + 1) * apart], odd);
            }
            store_one<T>(y_row + at_e.write, sum + odd);
          }
        }
        y_row += step_in;
      }
#pragma unroll
      for (int v = 0; v < N; ++v) acc[k][v] = 0;
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
    const int64_t on = p.teams * p.pb;
    plane0 += int(on), x += on * plane_out, y += on * plane_in;
    if (round + 1 < p.rounds) fill_ring();
  }
  copy_wait<0>();
}

// --- host ---

template <class T, int K, bool NHWC, int NQ, int NE, bool aligned,
          int kRing = stream_ring(stream_vectors(K, NHWC, sizeof(T)))>
const char* launch_stream(const Problem& p, const StreamPlan& plan, void* stream) {
  static Residents known;
  const auto kernel = stream_rows<T, K, NHWC, NQ, NE, aligned, kRing>;
  constexpr int VP = stream_vectors(K, NHWC, sizeof(T));
  StreamArgs a = plan.a;
  const int threads = a.team * a.teams, want = plan.want;
  const int64_t planes = planes_of(p), across = int64_t(a.segs) * a.slabs;
  const auto shared = [&](int rows) {
    a.rows = rows;
    a.entries = strip_entries(a.v, K, rows);
    return stream_shared<K>(a, kRing * VP).end;
  };
  const int64_t slots = resident_blocks(kernel, known, threads, shared(smaller(want, a.v.in)));
  const int64_t groups = ceil_div(planes, a.teams * a.pb), blocks = groups * across * ceil_div(a.v.in, want);
  const int64_t rounds = plan.wave ? ceil_div(blocks, slots) : blocks / (8 * slots), least = multiprocessors();
  a.rounds = rounds < 1 ? 1 : rounds > 4 ? 4 : int(rounds);
  int rows = want;  // with a block for every multiprocessor and no third wave, long strips win
  if (blocks < least || (blocks > 2 * slots && !plan.wave && !plan.exact))
    rows = fit_rows(a.v.in, want, K == 4 ? 4 : 2, ceil_div(groups, a.rounds) * across, blocks < least ? least : slots);
  const size_t bytes = shared(rows);
  a.strips = int(ceil_div(a.v.in, a.rows));
  a.by_strips = Divider(a.strips);
  const int64_t by_grid = kMaxGrid / (a.strips * across);  // groups of rounds * pb planes in a launch
  if (by_grid < 1) return "the grid of the backward kernel is too large";
  const int64_t group = int64_t(a.rounds) * a.teams * a.pb, by_number = max_threads / 2 / group;
  const int64_t at_once = (by_number < 1 ? 1 : by_grid < by_number ? by_grid : by_number) * group;
  for (int64_t done = 0; done < planes; done += at_once) {
    a.planes = int(planes - done < at_once ? planes - done : at_once);
    a.src = static_cast<const T*>(p.src) + done * a.v.out * a.out_row;
    a.dst = static_cast<T*>(p.dst) + done * a.v.in * a.in_row;
    const int64_t grid = ceil_div(a.planes, group) * across * a.strips;
    AEUP_LAUNCH(kernel, grid, threads, bytes, stream, a);
  }
  return nullptr;
}

}  // namespace aeup::back
