// How the vertical-first backward cuts a problem into blocks (see backward_stream.cuh).
#pragma once
#include "backward.cuh"

namespace aeup::back {

struct StreamArgs {
  const void* src;  // [planes, oh, out_row]
  void* dst;        // [planes, ih, in_row]
  Map v, u;
  int in_row, out_row, c;     // elements of a row and of a pixel
  int rows, strips, entries;  // vertical strips, rows of the vertical table
  int seg, segs;              // grad-input columns of a block
  int slab_vectors, slabs;    // 16-byte vectors of a pixel that a block takes; 0: all channels, rows taken as flat
  int team, teams;            // threads that share rows (32 or the block), and how many such teams a block has
  int pb, rounds, planes;     // planes that a team takes side by side, and how often the block takes the next ones
  int loaders, pitch;         // threads that fetch a row segment, floats of its buffer
  int quads, capacity;        // weights of a column / 4, pixels that the buffer holds (NHWC)
  int repeat;                 // 1: all columns but two at each edge have the same weights
  int align;                  // bytes that are certain
  Divider by_strips, by_segs, by_slabs, by_loaders, by_seg;
};
struct StreamShared {  // byte offsets in shared memory
  size_t buffer, table, lows, strip, end;
};
AEUP_HD int table_stride(const StreamArgs& p) { return 4 * (p.quads | 1); }  // floats; odd in quads: no bank conflicts
template <int K>
AEUP_HD StreamShared stream_shared(const StreamArgs& p, int slots) {  // slots: 16-byte ring slots of a thread
  StreamShared s;
  s.buffer = size_t(slots) * 16 * p.team * p.teams;
  s.table = s.buffer + size_t(2) * p.teams * p.pb * p.pitch * 4;
  s.lows = s.table + size_t(p.repeat ? 5 : p.seg) * table_stride(p) * 4;
  s.strip = s.lows + size_t(p.seg + 3) / 4 * 16;
  s.end = s.strip + (size_t(p.entries) * (sizeof(Weights<K, float>) + 4) + 4 + 15) / 16 * 16;
  return s;
}

// What is best on an H100 (K taps, NHWC or not, element size in bytes). large: weights in shared memory.
constexpr int stream_vectors(int K, bool nhwc, int element) { return nhwc && element == 4 && K == 4 ? 2 : 1; }  // VP
constexpr int stream_ring(int vectors) { return vectors == 2 ? 4 : 6; }  // rows in flight
// Where a multiprocessor has few threads and their rows overlap by half: more of them, if shared memory allows.
constexpr int stream_deep(int K, bool nhwc, int element, bool aligned) {
  return nhwc && K == 4 && aligned ? (element == 4 ? 6 : 10) : stream_ring(stream_vectors(K, nhwc, element));
}
constexpr int quads_in_registers(int K) { return K == 1 ? 2 : K == 2 ? 3 : 4; }
constexpr int made_by_thread(bool large, int element) { return large || element == 4 ? 2 : 3; }  // NE
// Most threads of a block, and the least blocks of them on a multiprocessor that leave room for the registers.
constexpr int stream_threads(bool nhwc, int element) { return nhwc && element == 4 ? 512 : 256; }
constexpr int stream_blocks(int K, bool nhwc, bool large, int element, bool aligned) {
  const bool narrow = element == 2;
  if (nhwc && K == 4) return narrow && aligned ? 2 : 1;
  const int most = nhwc ? (narrow ? 3 : 2) : large || K == 1 ? 3 : 2;
  return narrow && !aligned ? most - 1 : most;
}

// --- host ---

// Cuts the rows into segments and slabs for blocks of about `want`, at most `most` threads that fetch `vectors` and
// make `made` elements each, and the block into teams; false where nothing fits.
inline bool shape_block(StreamArgs& a, const Problem& p, int K, int want, int most, int vectors, int made) {
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
    a.loaders = int(ceil_div(loaders, vectors));
    each = a.loaders > makers ? a.loaders : makers;
    return each <= most;
  };
  int segs = 1;
  while (!cut(segs)) {
    if (segs >= a.u.in) {
      if (a.slab_vectors < 2) return false;
      a.slab_vectors /= 2, a.slabs = int(ceil_div(a.c, a.slab_vectors * V)), segs = 1;
      continue;
    }
    const int64_t guess = segs * each / most;  // never past the smallest number that fits
    segs = guess > segs + 1 && guess <= a.u.in ? int(guess) : segs + 1;
  }
  // Warps that need not wait for each other, where one holds a plane with few threads to spare.
  const bool by_warp = K > 1 && a.segs == 1 && a.c == 1 && each <= 32 && 32 % each < 8;
  const int64_t room = by_warp ? 32 : want;
  a.pb = a.segs == 1 && each < room ? int(room / each) : 1;
  if (a.pb > planes_of(p)) a.pb = int(planes_of(p));
  if (a.pb * p.ih * a.in_row > 0x7fffffff) a.pb = 1;  // 32-bit offsets among the planes of a team
  a.team = int(ceil_div(a.pb * each, 32)) * 32;
  a.teams = by_warp ? smaller(want / 32, int(ceil_div(planes_of(p), a.pb))) : 1;
  a.by_segs = Divider(a.segs), a.by_slabs = Divider(a.slabs), a.by_loaders = Divider(a.loaders);
  a.by_seg = Divider(a.seg);
  return true;
}

