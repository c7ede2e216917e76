// Runs one pass of a convolution on an emulated device, with the family asked for.
#pragma once
#include "conv_launch.h"
#include "device.h"

namespace emulated {

inline const char* answer(const std::string& text) {
  reply = text;
  return reply.c_str();
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
    memory.assign(bytes / 8 + 33, ~0ull);
    const uintptr_t at = (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256;
    Device device(0);
    device.reads(c.grad, out);
    device.writes(reinterpret_cast<void*>(at), bytes);
    if (const char* error = f->share(c, reinterpret_cast<void*>(at), nullptr)) return answer(error);
    if (const char* error = device.all_stored()) return error;
    c.shared_grad = reinterpret_cast<void*>(at);
  }
  Device device(f->workspace(c, pass));
  if (pass != Pass::input_gradient) device.reads(c.input, in);
  if (share) device.reads(c.shared_grad, f->shared(c));
  if (pass != Pass::forward && !share) device.reads(c.grad, out);
  if (pass != Pass::weight_gradient) device.reads(c.weight, weight_bytes);
  device.reads(c.bias, c.co * e);
  device.writes(c.result, pass == Pass::forward ? out : pass == Pass::input_gradient ? in : weight_bytes);
  if (const char* error = f->launch(c, pass, device.at, nullptr)) return answer(error);
  return device.all_stored();
}

}  // namespace emulated
