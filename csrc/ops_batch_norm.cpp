// The compiled operators of batch normalisation with the activation after it: torch.ops.aeup_native.batch_norm*. They
// are kernels without autograd; aeup/ops/batch_norm.py builds the public operators on them.
#include "cpu/batch_norm.h"
#include "ops_norm.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/batch_norm.h"
#endif

namespace {

using torch::stable::Tensor;

constexpr const char* kName = "aeup.batch_norm";

using aeup::arithmetic;
using aeup::dtype_code;
using Optional = aeup::OptionalTensor;

aeup::BatchNorm describe(const Tensor& input, bool training, double momentum, double eps, int64_t activation,
                         double slope) {
  aeup::BatchNorm b{};
  aeup::describe_norm(kName, &b, input, eps, activation, slope);
  // torch's kernels for the CPU write what is both layouts as contiguous.
  b.channels_last = b.channels_last && !(input.is_cpu() && aeup::is_dense(input, false));
  b.training = training, b.momentum = momentum;
  return b;
}
// A [c] tensor.
void* channels(const aeup::BatchNorm& b, const Tensor& input, const Tensor& x, int32_t dtype, const char* name) {
  return aeup::values_of(kName, b.c, input, x, dtype, name);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, const Optional& weight, const Optional& bias,
                                           const Optional& running_mean, const Optional& running_var,
                                           const Optional& counter, bool training, double momentum, double eps,
                                           int64_t activation, double slope) {
  aeup::BatchNorm b = describe(given, training, momentum, eps, activation, slope);
  if (bool(running_mean) != bool(running_var)) aeup::fail(kName, "running_mean and running_var belong together");
  if (!training && !running_mean) aeup::fail(kName, "running statistics are needed outside training");
  if (counter && (dtype_code(*counter) != aoti_torch_dtype_int64() || counter->numel() != 1 ||
                  !aeup::same_device(*counter, given)))
    aeup::fail(kName, "the counter must be one int64 on the input's device");
  const aeup::OnDevice guard(given);
  const Tensor input = aeup::dense(given, b.channels_last);
  b.input = input.const_data_ptr();
  const int32_t dtype = aeup::set_narrow(&b, given, running_mean, weight ? weight : bias);
  if (weight) b.weight = channels(b, given, *weight, dtype, "weight");
  if (bias) b.bias = channels(b, given, *bias, dtype, "bias");
  if (running_mean) {
    b.running_mean = b.next_mean = channels(b, given, *running_mean, dtype, "running_mean");
    b.running_var = b.next_var = channels(b, given, *running_var, dtype, "running_var");
  }
  if (counter) b.counter = b.next_counter = static_cast<int64_t*>(counter->mutable_data_ptr());
  Tensor output = aeup::empty_like(input, input.sizes(), b.channels_last);
  Tensor mean = aeup::empty_values(given, b.c, arithmetic(b.dtype)),
         invstd = aeup::empty_values(given, b.c, arithmetic(b.dtype));
  b.output = output.mutable_data_ptr(), b.mean = mean.mutable_data_ptr(), b.invstd = invstd.mutable_data_ptr();
  if (given.is_cpu()) aeup::batch_norm_cpu(b, aeup::torch_parallel);
#ifdef AEUP_WITH_CUDA
  else
    aeup::run_norm(kName, given, training ? aeup::batch_norm_workspace(b) : 0,
                   [&](void* workspace, void* stream) { return aeup::launch_batch_norm(b, workspace, stream); });
#endif
  return {output, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_grad, const Tensor& given, const Tensor& mean,
                                            const Tensor& invstd, const Optional& weight, const Optional& bias,
                                            bool training, int64_t activation, double slope, bool want_input,
                                            bool want_weight, bool want_bias) {
  aeup::BatchNorm b = describe(given, training, 0.0, 0.0, activation, slope);
  aeup::check_beside(kName, given, given_grad, "grad");
  if (given_grad.sizes() != given.sizes()) aeup::fail(kName, "grad and input differ in size");
  const aeup::OnDevice guard(given);
  const Tensor input = aeup::dense(given, b.channels_last), grad = aeup::dense(given_grad, b.channels_last);
  b.input = input.const_data_ptr(), b.grad = grad.const_data_ptr();
  b.mean = channels(b, given, mean, arithmetic(b.dtype), "mean");
  b.invstd = channels(b, given, invstd, arithmetic(b.dtype), "invstd");
  const int32_t dtype = aeup::set_narrow(&b, given, weight, bias);
  if (weight) b.weight = channels(b, given, *weight, dtype, "weight");
  if (bias) b.bias = channels(b, given, *bias, dtype, "bias");
  const aeup::NormGradients made(&b, input, dtype, want_input, want_weight, want_bias);
  if (given.is_cpu()) aeup::batch_norm_backward_cpu(b, aeup::torch_parallel);
#ifdef AEUP_WITH_CUDA
  else
    aeup::run_norm(
        kName, given, training || want_weight || want_bias ? aeup::batch_norm_workspace(b) : 0,
        [&](void* workspace, void* stream) { return aeup::launch_batch_norm_backward(b, workspace, stream); });
#endif
  return {made.input, made.weight, made.bias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? counter, bool training, float momentum, float eps, int activation, float slope) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
      "bool training, int activation, float slope, bool want_input, bool want_weight, bool want_bias) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&forward));
  m.impl("batch_norm_backward", TORCH_BOX(&backward));
}
#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("batch_norm", TORCH_BOX(&forward));
  m.impl("batch_norm_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace
