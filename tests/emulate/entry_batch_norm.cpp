// ctypes entry points of the emulated batch normalisation (see emulator_batch_norm.py).
#include "batch_norm.h"
#include "device.h"

using emulated::bytes_of;
using emulated::Device;
using emulated::reply;

namespace {
// size: n c pixels blocks; how: dtype channels_last training activation narrow; real: slope momentum eps.
aeup::BatchNorm describe(const int64_t* size, const int* how, const double* real) {
  aeup::BatchNorm b{};
  b.n = size[0], b.c = size[1], b.pixels = size[2], b.blocks = int(size[3]);
  b.dtype = static_cast<aeup::DType>(how[0]), b.channels_last = how[1] != 0, b.training = how[2] != 0;
  b.activation = static_cast<aeup::Activation>(how[3]), b.narrow = how[4] != 0;
  b.slope = real[0], b.momentum = real[1], b.eps = real[2];
  return b;
}
int64_t bytes(const aeup::BatchNorm& b) { return b.n * b.c * b.pixels * bytes_of(b.dtype); }
int64_t wide_bytes(const aeup::BatchNorm& b) { return b.c * (b.dtype == aeup::DType::f64 ? 8 : 4); }
int64_t channel_bytes(const aeup::BatchNorm& b) { return b.narrow ? b.c * bytes_of(b.dtype) : wide_bytes(b); }
const char* answer(const char* error, const Device& device) {
  if (!error) return device.all_stored();
  reply = error;
  return reply.c_str();
}
}  // namespace

extern "C" {
// read: input weight bias running_mean running_var counter; written: output mean invstd next_mean next_var
// next_counter. Return null, or what went wrong.
const char* aeup_emulate_batch_norm(const void* const* read, void* const* written, const int64_t* size, const int* how,
                                    const double* real) {
  aeup::BatchNorm b = describe(size, how, real);
  b.input = read[0], b.weight = read[1], b.bias = read[2], b.running_mean = read[3], b.running_var = read[4];
  b.counter = static_cast<const int64_t*>(read[5]);
  b.output = written[0], b.mean = written[1], b.invstd = written[2], b.next_mean = written[3], b.next_var = written[4];
  b.next_counter = static_cast<int64_t*>(written[5]);
  const int64_t each = channel_bytes(b), of_read[6] = {bytes(b), each, each, each, each, 8};
  const int64_t of_written[6] = {bytes(b), wide_bytes(b), wide_bytes(b), each, each, 8};
  Device device(aeup::batch_norm_workspace(b));
  device.stores.reserve(6);
  for (int i = 0; i < 6; ++i) device.reads(read[i], of_read[i]), device.writes(written[i], of_written[i]);
  return answer(aeup::launch_batch_norm(b, device.at, nullptr), device);
}
// read: input grad mean invstd weight bias; written: input_grad weight_grad bias_grad.
const char* aeup_emulate_batch_norm_backward(const void* const* read, void* const* written, const int64_t* size,
                                             const int* how, const double* real) {
  aeup::BatchNorm b = describe(size, how, real);
  b.input = read[0], b.grad = read[1], b.mean = const_cast<void*>(read[2]), b.invstd = const_cast<void*>(read[3]);
  b.weight = read[4], b.bias = read[5];
  b.input_grad = written[0], b.weight_grad = written[1], b.bias_grad = written[2];
  Device device(aeup::batch_norm_workspace(b));
  for (int i = 0; i < 6; ++i) device.reads(read[i], i < 2 ? bytes(b) : i < 4 ? wide_bytes(b) : channel_bytes(b));
  for (int i = 0; i < 3; ++i) device.writes(written[i], i ? channel_bytes(b) : bytes(b));
  return answer(aeup::launch_batch_norm_backward(b, device.at, nullptr), device);
}
}
