// The compiled operators of the transposed convolution, and of the convolution, its adjoint:
// torch.ops.aeup_native.conv*. They are kernels without autograd; aeup/ops/conv_transpose2d.py and conv2d.py build the
// public operators on them.
#include "ops_convolution.h"

namespace {

using torch::stable::Tensor;

constexpr const char *kName = "aeup.conv_transpose2d", *kConvolution = "aeup.conv2d";

struct Geometry {
  int64_t sh, sw, ph, pw, groups, dh, dw;
};
// Sizes of the map; nothing of the layouts. Throws where a kernel would read out of bounds.
aeup::Convolution describe(const char* op, const Geometry& g, aeup::Sizes input, aeup::Sizes output, aeup::Sizes weight,
                           bool tf32) {
  const int64_t kh = weight[2], kw = weight[3];
  for (const int64_t v : {g.sh, g.sw, g.groups, g.dh, g.dw, kh, kw})
    aeup::check_argument(op, "stride, groups, dilation and kernel size", v);
  for (const int64_t v : {g.ph, g.pw}) aeup::check_argument(op, "padding", v, 0);
  aeup::check_space(op, input);
  aeup::check_space(op, output);
  if (g.dh * (kh - 1) >= aeup::kMaxAxis || g.dw * (kw - 1) >= aeup::kMaxAxis)
    aeup::fail(op, "the dilated kernel is too large");
  if (input[2] * g.sh >= aeup::kMaxAxis || input[3] * g.sw >= aeup::kMaxAxis)
    aeup::fail(op, "input size times stride is too large");
  aeup::Convolution c{};
  aeup::set_channels(op, &c, input, output, weight[0], weight[1] * g.groups, g.groups);
  c.ih = input[2], c.iw = input[3], c.oh = output[2], c.ow = output[3];
  c.kh = int(kh), c.kw = int(kw), c.sh = int(g.sh), c.sw = int(g.sw), c.ph = int(g.ph), c.pw = int(g.pw);
  c.dh = int(g.dh), c.dw = int(g.dw);
  c.tf32 = tf32;
  // The output has exactly the size of the map with some output_padding below max(stride, dilation).
  const auto axis = [op](int64_t in, int64_t out, int64_t s, int64_t p, int64_t k, int64_t d) {
    const int64_t extra = out - ((in - 1) * s - 2 * p + d * (k - 1) + 1);
    if (extra < 0 || extra >= (s > d ? s : d))
      aeup::fail(op, "the spatial sizes of input and output do not belong together");
  };
  axis(c.ih, c.oh, g.sh, g.ph, kh, g.dh);
  axis(c.iw, c.ow, g.sw, g.pw, kw, g.dw);
  return c;
}
int64_t output_size(int64_t in, int64_t s, int64_t p, int64_t extra, int64_t k, int64_t d) {
  return (in - 1) * s - 2 * p + d * (k - 1) + extra + 1;
}

aeup::Convolution forward_of(const Tensor& input, const Tensor& weight, const Geometry& g, int64_t oph, int64_t opw,
                             bool tf32, int64_t activation = 0, double slope = 0) {
  aeup::check(kName, input, "input", 4);
  aeup::check(kName, weight, "weight", 4);
  aeup::same_kind(kName, weight, input, "weight");
  const int64_t out[4] = {input.size(0), weight.size(1) * g.groups,
                          output_size(input.size(2), g.sh, g.ph, oph, weight.size(2), g.dh),
                          output_size(input.size(3), g.sw, g.pw, opw, weight.size(3), g.dw)};
  auto c = describe(kName, g, input.sizes(), out, weight.sizes(), tf32);
  aeup::set_layout(kName, &c, input, weight, weight);
  c.activation = aeup::activation_of(kName, activation), c.slope = slope;
  return c;
}

// `input` and `weight` are meta tensors; `pass` is 0 forward, 1 input gradient, 2 weight gradient.
std::string kernel_name(const Tensor& input, const Tensor& weight, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                        int64_t oph, int64_t opw, int64_t groups, int64_t dh, int64_t dw, int64_t pass, bool tf32,
                        int64_t major, int64_t minor) {
  const auto c = forward_of(input, weight, {sh, sw, ph, pw, groups, dh, dw}, oph, opw, tf32);
  return aeup::family_name(kName, c, pass, major, minor);
}

#ifdef AEUP_WITH_CUDA
Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t sh, int64_t sw,
               int64_t ph, int64_t pw, int64_t oph, int64_t opw, int64_t groups, int64_t dh, int64_t dw,
               int64_t activation, double slope, bool tf32, std::string family) {
  const auto c = forward_of(input, weight, {sh, sw, ph, pw, groups, dh, dw}, oph, opw, tf32, activation, slope);
  return aeup::run_forward(kName, c, input, weight, bias, family);
}
int64_t forward_plan(const Tensor& input, const Tensor& weight, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                     int64_t oph, int64_t opw, int64_t groups, int64_t dh, int64_t dw, int64_t activation, double slope,
                     bool tf32) {
  const auto c = forward_of(input, weight, {sh, sw, ph, pw, groups, dh, dw}, oph, opw, tf32, activation, slope);
  return aeup::keep_forward(kName, c, aeup::Pass::forward, input, weight);
}

