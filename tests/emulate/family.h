// Runs one pass of a convolution on an emulated device, with the family asked for.
#pragma once
#include "conv_launch.h"
#include "device.h"

namespace emulated {

inline const char* answer(const std::string& text) {
  reply = text;
  return reply.c_str();
}
// The rows that the epilogue's gradient makes of an NCHW grad (see ConvolutionFamily::shared).
inline void make_rows(const aeup::Convolution& c, int64_t bytes, char* to) {
  const int64_t e = bytes_of(c.dtype), pixels = c.oh * c.ow, pitch = bytes / (c.n * pixels);
  std::memset(to, 0, size_t(bytes));
  for (int64_t i = 0; i < c.n * c.co * pixels; ++i) {
    const int64_t image = i / (c.co * pixels), channel = i / pixels % c.co, pixel = i % pixels;
    std::memcpy(to + (image * pixels + pixel) * pitch + channel * e, static_cast<const char*>(c.grad) + i * e, e);
  }
}
// `share`: the gradient is first brought into the form that both gradients share, and the pass reads only that. Returns
// null, or what went wrong: a refusal, a bad access, or an element stored not exactly once.
inline const char* run_pass(aeup::Convolution c, aeup::Pass pass, const char* family, int64_t weight_bytes,
                            bool share) {
  using aeup::Pass;
  std::string why;
  const aeup::ConvolutionFamily* f = aeup::choose_convolution(c, pass, family, 9, 0, &why);
  if (!f) return answer("refused: " + why);
  const int64_t e = bytes_of(c.dtype), in = c.n * c.ci * c.ih * c.iw * e, out = c.n * c.co * c.oh * c.ow * e;
  std::vector<uint64_t> memory;
  if (share) {
    const int64_t bytes = f->shared ? f->shared(c) : 0;
    if (!bytes) return answer("nothing to share");
    if (bytes != c.n * c.oh * c.ow * ((c.co * e + 15) / 16 * 16)) return answer("rows are not of whole 16 bytes");
    memory.assign(bytes / 8 + 33, ~0ull);
    const uintptr_t at = (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256;
    c.shared_grad = reinterpret_cast<void*>(at);
    if (!c.channels_last) {
      make_rows(c, bytes, reinterpret_cast<char*>(at));
    } else {
      Device device(0);
      device.reads(c.grad, out);
      device.writes(c.shared_grad, bytes);
      if (const char* error = f->share(c, reinterpret_cast<void*>(at), nullptr)) return answer(error);
      if (const char* error = device.all_stored()) return error;
    }
  }
  Device device(f->workspace(c, pass));
  if (pass != Pass::input_gradient) device.reads(c.input, in);
  if (share) device.reads(c.shared_grad, f->shared(c));
  if (pass != Pass::forward && !share) device.reads(c.grad, out);
  if (pass != Pass::weight_gradient) device.reads(c.weight, weight_bytes);
  device.reads(c.bias, (pass == Pass::forward ? c.co : c.ci) * e);
  device.writes(c.result, pass == Pass::forward ? out : pass == Pass::input_gradient ? in : weight_bytes);
  if (const char* error = f->launch(c, pass, device.at, nullptr)) return answer(error);
  return device.all_stored();
}

}  // namespace emulated
