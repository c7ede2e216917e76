// Batch or group normalisation and activation, backward: the gradients of weight and bias, which are sums over the
// channel, then the input's. The normalised value and the derivative of the activation are computed anew from the
// input.
#include "batch_norm.h"
#include "group_norm.cuh"
#include "group_norm.h"

namespace aeup {
namespace {

template <class T, int V, bool kPiecewise, bool kGrouped>
__global__ void __launch_bounds__(kNormBlock) sum_gradients(Norm<T> p) {
  using S = Acc<T>;
  __shared__ Coefficients<S, 3> shared;
  let_next_start();
  Walk<T, V, false, kGrouped> w(p);
  const int64_t channel = w.first_channel(p) + threadIdx.x;
  if (int(threadIdx.x) < 1 << p.tile_bits && channel < p.c) {
    const Place<kGrouped> place(p, w, channel);
    set_affine(p, place.parameter, load_one(p.mean + place.statistic), load_one(p.invstd + place.statistic), shared);
  }
  __syncthreads();
  S about[V], scale[V], bias[V], sum[V], product[V];
#pragma unroll
  for (int i = 0; i < V; ++i) about[i] = scale[i] = bias[i] = sum[i] = product[i] = S(0);
  if (w.left) {
    shared.get(0, w.channel_in_tile, p.width, about);
    shared.get(1, w.channel_in_tile, p.width, scale);
    shared.get(2, w.channel_in_tile, p.width, bias);
  }
  const T* const from[2] = {p.input, p.grad};
  sweep<4>(p, w, from, [&](S(&v)[2][V], int64_t) {
    S z[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[0][i] -= about[i];
      z[i] = scale[i] * v[0][i] + bias[i];
    }
    before_activation<kPiecewise>(p, v[1], z);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += v[1][i], product[i] += v[1][i] * v[0][i];
  });
  store_partial<Sums<S>>(p, w, S(0), sum, product);
}

// With g the gradient before the activation, x^ the normalised input and scale = weight * invstd:
// scale * (g - mean(g) - x^ * mean(g x^)), or outside training scale * g (Ioffe & Szegedy, 2015, section 3). Of groups:
// invstd * (weight * g - mean(weight * g) - x^ * mean(weight * g x^)) (Wu & He, 2018).
template <class T, int V, bool kPiecewise, bool kGrouped>
__global__ void __launch_bounds__(kNormBlock) input_gradient(Norm<T> p) {
  using S = Acc<T>;
  __shared__ Coefficients<S, 5> shared;
  Walk<T, V, true, kGrouped> w(p);
  after_previous();
  const int64_t channel = w.first_channel(p) + threadIdx.x;
  const bool mine = int(threadIdx.x) < 1 << p.tile_bits && channel < p.c;
  Sums<S> sums = {S(0), S(0)};
  if constexpr (kGrouped) {
    sums = add_partials_of_groups<Sums<S>>(p, w, [&](const Sums<S>& one, int64_t unit) {
      const S weight = p.weight ? of_channel(p, p.weight, split(unit, p.parameters).remainder) : S(1);
      return Sums<S>{weight * one.grad, weight * one.product};
    });
    store_parameter_gradients(p, w);
  } else if (p.partial)
    sums = add_partials_of<Sums<S>>(p, w.first_channel(p));
  if (mine && kGrouped) {
    const Place<kGrouped> place(p, w, channel);
    const S invstd = load_one(p.invstd + place.statistic), n = S(p.positions * p.pixels * p.group);
    set_affine(p, place.parameter, load_one(p.mean + place.statistic), invstd, shared);
    shared.of[3][threadIdx.x] = invstd * (sums.grad / n);
    shared.of[4][threadIdx.x] = invstd * (sums.product / n) * invstd * invstd;
  } else if (mine) {
    const S invstd = load_one(p.invstd + channel), n = S(p.positions * p.pixels);
    set_affine(p, channel, load_one(p.mean + channel), invstd, shared);
    if (w.split_index == 0) {
      if (p.weight_grad) set_channel(p, p.weight_grad, channel, sums.product * invstd);
      if (p.bias_grad) set_channel(p, p.bias_grad, channel, sums.grad);
    }
    const S scale = p.training ? shared.of[1][threadIdx.x] : S(0);
    shared.of[3][threadIdx.x] = scale * (sums.grad / n);
    shared.of[4][threadIdx.x] = scale * (sums.product / n) * invstd * invstd;
  }
  __syncthreads();
  if (!w.left || !p.result) return;
  S about[V], scale[V], bias[V], mean_grad[V], slope[V];
  shared.get(0, w.channel_in_tile, p.width, about);
  shared.get(1, w.channel_in_tile, p.width, scale);
  shared.get(2, w.channel_in_tile, p.width, bias);
  shared.get(3, w.channel_in_tile, p.width, mean_grad);
  shared.get(4, w.channel_in_tile, p.width, slope);
  const T* const from[2] = {p.input, p.grad};
  sweep<4>(p, w, from, [&](S(&v)[2][V], int64_t at) {
    S z[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[0][i] -= about[i];
      z[i] = scale[i] * v[0][i] + bias[i];
    }
    before_activation<kPiecewise>(p, v[1], z);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = scale[i] * v[1][i] - mean_grad[i] - slope[i] * v[0][i];
    Raw<T, V> y;
    y.pack(z);
    y.store(p.result + at);
  });
}

template <class T, int V, bool kPiecewise>
const char* run_as(const BatchNorm& b, void* workspace, void* stream) {
  using S = Acc<T>;
  Norm<T> p = plan_norm<T>(b, V > 1, blocks_at_once(b, V > 1 ? 1 : 2));
  p.result = static_cast<T*>(b.input_grad), p.training = b.training;
  p.weight_grad = b.weight_grad, p.bias_grad = b.bias_grad;
  const int64_t grid = p.result ? p.splits * p.tiles : p.tiles;
  if (!b.training && !b.weight_grad && !b.bias_grad)
    return launch(input_gradient<T, V, kPiecewise, false>, grid, kNormBlock, 0, stream, p);
  const Norm<T> sums = plan_sums<T, V>(b, workspace);
  take_partials(p, sums);
  AEUP_LAUNCH((sum_gradients<T, V, kPiecewise, false>), sums.splits * sums.tiles, kNormBlock, 0, stream, sums);
  return launch_after<input_gradient<T, V, kPiecewise, false>>(grid, kNormBlock, stream, p);
}

}  // namespace

const char* launch_batch_norm_backward(const BatchNorm& b, void* workspace, void* stream) {
  if (b.n * b.c * b.pixels == 0) return nullptr;
  if (!b.input_grad && !b.weight_grad && !b.bias_grad) return nullptr;
  if ((b.training || b.weight_grad || b.bias_grad) && !workspace) return "the sums need a workspace";
  return with_norm(b, b.input_grad, [&](auto t, auto v, auto piecewise) {
    return run_as<decltype(t), v(), piecewise()>(b, workspace, stream);
  });
}

const char* launch_group_norm_backward(const GroupNorm& g, void* workspace, void* stream) {
  if (g.n * g.c * g.pixels == 0) return nullptr;
  if (!g.input_grad && !g.weight_grad && !g.bias_grad) return nullptr;
  if (!workspace) return "the sums need a workspace";
  const Samples whole = channels_of(g);
  return with_norm(whole.each, g.input_grad, [&](auto t, auto v, auto piecewise) -> const char* {
    using T = decltype(t);
    Norm<T> sums = plan_sums<T, v()>(whole.each, workspace, whole.count);
    take_groups(sums, g, partials_of(sums, whole));
    AEUP_LAUNCH((sum_gradients<T, v(), piecewise(), true>), sums.splits * sums.tiles, kNormBlock, 0, stream, sums);
    Norm<T> p = plan_norm<T>(whole.each, v() > 1, blocks_at_once(g, v() > 1 ? 1 : 2), whole.count);
    p.result = static_cast<T*>(g.input_grad), p.weight_grad = g.weight_grad, p.bias_grad = g.bias_grad;
    take_groups(p, g, partials_of(sums, whole));
    const int64_t grid = p.result ? p.splits * p.tiles : p.tiles;
    return launch_after<input_gradient<T, v(), piecewise(), true>>(grid, kNormBlock, stream, p);
  });
}

}  // namespace aeup
