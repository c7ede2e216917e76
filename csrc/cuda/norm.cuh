// What the passes of batch and group normalisation share. A pass over the tensors is one of two kinds: it sums per
// channel, and its blocks write partial results; or it first adds those up, every block for its own channels and in the
// same order, and then makes the elements. So each direction takes two launches, and nothing is added in another order.
//
// Group normalisation (kGrouped) is the same over samples one after another, each with channels of its own, whose
// partial results are then added over the channels of a group too: group_norm.cuh.
#pragma once
#include "batch_norm.h"
#include "conv_common.cuh"

namespace aeup {

constexpr int kNormBlock = 512, kSegment = 64;  // threads; bytes of adjacent channels (or pixels) that a block reads
constexpr int kMostTile = 32;                   // channels of a block

template <class T>
constexpr int kNormWide = std::is_same_v<T, double> ? 1 : 16 / int(sizeof(T));

// A position is V adjacent elements: in NHWC of V channels of a pixel, else V pixels of a channel. Thread t of a block:
// [item / lanes][channel group][lane]; item i of split s takes positions s * items + i, and so on by splits * items.
template <class T>
struct Norm {
  using S = Acc<T>;
  const T *input, *grad;
  T* result;                                               // the output, or the input's gradient (may be null)
  const void *weight, *bias, *running_mean, *running_var;  // of S, or of T where narrow
  void *next_mean, *next_var, *weight_grad, *bias_grad;
  S *mean, *invstd;
  const int64_t* counter;
  int64_t* next_counter;
  S* partial;  // [parts][c][2]; null where there is nothing to add up
  int64_t c, positions, splits, parts, tiles;
  int64_t rounds, rest, part_rounds, part_rest;  // positions = (splits, parts) * items * rounds + rest
  int64_t plane, plane_step, channel_step;  // positions of a plane; elements from plane to plane, channel to channel
  int64_t jump, wrap;                       // elements to a thread's next position; and where that is past its plane
  int64_t skip;                             // positions within the plane of a jump
  int lane_bits, group_bits, tile_bits;     // log2 of lanes and channel groups of a block, and of its channels
  int items;                                // of a block
  int width, pixels;                        // of a position: V = width * pixels
  bool training, narrow;
  Activation activation;
  S slope, momentum, eps;  // slope: of the negative side; 0 relu, 1 no activation
  // kGrouped; `tiles` are those of all samples.
  int64_t sample_tiles, sample_step;  // tiles of a sample; elements from one to the next
  int64_t all, parameters, group;     // channels of all samples; elements of weight and bias; channels of a group
  int64_t units;                      // partial results of a group in each part: one a channel, or one
  int64_t part_all;                   // partial results of a part
  int64_t part_items, part_count;     // items of a block of the pass before, and the elements of an item's position
  int slot_bits;                      // log2 of the groups of a tile, at most
};
template <class S>
AEUP_DEV S load_fresh(const S* p) {  // written while this kernel may have been set up
#ifdef AEUP_EMULATE
  return load_one(p);
#else
  return __ldcg(p);
#endif
}

// Element i of an array of one value per channel.
template <class T>
AEUP_DEV Acc<T> of_channel(const Norm<T>& p, const void* from, int64_t i) {
  return p.narrow ? load_one(static_cast<const T*>(from) + i) : load_one(static_cast<const Acc<T>*>(from) + i);
}
template <class T>
AEUP_DEV void set_channel(const Norm<T>& p, void* to, int64_t i, Acc<T> value) {
  if (p.narrow)
    store_one(static_cast<T*>(to) + i, value);
  else
    store_one(static_cast<Acc<T>*>(to) + i, value);
}

// What one thread visits: upward from its first position, or downward from its last.
template <class T, int V, bool kUp, bool kGrouped = false>
struct Walk {
  int64_t at, in_plane, sample;
  int left, tile, channel_in_tile;  // of element 0
  int item, split_index;
  AEUP_DEV explicit Walk(const Norm<T>& p) {
    const Split b = split(blockIdx.x, p.tiles);
    tile = int(b.remainder), split_index = int(b.quotient), sample = 0;
    if constexpr (kGrouped) {
      const Split s = split(b.remainder, p.sample_tiles);
      tile = int(s.remainder), sample = s.quotient;
    }
    const int t = threadIdx.x, group = t >> p.lane_bits & ((1 << p.group_bits) - 1);
    item = t >> (p.lane_bits + p.group_bits) << p.lane_bits | (t & ((1 << p.lane_bits) - 1));
    channel_in_tile = group * p.width;
    const int64_t channel = first_channel(p) + channel_in_tile, mine = int64_t(split_index) * p.items + item;
    left = channel < p.c ? int(p.rounds + (mine < p.rest)) : 0;
    const Split place = split(kUp || mine >= p.positions ? mine : p.positions - 1 - mine, p.plane);
    in_plane = place.remainder;
    at = place.quotient * p.plane_step + channel * p.channel_step + in_plane * V;
    if constexpr (kGrouped) at += sample * p.sample_step;
  }
  AEUP_DEV int64_t first_channel(const Norm<T>& p) const { return int64_t(tile) << p.tile_bits; }  // of the sample
  AEUP_DEV void next(const Norm<T>& p) {
    if (kUp) {
      in_plane += p.skip, at += p.jump;
      if (in_plane >= p.plane) in_plane -= p.plane, at += p.wrap;
    } else {
      in_plane -= p.skip, at -= p.jump;
      if (in_plane < 0) in_plane += p.plane, at -= p.wrap;
    }
  }
};
// Calls f(values [N][V], at) for the thread's positions of N tensors, U of them loaded at once.
template <int U, class T, int V, bool kUp, bool kGrouped, int N, class F>
AEUP_DEV void sweep(const Norm<T>& p, Walk<T, V, kUp, kGrouped>& w, const T* const (&from)[N], F f) {
#pragma unroll 1
  for (; w.left > 0; w.left -= U) {
    Raw<T, V> raw[U][N];
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at[u] = w.at;
      if (u < w.left)
#pragma unroll
        for (int k = 0; k < N; ++k) raw[u][k].load(from[k] + w.at);
      w.next(p);
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (u < w.left) {
        Acc<T> values[N][V];
#pragma unroll
        for (int k = 0; k < N; ++k) raw[u][k].unpack(values[k]);
        f(values, at[u]);
      }
  }
}

// --- sums: what the blocks hand on, as two numbers and a count ---
// Count, mean and sum of squared distances from it (Chan, Golub & LeVeque, 1983, "Algorithms for computing the sample
// variance").
template <class S>
struct Moments {
  S n, mean, square;
  AEUP_DEV static Moments of(S n, S a, S b) { return {n, a, b}; }
  AEUP_DEV S first() const { return mean; }
  AEUP_DEV S second() const { return square; }
  AEUP_DEV void add(const Moments& o) {
    const S all = n + o.n, d = o.mean - mean;
    if (!(all > S(0))) return;
#ifdef AEUP_EMULATE
    const S part = o.n / all;
#else
    S part;
    if constexpr (std::is_same_v<S, float>)
      part = __fdividef(o.n, all);
    else
      part = o.n / all;
#endif
    mean += d * part;
    square += o.square + d * d * n * part;
    n = all;
  }
};
// Of the gradient before the activation, and of it times (input - mean).
template <class S>
struct Sums {
  S grad, product;
  AEUP_DEV static Sums of(S, S a, S b) { return {a, b}; }
  AEUP_DEV S first() const { return grad; }
  AEUP_DEV S second() const { return product; }
  AEUP_DEV void add(const Sums& o) { grad += o.grad, product += o.product; }
};

template <class Sum, int V>
AEUP_DEV Sum pairwise(Sum (&of)[V]) {
#pragma unroll
  for (int n = V / 2; n; n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) of[i].add(of[i + n]);
  return of[0];
}
// Every thread brings part `part` of a channel of the tile; threads below `tile` get the channels' sums. `shared`:
// kNormBlock of them.
template <class Sum>
AEUP_DEV Sum add_parts_of_tile(Sum mine, int channel, int part, int tile_bits, Sum* shared) {
  shared[part << tile_bits | channel] = mine;
  __syncthreads();
  const int t = threadIdx.x;
  mine = shared[t];
  for (int n = kNormBlock / 2; n >> tile_bits; n /= 2) {
    if (t < n) {
      mine.add(shared[t + n]);
      shared[t] = mine;
    }
    __syncthreads();
  }
  return mine;
}
// A block's partial result, from its threads' sums of each element of a position.
template <class Sum, class T, int V, bool kUp, bool kGrouped>
AEUP_DEV void store_partial(const Norm<T>& p, const Walk<T, V, kUp, kGrouped>& w, Acc<T> n, const Acc<T> (&a)[V],
                            const Acc<T> (&b)[V]) {
  using S = Acc<T>;
  constexpr int kPad = kSegment / 16, kRow = kNormBlock + kPad;  // rows of adjacent channels on other banks
  __shared__ S elements[2][V > 1 ? V : 1][V > 1 ? kRow : 1];
  __shared__ Sum shared[kNormBlock];
  const int t = threadIdx.x, tile = 1 << p.tile_bits;
  int channel = w.channel_in_tile, part = w.item;
  Sum of[V];
  if (V > 1 && p.width > 1) {
#pragma unroll
    for (int i = 0; i < V; ++i) elements[0][i][t] = a[i], elements[1][i][t] = b[i];
    __syncthreads();
    channel = t & (tile - 1), part = t >> p.tile_bits;
    const int row = channel % V, group = channel / V, apart = kNormBlock >> p.tile_bits;
    const int64_t more = p.rest - w.split_index * int64_t(p.items);  // items with one more position
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int item = part + j * apart, from = item << p.group_bits | group;
      of[j] = Sum::of(S(p.rounds + (item < more)), elements[0][row][from], elements[1][row][from]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) of[i] = Sum::of(n, a[i], b[i]);
  }
  const Sum total = add_parts_of_tile(pairwise(of), channel, part, p.tile_bits, shared);
  const int64_t to = w.first_channel(p) + t;
  if (t >= tile || to >= p.c) return;
  const int64_t before = kGrouped ? w.split_index * p.all + w.sample * p.c : w.split_index * p.c;
  store_one(p.partial + (before + to) * 2, total.first());
  store_one(p.partial + (before + to) * 2 + 1, total.second());
}
// The sums of all blocks of the pass before, for the channel of each thread below the tile's number of channels.
template <class Sum, class T>
AEUP_DEV Sum add_partials_of(const Norm<T>& p, int64_t first_channel) {
  using S = Acc<T>;
  __shared__ Sum shared[kNormBlock];
  const int t = threadIdx.x, in_tile = t & ((1 << p.tile_bits) - 1), part = t >> p.tile_bits;
  const int64_t channel = first_channel + in_tile;
  const S each = S(p.pixels);
  Sum sum = Sum::of(S(0), S(0), S(0));
  if (channel < p.c)
#pragma unroll 4
    for (int64_t s = part; s < p.parts; s += kNormBlock >> p.tile_bits) {
      const int64_t more = min(max(p.part_rest - s * p.items, int64_t(0)), int64_t(p.items));
      const S* at = p.partial + (s * p.c + channel) * 2;
      sum.add(Sum::of(S(p.part_rounds * p.items + more) * each, load_fresh(at), load_fresh(at + 1)));
    }
  return add_parts_of_tile(sum, in_tile, part, p.tile_bits, shared);
}

// --- the function of an element: z = scale * (x - mean) + bias, then the activation ---
template <class S>
AEUP_DEV S logistic(S z) {
#ifndef AEUP_EMULATE
  // Errors of a few units in the last place: z^2 s (1 - s) stays below 1/2.
  if constexpr (std::is_same_v<S, float>) return __fdividef(1.f, 1.f + __expf(-z));
#endif
  return S(1) / (S(1) + exp(-z));
}
// kPiecewise: none, relu and leaky_relu; else any.
template <bool kPiecewise, class T, int V>
AEUP_DEV void activate_all(const Norm<T>& p, Acc<T> (&z)[V]) {
  using S = Acc<T>;
  if constexpr (kPiecewise) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = z[i] < S(0) ? (p.slope == S(0) ? S(0) : z[i] * p.slope) : z[i];
  } else if (p.activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] *= logistic(z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = activate(z[i], p.activation, p.slope);
  }
}
// grad times the derivative at z; where that is NaN, relu's is 1 and leaky_relu's the slope, as torch's.
template <bool kPiecewise, class T, int V>
AEUP_DEV void before_activation(const Norm<T>& p, Acc<T> (&grad)[V], const Acc<T> (&z)[V]) {
  using S = Acc<T>;
  if constexpr (kPiecewise) {
    if (p.slope == S(0)) {
#pragma unroll
      for (int i = 0; i < V; ++i) grad[i] = z[i] <= S(0) ? S(0) : grad[i];
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) grad[i] = z[i] > S(0) ? grad[i] : grad[i] * p.slope;
    }
  } else if (p.activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const S s = logistic(z[i]);
      grad[i] *= s * (S(1) + z[i] * (S(1) - s));
    }
  } else if (p.activation != Activation::none) {
    const bool of_result = p.activation == Activation::tanh || p.activation == Activation::sigmoid;
#pragma unroll
    for (int i = 0; i < V; ++i)
      grad[i] =
          gradient_before(grad[i], of_result ? smooth_activation(z[i], p.activation) : z[i], p.activation, p.slope);
  }
}
// The coefficients of a block's channels, set by the threads below their number, and those of a thread's elements.
template <class S, int N>
struct Coefficients {
  S of[N][kMostTile];
  template <int V>
  AEUP_DEV void get(int which, int channel, int width, S (&to)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = of[which][channel + (width > 1 ? i : 0)];
  }
};

