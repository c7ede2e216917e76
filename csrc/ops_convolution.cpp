// The compiled operators of the transposed convolution: torch.ops.aeup_native.conv_*. They are kernels without
// autograd; aeup/ops/conv_transpose2d.py builds the public operators on them.
#include "convolution.h"
#include "tensors.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/conv_launch.h"
#endif

namespace {

using aeup::dense;
using aeup::Pass;
using aeup::suggests_channels_last;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) { aeup::fail("aeup.conv_transpose2d", message); }

aeup::DType dtype_of(const Tensor& x) {
  const auto dtype = aeup::dtype_of(x);
  if (!dtype || *dtype == aeup::DType::u8) fail("unsupported dtype; float64, float32, float16 and bfloat16 are served");
  return *dtype;
}
void check(const Tensor& x, const char* name, int64_t dim) {
  if (x.dim() != dim)
    fail(std::string(name) + " must have " + std::to_string(dim) + " dimensions, got " + std::to_string(x.dim()));
}
void same_kind(const Tensor& x, const Tensor& like, const char* name) {
  if (x.scalar_type() != like.scalar_type()) fail(std::string(name) + " differs in dtype");
  if (x.device() != like.device()) fail(std::string(name) + " is on another device");
}

struct Geometry {
  int64_t sh, sw, ph, pw, groups, dh, dw;
};
// Sizes of the map; nothing of the layouts. Throws where a kernel would read out of bounds.
aeup::Convolution describe(const Geometry& g, const std::vector<int64_t>& input, const std::vector<int64_t>& output,
                           int64_t weight_ci, int64_t weight_co, int64_t kh, int64_t kw, bool tf32) {
  constexpr int64_t kMost = int64_t(1) << 24;  // keeps positions below 2^31
  const int64_t small[] = {g.sh, g.sw, g.groups, g.dh, g.dw, kh, kw};
  for (const int64_t v : small)
    if (v < 1 || v > kMost)
      fail("stride, groups, dilation and kernel size must be 1 to 2^24, got " + std::to_string(v));
  if (g.ph < 0 || g.pw < 0 || g.ph > kMost || g.pw > kMost) fail("padding must be 0 to 2^24");
  for (const int d : {2, 3})
    if (input[d] < 1 || output[d] < 1 || input[d] >= aeup::kMaxAxis || output[d] >= aeup::kMaxAxis)
      fail("spatial sizes must be 1 to 2^30 - 1, got " + std::to_string(input[d]) + " and " +
           std::to_string(output[d]));
  if (g.dh * (kh - 1) >= aeup::kMaxAxis || g.dw * (kw - 1) >= aeup::kMaxAxis) fail("the dilated kernel is too large");
  if (input[2] * g.sh >= aeup::kMaxAxis || input[3] * g.sw >= aeup::kMaxAxis)
    fail("input size times stride is too large");
  aeup::Convolution c{};
  c.n = input[0], c.ci = input[1], c.ih = input[2], c.iw = input[3];
  c.co = output[1], c.oh = output[2], c.ow = output[3];
  c.kh = int(kh), c.kw = int(kw), c.sh = int(g.sh), c.sw = int(g.sw), c.ph = int(g.ph), c.pw = int(g.pw);
  c.dh = int(g.dh), c.dw = int(g.dw), c.groups = int(g.groups);
  c.tf32 = tf32;
  if (c.n != output[0]) fail("batch sizes differ");
  if (c.ci < 1 || c.co < 1) fail("there must be at least 1 channel");
  if (weight_ci != c.ci)
    fail("weight has " + std::to_string(weight_ci) + " input channels, the input " + std::to_string(c.ci));
  if (c.ci % g.groups || weight_co * g.groups != c.co) fail("groups does not divide the channels");
  // The output has exactly the size of the map with some output_padding below max(stride, dilation).
  const auto axis = [](int64_t in, int64_t out, int64_t s, int64_t p, int64_t k, int64_t d) {
    const int64_t extra = out - ((in - 1) * s - 2 * p + d * (k - 1) + 1);
    if (extra < 0 || extra >= (s > d ? s : d)) fail("the spatial sizes of input and output do not belong together");
  };
  axis(c.ih, c.oh, g.sh, g.ph, kh, g.dh);
  axis(c.iw, c.ow, g.sw, g.pw, kw, g.dw);
  return c;
}
std::vector<int64_t> sizes(const Tensor& x) {
  const auto s = x.sizes();
  return {s.begin(), s.end()};
}
int64_t output_size(int64_t in, int64_t s, int64_t p, int64_t extra, int64_t k, int64_t d) {
  return (in - 1) * s - 2 * p + d * (k - 1) + extra + 1;
}
aeup::Activation activation_of(int64_t activation) {
  if (activation < 0 || activation > 6) fail("activation must be 0 to 6, got " + std::to_string(activation));
  return static_cast<aeup::Activation>(activation);
}

