// ctypes entry points of the emulated convolution kernels (see emulator_convolution.py).
#include "conv_launch.h"
#include "device.h"

namespace aeup {
// The Hopper kernels are written for units that are not emulated.
constexpr ConvolutionFamily not_emulated(const char* name) {
  return {name, [](const Convolution&, Pass, int, int) -> const char* { return "not emulated"; },
          [](const Convolution&, Pass) -> int64_t { return 0; },
          [](const Convolution&, Pass, void*, void*) -> const char* { return "not emulated"; }};
}
const ConvolutionFamily kHopperConvolution = not_emulated("hopper");
const ConvolutionFamily kHopperFloatConvolution = not_emulated("hopper_float");
}  // namespace aeup

namespace {
// size: n ci co ih iw oh ow kh kw sh sw ph pw dh dw groups; how: pass dtype channels_last weight_channels_last tf32
// activation.
aeup::Convolution describe(const int64_t* size, const int* how, double slope) {
  aeup::Convolution c{};
  c.n = size[0], c.ci = size[1], c.co = size[2];
  c.ih = size[3], c.iw = size[4], c.oh = size[5], c.ow = size[6];
  c.kh = int(size[7]), c.kw = int(size[8]), c.sh = int(size[9]), c.sw = int(size[10]);
  c.ph = int(size[11]), c.pw = int(size[12]), c.dh = int(size[13]), c.dw = int(size[14]), c.groups = int(size[15]);
  c.dtype = static_cast<aeup::DType>(how[1]);
  c.channels_last = how[2] != 0, c.weight_channels_last = how[3] != 0, c.tf32 = how[4] != 0;
  c.activation = static_cast<aeup::Activation>(how[5]);
  c.slope = float(slope);
  return c;
}
}  // namespace

using emulated::bytes_of;
using emulated::Device;
using emulated::reply;

extern "C" {
// Returns null, or what went wrong: a refusal, a bad access, or an element stored not exactly once.
const char* aeup_emulate_convolution(const char* family, const void* input, const void* weight, const void* bias,
                                     const void* grad, void* result, const int64_t* size, const int* how,
                                     double slope) {
  using namespace aeup;
  Convolution c = describe(size, how, slope);
  c.input = input, c.weight = weight, c.bias = bias, c.grad = grad, c.result = result;
  const Pass pass = static_cast<Pass>(how[0]);
  std::string why;
  const ConvolutionFamily* f = choose_convolution(c, pass, family, 9, 0, &why);
  if (!f) {
    reply = "refused: " + why;
    return reply.c_str();
  }
  const int64_t work = f->workspace(c, pass), e = bytes_of(c.dtype);
  const int64_t in = c.n * c.ci * c.ih * c.iw * e, out = c.n * c.co * c.oh * c.ow * e;
  const int64_t weights = c.ci * (c.co / c.groups) * c.kh * c.kw * e;
  Device device(work);
  if (pass != Pass::input_gradient) device.reads(input, in);
  if (pass != Pass::forward) device.reads(grad, out);
  if (pass != Pass::weight_gradient) device.reads(weight, weights);
  device.reads(bias, c.co * e);
  device.writes(result, pass == Pass::forward ? out : pass == Pass::input_gradient ? in : weights);
  if (const char* error = f->launch(c, pass, device.at, nullptr)) {
    reply = error;
    return reply.c_str();
  }
  return device.all_stored();
}
// size: n c pixels; how: dtype channels_last activation.
const char* aeup_emulate_epilogue(const void* grad, const void* output, void* before, void* bias, const int64_t* size,
                                  const int* how, double slope) {
  using namespace aeup;
  EpilogueGradient g{};
  g.n = size[0], g.c = size[1], g.pixels = size[2];
  g.dtype = static_cast<DType>(how[0]), g.channels_last = how[1] != 0;
  g.activation = static_cast<Activation>(how[2]), g.slope = float(slope);
  g.grad = grad, g.output = output, g.before = before, g.bias = bias;
  const int64_t bytes = g.n * g.c * g.pixels * bytes_of(g.dtype);
  Device device(epilogue_gradient_workspace(g));
  device.reads(grad, bytes);
  device.reads(output, bytes);
  device.writes(before, bytes);
  device.writes(bias, g.c * bytes_of(g.dtype));
  if (const char* error = launch_epilogue_gradient(g, device.at, nullptr)) {
    reply = error;
    return reply.c_str();
  }
  return device.all_stored();
}
}
