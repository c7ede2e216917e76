// What the operators of transposed convolutions share (ops_convolution.cpp, ops_upsample_conv2d.cpp): once an operator
// has described its problem as a Convolution, the tensors, the family and the launch are the same for all. `op` is the
// operator's name in messages.
#pragma once
#include "convolution.h"
#include "tensors.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/conv_launch.h"
#endif

namespace aeup {

inline DType float_dtype_of(const char* op, const Tensor& x) {
  const auto dtype = dtype_of(x);
  if (!dtype || *dtype == DType::u8) fail(op, "unsupported dtype; float64, float32, float16 and bfloat16 are served");
  return *dtype;
}
inline void check(const char* op, const Tensor& x, const char* name, int64_t dim) {
  if (x.dim() != dim)
    fail(op, std::string(name) + " must have " + std::to_string(dim) + " dimensions, got " + std::to_string(x.dim()));
}
inline void same_kind(const char* op, const Tensor& x, const Tensor& like, const char* name) {
  if (dtype_code(x) != dtype_code(like)) fail(op, std::string(name) + " differs in dtype");
  if (!same_device(x, like)) fail(op, std::string(name) + " is on another device");
}
// What is given with `grad`: 4 dimensions, and grad's dtype and device.
inline void check_beside(const char* op, const Tensor& grad, const Tensor& x, const char* name) {
  check(op, x, name, 4);
  same_kind(op, x, grad, name);
}
// The bias [co] of tensors like `like`, as it lies in memory.
inline std::optional<Tensor> bias_of(const char* op, const std::optional<Tensor>& bias, const Tensor& like,
                                     int64_t co) {
  if (!bias) return std::nullopt;
  check(op, *bias, "bias", 1);
  same_kind(op, *bias, like, "bias");
  if (bias->size(0) != co) fail(op, "bias must have " + std::to_string(co) + " elements");
  return dense(*bias);
}
inline Activation activation_of(const char* op, int64_t activation) {
  if (activation < 0 || activation > 6) fail(op, "activation must be 0 to 6, got " + std::to_string(activation));
  return static_cast<Activation>(activation);
}

// The bounds of an axis that kernels rely on; nothing here overflows afterwards.
constexpr int64_t kMostArgument = int64_t(1) << 24;  // keeps positions below 2^31
inline void check_argument(const char* op, const char* names, int64_t value, int64_t least = 1) {
  if (value < least || value > kMostArgument)
    fail(op, std::string(names) + " must be " + std::to_string(least) + " to 2^24, got " + std::to_string(value));
}
inline void check_space(const char* op, Sizes size) {
  for (const int d : {2, 3})
    if (size[d] < 1 || size[d] >= kMaxAxis)
      fail(op, "spatial sizes must be 1 to 2^30 - 1, got " + std::to_string(size[d]));
}
// Batch and channels of c, from its input, its output and the weight.
inline void set_channels(const char* op, Convolution* c, Sizes input, Sizes output, int64_t weight_ci,
                         int64_t weight_co, int64_t groups) {
  c->n = input[0], c->ci = input[1], c->co = output[1], c->groups = int(groups);
  if (c->n != output[0]) fail(op, "batch sizes differ");
  if (c->ci < 1 || c->co < 1) fail(op, "there must be at least 1 channel");
  if (weight_ci != c->ci)
    fail(op, "weight has " + std::to_string(weight_ci) + " input channels, the input " + std::to_string(c->ci));
  if (weight_co != c->co)
    fail(op, "weight has " + std::to_string(weight_co) + " output channels, the output " + std::to_string(c->co));
  if (c->ci % groups || c->co % groups) fail(op, "groups does not divide the channels");
}
// Dtype and layouts of c: results are channels-last where one of the tensors of the problem is, as in torch.
inline void set_layout(const char* op, Convolution* c, const Tensor& like, const Tensor& other, const Tensor& weight) {
  c->dtype = float_dtype_of(op, like);
  c->weight_channels_last = suggests_channels_last(weight);
  c->channels_last = suggests_channels_last(like) || suggests_channels_last(other);
}

// Which family would serve on a device of that capability, and why those before it do not: for aeup.explain.
inline std::string family_name(const char* op, const Convolution& c, int64_t pass, int64_t major, int64_t minor) {
#ifdef AEUP_WITH_CUDA
  if (pass < 0 || pass > 2) fail(op, "pass must be 0 to 2, got " + std::to_string(pass));
  std::string why;
  const auto* family = choose_convolution(c, static_cast<Pass>(pass), "", int(major), int(minor), &why);
  if (!family) fail(op, why);
  return why.empty() ? family->name : std::string(family->name) + " (" + why + ")";
#else
  fail(op, "built without CUDA");
#endif
}

#ifdef AEUP_WITH_CUDA
inline const ConvolutionFamily* family_of(const char* op, const Convolution& c, Pass pass, const std::string& name) {
  int major = 0, minor = 0;
  if (const char* error = device_capability(&major, &minor)) fail(op, error);
  const ConvolutionFamily* family = choose_convolution(c, pass, name, major, minor, nullptr);
  if (!family) {
    std::string why;
    choose_convolution(c, pass, name, major, minor, &why);
    fail(op, why);
  }
  return family;
}
inline void run(const char* op, const Convolution& c, Pass pass, const std::string& name, const Tensor& like) {
  const ConvolutionFamily* family = family_of(op, c, pass, name);
  void* const stream = current_stream(op, like);
  const Workspace workspace(like, family->workspace(c, pass));
  if (const char* error = family->launch(c, pass, workspace.data, stream))
    fail(op, std::string(family->name) + " CUDA kernel: " + error);
}

// The three passes of a described problem.
inline Tensor run_forward(const char* op, Convolution c, const Tensor& given, const Tensor& given_weight,
                          const std::optional<Tensor>& bias, const std::string& family) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor input = dense(given, c.channels_last), weight = dense(given_weight, c.weight_channels_last);
  const std::optional<Tensor> added = bias_of(op, bias, given, c.co);
  if (added) c.bias = added->const_data_ptr();
  Tensor result = empty_like(input, {c.n, c.co, c.oh, c.ow}, c.channels_last);
  if (result.numel() == 0) return result;
  c.input = input.const_data_ptr(), c.weight = weight.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(op, c, Pass::forward, family, input);
  return result;
}
// With a bias [ci] or an activation: the convolution of `given`.
inline Tensor run_input_gradient(const char* op, Convolution c, const Tensor& given, const Tensor& given_weight,
                                 const std::string& family, const std::optional<Tensor>& bias = {}) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor grad = dense(given, c.channels_last), weight = dense(given_weight, c.weight_channels_last);
  const std::optional<Tensor> added = bias_of(op, bias, given, c.ci);
  if (added) c.bias = added->const_data_ptr();
  Tensor result = empty_like(grad, {c.n, c.ci, c.ih, c.iw}, c.channels_last);
  if (result.numel() == 0) return result;
  c.grad = grad.const_data_ptr(), c.weight = weight.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(op, c, Pass::input_gradient, family, grad);
  return result;
}
inline Tensor run_weight_gradient(const char* op, Convolution c, const Tensor& given_grad, const Tensor& given_input,
                                  const Tensor& like, const std::string& family) {
  const torch::stable::accelerator::DeviceGuard guard(given_grad.get_device_index());
  const Tensor grad = dense(given_grad, c.channels_last), input = dense(given_input, c.channels_last);
  Tensor result = empty_like(grad, like.sizes(), c.weight_channels_last);
  if (result.numel() == 0) return result;
  if (grad.numel() == 0 || input.numel() == 0) {  // a sum of nothing
    torch::stable::fill_(result, 0.0);
    return result;
  }
  c.grad = grad.const_data_ptr(), c.input = input.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(op, c, Pass::weight_gradient, family, grad);
  return result;
}

