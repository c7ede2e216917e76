// The gradient of the epilogue: one pass over grad (and the activation's values) that writes the gradient before the
// activation, in another layout if it must, and sums per channel; the sums of the blocks are added in a fixed order.
#include <numeric>

#include "conv_common.cuh"
#include "conv_launch.h"

namespace aeup {
namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32, kPerMultiprocessor = 4, kTurnedPerMultiprocessor = 3;

template <class T>
struct Epilogue {
  const T *grad, *values;  // values and before: null without an activation
  T* before;
  Acc<T>* partial;  // null where the bias's gradient is not wanted, or one block per channel writes it
  T* bias;          // else null
  int64_t c, elements;
  Activation activation;
  double slope;
  // flat: threads at work, a multiple of the period of the channels of a vector; threads of a block that add the slots
  // of its shared memory first, a multiple of c where c <= kBlock
  int64_t threads;
  int width;
  // NCHW: images and elements of a plane per unit, units along a plane and along the images, threads per unit (a power
  // of 2)
  int64_t n, pixels, images, chunk, chunks, image_splits;
  int lanes;
  bool aligned;  // all tensors at the same offset from a 16-byte boundary
  // turned: channels of a row of `before`; groups of channels, and blocks of a group
  int64_t pitch, groups, parts;
};
template <class T>
constexpr int kWide = 16 / int(sizeof(T));
template <class T>
constexpr int kTurned = 128 / int(sizeof(T));  // channels, and pixels, of a tile
inline bool is_piecewise(Activation a) {
  return a == Activation::none || a == Activation::relu || a == Activation::leaky_relu;
}
template <class T>
AEUP_DEV void store_sum(const Epilogue<T>& p, int64_t at, Acc<T> sum) {
  if (p.bias)
    store_one(p.bias + at, sum);
  else
    store_one(p.partial + at, sum);
}

// V elements, by accesses of A bytes. kPiecewise: no activation, relu or leaky_relu. These are kernels of their own, as
// a small tensor takes no longer than its instructions take to arrive.
template <class T, int V, int A, bool kPiecewise>
struct Piece {
  Raw<T, V, A> grad, values;

  AEUP_DEV void load(const Epilogue<T>& p, int64_t at) {
    grad.load(p.grad + at);
    if (p.values) values.load(p.values + at);
  }
  // Element i alone, where A is one element.
  AEUP_DEV void load_element(const Epilogue<T>& p, int64_t at, int i) {
    load_words<A>(p.grad + at, grad.w + i * grad.words);
    if (p.values) load_words<A>(p.values + at, values.w + i * values.words);
  }
  AEUP_DEV void clear() { grad.clear(), values.clear(); }
  // The gradient before the activation.
  AEUP_DEV void before(const Epilogue<T>& p, Acc<T> slope, Acc<T>* g) const {
    using S = Acc<T>;
    grad.unpack(g);
    if (!p.values) return;
    const auto piecewise = p.activation == Activation::relu ? Activation::relu : Activation::leaky_relu;
    S v[V];
    values.unpack(v);
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] = gradient_before(g[i], v[i], kPiecewise ? piecewise : p.activation, slope);
  }
  // Stores what goes on from here, and adds it to sum.
  AEUP_DEV void finish(const Epilogue<T>& p, int64_t at, Acc<T> slope, Acc<T>* sum) {
    Acc<T> g[V];
    before(p, slope, g);
    if (p.values) {
      grad.pack(g);
      grad.store(p.before + at);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += g[i];
  }
};
// The vectors at begin, begin + step, ... before end, two at a time.
template <class T, int A, bool kPiecewise>
AEUP_DEV void vectors(const Epilogue<T>& p, int64_t begin, int64_t end, int64_t step, Acc<T> slope, Acc<T>* sum) {
  using Vector = Piece<T, kWide<T>, A, kPiecewise>;
#pragma unroll 1
  for (int64_t at = begin; at < end; at += 2 * step) {
    const bool two = at + step < end;
    Vector first, second;
    first.load(p, at);
    if (two) second.load(p, at + step);
    first.finish(p, at, slope, sum);
    if (two) second.finish(p, at + step, slope, sum);
  }
}
template <class T, bool kPiecewise>
AEUP_DEV void single(const Epilogue<T>& p, int64_t at, Acc<T> slope, Acc<T>* sum) {
  Piece<T, 1, sizeof(T), kPiecewise> one;
  one.load(p, at);
  one.finish(p, at, slope, sum);
}

// All tensors as one row, [pixels, c] flat. A thread takes every threads-th vector, so that element i of all its
// vectors is of one channel.
template <class T, int A, bool kPiecewise>
__global__ void __launch_bounds__(kBlock, kPerMultiprocessor) along_channels(Epilogue<T> p) {
  using S = Acc<T>;
  constexpr int V = kWide<T>, kSlots = kBlock * V;
  alignas(16) __shared__ S sums[kSlots];
  const int64_t me = int64_t(blockIdx.x) * kBlock + threadIdx.x, whole = p.elements / V * V;
  const S slope = S(p.slope);
  S sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = S(0);
  if (me < p.threads) {
    vectors<T, A, kPiecewise>(p, me * V, whole, p.threads * V, slope, sum);
    // The rest is the turn of one thread: whole / V is its number plus a multiple of p.threads.
    if (whole < p.elements && split(whole / V, p.threads).remainder == me) {
#pragma unroll
      for (int i = 0; i < V - 1; ++i)
        if (whole + i < p.elements) single<T, kPiecewise>(p, whole + i, slope, sum + i);
    }
  }
  let_next_start();
  if (!p.partial && !p.bias) return;
#pragma unroll
  for (int i = 0; i < V; ++i) sums[threadIdx.x * V + i] = sum[i];
  __syncthreads();
  const int64_t slot0 = int64_t(blockIdx.x) * kSlots;  // slot s of the grid is of channel s % c
  if (p.c > kSlots) {
    for (int i = threadIdx.x; i < kSlots; i += kBlock)
      if (slot0 + i < p.threads * V) store_sum(p, slot0 + i, sums[i]);
    return;
  }
  const int first = int(split(slot0, p.c).remainder), c = int(p.c), width = p.width;
  const int64_t row = int64_t(blockIdx.x) * c;
  const auto channel = [&](int i) { return row + (i + first < c ? i + first : i + first - c); };
  if (c > kBlock) {
    for (int j = threadIdx.x; j < c; j += kBlock) {
      S total = S(0);
      for (int i = j; i < kSlots; i += c) total += sums[i];
      store_sum(p, channel(j), total);
    }
    return;
  }
  const int t = threadIdx.x;
  S total = S(0);
  if (t < width)
#pragma unroll 4
    for (int i = t; i < kSlots; i += width) total += sums[i];
  __syncthreads();
  sums[t] = total;
  __syncthreads();
  if (c > 32) {
    if (t >= c) return;
    total = S(0);
    for (int i = t; i < width; i += c) total += sums[i];
    return store_sum(p, channel(t), total);
  }
#pragma unroll 1
  for (int j = t / 32; j < c; j += kWarps) {
    total = S(0);
    for (int i = j + t % 32 * c; i < width; i += 32 * c) total += sums[i];
#pragma unroll
    for (int n = 16; n; n /= 2) total += __shfl_xor_sync(~0u, total, n);
    if (t % 32 == 0) store_sum(p, channel(j), total);
  }
}

// [n, c, pixels]. A unit is a channel of some images, or a piece of a plane, summed by `lanes` threads.
template <class T, bool kPiecewise>
__global__ void __launch_bounds__(kBlock, kPiecewise ? kPerMultiprocessor : 3) along_planes(Epilogue<T> p) {
  using S = Acc<T>;
  constexpr int V = kWide<T>;
  __shared__ S sums[kBlock];
  const int lane = threadIdx.x & (p.lanes - 1), per_block = kBlock / p.lanes;
  const int64_t unit = int64_t(blockIdx.x) * per_block + int(threadIdx.x) / p.lanes;
  const Split c = split(unit, p.c), chunk = split(c.quotient, p.chunks);
  const S slope = S(p.slope);
  S sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = S(0);
  const int64_t last = min((chunk.quotient + 1) * p.images, p.n);
  for (int64_t image = chunk.quotient * p.images; image < last; ++image) {
    const int64_t plane = (image * p.c + c.remainder) * p.pixels;
    const int64_t begin = plane + chunk.remainder * p.chunk, end = min(begin + p.chunk, plane + p.pixels);
    // Vectors in the aligned middle, elements at both ends.
    const int64_t address = int64_t(reinterpret_cast<uintptr_t>(p.grad) % 16 / sizeof(T)) + begin;
    const int64_t first = p.aligned ? min(begin + (V - address % V) % V, end) : end;
    const int64_t body = first + (end - first) / V * V;
    for (int64_t at = begin + lane; at < first; at += p.lanes) single<T, kPiecewise>(p, at, slope, sum);
    vectors<T, 16, kPiecewise>(p, first + lane * V, body, int64_t(p.lanes) * V, slope, sum);
    for (int64_t at = body + lane; at < end; at += p.lanes) single<T, kPiecewise>(p, at, slope, sum);
  }
  let_next_start();
  if (!p.partial && !p.bias) return;
  S total = S(0);
#pragma unroll
  for (int i = 0; i < V; ++i) total += sum[i];
  sums[threadIdx.x] = total;
  __syncthreads();
  for (int n = p.lanes / 2; n; n /= 2) {
    if (lane < n) sums[threadIdx.x] = total += sums[threadIdx.x + n];
    __syncthreads();
  }
  if (lane == 0 && unit < p.c * p.chunks * p.image_splits) store_sum(p, unit, total);
}

// grad and values [n, c, pixels] -> before [n, pixels, pitch], zeros from c on. A tile is kTurned pixels (images one
// after the other) of kTurned channels: 128 bytes of either in a row. A thread loads a vector of pixels for each of the
// kPer channels of a word, and stores vectors of channels; a block takes every parts-th tile of its channels.
template <class T, int A, bool kPiecewise>
__global__ void __launch_bounds__(kBlock, kTurnedPerMultiprocessor) turned(Epilogue<T> p) {
  using S = Acc<T>;
  constexpr int V = kWide<T>, kPixels = kTurned<T>, kWords = 32, kPer = kTurned<T> / kWords;
  // Vector v of a pixel is at v ^ (pixel / V): 8 vectors of any 8 threads are in different banks, either way.
  alignas(16) __shared__ uint32_t tiles[2][kPixels][kWords];
  const int lane = threadIdx.x % 8, row = threadIdx.x / 8;
  const Split block = split(blockIdx.x, p.groups);
  const int64_t first = block.remainder * kTurned<T>, channel = first + row * kPer;
  const int64_t all = p.n * p.pixels;
  const S slope = S(p.slope);
  Piece<T, V, A, kPiecewise> held[kPer];
  const auto load = [&](int64_t pixel) {
#pragma unroll
    for (int k = 0; k < kPer; ++k) held[k].clear();
    if (pixel >= all) return;
    const Split at = split(pixel, p.pixels);
    int64_t from = (at.quotient * p.c + channel) * p.pixels + at.remainder;
    if constexpr (A == 16) {
#pragma unroll
      for (int k = 0; k < kPer; ++k)
        if (channel + k < p.c) held[k].load(p, from + k * p.pixels);
    } else {
      int64_t left = p.pixels - at.remainder;  // in this image
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (pixel + i < all)
#pragma unroll
          for (int k = 0; k < kPer; ++k)
            if (channel + k < p.c) held[k].load_element(p, from + k * p.pixels, i);
        ++from;
        if (--left == 0) from += (p.c - 1) * p.pixels, left = p.pixels;
      }
    }
  };
  S sum[kPer];
#pragma unroll
  for (int k = 0; k < kPer; ++k) sum[k] = S(0);
  const int64_t step = p.parts * kPixels;
  load(block.quotient * kPixels + lane * V);
  int flip = 0;
#pragma unroll 1
  for (int64_t tile = block.quotient * kPixels; tile < all; tile += step, flip ^= 1) {
    S g[kPer][V];
#pragma unroll
    for (int k = 0; k < kPer; ++k) held[k].before(p, slope, g[k]);
    load(tile + step + lane * V);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Raw<T, kPer> word;
      S of[kPer];
#pragma unroll
      for (int k = 0; k < kPer; ++k) of[k] = g[k][i];
      word.pack(of);
      tiles[flip][lane * V + i][row ^ lane * 4] = word.w[0];
    }
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
#pragma unroll
      for (int i = V / 2; i; i /= 2)
#pragma unroll
        for (int j = 0; j < i; ++j) g[k][j] += g[k][j + i];
      sum[k] += g[k][0];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPixels; i += kBlock / 8) {
      const int pixel = i + row;
      if (tile + pixel >= all || first + lane * V >= p.pitch) continue;
      T* const to = p.before + (tile + pixel) * p.pitch + first + lane * V;
      AEUP_CHECK(to, 16, true);
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&tiles[flip][pixel][(lane ^ pixel / V) * 4]);
    }
  }
  let_next_start();
  if (!p.partial && !p.bias) return;
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
#pragma unroll
    for (int n = 4; n; n /= 2) sum[k] += __shfl_xor_sync(~0u, sum[k], n);
    if (lane == 0 && channel + k < p.c) store_sum(p, block.quotient * p.c + channel + k, sum[k]);
  }
}

constexpr int kSector = 8;  // channels of a block of add_parts

// partial [parts][c] -> bias [c].
template <class T>
__global__ void __launch_bounds__(kBlock) add_parts(const Acc<T>* partial, T* bias, int64_t parts, int64_t c) {
  using S = Acc<T>;
  constexpr int kRows = kBlock / kSector, kBatch = 10;
  __shared__ S sums[kWarps][kSector];
  after_previous();
  const int lane = threadIdx.x % kSector;
  const int64_t channel = int64_t(blockIdx.x) * kSector + lane;
  S sum = S(0);
#pragma unroll 1
  for (int64_t at = threadIdx.x / kSector; at < parts; at += kRows * kBatch) {
    S part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool inside = channel < c && at + i * kRows < parts;
      const S* from = partial + (at + i * kRows) * c + channel;
#ifdef AEUP_EMULATE
      part[i] = inside ? load_one(from) : S(0);
#else
      part[i] = inside ? __ldcg(from) : S(0);  // written while this kernel may have been set up
#endif
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += part[i];
  }
#pragma unroll
  for (int n = 16; n >= kSector; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
  if (threadIdx.x % 32 < kSector) sums[threadIdx.x / 32][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= kSector || channel >= c) return;
  sum = sums[0][lane];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += sums[i][lane];
  store_one(bias + channel, sum);
}

bool same_offset(const EpilogueGradient& e) {
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  return !e.output || (offset(e.output) == offset(e.grad) && offset(e.before) == offset(e.grad));
}

template <class T>
struct Plan {
  Epilogue<T> p;
  bool turned, planes;
  int64_t blocks, partials;  // partials [partials / c][c]
};
template <class T>
Plan<T> plan_of(const EpilogueGradient& e) {
  constexpr int V = kWide<T>;
  Plan<T> q{};
  Epilogue<T>& p = q.p;
  p.grad = static_cast<const T*>(e.grad), p.values = static_cast<const T*>(e.output);
  p.before = static_cast<T*>(e.before);
  p.c = e.c, p.elements = e.n * e.c * e.pixels, p.activation = e.activation, p.slope = e.slope;
  p.n = e.n, p.pixels = e.pixels;
  const int64_t most = kPerMultiprocessor * int64_t(multiprocessors());  // all at once
  if ((q.turned = e.pitch != 0)) {
    const int64_t tiles = ceil_div(e.n * e.pixels, kTurned<T>);
    p.pitch = e.pitch / int64_t(sizeof(T)), p.groups = ceil_div(p.pitch, kTurned<T>);
    p.parts = min(tiles, max(kTurnedPerMultiprocessor * int64_t(multiprocessors()) / p.groups, int64_t(1)));
    q.blocks = p.groups * p.parts, q.partials = p.parts * p.c;
    return q;
  }
  // One pixel per image, or one channel, is both layouts.
  q.planes = !e.channels_last && e.pixels > 1 && e.c > 1;
  if (!q.planes) {
    const int64_t period = p.c / std::gcd(p.c, int64_t(V)), vectors = ceil_div(p.elements, V);
    // One block where 4 vectors per thread do: its sums are the result. Else a vector per thread, two, or more.
    q.blocks = vectors <= 4 * kBlock ? 1 : min(ceil_div(vectors, kBlock), most / 2);
    if (q.blocks > 1) q.blocks = max(q.blocks, min(ceil_div(vectors, 2 * kBlock), most));
    q.blocks = max(q.blocks, ceil_div(period, kBlock));
    // All threads work where the blocks are whole periods.
    const int64_t whole = period / std::gcd(period, int64_t(kBlock)), up = ceil_div(q.blocks, whole) * whole;
    if (q.blocks > whole) q.blocks = up <= most ? up : up - whole;
    p.threads = q.blocks * kBlock / period * period;
    p.width = p.c <= kBlock ? int(kBlock / p.c * p.c) : kBlock;
    q.partials = p.c > kBlock * V ? p.threads * V : q.blocks * p.c;
    return q;
  }
  const int64_t vectors = ceil_div(e.pixels, V), threads = most * kBlock;
  p.lanes = 1;
  while (p.lanes < 32 && p.lanes * 2 <= vectors) p.lanes *= 2;
  if (vectors >= 2 * kBlock) p.lanes = kBlock;
  // Pieces of at least 4 vectors per thread; of whole vectors, so that only the ends of a plane are off alignment.
  const int64_t pieces = max(ceil_div(vectors, 4 * p.lanes), int64_t(1));
  p.chunks = min(pieces, max(threads / (p.lanes * p.c * p.n), int64_t(1)));
  p.chunk = ceil_div(ceil_div(e.pixels, p.chunks), V) * V;
  p.chunks = ceil_div(e.pixels, p.chunk);
  const int64_t splits = max(threads / (p.lanes * p.c * p.chunks), int64_t(1));
  p.images = ceil_div(e.n, min(splits, e.n));
  p.image_splits = ceil_div(e.n, p.images);
  q.partials = p.c * p.chunks * p.image_splits;
  q.blocks = ceil_div(q.partials * p.lanes, kBlock);
  return q;
}

template <class T, bool kPiecewise>
const char* launch_first(const Plan<T>& q, const EpilogueGradient& e, void* stream) {
  if constexpr (sizeof(T) <= 4)
    if (q.turned) {
      const int64_t plane = e.pixels * int64_t(sizeof(T));
      if (alignment_of(e.grad, plane) == 16 && alignment_of(e.output, plane) == 16)
        return launch(turned<T, 16, kPiecewise>, q.blocks, kBlock, 0, stream, q.p);
      return launch(turned<T, int(sizeof(T)), kPiecewise>, q.blocks, kBlock, 0, stream, q.p);
    }
  if (q.planes) return launch(along_planes<T, kPiecewise>, q.blocks, kBlock, 0, stream, q.p);
  if (q.p.aligned && alignment_of(e.grad) == 16)
    return launch(along_channels<T, 16, kPiecewise>, q.blocks, kBlock, 0, stream, q.p);
  return launch(along_channels<T, int(sizeof(T)), kPiecewise>, q.blocks, kBlock, 0, stream, q.p);
}
template <class T>
const char* run(const EpilogueGradient& e, void* workspace, void* stream) {
  if (e.pitch && (sizeof(T) > 4 || e.pitch < e.c * int64_t(sizeof(T)) || alignment_of(e.before, e.pitch) < 16))
    return "channels-last rows are of 2- or 4-byte elements, hold all channels and start at multiples of 16 bytes";
  Plan<T> q = plan_of<T>(e);
  const int64_t parts = q.partials / e.c;
  q.p.aligned = same_offset(e);
  if (e.bias && parts == 1) {
    q.p.bias = static_cast<T*>(e.bias);
  } else if (e.bias) {
    if (!workspace) return "the bias's gradient needs a workspace";
    q.p.partial = static_cast<Acc<T>*>(workspace);
  }
  const char* error =
      is_piecewise(e.activation) ? launch_first<T, true>(q, e, stream) : launch_first<T, false>(q, e, stream);
  if (error || !q.p.partial) return error;
  return launch_after<add_parts<T>>(ceil_div(e.c, int64_t(kSector)), kBlock, stream,
                                    static_cast<const Acc<T>*>(q.p.partial), static_cast<T*>(e.bias), parts, e.c);
}

}  // namespace

int64_t epilogue_gradient_workspace(const EpilogueGradient& e) {
  if (!e.bias || e.n * e.c * e.pixels == 0) return 0;
  const int64_t partials = e.dtype == DType::f64   ? plan_of<double>(e).partials
                           : e.dtype == DType::f32 ? plan_of<float>(e).partials
                                                   : plan_of<Half>(e).partials;
  return partials == e.c ? 0 : partials * (e.dtype == DType::f64 ? 8 : 4);
}

const char* launch_epilogue_gradient(const EpilogueGradient& e, void* workspace, void* stream) {
  if (e.n * e.c * e.pixels == 0) return nullptr;
  return with_type(e.dtype, [&](auto t) { return run<decltype(t)>(e, workspace, stream); });
}

}  // namespace aeup