aeup::Convolution forward_of(const Tensor& input, const Tensor& weight, const Geometry& g, int64_t oph, int64_t opw,
                             bool tf32) {
  check(input, "input", 4);
  check(weight, "weight", 4);
  same_kind(weight, input, "weight");
  const int64_t kh = weight.size(2), kw = weight.size(3), co = weight.size(1) * g.groups;
  const std::vector<int64_t> out{input.size(0), co, output_size(input.size(2), g.sh, g.ph, oph, kh, g.dh),
                                 output_size(input.size(3), g.sw, g.pw, opw, kw, g.dw)};
  auto c = describe(g, sizes(input), out, weight.size(0), weight.size(1), kh, kw, tf32);
  c.dtype = dtype_of(input);
  c.weight_channels_last = suggests_channels_last(weight);
  c.channels_last = suggests_channels_last(input) || c.weight_channels_last;
  return c;
}

// Which family would serve on a device of that capability, and why those before it do not: for aeup.explain. `input`
// and `weight` are meta tensors; `pass` is 0 forward, 1 input gradient, 2 weight gradient.
std::string kernel_name(const Tensor& input, const Tensor& weight, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                        int64_t oph, int64_t opw, int64_t groups, int64_t dh, int64_t dw, int64_t pass, bool tf32,
                        int64_t major, int64_t minor) {
#ifdef AEUP_WITH_CUDA
  if (pass < 0 || pass > 2) fail("pass must be 0 to 2, got " + std::to_string(pass));
  const auto c = forward_of(input, weight, {sh, sw, ph, pw, groups, dh, dw}, oph, opw, tf32);
  std::string why;
  const auto* family = aeup::choose_convolution(c, static_cast<Pass>(pass), "", int(major), int(minor), &why);
  if (!family) fail(why);
  return why.empty() ? family->name : std::string(family->name) + " (" + why + ")";
#else
  fail("built without CUDA");
#endif
}

#ifdef AEUP_WITH_CUDA
void run(aeup::Convolution& c, Pass pass, const std::string& name, const Tensor& like) {
  int major = 0, minor = 0;
  if (const char* error = aeup::device_capability(&major, &minor)) fail(error);
  std::string why;
  const aeup::ConvolutionFamily* family = aeup::choose_convolution(c, pass, name, major, minor, nullptr);
  if (!family) {
    aeup::choose_convolution(c, pass, name, major, minor, &why);
    fail(why);
  }
  void* const stream = aeup::current_stream("aeup.conv_transpose2d", like);
  const aeup::Workspace workspace(like, family->workspace(c, pass));
  if (const char* error = family->launch(c, pass, workspace.data, stream))
    fail(std::string(family->name) + " CUDA kernel: " + error);
}

