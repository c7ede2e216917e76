// ctypes entry points of the emulated convolution kernels (see emulator_convolution.py).
#include "family.h"

#ifndef AEUP_EMULATE_HOPPER
namespace aeup {
// The Hopper kernels have a library of their own: emulator_hopper.py.
constexpr ConvolutionFamily not_emulated(const char* name) {
  return {name, [](const Convolution&, Pass, int, int) -> const char* { return "not emulated"; },
          [](const Convolution&, Pass) -> int64_t { return 0; },
          [](const Convolution&, Pass, void*, void*) -> const char* { return "not emulated"; }};
}
const ConvolutionFamily kHopperConvolution = not_emulated("hopper");
const ConvolutionFamily kHopperFloatConvolution = not_emulated("hopper_float");
}  // namespace aeup
#endif

namespace {
// size: n ci co ih iw oh ow kh kw sh sw ph pw dh dw groups; how: pass dtype channels_last weight_channels_last tf32
// activation share.
aeup::Convolution describe(const int64_t* size, const int* how, double slope) {
  aeup::Convolution c{};
  c.n = size[0], c.ci = size[1], c.co = size[2];
  c.ih = size[3], c.iw = size[4], c.oh = size[5], c.ow = size[6];
  c.kh = int(size[7]), c.kw = int(size[8]), c.sh = int(size[9]), c.sw = int(size[10]);
  c.ph = int(size[11]), c.pw = int(size[12]), c.dh = int(size[13]), c.dw = int(size[14]), c.groups = int(size[15]);
  c.dtype = static_cast<aeup::DType>(how[1]);
  c.channels_last = how[2] != 0, c.weight_channels_last = how[3] != 0, c.tf32 = how[4] != 0;
  c.activation = static_cast<aeup::Activation>(how[5]);
  c.slope = slope;
  return c;
}
}  // namespace

using emulated::bytes_of;
using emulated::Device;
using emulated::reply;

extern "C" {
// Returns null, or what went wrong (family.h).
const char* aeup_emulate_convolution(const char* family, const void* input, const void* weight, const void* bias,
                                     const void* grad, void* result, const int64_t* size, const int* how,
                                     double slope) {
  aeup::Convolution c = describe(size, how, slope);
  c.input = input, c.weight = weight, c.bias = bias, c.grad = grad, c.result = result;
  const int64_t weights = c.ci * (c.co / c.groups) * c.kh * c.kw * bytes_of(c.dtype);
  return emulated::run_pass(c, static_cast<aeup::Pass>(how[0]), family, weights, how[6] != 0);
}
#ifndef AEUP_EMULATE_HOPPER
// size: n c pixels pitch; how: dtype channels_last activation.
const char* aeup_emulate_epilogue(const void* grad, const void* output, void* before, void* bias, const int64_t* size,
                                  const int* how, double slope) {
  using namespace aeup;
  EpilogueGradient g{};
  g.n = size[0], g.c = size[1], g.pixels = size[2], g.pitch = size[3];
  g.dtype = static_cast<DType>(how[0]), g.channels_last = how[1] != 0;
  g.activation = static_cast<Activation>(how[2]), g.slope = slope;
  g.grad = grad, g.output = output, g.before = before, g.bias = bias;
  const int64_t bytes = g.n * g.c * g.pixels * bytes_of(g.dtype);
  Device device(epilogue_gradient_workspace(g));
  device.reads(grad, bytes);
  device.reads(output, bytes);
  device.writes(before, g.pitch ? g.n * g.pixels * g.pitch : bytes);
  device.writes(bias, g.c * bytes_of(g.dtype));
  if (const char* error = launch_epilogue_gradient(g, device.at, nullptr)) {
    reply = error;
    return reply.c_str();
  }
  return device.all_stored();
}
#endif
}
