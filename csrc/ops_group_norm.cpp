// The compiled operators of group normalisation with the activation after it: torch.ops.aeup_native.group_norm*. They
// are kernels without autograd; aeup/ops/group_norm.py builds the public operators on them.
#include "cpu/group_norm.h"
#include "ops_norm.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/group_norm.h"
#endif

namespace {

using aeup::arithmetic;
using torch::stable::Tensor;
using Optional = aeup::OptionalTensor;

constexpr const char* kName = "aeup.group_norm";

aeup::GroupNorm describe(const Tensor& input, int64_t groups, double eps, int64_t activation, double slope) {
  aeup::GroupNorm g{};
  aeup::describe_norm(kName, &g, input, eps, activation, slope);
  if (groups < 1 || g.c % groups)
    aeup::fail(kName, std::to_string(g.c) + " channels cannot be cut into " + std::to_string(groups) + " groups");
  g.groups = groups;
  return g;
}
int32_t set_affine(aeup::GroupNorm* g, const Tensor& input, const Optional& weight, const Optional& bias) {
  const int32_t dtype = aeup::set_narrow(g, input, weight, bias);
  if (weight) g->weight = aeup::values_of(kName, g->c, input, *weight, dtype, "weight");
  if (bias) g->bias = aeup::values_of(kName, g->c, input, *bias, dtype, "bias");
  return dtype;
}

// mean and invstd: [n * groups].
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, const Optional& weight, const Optional& bias,
                                           int64_t groups, double eps, int64_t activation, double slope) {
  aeup::GroupNorm g = describe(given, groups, eps, activation, slope);
  const aeup::OnDevice guard(given);
  const Tensor input = aeup::dense(given, g.channels_last);
  g.input = input.const_data_ptr();
  set_affine(&g, given, weight, bias);
  Tensor output = aeup::empty_like(input, input.sizes(), g.channels_last);
  Tensor mean = aeup::empty_values(given, g.n * groups, arithmetic(g.dtype)),
         invstd = aeup::empty_values(given, g.n * groups, arithmetic(g.dtype));
  g.output = output.mutable_data_ptr(), g.mean = mean.mutable_data_ptr(), g.invstd = invstd.mutable_data_ptr();
  if (given.is_cpu()) aeup::group_norm_cpu(g, aeup::torch_parallel);
#ifdef AEUP_WITH_CUDA
  else
    aeup::run_norm(kName, given, aeup::group_norm_workspace(g),
                   [&](void* workspace, void* stream) { return aeup::launch_group_norm(g, workspace, stream); });
#endif
  return {output, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_grad, const Tensor& given, const Tensor& mean,
                                            const Tensor& invstd, const Optional& weight, const Optional& bias,
                                            int64_t groups, int64_t activation, double slope, bool want_input,
                                            bool want_weight, bool want_bias) {
  aeup::GroupNorm g = describe(given, groups, 0.0, activation, slope);
  aeup::check_beside(kName, given, given_grad, "grad");
  if (given_grad.sizes() != given.sizes()) aeup::fail(kName, "grad and input differ in size");
  const aeup::OnDevice guard(given);
  const Tensor input = aeup::dense(given, g.channels_last), grad = aeup::dense(given_grad, g.channels_last);
  g.input = input.const_data_ptr(), g.grad = grad.const_data_ptr();
  g.mean = aeup::values_of(kName, g.n * groups, given, mean, arithmetic(g.dtype), "mean");
  g.invstd = aeup::values_of(kName, g.n * groups, given, invstd, arithmetic(g.dtype), "invstd");
  const int32_t dtype = set_affine(&g, given, weight, bias);
  const aeup::NormGradients made(&g, input, dtype, want_input, want_weight, want_bias);
  if (given.is_cpu()) aeup::group_norm_backward_cpu(g, aeup::torch_parallel);
#ifdef AEUP_WITH_CUDA
  else
    aeup::run_norm(kName, given, aeup::group_norm_workspace(g), [&](void* workspace, void* stream) {
      return aeup::launch_group_norm_backward(g, workspace, stream);
    });
#endif
  return {made.input, made.weight, made.bias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "group_norm(Tensor input, Tensor? weight, Tensor? bias, int groups, float eps, int activation, float slope) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
      "int groups, int activation, float slope, bool want_input, bool want_weight, bool want_bias) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&forward));
  m.impl("group_norm_backward", TORCH_BOX(&backward));
}
#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("group_norm", TORCH_BOX(&forward));
  m.impl("group_norm_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace
