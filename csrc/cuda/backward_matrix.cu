// Backward of 16-bit dtypes in NCHW at any scale, both passes on tensor cores. A grad-input strip is V G U' with the
// weights V [16 rows, grad-output rows] and U [grad-input columns, grad-output columns], which are zero off a band.
//
// A block keeps its strip's weights in shared memory, in the order of the fragments, and takes one plane after the
// other. A warp owns 64 grad-output columns, whose rows it fetches by cp.async, 16 at a time. They are B operands as
// they lie (ldmatrix.trans): no element is converted. The sums over rows go through shared memory and become A operands
// for the sums over columns. Weights and these sums are the sum of two 16-bit numbers each, so 16 bits of them count;
// all sums are in float32.
#include "backward.cuh"
#include "matrix.cuh"

namespace aeup::back {
namespace {

constexpr int kPairs = 4, kMostWarps = 5;              // pairs of 8 columns of a warp
constexpr int kStages = 3, kStage = 16 * 32 * kPairs;  // of a warp: how many in flight, bytes

struct MatrixArgs {
  const void* src;  // [planes, oh, ow]
  void* dst;        // [planes, ih, iw]
  Map v, u;
  int64_t planes;
  int rows, strips, steps;      // grad-input rows of a strip, at most 16; its grad-output rows / 16
  int seg, segs, tiles, depth;  // grad-input columns of a block; their 8s; grad-output columns that a tile needs / 16
  int pairs, pitch;             // a block's grad-output columns / 16; bytes from row to row of their sums
  int warps;
  int two;  // 1: results are stored by two
};
struct MatrixShared {  // byte offsets
  int sums, rows, columns, starts, end;
};
AEUP_HD MatrixShared matrix_shared(const MatrixArgs& p) {
  MatrixShared s;
  s.sums = p.warps * kStages * kStage;
  s.rows = s.sums + 2 * 16 * p.pitch;
  s.columns = s.rows + p.steps * 1024;
  s.starts = s.columns + p.tiles * p.depth * 512;
  s.end = s.starts + (2 * p.tiles + 3) / 4 * 16;
  return s;
}

// w as the sum of two numbers of T, in the low and the high half of the word.
template <class T>
AEUP_DEV uint32_t two_parts(float w) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t high = bf16_pair(w, 0.f);
    return high | bf16_pair(0.f, w - bf16_low(high));
  } else {
    const uint32_t high = half_pair(w, 0.f);
    return high | half_pair(0.f, w - half_low(high));
  }
}
// f(input, weight) for the inputs that output o reads; taps clamped onto one input are added.
template <int K, class F>
AEUP_DEV void each_weight(const Axis<float>& axis, int o, F f) {
  float w[K], sum = 0;
  const int s = int(taps<K>(axis, o, w));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int i = clamp_index(s + k, axis.in);
    sum += w[k];
    if (k < K - 1 && clamp_index(s + k + 1, axis.in) == i) continue;
    f(i, sum);
    sum = 0;
  }
}
// Element (i, j) of a plane's result without the weights that are zero, for where an Inf met one of those.
template <class T, int K>
AEUP_DEV float without_zeros(const MatrixArgs& p, const T* plane, int i, int j) {
  const int last_o = outputs_before<K>(p.v, i + 1), last = outputs_before<K>(p.u, j + 1);
  float sum = 0;
#pragma unroll 1
  for (int o = outputs_before<K>(p.v, i - K + 1); o < last_o; ++o) {
    float h = 0;
#pragma unroll 1
    for (int c = outputs_before<K>(p.u, j - K + 1); c < last; ++c) {
      const float w = weight_of<K>(p.u.axis, c, j);
      if (w != 0.f) h = fmaf(w, load_one(plane + int64_t(o) * p.u.out + c), h);
    }
    const float w = weight_of<K>(p.v.axis, o, i);
    if (w != 0.f) sum = fmaf(w, h, sum);
  }
  return sum;
}