struct StreamPlan {
  StreamArgs a;
  int want;    // rows of a strip
  int ring;    // rows in flight
  bool wave;   // as many rounds as make the grid one wave of blocks
  bool exact;  // the strips stay as long as wanted
  bool large;  // NCHW: the weights do not fit the registers
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
  const int VP = stream_vectors(K, nhwc, es);
  bool fits;
  if (nhwc) {
    a.quads = int(ceil_div(most_outputs(a.u, K), 4));
    const int want = !narrow ? 384 : K == 1 ? 192 : 256, most = narrow ? want : VP == 2 ? 384 : 480;
    fits = shape_block(a, p, K, want, most, VP, made_by_thread(true, es));
    const int apart = a.slab_vectors ? a.slab_vectors * V : a.c, pixels = (a.loaders * VP * V + apart - 1) / apart;
    a.capacity = pixels > 4 * a.quads ? pixels : 4 * a.quads;
    a.pitch = (V + a.capacity * apart + 3) / 4 * 4;
    plan.want = narrow ? 16 : VP == 2 ? 22 : 32;  // here and below: as in the fastest variants on an H100
  } else {
    a.quads = nchw_quads(a.u, K);
    plan.large = a.quads > quads_in_registers(K);
    if (!plan.large) a.quads = quads_in_registers(K);
    const bool steep = a.v.per >= 4;
    plan.wave = K == 2 && narrow && !steep;
    plan.exact = K == 1 && narrow && !steep;
    fits = shape_block(a, p, K, plan.wave ? 256 : 128, stream_threads(false, es), VP, made_by_thread(plan.large, es));
    a.pitch = a.loaders * V + 4 * a.quads;
    const int two = steep ? 4 : narrow ? 14 : 56, four = !steep ? 56 : narrow ? 16 : 32;
    plan.want = K == 1 ? (plan.exact ? 7 : 3) : K == 2 ? two : four;
  }
  if (!fits) {
    plan.refused = "a column and its neighbours do not fit a block";
    return plan;
  }
  plan.want = bounded_rows(a.v, plan.want);
  a.entries = strip_entries(a.v, K, 2 * plan.want);
  for (const int ring : {stream_deep(K, nhwc, es, a.align == 16), stream_ring(VP)}) {
    plan.ring = ring;
    const size_t bytes = K == 1   ? stream_shared<1>(a, ring * VP).end
                         : K == 2 ? stream_shared<2>(a, ring * VP).end
                                  : stream_shared<4>(a, ring * VP).end;
    plan.refused = bytes > (96 << 10) ? "a row segment needs more than 96 KiB of shared memory" : nullptr;
    if (!plan.refused) break;
  }
  return plan;
}

}  // namespace aeup::back
