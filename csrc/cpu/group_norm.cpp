// Group normalisation with the activation after it, on the CPU: the passes of batch normalisation over the channels of
// each sample, whose sums are then joined to those of groups. Compiled once per instruction set (AEUP_ISA);
// csrc/cpu/dispatch.cpp chooses at run time.
//
// In NCHW all channels of all samples are walked as those of one image, and the statistics as if a group were one
// channel: it lies in one stretch. A large tensor of many groups (channels-last: samples) is cut into parts of some,
// each of which takes both passes while it is in a cache.
#include "cpu/group_norm.h"

#include "cpu/norm_passes.h"

namespace aeup {
namespace AEUP_ISA {
namespace {

constexpr int64_t kPart = 1 << 16, kParts = 32;  // elements, about; parts of a tensor, at least, if not one
constexpr int64_t kLeast = 16;  // pixels that a sample counts for in channels-last, as its table of coefficients is

// Some groups of the tensors, as channels of `samples` images [c, pixels].
struct Part {
  AnyNorm channels, statistics;
  int64_t samples, shift, first, groups;  // shift: elements before it; first: of the groups
  int64_t units, width;                   // of a group: channels in `statistics`, and in `channels`
};
// Calls f(part, how to run its pieces).
template <class F>
void over_parts(const GroupNorm& g, ParallelFor parallel, F f) {
  const int64_t width = g.c / g.groups;
  const bool last = g.channels_last && g.c > 1 && g.pixels > 1;
  const int64_t stretches = last ? g.n : g.n * g.groups, length = g.n * g.c * g.pixels / stretches;
  const int64_t work = last ? g.c * std::max(g.pixels, kLeast) : length;
  const bool cut = stretches >= kParts && stretches * work >= kParts * kPart;
  const int64_t most = cut ? std::max<int64_t>(kPart / work, 1) : stretches;
  const auto run = [&](int64_t i, ParallelFor how) {
    const int64_t from = i * most, count = std::min(most, stretches - from), groups = last ? g.groups : 1;
    Part p{g, g, last ? count : 1, from * length, from * groups, count * groups, last ? width : 1, width};
    p.channels.n = 1, p.channels.channels_last = last;
    if (!last) p.channels.c = count * width;
    p.statistics = p.channels;
    if (!last) p.statistics.c = count, p.statistics.pixels = length;
    f(p, how);
  };
  if (!cut) return run(0, parallel);
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const ParallelFor serial = [](int64_t n, void (*body)(int64_t, int64_t, void*), void* of) { body(0, n, of); };
    for (int64_t i = begin; i < end; ++i) (*static_cast<decltype(run)*>(context))(i, serial);
  };
  parallel((stretches + most - 1) / most, body, const_cast<void*>(static_cast<const void*>(&run)));
}

template <class T, class F>
void forward(const GroupNorm& g, ParallelFor all, F activation) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  const Channels<S> channels{g};
  over_parts(g, all, [&](const Part& p, ParallelFor parallel) {
    const T* const from[1] = {static_cast<const T*>(g.input) + p.shift};
    std::vector<double> mean, square;
    statistics<T>(from[0], walk_of<S>(p.statistics, p.samples), parallel, mean, square);
    const Walk w = walk_of<S>(p.channels, p.samples);
    Coefficients<S, 3> k(w);
    const double n = double(p.statistics.pixels);
    for (int64_t i = 0; i < p.groups; ++i) {
      double of_group = 0, squares = 0;
      for (int64_t u = i * p.units; u < (i + 1) * p.units; ++u) of_group += mean[u] / double(p.units);
      for (int64_t u = i * p.units; u < (i + 1) * p.units; ++u)
        squares += square[u] + n * (mean[u] - of_group) * (mean[u] - of_group);
      const S center = S(of_group), invstd = S(1.0 / std::sqrt(squares / (n * double(p.units)) + g.eps));
      static_cast<S*>(g.mean)[p.first + i] = center, static_cast<S*>(g.invstd)[p.first + i] = invstd;
      for (int64_t q = i * p.width; q < (i + 1) * p.width; ++q) {
        const int64_t c = (p.first * p.width + q) % g.c;
        const S scale = invstd * channels.get(g.weight, c, S(1));
        k.of_channel[0][q] = center, k.of_channel[1][q] = scale;
        k.of_channel[2][q] = channels.get(g.bias, c, S(0)) - S(of_group - center) * scale;
      }
    }
    k.spread(w);
    map_elements<1>(w, parallel, from, static_cast<T*>(g.output) + p.shift, k,
                    [=](const V(&x)[1], const V(&c)[3]) { return activation.value((x[0] - c[0]) * c[1] + c[2]); });
  });
}

// With z = weight * x^ + bias and g the gradient before the activation: the sums over a group that the gradient of its
// input needs are those of weight * g and weight * g * x^ (Wu & He, 2018, "Group Normalization").
template <class T, class F>
void backward(const GroupNorm& g, ParallelFor all, F activation) {
  using S = typename Arith<T>::type;
  const Channels<S> channels{g};
  const S *mean = static_cast<const S*>(g.mean), *invstd = static_cast<const S*>(g.invstd);
  std::vector<double> of_weight(g.n * g.c), of_bias(g.n * g.c);  // and sample
  over_parts(g, all, [&](const Part& p, ParallelFor parallel) {
    const T* const from[2] = {static_cast<const T*>(g.input) + p.shift, static_cast<const T*>(g.grad) + p.shift};
    T* const to = g.input_grad ? static_cast<T*>(g.input_grad) + p.shift : nullptr;
    T* const kept = F::smooth ? to : nullptr;  // as in batch_norm.cpp
    const Walk w = walk_of<S>(p.channels, p.samples);
    const auto channel = [&](int64_t q) { return (p.first * p.width + q) % g.c; };
    Coefficients<S, 5> k(w);
    for (int64_t q = 0; q < p.groups * p.width; ++q) {
      const int64_t group = p.first + q / p.width;
      k.of_channel[0][q] = mean[group];
      k.of_channel[1][q] = invstd[group] * channels.get(g.weight, channel(q), S(1));
      k.of_channel[2][q] = channels.get(g.bias, channel(q), S(0));
    }
    k.spread(w);
    const std::vector<double> total = gradient_sums(w, parallel, from, kept, k, activation);
    const double *const grads = total.data(), *const products = grads + p.groups * p.width;
    for (int64_t i = 0; i < p.groups; ++i) {
      const double r = invstd[p.first + i], n = double(p.width * g.pixels);
      double of_grads = 0, of_products = 0;
      for (int64_t q = i * p.width; q < (i + 1) * p.width; ++q) {
        const double weight = channels.get(g.weight, channel(q), S(1));
        of_grads += weight * grads[q], of_products += weight * products[q];
        of_bias[p.first * p.width + q] = grads[q], of_weight[p.first * p.width + q] = products[q] * r;
      }
      for (int64_t q = i * p.width; q < (i + 1) * p.width; ++q)
        k.of_channel[3][q] = S(r * of_grads / n), k.of_channel[4][q] = S(r * r * r * of_products / n);
    }
    if (!to) return;
    k.spread(w);
    input_gradient(w, parallel, from, to, k, activation, true, kept != nullptr);
  });
  for (int64_t c = 0; c < g.c; ++c) {
    for (int64_t q = c + g.c; q < g.n * g.c; q += g.c) of_weight[c] += of_weight[q], of_bias[c] += of_bias[q];
    if (g.weight_grad) channels.set(g.weight_grad, c, S(of_weight[c]));
    if (g.bias_grad) channels.set(g.bias_grad, c, S(of_bias[c]));
  }
}

}  // namespace

void group_norm(const GroupNorm& g, ParallelFor parallel) {
  with_type(g.dtype, [&](auto t) {
    using T = decltype(t);
    with_activation<typename Arith<T>::type>(g.activation, g.slope,
                                             [&](auto activation) { forward<T>(g, parallel, activation); });
  });
}
void group_norm_backward(const GroupNorm& g, ParallelFor parallel) {
  with_type(g.dtype, [&](auto t) {
    using T = decltype(t);
    with_activation<typename Arith<T>::type>(g.activation, g.slope,
                                             [&](auto activation) { backward<T>(g, parallel, activation); });
  });
}

}  // namespace AEUP_ISA
}  // namespace aeup