template <class T, int K>
__global__ void __launch_bounds__(32 * kMostWarps, 3) multiply_planes(const MatrixArgs p) {
  AEUP_DYNAMIC_SHARED(unsigned char, shared);
  const MatrixShared at = matrix_shared(p);
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, warps = threads / 32, lane = thread & 31;
  const unsigned across = unsigned(p.strips) * unsigned(p.segs), place = blockIdx.x % across;
  const int i0 = int(place / unsigned(p.segs)) * p.rows, i1 = min(p.v.in, i0 + p.rows);
  const int j0 = int(place % unsigned(p.segs)) * p.seg, j1 = min(p.u.in, j0 + p.seg);
  const int o0 = outputs_before<K>(p.v, i0 - K + 1), n = outputs_before<K>(p.v, i1) - o0;
  const int c0 = p.segs == 1 ? 0 : outputs_before<K>(p.u, j0 - K + 1) & ~7;
  const int c1 = p.segs == 1 ? p.u.out : outputs_before<K>(p.u, j1);
  const int steps = (n + 15) / 16;
  AEUP_EXPECT(steps <= p.steps, "rows of the strip");
  AEUP_EXPECT(c1 - c0 <= 16 * p.pairs, "columns of the segment");

  // What this thread fetches of 16 grad-output rows: vector `lane % 8` of its warp in rows lane / 8 + 4 m. Vectors are
  // exchanged within a row, so that 8 rows of one column lie in different banks.
  const int64_t plane_out = int64_t(p.v.out) * p.u.out, plane_in = int64_t(p.v.in) * p.u.in;
  const int64_t at_once = gridDim.x / across, four = 4 * int64_t(p.u.out);
  const int64_t next_plane = at_once * plane_out - steps * 4 * four;
  int64_t plane = blockIdx.x / across, coming = plane;  // coming: the plane that is being fetched
  const int vector = lane & 7, row = lane >> 3;
  const bool inside = c0 + (warp * 8 + vector) * 8 < c1;
  unsigned char* const ring = shared + warp * kStages * kStage;
  const int to = row * 128 + (vector ^ row) * 16;
  const T* source =
      static_cast<const T*>(p.src) + plane * plane_out + int64_t(o0 + row) * p.u.out + c0 + (warp * 8 + vector) * 8;
  int steps_left = steps, left = inside ? n - row : 0;  // of the plane; left: rows from this thread's first on
  const auto fetch = [&](int stage) __attribute__((always_inline)) {
    if (coming < p.planes) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        copy_or_zero<16>(ring + stage * kStage + m * 4 * 128 + (to ^ (m & 1) * 64), source, left > 4 * m);
        source += four;
      }
      left -= 16;
      if (--steps_left == 0) steps_left = steps, left = inside ? n - row : 0, coming += at_once, source += next_plane;
    }
    copy_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(s);  // on their way while the weights are made

  // The weights as fragments: rows [step][lane][4 words high, 4 low], columns [tile][depth][lane][2 words high, 2 low].
  int* const starts = reinterpret_cast<int*>(shared + at.starts);  // of each tile: first 16 columns, and how many 16s
#pragma unroll 1
  for (int i = thread; i < (at.starts - at.rows) / 16; i += threads)
    reinterpret_cast<uint4*>(shared + at.rows)[i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int t = thread; t < p.tiles; t += threads) {
    const int j = j0 + 8 * t, end = outputs_before<K>(p.u, min(j + 8, p.u.in)) - c0;
    const int start = j < j1 ? (outputs_before<K>(p.u, j - K + 1) - c0) / 16 : 0;
    starts[2 * t] = start, starts[2 * t + 1] = j < j1 ? (min(end, c1 - c0) + 15) / 16 - start : 0;
    AEUP_EXPECT(starts[2 * t] >= 0 && starts[2 * t + 1] <= p.depth, "columns of the tile");
  }
  __syncthreads();
#pragma unroll 1
  for (int o = thread; o < n; o += threads)
    each_weight<K>(p.v.axis, o0 + o, [&](int i, float w) {
      if (i < i0 || i >= i1) return;
      const int m = i - i0, k = o & 15, word = (m >> 3) + 2 * (k >> 3), who = (m & 7) * 4 + (k & 7) / 2;
      auto* to = reinterpret_cast<uint16_t*>(shared + at.rows) + (((o >> 4) * 32 + who) * 8 + word) * 2 + (k & 1);
      const uint32_t parts = two_parts<T>(w);
      to[0] = uint16_t(parts), to[8] = uint16_t(parts >> 16);
    });
