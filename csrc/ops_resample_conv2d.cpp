// The compiled operators of resampling followed by a convolution: torch.ops.aeup_native.resample_conv2d*. They are
// kernels without autograd; aeup/ops/upsample_conv2d.py builds the public operators on them.
#include "ops_convolution.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/resample_conv.h"
#endif

namespace {

using torch::stable::Tensor;

#ifdef AEUP_WITH_CUDA
using aeup::dense;
using aeup::Pass;
using aeup::ResampleConv;
using aeup::suggests_channels_last;

constexpr const char* kName = "aeup.upsample_conv2d";
[[noreturn]] void fail(const std::string& message) { aeup::fail(kName, message); }

struct Geometry {
  int64_t uh, uw, mode;
  bool align_corners;
  double scale_h, scale_w;
  int64_t ph, pw, groups;
};
// Sizes of the map; nothing of the layouts. Throws where a kernel would read out of bounds.
ResampleConv describe(const Geometry& g, const Tensor& like, int64_t n, int64_t ci, int64_t ih, int64_t iw,
                      const Tensor& weight, bool tf32) {
  aeup::check(kName, weight, "weight", 4);
  aeup::same_kind(kName, weight, like, "weight");
  const aeup::DType dtype = aeup::float_dtype_of(kName, like);
  if (g.mode < 0 || g.mode > 3) fail("mode must be 0 to 3, got " + std::to_string(g.mode));
  for (const int64_t v : {g.groups, weight.size(2), weight.size(3)})
    aeup::check_argument(kName, "groups and kernel size", v);
  for (const int64_t v : {g.ph, g.pw}) aeup::check_argument(kName, "padding", v, 0);
  for (const int64_t v : {ih, iw, g.uh, g.uw})
    if (v < 1 || v >= aeup::kMaxAxis) fail("spatial sizes must be 1 to 2^30 - 1, got " + std::to_string(v));
  ResampleConv c{};
  c.n = n, c.ci = ci, c.co = weight.size(0), c.ih = ih, c.iw = iw, c.uh = g.uh, c.uw = g.uw;
  c.kh = int(weight.size(2)), c.kw = int(weight.size(3)), c.ph = int(g.ph), c.pw = int(g.pw), c.groups = int(g.groups);
  c.oh = g.uh + 2 * g.ph - c.kh + 1, c.ow = g.uw + 2 * g.pw - c.kw + 1;
  if (c.oh < 1 || c.ow < 1) fail("the kernel is larger than the padded, resampled input");
  if (c.ci < 1 || c.co < 1) fail("there must be at least 1 channel");
  if (c.ci % g.groups || c.co % g.groups) fail("groups does not divide the channels");
  if (weight.size(1) * g.groups != c.ci)
    fail("weight has " + std::to_string(weight.size(1)) + " input channels per group, the input " +
         std::to_string(c.ci / g.groups));
  c.mode = static_cast<aeup::Mode>(g.mode), c.align_corners = g.align_corners;
  c.scale_h = g.scale_h, c.scale_w = g.scale_w;
  c.dtype = dtype, c.tf32 = tf32;
  c.weight_channels_last = suggests_channels_last(weight);
  return c;
}
ResampleConv forward_of(const Tensor& input, const Tensor& weight, const Geometry& g, bool tf32) {
  aeup::check(kName, input, "input", 4);
  auto c = describe(g, input, input.size(0), input.size(1), input.size(2), input.size(3), weight, tf32);
  c.channels_last = suggests_channels_last(input) || c.weight_channels_last;
  return c;
}
void same_output(const ResampleConv& c, const Tensor& grad) {
  const int64_t size[4] = {c.n, c.co, c.oh, c.ow};
  if (grad.sizes() != aeup::Sizes(size))
    fail("grad must have size [" + std::to_string(c.n) + ", " + std::to_string(c.co) + ", " + std::to_string(c.oh) +
         ", " + std::to_string(c.ow) + "]");
}

void run(const ResampleConv& c, Pass pass, const Tensor& like) {
  int major = 0, minor = 0;
  if (const char* error = aeup::device_capability(&major, &minor)) fail(error);
  if (const char* why = aeup::refuses_resample_conv(c, pass, major, minor)) fail(std::string("refuses: ") + why);
  void* const stream = aeup::current_stream("aeup.upsample_conv2d", like);
  const aeup::Workspace workspace(like, aeup::resample_conv_workspace(c, pass));
  if (const char* error = aeup::launch_resample_conv(c, pass, workspace.data, stream))
    fail(std::string("CUDA kernel: ") + error);
}

Tensor forward(const Tensor& given, const Tensor& given_weight, const std::optional<Tensor>& bias, int64_t uh,
               int64_t uw, int64_t mode, bool align_corners, double scale_h, double scale_w, int64_t ph, int64_t pw,
               int64_t groups, int64_t activation, double slope, bool tf32) {
  auto c = forward_of(given, given_weight, {uh, uw, mode, align_corners, scale_h, scale_w, ph, pw, groups}, tf32);
  c.activation = aeup::activation_of(kName, activation);
  c.slope = slope;
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor input = dense(given, c.channels_last), weight = dense(given_weight, c.weight_channels_last);
  const std::optional<Tensor> added = aeup::bias_of(kName, bias, given, c.co);
  if (added) c.bias = added->const_data_ptr();
  Tensor result = aeup::empty_like(input, {c.n, c.co, c.oh, c.ow}, c.channels_last);
  if (result.numel() == 0) return result;
  c.input = input.const_data_ptr(), c.weight = weight.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(c, Pass::forward, input);
  return result;
}

Tensor input_gradient(const Tensor& given, const Tensor& given_weight, int64_t ih, int64_t iw, int64_t uh, int64_t uw,
                      int64_t mode, bool align_corners, double scale_h, double scale_w, int64_t ph, int64_t pw,
                      int64_t groups, bool tf32) {
  aeup::check(kName, given, "grad", 4);
  aeup::check(kName, given_weight, "weight", 4);
  auto c = describe({uh, uw, mode, align_corners, scale_h, scale_w, ph, pw, groups}, given, given.size(0),
                    given_weight.size(1) * groups, ih, iw, given_weight, tf32);
  same_output(c, given);
  c.channels_last = suggests_channels_last(given) || c.weight_channels_last;
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor grad = dense(given, c.channels_last), weight = dense(given_weight, c.weight_channels_last);
  Tensor result = aeup::empty_like(grad, {c.n, c.ci, c.ih, c.iw}, c.channels_last);
  if (result.numel() == 0) return result;
  c.grad = grad.const_data_ptr(), c.weight = weight.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(c, Pass::input_gradient, grad);
  return result;
}

Tensor weight_gradient(const Tensor& given_grad, const Tensor& given_input, const Tensor& like, int64_t uh, int64_t uw,
                       int64_t mode, bool align_corners, double scale_h, double scale_w, int64_t ph, int64_t pw,
                       int64_t groups, bool tf32) {
  aeup::check(kName, given_grad, "grad", 4);
  auto c = forward_of(given_input, like, {uh, uw, mode, align_corners, scale_h, scale_w, ph, pw, groups}, tf32);
  aeup::same_kind(kName, given_grad, given_input, "grad");
  same_output(c, given_grad);
  c.channels_last = suggests_channels_last(given_grad) || suggests_channels_last(given_input);
  const torch::stable::accelerator::DeviceGuard guard(given_grad.get_device_index());
  const Tensor grad = dense(given_grad, c.channels_last), input = dense(given_input, c.channels_last);
  Tensor result = aeup::empty_like(grad, like.sizes(), c.weight_channels_last);
  if (grad.numel() == 0) {  // a sum of nothing
    torch::stable::fill_(result, 0.0);
    return result;
  }
  c.grad = grad.const_data_ptr(), c.input = input.const_data_ptr(), c.result = result.mutable_data_ptr();
  run(c, Pass::weight_gradient, grad);
  return result;
}
#endif

// Which kernel would serve on a device of that capability, or "refuses: " and why: for aeup.explain and the choice of a
// backend. `input` and `weight` are meta tensors; `pass` is 0 forward, 1 input gradient, 2 weight gradient.
std::string kernel_name(const Tensor& input, const Tensor& weight, int64_t uh, int64_t uw, int64_t mode,
                        bool align_corners, double scale_h, double scale_w, int64_t ph, int64_t pw, int64_t groups,
                        int64_t pass, bool tf32, int64_t major, int64_t minor) {
#ifdef AEUP_WITH_CUDA
  if (pass < 0 || pass > 2) fail("pass must be 0 to 2, got " + std::to_string(pass));
  const auto c = forward_of(input, weight, {uh, uw, mode, align_corners, scale_h, scale_w, ph, pw, groups}, tf32);
  const char* why = aeup::refuses_resample_conv(c, static_cast<Pass>(pass), int(major), int(minor));
  return why ? std::string("refuses: ") + why : aeup::resample_conv_label(c, static_cast<Pass>(pass));
#else
  return "refuses: built without CUDA";
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "resample_conv2d(Tensor input, Tensor weight, Tensor? bias, int uh, int uw, int mode, bool align_corners, "
      "float scale_h, float scale_w, int ph, int pw, int groups, int activation, float slope, bool tf32) -> Tensor");
  m.def(
      "resample_conv2d_input_gradient(Tensor grad, Tensor weight, int ih, int iw, int uh, int uw, int mode, "
      "bool align_corners, float scale_h, float scale_w, int ph, int pw, int groups, bool tf32) -> Tensor");
  m.def(
      "resample_conv2d_weight_gradient(Tensor grad, Tensor input, Tensor weight_like, int uh, int uw, int mode, "
      "bool align_corners, float scale_h, float scale_w, int ph, int pw, int groups, bool tf32) -> Tensor");
  m.def(
      "resample_conv2d_kernel(Tensor input, Tensor weight, int uh, int uw, int mode, bool align_corners, "
      "float scale_h, float scale_w, int ph, int pw, int groups, int which, bool tf32, int major, int minor) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CompositeExplicitAutograd, m) {
  m.impl("resample_conv2d_kernel", TORCH_BOX(&kernel_name));
}

#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("resample_conv2d", TORCH_BOX(&forward));
  m.impl("resample_conv2d_input_gradient", TORCH_BOX(&input_gradient));
  m.impl("resample_conv2d_weight_gradient", TORCH_BOX(&weight_gradient));
}
#endif

}  // namespace