Tensor forward(const Tensor& given, const Tensor& given_weight, const std::optional<Tensor>& bias, int64_t sh,
               int64_t sw, int64_t ph, int64_t pw, int64_t oph, int64_t opw, int64_t groups, int64_t dh, int64_t dw,
               int64_t activation, double slope, bool tf32, std::string family) {
  auto c = forward_of(given, given_weight, {sh, sw, ph, pw, groups, dh, dw}, oph, opw, tf32);
  c.activation = activation_of(activation);
  c.slope = float(slope);
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor input = dense(given, c.channels_last), weight = dense(given_weight, c.weight_channels_last);
  Tensor added;
  if (bias) {
    check(*bias, "bias", 1);
    same_kind(*bias, given, "bias");
    if (bias->size(0) != c.co) fail("bias must have " + std::to_string(c.co) + " elements");
    added = torch::stable::contiguous(*bias);
    c.bias = added.const_data_ptr();
  }
  Tensor result = aeup::empty_like(input, {c.n, c.co, c.oh, c.ow}, c.channels_last);
  if (result.numel() == 0) return result;
  c.input = input.const_data_ptr(), c.weight = weight.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(c, Pass::forward, family, input);
  return result;
}

Tensor input_gradient(const Tensor& given, const Tensor& given_weight, int64_t ih, int64_t iw, int64_t sh, int64_t sw,
                      int64_t ph, int64_t pw, int64_t groups, int64_t dh, int64_t dw, bool tf32, std::string family) {
  check(given, "grad", 4);
  check(given_weight, "weight", 4);
  same_kind(given_weight, given, "weight");
  const std::vector<int64_t> in{given.size(0), given_weight.size(0), ih, iw};
  auto c = describe({sh, sw, ph, pw, groups, dh, dw}, in, sizes(given), in[1], given_weight.size(1),
                    given_weight.size(2), given_weight.size(3), tf32);
  c.dtype = dtype_of(given);
  c.weight_channels_last = suggests_channels_last(given_weight);
  c.channels_last = suggests_channels_last(given) || c.weight_channels_last;
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor grad = dense(given, c.channels_last), weight = dense(given_weight, c.weight_channels_last);
  Tensor result = aeup::empty_like(grad, in, c.channels_last);
  if (result.numel() == 0) return result;
  c.grad = grad.const_data_ptr(), c.weight = weight.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(c, Pass::input_gradient, family, grad);
  return result;
}

Tensor weight_gradient(const Tensor& given_grad, const Tensor& given_input, const Tensor& like, int64_t sh, int64_t sw,
                       int64_t ph, int64_t pw, int64_t groups, int64_t dh, int64_t dw, bool tf32, std::string family) {
  check(given_grad, "grad", 4);
  check(given_input, "input", 4);
  check(like, "weight_like", 4);
  same_kind(given_input, given_grad, "input");
  same_kind(like, given_grad, "weight_like");
  auto c = describe({sh, sw, ph, pw, groups, dh, dw}, sizes(given_input), sizes(given_grad), like.size(0), like.size(1),
                    like.size(2), like.size(3), tf32);
  c.dtype = dtype_of(given_grad);
  c.weight_channels_last = suggests_channels_last(like);
  c.channels_last = suggests_channels_last(given_grad) || suggests_channels_last(given_input);
  const torch::stable::accelerator::DeviceGuard guard(given_grad.get_device_index());
  const Tensor grad = dense(given_grad, c.channels_last), input = dense(given_input, c.channels_last);
  Tensor result = aeup::empty_like(grad, sizes(like), c.weight_channels_last);
  if (result.numel() == 0) return result;
  if (grad.numel() == 0 || input.numel() == 0) {  // a sum of nothing
    torch::stable::fill_(result, 0.0);
    return result;
  }
  c.grad = grad.const_data_ptr(), c.input = input.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(c, Pass::weight_gradient, family, grad);
  return result;
}

