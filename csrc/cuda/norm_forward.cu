// Batch or group normalisation and activation, forward: the statistics, then the output; of batch normalisation outside
// training the output alone.
#include "batch_norm.h"
#include "group_norm.cuh"
#include "group_norm.h"

namespace aeup {
namespace {

// Each thread sums distances from its own first value: that is one of its k values, so the sum of squares is at most k
// times the one about their mean, and its rounding errors are at most k units in the last place of that.
template <class T, int V, bool kGrouped>
__global__ void __launch_bounds__(kNormBlock) statistics(Norm<T> p) {
  using S = Acc<T>;
  let_next_start();
  Walk<T, V, false, kGrouped> w(p);
  const S n = S(w.left), part = w.left ? S(1) / n : S(0);
  S shift[V], sum[V], square[V];
#pragma unroll
  for (int i = 0; i < V; ++i) shift[i] = sum[i] = square[i] = S(0);
  bool first = true;
  const T* const from[1] = {p.input};
  sweep<8>(p, w, from, [&](const S(&v)[1][V], int64_t) {
    if (first) {
#pragma unroll
      for (int i = 0; i < V; ++i) shift[i] = v[0][i];
      first = false;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const S d = v[0][i] - shift[i];
      sum[i] += d, square[i] += d * d;
    }
  });
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const S about_mean = square[i] - sum[i] * (sum[i] * part);
    square[i] = about_mean < S(0) ? S(0) : about_mean;  // keeps NaN
    sum[i] = shift[i] + sum[i] * part;
  }
  store_partial<Moments<S>>(p, w, n, sum, square);
}

template <class T, int V, bool kPiecewise, bool kGrouped>
__global__ void __launch_bounds__(kNormBlock, std::is_same_v<T, double> ? 1 : 2) normalise(Norm<T> p) {
  using S = Acc<T>;
  __shared__ Coefficients<S, 3> shared;
  Walk<T, V, true, kGrouped> w(p);
  after_previous();
  const int64_t channel = w.first_channel(p) + threadIdx.x;
  const bool mine = int(threadIdx.x) < 1 << p.tile_bits && channel < p.c, report = w.split_index == 0;
  S mean = S(0), var = S(0);
  if constexpr (kGrouped) {
    const Moments<S> all = add_partials_of_groups<Moments<S>>(p, w, [](const Moments<S>& m, int64_t) { return m; });
    mean = all.mean, var = all.square / all.n;
  } else if (p.partial) {
    const S n = S(p.positions * p.pixels);
    const Moments<S> all = add_partials_of<Moments<S>>(p, w.first_channel(p));
    mean = all.mean, var = all.square / n;
    if (mine && report && p.next_mean) {
      const S old_mean = of_channel(p, p.running_mean, channel), old_var = of_channel(p, p.running_var, channel);
      set_channel(p, p.next_mean, channel, (S(1) - p.momentum) * old_mean + p.momentum * mean);
      set_channel(p, p.next_var, channel, (S(1) - p.momentum) * old_var + p.momentum * (all.square / (n - S(1))));
    }
    if (report && w.tile == 0 && threadIdx.x == 0 && p.next_counter) {
      AEUP_CHECK(p.counter, 8, false);
      AEUP_CHECK(p.next_counter, 8, true);
      *p.next_counter = *p.counter + 1;
    }
  } else if (mine) {
    mean = of_channel(p, p.running_mean, channel), var = of_channel(p, p.running_var, channel);
  }
  if (mine) {
    const S invstd = S(1) / sqrt(var + p.eps);
    const Place<kGrouped> place(p, w, channel);
    set_affine(p, place.parameter, mean, invstd, shared);
    if (report && place.first) store_one(p.mean + place.statistic, mean), store_one(p.invstd + place.statistic, invstd);
  }
  __syncthreads();
  if (!w.left) return;
  S about[V], scale[V], bias[V];
  shared.get(0, w.channel_in_tile, p.width, about);
  shared.get(1, w.channel_in_tile, p.width, scale);
  shared.get(2, w.channel_in_tile, p.width, bias);
  const T* const from[1] = {p.input};
  sweep < V<8            ? 4
            : kPiecewise ? 3
                         : 2>(
              p, w, from,
              [&](S(&v)[1][V], int64_t at) {
#pragma unroll
                for (int i = 0; i < V; ++i) v[0][i] = scale[i] * (v[0][i] - about[i]) + bias[i];
                activate_all<kPiecewise>(p, v[0]);
                Raw<T, V> y;
                y.pack(v[0]);
                y.store(p.result + at);
              });
}

template <class T, int V, bool kPiecewise>
const char* run_as(const BatchNorm& b, void* workspace, void* stream) {
  using S = Acc<T>;
  Norm<T> p = plan_norm<T>(b, V > 1, blocks_at_once(b, 2));
  p.result = static_cast<T*>(b.output), p.training = b.training, p.momentum = S(b.momentum);
  p.running_mean = b.running_mean, p.running_var = b.running_var;
  if (!b.training) return launch(normalise<T, V, kPiecewise, false>, p.splits * p.tiles, kNormBlock, 0, stream, p);
  p.next_mean = b.next_mean, p.next_var = b.next_var;
  p.counter = b.counter, p.next_counter = b.next_counter;
  const Norm<T> sums = plan_sums<T, V>(b, workspace);
  take_partials(p, sums);
  AEUP_LAUNCH((statistics<T, V, false>), sums.splits * sums.tiles, kNormBlock, 0, stream, sums);
  return launch_after<normalise<T, V, kPiecewise, false>>(p.splits * p.tiles, kNormBlock, stream, p);
}

}  // namespace

