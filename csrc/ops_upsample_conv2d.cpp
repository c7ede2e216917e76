// The compiled operators of nearest upsampling by an integer scale and the convolution after it, as one transposed
// convolution with folded weights (fold.h): torch.ops.aeup_native.upsample_conv2d*. They are kernels without autograd;
// aeup/ops/upsample_conv2d.py builds the public operators on them.
#include "ops_convolution.h"

namespace {

using torch::stable::Tensor;

constexpr const char* kName = "aeup.upsample_conv2d";

struct Geometry {
  int64_t sh, sw, ph, pw, groups;
};
int64_t output_size(int64_t in, int64_t scale, int64_t padding, int64_t kernel) {
  return in * scale + 2 * padding - kernel + 1;
}
// Sizes of the map; nothing of the layouts. Throws where a kernel would read out of bounds. weight [co, ci / groups,
// kh, kw].
aeup::Convolution describe(const Geometry& g, aeup::Sizes input, aeup::Sizes output, aeup::Sizes weight, bool tf32) {
  const int64_t kh = weight[2], kw = weight[3];
  for (const int64_t v : {g.sh, g.sw, g.groups, kh, kw})
    aeup::check_argument(kName, "scale, groups and kernel size", v);
  for (const int64_t v : {g.ph, g.pw}) aeup::check_argument(kName, "padding", v, 0);
  aeup::check_space(kName, input);
  aeup::check_space(kName, output);
  if (input[2] * g.sh >= aeup::kMaxAxis || input[3] * g.sw >= aeup::kMaxAxis)
    aeup::fail(kName, "input size times scale is too large");
  aeup::Convolution c{};
  aeup::set_channels(kName, &c, input, output, weight[1] * g.groups, weight[0], g.groups);
  c.ih = input[2], c.iw = input[3];
  c.fold(kh, kw, g.sh, g.sw, g.ph, g.pw);
  c.tf32 = tf32;
  if (int64_t(c.kh) * c.kw > aeup::kMostArgument) aeup::fail(kName, "the folded kernel has more than 2^24 elements");
  if (c.oh != output[2] || c.ow != output[3])
    aeup::fail(kName, "the spatial sizes of input and output do not belong together");
  return c;
}

aeup::Convolution forward_of(const Tensor& input, const Tensor& weight, const Geometry& g, bool tf32,
                             int64_t activation = 0, double slope = 0) {
  aeup::check(kName, input, "input", 4);
  aeup::check(kName, weight, "weight", 4);
  aeup::same_kind(kName, weight, input, "weight");
  const int64_t output[4] = {input.size(0), weight.size(0), output_size(input.size(2), g.sh, g.ph, weight.size(2)),
                             output_size(input.size(3), g.sw, g.pw, weight.size(3))};
  auto c = describe(g, input.sizes(), output, weight.sizes(), tf32);
  aeup::set_layout(kName, &c, input, weight, weight);
  c.activation = aeup::activation_of(kName, activation), c.slope = slope;
  return c;
}

// `input` and `weight` are meta tensors; `pass` is 0 forward, 1 input gradient, 2 weight gradient.
std::string kernel_name(const Tensor& input, const Tensor& weight, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                        int64_t groups, int64_t pass, bool tf32, int64_t major, int64_t minor) {
  return aeup::family_name(kName, forward_of(input, weight, {sh, sw, ph, pw, groups}, tf32), pass, major, minor);
}

#ifdef AEUP_WITH_CUDA
Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t sh, int64_t sw,
               int64_t ph, int64_t pw, int64_t groups, int64_t activation, double slope, bool tf32,
               std::string family) {
  const auto c = forward_of(input, weight, {sh, sw, ph, pw, groups}, tf32, activation, slope);
  return aeup::run_forward(kName, c, input, weight, bias, family);
}
int64_t forward_plan(const Tensor& input, const Tensor& weight, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                     int64_t groups, int64_t activation, double slope, bool tf32) {
  const auto c = forward_of(input, weight, {sh, sw, ph, pw, groups}, tf32, activation, slope);
  return aeup::keep_forward(kName, c, aeup::Pass::forward, input, weight);
}

