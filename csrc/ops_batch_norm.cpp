// The compiled operators of batch normalisation with the activation after it: torch.ops.aeup_native.batch_norm*. They
// are kernels without autograd; aeup/ops/batch_norm.py builds the public operators on them.
#include "cpu/batch_norm.h"
#include "ops_convolution.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/batch_norm.h"
#endif

namespace {

using torch::stable::Tensor;

constexpr const char* kName = "aeup.batch_norm";

using aeup::dtype_code;
using Optional = std::optional<Tensor>;

// Dtypes are the shim's numbers.
int32_t arithmetic(aeup::DType t) {
  return t == aeup::DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

aeup::BatchNorm describe(const Tensor& input, bool training, double momentum, double eps, int64_t activation,
                         double slope) {
  aeup::check(kName, input, "input", 4);
  aeup::BatchNorm b{};
  b.dtype = aeup::float_dtype_of(kName, input);
  b.activation = aeup::activation_of(kName, activation);
  b.n = input.size(0), b.c = input.size(1), b.pixels = input.size(2) * input.size(3);
  // torch's kernels for the CPU write what is both layouts as contiguous.
  b.channels_last = aeup::suggests_channels_last(input) && !(input.is_cpu() && aeup::is_dense(input, false));
  b.training = training, b.momentum = momentum, b.eps = eps, b.slope = slope;
  if (input.numel() == 0) aeup::fail(kName, "the input is empty");
  return b;
}
// A [c] tensor of `dtype` that the kernels may read and write as it lies.
void* channels(const aeup::BatchNorm& b, const Tensor& input, const Tensor& x, int32_t dtype, const char* name) {
  if (x.dim() != 1 || x.size(0) != b.c)
    aeup::fail(kName, std::string(name) + " must have " + std::to_string(b.c) + " elements");
  if (dtype_code(x) != dtype) aeup::fail(kName, std::string(name) + " has another dtype");
  if (!aeup::same_device(x, input)) aeup::fail(kName, std::string(name) + " is on another device");
  if (b.c > 1 && x.stride(0) != 1) aeup::fail(kName, std::string(name) + " must be contiguous");
  return const_cast<void*>(x.const_data_ptr());
}
// The dtype of the parameters, one for all: the input's or that of the arithmetic.
int32_t set_narrow(aeup::BatchNorm* b, const Tensor& input, const Optional& one, const Optional& other) {
  const Optional& first = one ? one : other;
  const int32_t code = dtype_code(input), own = arithmetic(b->dtype);
  b->narrow = first && dtype_code(*first) == code && code != own;
  return b->narrow ? code : own;
}
Tensor empty_channels(const Tensor& input, int64_t channels, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &channels, &stride, dtype, aeup::device_type(input),
                                                         input.get_device_index(), &handle));
  return Tensor(handle);
}
struct OnDevice {  // of the input, for the length of a call
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const Tensor& input) {
    if (!input.is_cpu()) guard.emplace(input.get_device_index());
  }
};
#ifdef AEUP_WITH_CUDA
template <class Launch>
void run_cuda(const aeup::BatchNorm& b, const Tensor& input, bool sums, Launch launch) {
  void* const stream = aeup::current_stream(kName, input);
  const aeup::Workspace workspace(input, sums ? aeup::batch_norm_workspace(b) : 0);
  if (const char* error = launch(b, workspace.data, stream)) aeup::fail(kName, std::string("CUDA kernel: ") + error);
}
#endif

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
  const OnDevice guard(given);
  const Tensor input = aeup::dense(given, b.channels_last);
  b.input = input.const_data_ptr();
  const int32_t dtype = set_narrow(&b, given, running_mean, weight ? weight : bias);
  if (weight) b.weight = channels(b, given, *weight, dtype, "weight");
  if (bias) b.bias = channels(b, given, *bias, dtype, "bias");
  if (running_mean) {
    b.running_mean = b.next_mean = channels(b, given, *running_mean, dtype, "running_mean");
    b.running_var = b.next_var = channels(b, given, *running_var, dtype, "running_var");
  }
  if (counter) b.counter = b.next_counter = static_cast<int64_t*>(counter->mutable_data_ptr());
  Tensor output = aeup::empty_like(input, input.sizes(), b.channels_last);
  Tensor mean = empty_channels(given, b.c, arithmetic(b.dtype)),
         invstd = empty_channels(given, b.c, arithmetic(b.dtype));
  b.output = output.mutable_data_ptr(), b.mean = mean.mutable_data_ptr(), b.invstd = invstd.mutable_data_ptr();
  if (given.is_cpu()) aeup::batch_norm_cpu(b, aeup::torch_parallel);
#ifdef AEUP_WITH_CUDA
  else
    run_cuda(b, given, training, aeup::launch_batch_norm);
#endif
  return {output, mean, invstd};
}

// What is not wanted is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_grad, const Tensor& given, const Tensor& mean,
                                            const Tensor& invstd, const Optional& weight, const Optional& bias,
                                            bool training, int64_t activation, double slope, bool want_input,
                                            bool want_weight, bool want_bias) {
  aeup::BatchNorm b = describe(given, training, 0.0, 0.0, activation, slope);
  aeup::check_beside(kName, given, given_grad, "grad");
  if (given_grad.sizes() != given.sizes()) aeup::fail(kName, "grad and input differ in size");
  const OnDevice guard(given);
  const Tensor input = aeup::dense(given, b.channels_last), grad = aeup::dense(given_grad, b.channels_last);
  b.input = input.const_data_ptr(), b.grad = grad.const_data_ptr();
  b.mean = channels(b, given, mean, arithmetic(b.dtype), "mean");
  b.invstd = channels(b, given, invstd, arithmetic(b.dtype), "invstd");
  const int32_t dtype = set_narrow(&b, given, weight, bias);
  if (weight) b.weight = channels(b, given, *weight, dtype, "weight");
  if (bias) b.bias = channels(b, given, *bias, dtype, "bias");
  // One tensor each where they are not wanted: results of an operator may not share memory.
  Tensor input_grad =
      aeup::empty_like(input, want_input ? input.sizes() : aeup::Sizes({0}), want_input && b.channels_last);
  Tensor weight_grad = empty_channels(input, want_weight ? b.c : 0, dtype),
         bias_grad = empty_channels(input, want_bias ? b.c : 0, dtype);
  b.input_grad = want_input ? input_grad.mutable_data_ptr() : nullptr;
  b.weight_grad = want_weight ? weight_grad.mutable_data_ptr() : nullptr;
  b.bias_grad = want_bias ? bias_grad.mutable_data_ptr() : nullptr;
  if (given.is_cpu()) aeup::batch_norm_backward_cpu(b, aeup::torch_parallel);
#ifdef AEUP_WITH_CUDA
  else
    run_cuda(b, given, training || want_weight || want_bias, aeup::launch_batch_norm_backward);
#endif
  return {input_grad, weight_grad, bias_grad};
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