int64_t batch_norm_workspace(const BatchNorm& b) { return b.n * b.c * b.pixels ? partials_bytes(b) : 0; }

const char* launch_batch_norm(const BatchNorm& b, void* workspace, void* stream) {
  if (b.n * b.c * b.pixels == 0) return nullptr;
  if (b.training && !workspace) return "the statistics need a workspace";
  return with_norm(b, b.output, [&](auto t, auto v, auto piecewise) {
    return run_as<decltype(t), v(), piecewise()>(b, workspace, stream);
  });
}

int64_t group_norm_workspace(const GroupNorm& g) {
  if (g.n * g.c * g.pixels == 0) return 0;
  const Samples whole = channels_of(g), sums = statistics_of(g);
  return max(partials_bytes(whole.each, whole.count), partials_bytes(sums.each, sums.count));
}

const char* launch_group_norm(const GroupNorm& g, void* workspace, void* stream) {
  if (g.n * g.c * g.pixels == 0) return nullptr;
  if (!workspace) return "the statistics need a workspace";
  const Samples s = statistics_of(g);
  PartialsOfGroups found;
  const char* const error = with_norm(s.each, nullptr, [&](auto t, auto v, auto) {
    using T = decltype(t);
    const Norm<T> p = plan_sums<T, v()>(s.each, workspace, s.count);
    found = partials_of(p, s);
    return s.count > 1 ? launch(statistics<T, v(), true>, p.splits * p.tiles, kNormBlock, 0, stream, p)
                       : launch(statistics<T, v(), false>, p.splits * p.tiles, kNormBlock, 0, stream, p);
  });
  if (error) return error;
  const Samples whole = channels_of(g);
  return with_norm(whole.each, g.output, [&](auto t, auto v, auto piecewise) {
    using T = decltype(t);
    Norm<T> p = plan_norm<T>(whole.each, v() > 1, blocks_at_once(g, 2), whole.count);
    p.result = static_cast<T*>(g.output);
    take_groups(p, g, found);
    return launch_after<normalise<T, v(), piecewise(), true>>(p.splits * p.tiles, kNormBlock, stream, p);
  });
}

}  // namespace aeup
