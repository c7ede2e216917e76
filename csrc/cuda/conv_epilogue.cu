// The gradient of the epilogue: one pass over grad (and the activation's values) that writes the gradient before the
// activation and sums per channel; the sums of the blocks are added in a fixed order.
#include <numeric>

#include "conv_launch.h"
#include "conv_partials.cuh"

namespace aeup {
namespace {

constexpr int kBlock = 256;

template <class T>
struct Epilogue {
  const T *grad, *values;  // values and before: null without an activation
  T* before;
  Acc<T>* partial;  // null where the bias's gradient is not wanted
  int64_t c, elements;
  Activation activation;
  double slope;
  // channels-last: threads at work, a multiple of the period of the channels of a vector
  int64_t threads;
  // NCHW: images and elements of a plane per unit, units along a plane and along the images, threads per unit
  int64_t n, pixels, images, chunk, chunks, image_splits;
  int lanes;
  bool aligned;  // all tensors at the same offset from a 16-byte boundary
};
template <class T>
constexpr int kWide = 16 / int(sizeof(T));

// V elements from `at`, by accesses of A bytes; adds their gradients to sum.
template <class T, int V, int A>
AEUP_DEV void one_vector(const Epilogue<T>& p, int64_t at, Acc<T>* sum) {
  using S = Acc<T>;
  Raw<T, V, A> raw;
  S g[V];
  raw.load(p.grad + at);
  if (p.values) {
    Raw<T, V, A> other;
    S v[V];
    other.load(p.values + at);
    raw.unpack(g);
    other.unpack(v);
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] *= derivative(v[i], p.activation, p.slope);
    raw.pack(g);
    raw.store(p.before + at);
  } else {
    raw.unpack(g);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += g[i];
}

// [pixels, c] flat. A thread takes every threads-th vector, so that element i of all its vectors is of one channel.
template <class T, int A>
__global__ void __launch_bounds__(kBlock) along_channels(Epilogue<T> p) {
  using S = Acc<T>;
  constexpr int V = kWide<T>, kSlots = kBlock * V;
  __shared__ S sums[kSlots];
  const int64_t me = int64_t(blockIdx.x) * kBlock + threadIdx.x, whole = p.elements / V;
  S sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = S(0);
  if (me < p.threads) {
#pragma unroll 2
    for (int64_t v = me; v < whole; v += p.threads) one_vector<T, V, A>(p, v * V, sum);
    if (whole % p.threads == me) {  // whose turn the incomplete vector is
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (whole * V + i < p.elements) one_vector<T, 1, sizeof(T)>(p, whole * V + i, sum + i);
    }
  }
  if (!p.partial) return;
#pragma unroll
  for (int i = 0; i < V; ++i) sums[threadIdx.x * V + i] = sum[i];
  __syncthreads();
  const int64_t slot0 = int64_t(blockIdx.x) * kSlots;  // slot s of the grid is of channel s % c
  if (p.c > kSlots) {
    for (int i = threadIdx.x; i < kSlots; i += kBlock)
      if (slot0 + i < p.threads * V) store_one(p.partial + slot0 + i, sums[i]);
    return;
  }
  const int first = int(slot0 % p.c), c = int(p.c);
  for (int channel = threadIdx.x; channel < c; channel += kBlock) {
    S total = S(0);
    for (int i = channel >= first ? channel - first : channel - first + c; i < kSlots; i += c) total += sums[i];
    store_one(p.partial + int64_t(blockIdx.x) * c + channel, total);
  }
}

// [n, c, pixels]. A unit is a channel of some images, or a piece of a plane, summed by `lanes` threads.
template <class T>
__global__ void __launch_bounds__(kBlock) along_planes(Epilogue<T> p) {
  using S = Acc<T>;
  constexpr int V = kWide<T>;
  __shared__ S sums[kBlock];
  const int lane = threadIdx.x % p.lanes;
  const int64_t unit = (int64_t(blockIdx.x) * kBlock + threadIdx.x) / p.lanes;
  const Split c = split(unit, p.c), chunk = split(c.quotient, p.chunks);
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
    for (int64_t at = begin + lane; at < first; at += p.lanes) one_vector<T, 1, sizeof(T)>(p, at, sum);
#pragma unroll 2
    for (int64_t at = first + lane * V; at < body; at += p.lanes * V) one_vector<T, V, 16>(p, at, sum);
    for (int64_t at = body + lane; at < end; at += p.lanes) one_vector<T, 1, sizeof(T)>(p, at, sum);
  }
  if (!p.partial) return;
  S total = S(0);
#pragma unroll
  for (int i = 0; i < V; ++i) total += sum[i];
  sums[threadIdx.x] = total;
  __syncthreads();
  for (int n = p.lanes / 2; n; n /= 2) {
    if (lane < n) sums[threadIdx.x] = total += sums[threadIdx.x + n];
    __syncthreads();
  }
  if (lane == 0 && unit < p.c * p.chunks * p.image_splits) store_one(p.partial + unit, total);
}

bool same_offset(const EpilogueGradient& e) {
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  return !e.output || (offset(e.output) == offset(e.grad) && offset(e.before) == offset(e.grad));
}

template <class T>
struct Plan {
  Epilogue<T> p;
  bool planes;
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
  const int64_t most = 6 * int64_t(multiprocessors());
  // One pixel per image is both layouts.
  q.planes = !e.channels_last && e.pixels > 1;
  if (!q.planes) {
    const int64_t period = p.c / std::gcd(p.c, int64_t(V));
    const int64_t wanted = min(ceil_div(ceil_div(p.elements, V), 4 * kBlock), most);
    q.blocks = max(wanted, ceil_div(period, kBlock));
    p.threads = q.blocks * kBlock / period * period;
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

template <class T>
const char* run(const EpilogueGradient& e, void* workspace, void* stream) {
  Plan<T> q = plan_of<T>(e);
  if (e.bias) {
    if (!workspace) return "the bias's gradient needs a workspace";
    q.p.partial = static_cast<Acc<T>*>(workspace);
  }
  q.p.aligned = same_offset(e);
  if (q.planes)
    AEUP_LAUNCH(along_planes<T>, q.blocks, kBlock, 0, stream, q.p);
  else if (q.p.aligned && alignment_of(e.grad) == 16)
    AEUP_LAUNCH((along_channels<T, 16>), q.blocks, kBlock, 0, stream, q.p);
  else
    AEUP_LAUNCH((along_channels<T, int(sizeof(T))>), q.blocks, kBlock, 0, stream, q.p);
  if (!e.bias) return nullptr;
  return launch_add_partials<T>(static_cast<const Acc<T>*>(workspace), static_cast<T*>(e.bias), q.partials / e.c, e.c,
                                int64_t(1), int64_t(1), true, stream);
}

}  // namespace

int64_t epilogue_gradient_workspace(const EpilogueGradient& e) {
  if (!e.bias || e.n * e.c * e.pixels == 0) return 0;
  return e.dtype == DType::f64   ? plan_of<double>(e).partials * 8
         : e.dtype == DType::f32 ? plan_of<float>(e).partials * 4
                                 : plan_of<Half>(e).partials * 4;
}

const char* launch_epilogue_gradient(const EpilogueGradient& e, void* workspace, void* stream) {
  if (e.n * e.c * e.pixels == 0) return nullptr;
  return with_type(e.dtype, [&](auto t) { return run<decltype(t)>(e, workspace, stream); });
}

}  // namespace aeup