// mean, scale and bias of a channel of the block, for z = scale * (x - mean) + bias.
template <class S, int N, class T>
AEUP_DEV void set_affine(const Norm<T>& p, int64_t parameter, S mean, S invstd, Coefficients<S, N>& shared) {
  shared.of[0][threadIdx.x] = mean;
  shared.of[1][threadIdx.x] = p.weight ? invstd * of_channel(p, p.weight, parameter) : invstd;
  shared.of[2][threadIdx.x] = p.bias ? of_channel(p, p.bias, parameter) : S(0);
}

// --- the plan ---
// `at_once`: blocks that shall run at the same time. Sets all that says how the tensors are walked: `samples` of them
// as b describes one.
template <class T>
Norm<T> plan_norm(const AnyNorm& b, bool vectors, int64_t at_once, int64_t samples = 1) {
  constexpr int kBytes = int(sizeof(T));
  const int v = vectors ? kNormWide<T> : 1;
  Norm<T> p{};
  p.c = b.c;
  const bool last = b.channels_adjacent();
  const int64_t pixels = b.c > 1 ? b.pixels : b.n * b.pixels, planes = b.c > 1 ? b.n : 1;
  p.width = last ? v : 1, p.pixels = last ? 1 : v;
  int lanes = 1, groups = 1;
  if (last) {
    p.plane = 1, p.plane_step = b.c, p.channel_step = 1;
    p.positions = planes * pixels;
    while (groups * v * kBytes < kSegment && groups * v < b.c) groups *= 2;
  } else {
    p.plane = pixels / v, p.plane_step = b.c * pixels, p.channel_step = pixels;
    p.positions = planes * p.plane;
    while (lanes < kNormBlock && lanes * 2 <= p.plane) lanes *= 2;
    while (groups * lanes * v * kBytes < kSegment && groups * 2 <= b.c) groups *= 2;
  }
  while (1 << p.lane_bits < lanes) ++p.lane_bits;
  while (1 << p.group_bits < groups) ++p.group_bits;
  while (1 << p.tile_bits < groups * p.width) ++p.tile_bits;
  p.items = kNormBlock / groups;
  p.sample_tiles = ceil_div(b.c, int64_t(groups) * p.width);
  p.tiles = p.sample_tiles * samples, p.sample_step = b.n * b.c * b.pixels, p.all = b.c * samples;
  p.splits = max(at_once / p.tiles, int64_t(1));
  if (p.splits * p.tiles * 8 < at_once * 7) p.splits = max(4 * at_once / p.tiles, int64_t(1));  // many, in turn
  p.splits = min(p.splits, ceil_div(p.positions, p.items));
  const int64_t step = p.splits * p.items;
  p.rounds = p.positions / step, p.rest = p.positions % step;
  p.skip = step % p.plane;
  p.jump = step / p.plane * p.plane_step + p.skip * v;
  p.wrap = p.plane_step - p.plane * v;
  p.activation = b.activation;
  p.slope = Acc<T>(b.activation == Activation::none ? 1 : b.activation == Activation::relu ? 0 : b.slope);
  p.eps = Acc<T>(b.eps), p.narrow = b.narrow;
  using S = Acc<T>;
  p.input = static_cast<const T*>(b.input), p.grad = static_cast<const T*>(b.grad);
  p.weight = b.weight, p.bias = b.bias;
  p.mean = static_cast<S*>(b.mean), p.invstd = static_cast<S*>(b.invstd);
  return p;
}
// Whether positions may be of more than one element: by the sizes, and by the tensors.
template <class T>
bool has_vectors(const AnyNorm& b) {
  const bool last = b.channels_adjacent();
  return kNormWide<T> > 1 && (last ? b.c : b.c > 1 ? b.pixels : b.n * b.pixels) % kNormWide<T> == 0;
}
template <class T>
bool in_vectors(const AnyNorm& b, const void* result) {
  return has_vectors<T>(b) && alignment_of(b.input) == 16 && alignment_of(b.grad) == 16 && alignment_of(result) == 16;
}
inline bool is_piecewise_norm(Activation a) {
  return a == Activation::none || a == Activation::relu || a == Activation::leaky_relu;
}
// What one pass wants of another plan: the sums' partial results.
template <class T>
void take_partials(Norm<T>& p, const Norm<T>& sums) {
  p.partial = sums.partial, p.parts = sums.splits;
  p.part_rounds = sums.rounds, p.part_rest = sums.rest;
}
// Blocks that run at once: as many of a pass on a multiprocessor as its registers leave room for.
inline int64_t blocks_at_once(const AnyNorm& b, int per_multiprocessor) {
  return b.blocks ? b.blocks : per_multiprocessor * int64_t(multiprocessors());
}
template <class T, int V>
Norm<T> plan_sums(const AnyNorm& b, void* workspace, int64_t samples = 1) {
  Norm<T> p = plan_norm<T>(b, V > 1, blocks_at_once(b, V > 1 ? 1 : 2), samples);
  p.partial = static_cast<Acc<T>*>(workspace);
  return p;
}
// Bytes of the partial results of sums over `samples` of b; which of the two it is, the tensors' addresses tell.
inline int64_t partials_bytes(const AnyNorm& b, int64_t samples = 1) {
  int64_t splits = 0;
  with_type(b.dtype, [&](auto t) -> const char* {
    using T = decltype(t);
    splits = plan_sums<T, 1>(b, nullptr, samples).splits;
    if (has_vectors<T>(b)) splits = max(splits, plan_sums<T, kNormWide<T>>(b, nullptr, samples).splits);
    return nullptr;
  });
  return splits * samples * b.c * 2 * (b.dtype == DType::f64 ? 8 : 4);
}

// f(T(), elements of a position, whether the activation is piecewise), the last two as types: vectors where the tensors
// with `result` allow them.
template <class F>
const char* with_norm(const AnyNorm& b, const void* result, F f) {
  return with_type(b.dtype, [&](auto t) -> const char* {
    using T = decltype(t);
    if constexpr (kNormWide<T> > 1) {
      const std::integral_constant<int, kNormWide<T>> v;
      if (in_vectors<T>(b, result))
        return is_piecewise_norm(b.activation) ? f(t, v, std::true_type()) : f(t, v, std::false_type());
    }
    return f(t, std::integral_constant<int, 1>(), std::false_type());
  });
}

}  // namespace aeup