std::tuple<Tensor, Tensor> epilogue_gradient(const Tensor& given, const std::optional<Tensor>& output,
                                             int64_t activation, double slope, bool want_bias) {
  aeup::EpilogueGradient e{};
  e.activation = activation_of(activation);
  const bool active = e.activation != aeup::Activation::none;
  check(given, "grad", 4);
  e.dtype = dtype_of(given);
  if (active) {
    if (!output) fail("an activation needs its output");
    same_kind(*output, given, "output");
    if (sizes(*output) != sizes(given)) fail("grad and output differ in size");
  }
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const bool empty = given.numel() == 0;
  Tensor before = given;
  if (!active && !want_bias) return {before, aeup::empty_like(given, {0}, false)};
  // A gradient that is dense in no layout (expanded, for one) takes the output's.
  e.channels_last = suggests_channels_last(given) || (active && suggests_channels_last(*output));
  const Tensor grad = dense(given, e.channels_last), out = active ? dense(*output, e.channels_last) : grad;
  if (active) before = aeup::empty_like(grad, sizes(given), e.channels_last);
  Tensor bias = aeup::empty_like(given, {want_bias ? given.size(1) : 0}, false);
  if (empty) {
    if (want_bias) torch::stable::fill_(bias, 0.0);
    return {before, bias};
  }
  e.slope = slope;
  e.n = given.size(0), e.c = given.size(1), e.pixels = given.size(2) * given.size(3);
  e.grad = grad.const_data_ptr();
  e.output = active ? out.const_data_ptr() : nullptr;
  e.before = active ? before.mutable_data_ptr() : nullptr;
  e.bias = want_bias ? bias.mutable_data_ptr() : nullptr;
  void* const stream = aeup::current_stream("aeup.conv_epilogue_gradient", given);
  const aeup::Workspace workspace(given, aeup::epilogue_gradient_workspace(e));
  if (const char* error = aeup::launch_epilogue_gradient(e, workspace.data, stream))
    aeup::fail("aeup.conv_epilogue_gradient", std::string("CUDA kernel: ") + error);
  return {before, bias};
}

// All gradients in one call, which is what a training step makes: the epilogue's, then of input and weight. What is not
// wanted is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                            const std::optional<Tensor>& output, int64_t sh, int64_t sw, int64_t ph,
                                            int64_t pw, int64_t groups, int64_t dh, int64_t dw, int64_t activation,
                                            double slope, bool tf32, bool want_input, bool want_weight,
                                            bool want_bias) {
  check(input, "input", 4);
  auto [before, of_bias] = epilogue_gradient(grad, output, activation, slope, want_bias);
  const Tensor none = aeup::empty_like(grad, {0}, false);
  Tensor of_input = none, of_weight = none;
  if (want_input)
    of_input = input_gradient(before, weight, input.size(2), input.size(3), sh, sw, ph, pw, groups, dh, dw, tf32, "");
  if (want_weight) of_weight = weight_gradient(before, input, weight, sh, sw, ph, pw, groups, dh, dw, tf32, "");
  return {of_input, of_weight, of_bias};
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, int sh, int sw, int ph, int pw, int oph, int opw, "
      "int groups, int dh, int dw, int activation, float slope, bool tf32, str family) -> Tensor");
  m.def(
      "conv_transpose2d_input_gradient(Tensor grad, Tensor weight, int ih, int iw, int sh, int sw, int ph, int pw, "
      "int groups, int dh, int dw, bool tf32, str family) -> Tensor");
  m.def(
      "conv_transpose2d_weight_gradient(Tensor grad, Tensor input, Tensor weight_like, int sh, int sw, int ph, int pw, "
      "int groups, int dh, int dw, bool tf32, str family) -> Tensor");
  m.def(
      "conv_transpose2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor? output, int sh, int sw, int ph, "
      "int pw, int groups, int dh, int dw, int activation, float slope, bool tf32, bool want_input, bool want_weight, "
      "bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_epilogue_gradient(Tensor grad, Tensor? output, int activation, float slope, bool want_bias) -> "
      "(Tensor, Tensor)");
  m.def(
      "conv_transpose2d_kernel(Tensor input, Tensor weight, int sh, int sw, int ph, int pw, int oph, int opw, "
      "int groups, int dh, int dw, int which, bool tf32, int major, int minor) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CompositeExplicitAutograd, m) {
  m.impl("conv_transpose2d_kernel", TORCH_BOX(&kernel_name));
}

#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("conv_transpose2d", TORCH_BOX(&forward));
  m.impl("conv_transpose2d_input_gradient", TORCH_BOX(&input_gradient));
  m.impl("conv_transpose2d_weight_gradient", TORCH_BOX(&weight_gradient));
  m.impl("conv_transpose2d_backward", TORCH_BOX(&backward));
  m.impl("conv_epilogue_gradient", TORCH_BOX(&epilogue_gradient));
}
#endif

}  // namespace