#pragma unroll 1
  for (int c = thread; c < c1 - c0; c += threads)
    each_weight<K>(p.u.axis, c0 + c, [&](int j, float w) {
      if (j < j0 || j >= j1) return;
      const int t = (j - j0) >> 3, k = c & 15, who = ((j - j0) & 7) * 4 + (k & 7) / 2;
      auto* to = reinterpret_cast<uint16_t*>(shared + at.columns) +
                 (((t * p.depth + (c >> 4) - starts[2 * t]) * 32 + who) * 4 + (k >> 3)) * 2 + (k & 1);
      const uint32_t parts = two_parts<BFloat16>(w);
      to[0] = uint16_t(parts), to[4] = uint16_t(parts >> 16);
    });
  __syncthreads();

  const int g = lane >> 2, q = lane & 3;
  const int corner = (lane & 15) * p.pitch + (lane >> 4) * 16;  // of ldmatrix: 16 rows, two vectors
  const int own = (lane & 15) * 128 + (lane >> 4 ^ (lane & 7)) * 16;
  const int mine = min(kPairs, p.pairs - warp * kPairs);
  unsigned char* const sums = shared + at.sums;  // the large parts; the small ones 16 rows on
  unsigned char* const own_sums = sums + g * p.pitch + warp * kPairs * 32 + q * 4;
  const int eight = 8 * p.pitch, rest_on = 16 * p.pitch;
  const auto* const row_weights = reinterpret_cast<const uint4*>(shared + at.rows);
  const auto* const column_weights = reinterpret_cast<const uint4*>(shared + at.columns);
  T* const dst = static_cast<T*>(p.dst);
  int stage = 0;
  for (; plane < p.planes; plane += at_once) {
    float acc[2 * kPairs][4];
#pragma unroll
    for (int t = 0; t < 2 * kPairs; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[t][i] = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      __syncwarp();  // the stage has come, and nobody reads the one before it
      fetch(stage == 0 ? kStages - 1 : stage - 1);
      const uint4 a = row_weights[(step * 32 + lane) * 2], b = row_weights[(step * 32 + lane) * 2 + 1];
      const uint32_t large[4] = {a.x, a.y, a.z, a.w}, small[4] = {b.x, b.y, b.z, b.w};
      uint32_t x[kPairs][4];
#pragma unroll
      for (int m = 0; m < kPairs; ++m) load_matrices<true>(ring + stage * kStage + (own ^ m * 32), x[m]);
#pragma unroll
      for (int m = 0; m < kPairs; ++m)
#pragma unroll
        for (int t = 0; t < 2; ++t) matrix_product<T>(acc[2 * m + t], small, x[m][2 * t], x[m][2 * t + 1]);
#pragma unroll
      for (int m = 0; m < kPairs; ++m)
#pragma unroll
        for (int t = 0; t < 2; ++t) matrix_product<T>(acc[2 * m + t], large, x[m][2 * t], x[m][2 * t + 1]);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    __syncthreads();  // nobody reads the last plane's sums
#pragma unroll
    for (int m = 0; m < kPairs; ++m)
      if (m < mine) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = acc[2 * m + t][2 * h], y = acc[2 * m + t][2 * h + 1];
            const uint32_t bits = bf16_pair(x, y);
            unsigned char* const to = own_sums + h * eight + m * 32 + t * 16;
            *reinterpret_cast<uint32_t*>(to) = bits;
            *reinterpret_cast<uint32_t*>(to + rest_on) = bf16_pair(x - bf16_low(bits), y - bf16_high(bits));
          }
      }
    __syncthreads();
    const T* const whole = static_cast<const T*>(p.src) + plane * plane_out;
#pragma unroll 1
    for (int t = warps - 1 - warp; t < p.tiles; t += warps) {  // the last warp may have few columns
      const unsigned char* from = sums + starts[2 * t] * 32 + corner;
      const uint4* weight = column_weights + t * p.depth * 32 + lane;
      float sum[4] = {0, 0, 0, 0}, rest[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int d = starts[2 * t + 1]; d > 0; --d, from += 32, weight += 32) {
        uint32_t a[4], b[4];
        load_matrices<false>(from, a);
        load_matrices<false>(from + rest_on, b);
        const uint4 w = *weight;
        matrix_product<BFloat16>(sum, a, w.x, w.y);
        matrix_product<BFloat16>(rest, b, w.x, w.y);
        matrix_product<BFloat16>(rest, a, w.z, w.w);
      }
      const int i = i0 + g, j = j0 + 8 * t + 2 * q;
      T* const y = dst + plane * plane_in + int64_t(i) * p.u.in + j;
      int again = 0;  // bit h: not all finite, perhaps for a weight that is zero
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (i + 8 * h >= i1 || j >= j1) continue;
        const float f[2] = {sum[2 * h] + rest[2 * h], sum[2 * h + 1] + rest[2 * h + 1]};
        if ((f[0] - f[0]) + (f[1] - f[1]) != 0.f) {
          again |= 1 << h;
        } else if (p.two) {
          Raw<T, 2> out;
          out.pack(f);
          out.store(y + 8 * h * p.u.in);
        } else {
          store_one<T>(y + 8 * h * p.u.in, f[0]);
          if (j + 1 < j1) store_one<T>(y + 8 * h * p.u.in + 1, f[1]);
        }
      }
      if (again) {
#pragma unroll 1
        for (int e = 0; e < 4; ++e) {
          const int down = e / 2 * 8, right = e & 1;
          if (again >> e / 2 & 1 && j + right < j1)
            store_one<T>(y + down * p.u.in + right, without_zeros<T, K>(p, whole, i + down, j + right));
        }
      }
    }
  }
  copy_wait<0>();
}