aeup::Convolution input_gradient_of(const Tensor& grad, const Tensor& weight, int64_t ih, int64_t iw, const Geometry& g,
                                    bool tf32) {
  aeup::check(kName, grad, "grad", 4);
  aeup::check_beside(kName, grad, weight, "weight");
  auto c = describe(kName, g, {grad.size(0), weight.size(0), ih, iw}, grad.sizes(), weight.sizes(), tf32);
  aeup::set_layout(kName, &c, grad, weight, weight);
  return c;
}
Tensor input_gradient(const Tensor& grad, const Tensor& weight, int64_t ih, int64_t iw, int64_t sh, int64_t sw,
                      int64_t ph, int64_t pw, int64_t groups, int64_t dh, int64_t dw, bool tf32, std::string family) {
  const auto c = input_gradient_of(grad, weight, ih, iw, {sh, sw, ph, pw, groups, dh, dw}, tf32);
  return aeup::run_input_gradient(kName, c, grad, weight, family);
}

aeup::Convolution weight_gradient_of(const Tensor& grad, const Tensor& input, const Tensor& like, const Geometry& g,
                                     bool tf32) {
  aeup::check(kName, grad, "grad", 4);
  aeup::check_beside(kName, grad, input, "input");
  aeup::check_beside(kName, grad, like, "weight_like");
  auto c = describe(kName, g, input.sizes(), grad.sizes(), like.sizes(), tf32);
  aeup::set_layout(kName, &c, grad, input, like);
  return c;
}
Tensor weight_gradient(const Tensor& grad, const Tensor& input, const Tensor& like, int64_t sh, int64_t sw, int64_t ph,
                       int64_t pw, int64_t groups, int64_t dh, int64_t dw, bool tf32, std::string family) {
  const auto c = weight_gradient_of(grad, input, like, {sh, sw, ph, pw, groups, dh, dw}, tf32);
  return aeup::run_weight_gradient(kName, c, grad, input, like, family);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                            const std::optional<Tensor>& output, int64_t sh, int64_t sw, int64_t ph,
                                            int64_t pw, int64_t groups, int64_t dh, int64_t dw, int64_t activation,
                                            double slope, bool tf32, bool want_input, bool want_weight,
                                            bool want_bias) {
  const Geometry g{sh, sw, ph, pw, groups, dh, dw};
  return aeup::run_backward(
      kName, grad, input, weight, output, activation, slope, want_input, want_weight, want_bias,
      [&](const Tensor& before) { return input_gradient_of(before, weight, input.size(2), input.size(3), g, tf32); },
      [&](const Tensor& before) { return weight_gradient_of(before, input, weight, g, tf32); });
}

