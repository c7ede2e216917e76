// ctypes entry points of the emulated group normalisation (see emulator_group_norm.py).
#include "device.h"
#include "group_norm.h"

using emulated::bytes_of;
using emulated::Device;
using emulated::reply;

namespace {
// size: n c pixels groups blocks; how: dtype channels_last activation narrow; real: slope eps.
aeup::GroupNorm describe(const int64_t* size, const int* how, const double* real) {
  aeup::GroupNorm g{};
  g.n = size[0], g.c = size[1], g.pixels = size[2], g.groups = size[3], g.blocks = int(size[4]);
  g.dtype = static_cast<aeup::DType>(how[0]), g.channels_last = how[1] != 0;
  g.activation = static_cast<aeup::Activation>(how[2]), g.narrow = how[3] != 0;
  g.slope = real[0], g.eps = real[1];
  return g;
}
int64_t bytes(const aeup::GroupNorm& g) { return g.n * g.c * g.pixels * bytes_of(g.dtype); }
int64_t wide(const aeup::GroupNorm& g) { return g.dtype == aeup::DType::f64 ? 8 : 4; }
int64_t of_groups(const aeup::GroupNorm& g) { return g.n * g.groups * wide(g); }
int64_t of_channels(const aeup::GroupNorm& g) { return g.c * (g.narrow ? bytes_of(g.dtype) : wide(g)); }
const char* answer(const char* error, const Device& device) {
  if (!error) return device.all_stored();
  reply = error;
  return reply.c_str();
}
}  // namespace

extern "C" {
// read: input weight bias; written: output mean invstd. Return null, or what went wrong.
const char* aeup_emulate_group_norm(const void* const* read, void* const* written, const int64_t* size, const int* how,
                                    const double* real) {
  aeup::GroupNorm g = describe(size, how, real);
  g.input = read[0], g.weight = read[1], g.bias = read[2];
  g.output = written[0], g.mean = written[1], g.invstd = written[2];
  Device device(aeup::group_norm_workspace(g));
  for (int i = 0; i < 3; ++i) device.reads(read[i], i ? of_channels(g) : bytes(g));
  for (int i = 0; i < 3; ++i) device.writes(written[i], i ? of_groups(g) : bytes(g));
  return answer(aeup::launch_group_norm(g, device.at, nullptr), device);
}
// read: input grad mean invstd weight bias; written: input_grad weight_grad bias_grad.
const char* aeup_emulate_group_norm_backward(const void* const* read, void* const* written, const int64_t* size,
                                             const int* how, const double* real) {
  aeup::GroupNorm g = describe(size, how, real);
  g.input = read[0], g.grad = read[1], g.mean = const_cast<void*>(read[2]), g.invstd = const_cast<void*>(read[3]);
  g.weight = read[4], g.bias = read[5];
  g.input_grad = written[0], g.weight_grad = written[1], g.bias_grad = written[2];
  Device device(aeup::group_norm_workspace(g));
  for (int i = 0; i < 6; ++i) device.reads(read[i], i < 2 ? bytes(g) : i < 4 ? of_groups(g) : of_channels(g));
  for (int i = 0; i < 3; ++i) device.writes(written[i], i ? of_channels(g) : bytes(g));
  return answer(aeup::launch_group_norm_backward(g, device.at, nullptr), device);
}
}
