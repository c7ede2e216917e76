// Group normalisation by the kernels of norm.cuh. In NHWC the tensors are samples one after another; in NCHW one sample
// of n * c channels, and for the statistics one whose channels are the groups, each one stretch of memory. Whatever a
// partial result stands for, each block of the second pass adds up those of the groups of its own channels.
#pragma once
#include "norm.cuh"

namespace aeup {

// Where the values of a channel of a walk's sample are.
template <bool kGrouped>
struct Place {
  int64_t parameter, statistic;  // elements of weight and bias, of mean and invstd
  bool first;                    // of its group
  template <class T, class W>
  AEUP_DEV Place(const Norm<T>& p, const W& w, int64_t channel) : parameter(channel), statistic(channel), first(true) {
    if constexpr (kGrouped) {
      const Split in_group = split(w.sample * p.c + channel, p.group);
      statistic = in_group.quotient, first = in_group.remainder == 0;
      parameter = split(w.sample * p.c + channel, p.parameters).remainder;
    }
  }
};

// Of each of a tile's groups the sum of f(partial result, its place among those of a part); a thread below the tile's
// number of channels gets that of its own channel's group.
template <class Sum, class T, int V, bool kUp, class F>
AEUP_DEV Sum add_partials_of_groups(const Norm<T>& p, const Walk<T, V, kUp, true>& w, F f) {
  using S = Acc<T>;
  __shared__ Sum shared[kNormBlock];
  const int t = threadIdx.x, slot = t & ((1 << p.slot_bits) - 1), part = t >> p.slot_bits;
  const int64_t start = w.sample * p.c, end = start + min(w.first_channel(p) + (int64_t(1) << p.tile_bits), p.c);
  const int64_t channel = start + w.first_channel(p);
  const int64_t first = split(channel, p.group).quotient, group = first + slot;
  Sum sum = Sum::of(S(0), S(0), S(0));
  if (group <= split(end - 1, p.group).quotient)
#pragma unroll 4
    for (int64_t e = part; e < p.parts * p.units; e += kNormBlock >> p.slot_bits) {
      const Split s = split(e, p.units);
      const int64_t unit = group * p.units + s.remainder;
      const int64_t more = min(max(p.part_rest - s.quotient * p.part_items, int64_t(0)), p.part_items);
      const S* at = p.partial + (s.quotient * p.part_all + unit) * 2;
      const S count = S((p.part_rounds * p.part_items + more) * p.part_count);
      sum.add(f(Sum::of(count, load_fresh(at), load_fresh(at + 1)), unit));
    }
  add_parts_of_tile(sum, slot, part, p.slot_bits, shared);
  return shared[split(min(channel + t, end - 1), p.group).quotient - first];
}

// The gradients of weight and bias, by the first blocks of the first sample's tiles: over parts and samples.
template <class T, int V, bool kUp>
AEUP_DEV void store_parameter_gradients(const Norm<T>& p, const Walk<T, V, kUp, true>& w) {
  using S = Acc<T>;
  __shared__ Sums<S> shared[kNormBlock];
  if (w.split_index || w.sample || w.first_channel(p) >= p.parameters || !(p.weight_grad || p.bias_grad)) return;
  const int t = threadIdx.x, in_tile = t & ((1 << p.tile_bits) - 1), part = t >> p.tile_bits;
  const int64_t channel = w.first_channel(p) + in_tile, samples = split(p.part_all, p.parameters).quotient;
  Sums<S> sum = {S(0), S(0)};
  if (channel < p.parameters)
#pragma unroll 4
    for (int64_t e = part; e < p.parts * samples; e += kNormBlock >> p.tile_bits) {
      const Split s = split(e, samples);
      const int64_t unit = s.remainder * p.parameters + channel;
      const S* at = p.partial + (s.quotient * p.part_all + unit) * 2;
      const S invstd = load_one(p.invstd + split(unit, p.group).quotient);
      sum.add({load_fresh(at), load_fresh(at + 1) * invstd});
    }
  sum = add_parts_of_tile(sum, in_tile, part, p.tile_bits, shared);
  if (t >= 1 << p.tile_bits || channel >= p.parameters) return;
  if (p.weight_grad) set_channel(p, p.weight_grad, channel, sum.product);
  if (p.bias_grad) set_channel(p, p.bias_grad, channel, sum.grad);
}

// --- the plan ---
// The tensors as `count` samples [c, pixels], whose sums are `units` partial results for each group.
struct Samples {
  AnyNorm each;
  int64_t count, units;
};
inline Samples channels_of(const GroupNorm& g) {
  Samples s{g, g.n, g.c / g.groups};
  s.each.n = 1, s.each.channels_last = g.channels_last && g.c > 1;
  if (!s.each.channels_last) s.each.c = g.n * g.c, s.count = 1;
  return s;
}
inline Samples statistics_of(const GroupNorm& g) {
  Samples s = channels_of(g);
  if (!s.each.channels_last) s.each.c = g.n * g.groups, s.each.pixels *= s.units, s.units = 1;
  return s;
}
struct PartialsOfGroups {
  void* at;
  int64_t parts, rounds, rest, all, items, count, units;  // see Norm
};
template <class T>
PartialsOfGroups partials_of(const Norm<T>& sums, const Samples& s) {
  return {sums.partial, sums.splits, sums.rounds, sums.rest, sums.all, sums.items, sums.pixels, s.units};
}
template <class T>
void take_groups(Norm<T>& p, const GroupNorm& g, const PartialsOfGroups& found) {
  p.partial = static_cast<Acc<T>*>(found.at), p.parts = found.parts;
  p.part_rounds = found.rounds, p.part_rest = found.rest;
  p.part_all = found.all, p.part_items = found.items, p.part_count = found.count, p.units = found.units;
  p.parameters = g.c, p.group = g.c / g.groups;
  const int64_t tile = int64_t(1) << p.tile_bits;
  const bool aligned = tile % p.group == 0 || p.group % tile == 0;
  const int64_t most = aligned ? ceil_div(tile, p.group) : min(tile, (tile + p.group - 2) / p.group + 1);
  while (1 << p.slot_bits < most) ++p.slot_bits;
}

}  // namespace aeup