// The convolution of `input` by weight [co, ci / groups, kh, kw]: as the input's gradient of the transposed one, of
// which `input` is the output's.
aeup::Convolution convolution_of(const Tensor& input, const Tensor& weight, const Geometry& g, int64_t activation,
                                 double slope, bool tf32) {
  aeup::check(kConvolution, input, "input", 4);
  aeup::check(kConvolution, weight, "weight", 4);
  aeup::same_kind(kConvolution, weight, input, "weight");
  const auto size = [](int64_t in, int64_t s, int64_t p, int64_t k, int64_t d) {
    return s < 1 ? 0 : (in + 2 * p - d * (k - 1) - 1) / s + 1;  // describe refuses 0
  };
  const int64_t result[4] = {input.size(0), weight.size(0), size(input.size(2), g.sh, g.ph, weight.size(2), g.dh),
                             size(input.size(3), g.sw, g.pw, weight.size(3), g.dw)};
  auto c = describe(kConvolution, g, result, input.sizes(), weight.sizes(), tf32);
  aeup::set_layout(kConvolution, &c, input, weight, weight);
  c.activation = aeup::activation_of(kConvolution, activation), c.slope = slope;
  return c;
}
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t sh, int64_t sw,
                   int64_t ph, int64_t pw, int64_t groups, int64_t dh, int64_t dw, int64_t activation, double slope,
                   bool tf32, std::string family) {
  const auto c = convolution_of(input, weight, {sh, sw, ph, pw, groups, dh, dw}, activation, slope, tf32);
  return aeup::run_input_gradient(kConvolution, c, input, weight, family, bias);
}
int64_t convolution_plan(const Tensor& input, const Tensor& weight, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                         int64_t groups, int64_t dh, int64_t dw, int64_t activation, double slope, bool tf32) {
  const auto c = convolution_of(input, weight, {sh, sw, ph, pw, groups, dh, dw}, activation, slope, tf32);
  return aeup::keep_forward(kConvolution, c, aeup::Pass::input_gradient, input, weight);
}
// All gradients in one call; what is not wanted is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        const std::optional<Tensor>& output, int64_t sh, int64_t sw,
                                                        int64_t ph, int64_t pw, int64_t groups, int64_t dh, int64_t dw,
                                                        int64_t activation, double slope, bool tf32, bool want_input,
                                                        bool want_weight, bool want_bias) {
  const Geometry g{sh, sw, ph, pw, groups, dh, dw};
  aeup::check(kConvolution, input, "input", 4);
  aeup::check_beside(kConvolution, input, weight, "weight");
  const aeup::Epilogue epilogue = aeup::epilogue_of(grad, output, activation, slope, want_bias);
  const Tensor before = aeup::run_epilogue(epilogue);
  Tensor input_grad, weight_grad;
  if (!want_input || !want_weight) input_grad = weight_grad = aeup::empty_like(grad, {0}, false);
  if (want_input) {
    const auto extra = [](int64_t in, int64_t out, int64_t s, int64_t p, int64_t k, int64_t d) {
      return in - output_size(out, s, p, 0, k, d);
    };
    const int64_t oph = extra(input.size(2), before.size(2), sh, ph, weight.size(2), dh);
    const int64_t opw = extra(input.size(3), before.size(3), sw, pw, weight.size(3), dw);
    const auto c = forward_of(before, weight, g, oph, opw, tf32);
    input_grad = aeup::run_forward(kConvolution, c, before, weight, std::nullopt, "");
  }
  if (want_weight) {
    const auto c = weight_gradient_of(input, before, weight, g, tf32);
    weight_grad = aeup::run_weight_gradient(kConvolution, c, input, before, weight, "");
  }
  return {input_grad, weight_grad, epilogue.bias};
}
#endif

}  // namespace

#ifdef AEUP_WITH_CUDA
namespace aeup {
namespace {

struct Kept {
  const char* op;
  Convolution c;
  Pass pass;
  Shape input, weight;
};
Keep<Kept> kept;

Tensor conv_planned(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t number) {
  constexpr const char* kPlanned = "aeup_native.conv_planned";
  const Kept* plan = kept.find(number);
  if (!plan) fail(kPlanned, "there is no plan " + std::to_string(number));
  check(kPlanned, input, "input", 4);
  check(kPlanned, weight, "weight", 4);
  if (!(Shape(input) == plan->input) || !(Shape(weight) == plan->weight))
    fail(plan->op, "the tensors are not those of plan " + std::to_string(number));
  if (plan->pass == Pass::forward) return run_forward(plan->op, plan->c, input, weight, bias, "");
  return run_input_gradient(plan->op, plan->c, input, weight, "", bias);
}

constexpr const char* kEpilogue = "aeup.conv_epilogue_gradient";

// before: null where there is no activation, unless it is to be rows of `pitch` bytes.
void launch(const Epilogue& p, void* before, int64_t pitch) {
  EpilogueGradient e = p.e;
  if (!before && p.bias.numel() == 0) return;
  if (p.grad.numel() == 0) {  // sums of nothing
    torch::stable::fill_(p.bias, 0.0);
    return;
  }
  e.grad = p.grad.const_data_ptr(), e.before = before, e.pitch = pitch;
  if (e.activation != Activation::none) e.output = p.output.const_data_ptr();
  if (p.bias.numel() > 0) e.bias = p.bias.mutable_data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(p.grad.get_device_index());
  void* const stream = current_stream(kEpilogue, p.grad);
  const Workspace workspace(p.grad, epilogue_gradient_workspace(e));
  if (const char* error = launch_epilogue_gradient(e, workspace.data, stream))
    fail(kEpilogue, std::string("CUDA kernel: ") + error);
}

std::tuple<Tensor, Tensor> epilogue_gradient(const Tensor& grad, const std::optional<Tensor>& output,
                                             int64_t activation, double slope, bool want_bias) {
  const Epilogue p = epilogue_of(grad, output, activation, slope, want_bias);
  return {run_epilogue(p), p.bias};
}

}  // namespace

int64_t keep_forward(const char* op, const Convolution& c, Pass pass, const Tensor& input, const Tensor& weight) {
  return kept.add({op, c, pass, Shape(input), Shape(weight)});
}

Epilogue epilogue_of(const Tensor& given, const std::optional<Tensor>& output, int64_t activation, double slope,
                     bool want_bias) {
  Epilogue p;
  EpilogueGradient& e = p.e;
  e.activation = activation_of(kEpilogue, activation);
  const bool active = e.activation != Activation::none;
  check(kEpilogue, given, "grad", 4);
  e.dtype = float_dtype_of(kEpilogue, given);
  if (active) {
    if (!output) fail(kEpilogue, "an activation needs its output");
    same_kind(kEpilogue, *output, given, "output");
    if (output->sizes() != given.sizes()) fail(kEpilogue, "grad and output differ in size");
  }
  e.slope = slope;
  e.n = given.size(0), e.c = given.size(1), e.pixels = given.size(2) * given.size(3);
  // A gradient that is dense in no layout (expanded, for one) takes the output's.
  e.channels_last = suggests_channels_last(given) || (active && suggests_channels_last(*output));
  p.grad = active || want_bias ? dense(given, e.channels_last) : given;
  if (active) p.output = dense(*output, e.channels_last);
  p.bias = empty_like(given, {want_bias ? e.c : 0}, false);
  return p;
}

Tensor run_epilogue(const Epilogue& p) {
  if (p.e.activation == Activation::none) {
    launch(p, nullptr, 0);
    return p.grad;
  }
  Tensor before = empty_like(p.grad, p.grad.sizes(), p.e.channels_last);
  launch(p, before.mutable_data_ptr(), 0);
  return before;
}
void run_epilogue(const Epilogue& p, void* rows, int64_t pitch) { launch(p, rows, pitch); }

}  // namespace aeup
#endif

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, int sh, int sw, int ph, int pw, int oph, int opw, "
      "int groups, int dh, int dw, int activation, float slope, bool tf32, str family) -> Tensor");
  m.def(
      "conv_transpose2d_plan(Tensor input, Tensor weight, int sh, int sw, int ph, int pw, int oph, int opw, "
      "int groups, int dh, int dw, int activation, float slope, bool tf32) -> int");
  m.def("conv_planned(Tensor input, Tensor weight, Tensor? bias, int number) -> Tensor");
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
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int sh, int sw, int ph, int pw, int groups, int dh, int dw, "
      "int activation, float slope, bool tf32, str family) -> Tensor");
  m.def(
      "conv2d_plan(Tensor input, Tensor weight, int sh, int sw, int ph, int pw, int groups, int dh, int dw, "
      "int activation, float slope, bool tf32) -> int");
  m.def(
      "conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor? output, int sh, int sw, int ph, int pw, "
      "int groups, int dh, int dw, int activation, float slope, bool tf32, bool want_input, bool want_weight, "
      "bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_transpose2d_kernel(Tensor input, Tensor weight, int sh, int sw, int ph, int pw, int oph, int opw, "
      "int groups, int dh, int dw, int which, bool tf32, int major, int minor) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CompositeExplicitAutograd, m) {
  m.impl("conv_transpose2d_kernel", TORCH_BOX(&kernel_name));
#ifdef AEUP_WITH_CUDA
  m.impl("conv_transpose2d_plan", TORCH_BOX(&forward_plan));  // reads no memory
#endif
}

#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("conv_transpose2d", TORCH_BOX(&forward));
  m.impl("conv_planned", TORCH_BOX(&aeup::conv_planned));
  m.impl("conv_transpose2d_input_gradient", TORCH_BOX(&input_gradient));
  m.impl("conv_transpose2d_weight_gradient", TORCH_BOX(&weight_gradient));
  m.impl("conv_transpose2d_backward", TORCH_BOX(&backward));
  m.impl("conv_epilogue_gradient", TORCH_BOX(&aeup::epilogue_gradient));
  m.impl("conv2d", TORCH_BOX(&convolution));
  m.impl("conv2d_plan", TORCH_BOX(&convolution_plan));
  m.impl("conv2d_backward", TORCH_BOX(&convolution_backward));
}
#endif

}  // namespace
