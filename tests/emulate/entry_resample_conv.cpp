// ctypes entry point of the emulated kernels of resampling and convolution (see emulator_resample_conv.py).
#include "device.h"
#include "resample_conv.h"

extern "C" {
// size: n ci co ih iw uh uw oh ow kh kw ph pw groups; how: pass mode align_corners dtype channels_last
// weight_channels_last tf32 activation major minor; numbers: scale_h scale_w slope. Returns null, or what went wrong: a
// refusal, a bad access, or an element stored not exactly once.
const char* aeup_emulate_resample_conv(const void* input, const void* weight, const void* bias, const void* grad,
                                       void* result, const int64_t* size, const int* how, const double* numbers) {
  using namespace aeup;
  ResampleConv c{};
  c.n = size[0], c.ci = size[1], c.co = size[2], c.ih = size[3], c.iw = size[4], c.uh = size[5], c.uw = size[6];
  c.oh = size[7], c.ow = size[8], c.kh = int(size[9]), c.kw = int(size[10]), c.ph = int(size[11]);
  c.pw = int(size[12]), c.groups = int(size[13]);
  const Pass pass = static_cast<Pass>(how[0]);
  c.mode = static_cast<Mode>(how[1]), c.align_corners = how[2] != 0, c.dtype = static_cast<DType>(how[3]);
  c.channels_last = how[4] != 0, c.weight_channels_last = how[5] != 0, c.tf32 = how[6] != 0;
  c.activation = static_cast<Activation>(how[7]);
  c.scale_h = numbers[0], c.scale_w = numbers[1], c.slope = numbers[2];
  c.input = input, c.weight = weight, c.bias = bias, c.grad = grad, c.result = result;
  if (const char* why = refuses_resample_conv(c, pass, how[8], how[9])) {
    emulated::reply = std::string("refused: ") + why;
    return emulated::reply.c_str();
  }
  const int64_t e = emulated::bytes_of(c.dtype), in = c.n * c.ci * c.ih * c.iw * e, out = c.n * c.co * c.oh * c.ow * e;
  const int64_t weights = c.co * (c.ci / c.groups) * c.kh * c.kw * e;
  emulated::Device device(resample_conv_workspace(c, pass));
  if (pass != Pass::input_gradient) device.reads(input, in);
  if (pass != Pass::forward) device.reads(grad, out);
  if (pass != Pass::weight_gradient) device.reads(weight, weights);
  device.reads(bias, c.co * e);
  device.writes(result, pass == Pass::forward ? out : pass == Pass::input_gradient ? in : weights);
  if (const char* error = launch_resample_conv(c, pass, device.at, nullptr)) {
    emulated::reply = error;
    return emulated::reply.c_str();
  }
  return device.all_stored();
}
}
