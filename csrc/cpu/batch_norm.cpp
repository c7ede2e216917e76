// Batch normalisation with the activation after it, on the CPU. Compiled once per instruction set (AEUP_ISA);
// csrc/cpu/dispatch.cpp chooses at run time. How it walks the tensors: csrc/cpu/norm_passes.h.
#include "cpu/batch_norm.h"

#include "cpu/norm_passes.h"

namespace aeup {
namespace AEUP_ISA {
namespace {

template <class T, class F>
void forward(const BatchNorm& b, ParallelFor parallel, F activation) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  const Walk w = walk_of<S>(b);
  const Channels<S> channels{b};
  const T* const from[1] = {static_cast<const T*>(b.input)};
  std::vector<double> mean, square;
  if (b.training) statistics<T>(from[0], w, parallel, mean, square);
  Coefficients<S, 3> k(w);
  const double n = double(b.n * b.pixels);
  for (int64_t i = 0; i < b.c; ++i) {
    const S old_mean = channels.get(b.running_mean, i, S(0)), old_var = channels.get(b.running_var, i, S(0));
    const double var = b.training ? square[i] / n : old_var;
    const S center = b.training ? S(mean[i]) : old_mean, invstd = S(1.0 / std::sqrt(var + b.eps));
    if (b.training && b.next_mean) {
      channels.set(b.next_mean, i, S((1 - b.momentum) * old_mean + b.momentum * mean[i]));
      channels.set(b.next_var, i, S((1 - b.momentum) * old_var + b.momentum * (square[i] / (n - 1))));
    }
    static_cast<S*>(b.mean)[i] = center, static_cast<S*>(b.invstd)[i] = invstd;
    const S scale = invstd * channels.get(b.weight, i, S(1)), rounding = b.training ? S(mean[i] - center) : S(0);
    k.of_channel[0][i] = center, k.of_channel[1][i] = scale;
    k.of_channel[2][i] = channels.get(b.bias, i, S(0)) - rounding * scale;
  }
  if (b.training && b.next_counter) *b.next_counter = *b.counter + 1;
  k.spread(w);
  map_elements<1>(w, parallel, from, static_cast<T*>(b.output), k,
                  [=](const V(&x)[1], const V(&c)[3]) { return activation.value((x[0] - c[0]) * c[1] + c[2]); });
}

template <class T, class F>
void backward(const BatchNorm& b, ParallelFor parallel, F activation) {
  using S = typename Arith<T>::type;
  const Walk w = walk_of<S>(b);
  const Channels<S> channels{b};
  const T* const from[2] = {static_cast<const T*>(b.input), static_cast<const T*>(b.grad)};
  const S *mean = static_cast<const S*>(b.mean), *invstd = static_cast<const S*>(b.invstd);
  Coefficients<S, 5> k(w);
  for (int64_t i = 0; i < b.c; ++i) {
    k.of_channel[0][i] = mean[i];
    k.of_channel[1][i] = invstd[i] * channels.get(b.weight, i, S(1));
    k.of_channel[2][i] = channels.get(b.bias, i, S(0));
  }
  T* const to = static_cast<T*>(b.input_grad);
  const bool sums = (b.training && to) || b.weight_grad || b.bias_grad;
  // The gradient before a smooth activation is kept where the input's goes: cheaper than to compute it again.
  T* const kept = F::smooth && sums ? to : nullptr;
  k.spread(w);
  if (sums) {
    const std::vector<double> total = gradient_sums(w, parallel, from, kept, k, activation);
    const double n = double(b.n * b.pixels);
    for (int64_t i = 0; i < b.c; ++i) {
      const double of_weight = total[b.c + i] * invstd[i], scale = k.of_channel[1][i];
      if (b.weight_grad) channels.set(b.weight_grad, i, S(of_weight));
      if (b.bias_grad) channels.set(b.bias_grad, i, S(total[i]));
      k.of_channel[3][i] = S(scale * total[i] / n), k.of_channel[4][i] = S(scale * of_weight * invstd[i] / n);
    }
    k.spread(w);
  }
  if (to) input_gradient(w, parallel, from, to, k, activation, b.training, kept != nullptr);
}

}  // namespace

void batch_norm(const BatchNorm& b, ParallelFor parallel) {
  with_type(b.dtype, [&](auto t) {
    using T = decltype(t);
    with_activation<typename Arith<T>::type>(b.activation, b.slope,
                                             [&](auto activation) { forward<T>(b, parallel, activation); });
  });
}
void batch_norm_backward(const BatchNorm& b, ParallelFor parallel) {
  with_type(b.dtype, [&](auto t) {
    using T = decltype(t);
    with_activation<typename Arith<T>::type>(b.activation, b.slope,
                                             [&](auto activation) { backward<T>(b, parallel, activation); });
  });
}

}  // namespace AEUP_ISA
}  // namespace aeup