// Keeps the description of an op's forward call with these tensors, which is that pass, under a number or -1 (Keep):
// what aeup_native.conv_planned(input, weight, bias, number) runs for all that are alike.
int64_t keep_forward(const char* op, const Convolution& c, Pass pass, const Tensor& input, const Tensor& weight);

// The gradient of bias and activation (ops_convolution.cpp). Where there is something to compute, grad and output are
// dense in one layout.
struct Epilogue {
  EpilogueGradient e{};
  Tensor grad, output, bias;  // bias: the gradient; empty where it is not wanted
};
Epilogue epilogue_of(const Tensor& grad, const std::optional<Tensor>& output, int64_t activation, double slope,
                     bool want_bias);
// The gradient before the activation, and p.bias.
Tensor run_epilogue(const Epilogue& p);
// The same from NCHW to channels-last rows of `pitch` bytes.
void run_epilogue(const Epilogue& p, void* rows, int64_t pitch);

// All gradients in one call, which is what a training step makes: the epilogue's, then of input and weight from the
// gradient before the activation. What is not wanted is an empty tensor. `of_input` and `of_weight` describe the two
// problems for that gradient.
template <class OfInput, class OfWeight>
std::tuple<Tensor, Tensor, Tensor> run_backward(const char* op, const Tensor& given, const Tensor& input,
                                                const Tensor& weight, const std::optional<Tensor>& output,
                                                int64_t activation, double slope, bool want_input, bool want_weight,
                                                bool want_bias, OfInput of_input, OfWeight of_weight) {
  check(op, input, "input", 4);
  Epilogue epilogue = epilogue_of(given, output, activation, slope, want_bias);
  Tensor grad = epilogue.grad, input_grad, weight_grad;
  if (!want_input || !want_weight) input_grad = weight_grad = empty_like(given, {0}, false);
  Convolution x{}, w{};
  if (want_input) x = of_input(grad);
  if (want_weight) w = of_weight(grad);
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const bool both = want_input && want_weight;
  const bool alike = (want_input || want_weight) && grad.numel() > 0 && (!both || x.channels_last == w.channels_last);
  const Convolution& any = want_input ? x : w;
  const ConvolutionFamily* family = nullptr;  // where it brings grad into one form for all that is wanted
  if (alike) {
    family = family_of(op, any, want_input ? Pass::input_gradient : Pass::weight_gradient, "");
    if (!family->shared || (both && family != family_of(op, w, Pass::weight_gradient, ""))) family = nullptr;
  }
  std::optional<Workspace> shared;
  if (family && !any.channels_last && !epilogue.e.channels_last) {  // the epilogue writes that form at once
    grad = epilogue.grad = dense(grad, false);
    const int64_t bytes = family->shared(any);
    shared.emplace(grad, bytes);
    run_epilogue(epilogue, shared->data, bytes / (any.n * any.oh * any.ow));
  } else {
    grad = run_epilogue(epilogue);
    if (alike) grad = dense(grad, any.channels_last);
    if (family) {
      x.grad = w.grad = grad.const_data_ptr();
      if (const int64_t bytes = family->shared(any)) {
        shared.emplace(grad, bytes);
        if (const char* error = family->share(any, shared->data, current_stream(op, grad)))
          fail(op, std::string(family->name) + " CUDA kernel: " + error);
      }
    }
  }
  if (shared) x.shared_grad = w.shared_grad = shared->data;
  if (want_input) input_grad = run_input_gradient(op, x, grad, weight, "");
  if (want_weight) weight_grad = run_weight_gradient(op, w, grad, input, weight, "");
  return {input_grad, weight_grad, epilogue.bias};
}
#endif

}  // namespace aeup