// --- host ---

struct MatrixPlan {
  MatrixArgs a;
  const char* refused;
};
MatrixPlan plan_matrix(const Problem& p) {
  MatrixPlan plan{};
  MatrixArgs& a = plan.a;
  const int K = taps_of(p.mode);
  const auto refuse = [&](const char* why) {
    plan.refused = why;
    return plan;
  };
  if (pixel_of(p) != 1 || element_size(p.dtype) != 2) return refuse("it needs one 16-bit element per pixel");
  if (alignment_of(p.src, p.ow * 2) < 16) return refuse("it needs rows aligned to 16 bytes");
  a.v = make_map(p, true), a.u = make_map(p, false);
  if (p.oh == p.ih && p.ow == p.iw) return refuse("nothing is enlarged");
  if (a.v.per > 16 || a.u.per > 16 || (K < 4 && a.v.per >= 4)) return refuse("the scale is too large");
  a.src = p.src, a.dst = p.dst;
  a.planes = planes_of(p);
  // Rows: strips of equal length at the least cost, in barriers; one for the step, two for the sums and results.
  int least = INT_MAX;
  for (int rows = smaller(16, a.v.in); rows > 0; --rows) {
    const int strips = int(ceil_div(a.v.in, rows)), each = int(ceil_div(a.v.in, strips));
    const int steps = int(ceil_div(smaller(most_outputs(a.v, each + K - 1), a.v.out), 16));
    if (strips * (steps + 2) >= least) continue;
    least = strips * (steps + 2);
    a.rows = each, a.strips = strips, a.steps = steps;
  }
  for (a.segs = int(ceil_div(a.u.out, 16 * kPairs * kMostWarps));; ++a.segs) {
    a.seg = int(ceil_div(ceil_div(a.u.in, a.segs), 8)) * 8;
    const int reach = a.segs == 1 ? a.u.out : smaller(most_outputs(a.u, a.seg + K - 1) + 7, a.u.out);
    a.pairs = int(ceil_div(reach, 16));
    if (a.pairs <= kPairs * kMostWarps) break;
    if (a.seg == 8) return refuse("8 columns need more than a block holds");
  }
  a.segs = int(ceil_div(a.u.in, a.seg));
  a.tiles = int(ceil_div(smaller(a.seg, a.u.in), 8));
  a.depth = smaller(int(ceil_div(most_outputs(a.u, 8 + K - 1) + 15, 16)), a.pairs);
  a.pitch = (2 * a.pairs + 1) * 16;  // an odd number of vectors: 8 rows lie in different banks
  a.two = a.u.in % 2 == 0 && alignment_of(p.dst) >= 4;
  a.warps = int(ceil_div(a.pairs, kPairs));
  if (matrix_shared(a).end > (96 << 10)) return refuse("its weights need more than 96 KiB of shared memory");
  return plan;
}

}  // namespace

const char* refuses_matrix(const Problem& p) { return plan_matrix(p).refused; }

const char* launch_matrix(const Problem& p, void* stream) {
  const MatrixPlan plan = plan_matrix(p);
  if (plan.refused) return plan.refused;
  const MatrixArgs& a = plan.a;
  const int threads = a.warps * 32;
  const size_t bytes = size_t(matrix_shared(a).end);
  const int64_t across = int64_t(a.strips) * a.segs;
  if (across > kMaxGrid) return "the grid of the backward kernel is too large";
  return with_kernel(p, [&](auto t, auto taps) -> const char* {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) {
      static Residents known;
      const auto kernel = multiply_planes<T, decltype(taps)::value>;
      int64_t at_once = resident_blocks(kernel, known, threads, bytes) / across;  // planes
      at_once = at_once < 1 ? 1 : at_once < a.planes ? at_once : a.planes;
      AEUP_LAUNCH(kernel, at_once * across, threads, bytes, stream, a);
    }
    return nullptr;
  });
}

}  // namespace aeup::back