aeup::Convolution input_gradient_of(const Tensor& grad, const Tensor& weight, int64_t ih, int64_t iw, const Geometry& g,
                                    bool tf32) {
  aeup::check(kName, grad, "grad", 4);
  aeup::check_beside(kName, grad, weight, "weight");
  auto c = describe(g, {grad.size(0), weight.size(1) * g.groups, ih, iw}, grad.sizes(), weight.sizes(), tf32);
  aeup::set_layout(kName, &c, grad, weight, weight);
  return c;
}
Tensor input_gradient(const Tensor& grad, const Tensor& weight, int64_t ih, int64_t iw, int64_t sh, int64_t sw,
                      int64_t ph, int64_t pw, int64_t groups, bool tf32, std::string family) {
  const auto c = input_gradient_of(grad, weight, ih, iw, {sh, sw, ph, pw, groups}, tf32);
  return aeup::run_input_gradient(kName, c, grad, weight, family);
}

aeup::Convolution weight_gradient_of(const Tensor& grad, const Tensor& input, const Tensor& like, const Geometry& g,
                                     bool tf32) {
  aeup::check(kName, grad, "grad", 4);
  aeup::check_beside(kName, grad, input, "input");
  aeup::check_beside(kName, grad, like, "weight_like");
  auto c = describe(g, input.sizes(), grad.sizes(), like.sizes(), tf32);
  aeup::set_layout(kName, &c, grad, input, like);
  return c;
}
Tensor weight_gradient(const Tensor& grad, const Tensor& input, const Tensor& like, int64_t sh, int64_t sw, int64_t ph,
                       int64_t pw, int64_t groups, bool tf32, std::string family) {
  const auto c = weight_gradient_of(grad, input, like, {sh, sw, ph, pw, groups}, tf32);
  return aeup::run_weight_gradient(kName, c, grad, input, like, family);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                            const std::optional<Tensor>& output, int64_t sh, int64_t sw, int64_t ph,
                                            int64_t pw, int64_t groups, int64_t activation, double slope, bool tf32,
                                            bool want_input, bool want_weight, bool want_bias) {
  const Geometry g{sh, sw, ph, pw, groups};
  return aeup::run_backward(
      kName, grad, input, weight, output, activation, slope, want_input, want_weight, want_bias,
      [&](const Tensor& before) { return input_gradient_of(before, weight, input.size(2), input.size(3), g, tf32); },
      [&](const Tensor& before) { return weight_gradient_of(before, input, weight, g, tf32); });
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "upsample_conv2d(Tensor input, Tensor weight, Tensor? bias, int sh, int sw, int ph, int pw, int groups, "
      "int activation, float slope, bool tf32, str family) -> Tensor");
  m.def(
      "upsample_conv2d_plan(Tensor input, Tensor weight, int sh, int sw, int ph, int pw, int groups, int activation, "
      "float slope, bool tf32) -> int");
  m.def(
      "upsample_conv2d_input_gradient(Tensor grad, Tensor weight, int ih, int iw, int sh, int sw, int ph, int pw, "
      "int groups, bool tf32, str family) -> Tensor");
  m.def(
      "upsample_conv2d_weight_gradient(Tensor grad, Tensor input, Tensor weight_like, int sh, int sw, int ph, int pw, "
      "int groups, bool tf32, str family) -> Tensor");
  m.def(
      "upsample_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor? output, int sh, int sw, int ph, "
      "int pw, int groups, int activation, float slope, bool tf32, bool want_input, bool want_weight, bool want_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "upsample_conv2d_kernel(Tensor input, Tensor weight, int sh, int sw, int ph, int pw, int groups, int which, "
      "bool tf32, int major, int minor) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CompositeExplicitAutograd, m) {
  m.impl("upsample_conv2d_kernel", TORCH_BOX(&kernel_name));
#ifdef AEUP_WITH_CUDA
  m.impl("upsample_conv2d_plan", TORCH_BOX(&forward_plan));  // reads no memory
#endif
}

#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("upsample_conv2d", TORCH_BOX(&forward));
  m.impl("upsample_conv2d_input_gradient", TORCH_BOX(&input_gradient));
  m.impl("upsample_conv2d_weight_gradient", TORCH_BOX(&weight_gradient));
  m.impl("upsample_conv2d_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace
