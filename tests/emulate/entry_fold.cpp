// ctypes entry points of the folded convolution (see emulator_fold.py).
#include "family.h"
#include "hopper_pack.h"

using namespace aeup;
using emulated::answer;
using emulated::bytes_of;
using emulated::Device;

namespace {
// size: n ci co ih iw groups, then kernel, scale and padding; how: pass dtype channels_last weight_channels_last tf32
// activation share.
Convolution describe(const int64_t* size, const int* how) {
  Convolution c{};
  c.n = size[0], c.ci = size[1], c.co = size[2], c.ih = size[3], c.iw = size[4], c.groups = int(size[5]);
  c.fold(size[6], size[7], size[8], size[9], size[10], size[11]);
  c.dtype = static_cast<DType>(how[1]);
  c.channels_last = how[2] != 0, c.weight_channels_last = how[3] != 0, c.tf32 = how[4] != 0;
  c.activation = static_cast<Activation>(how[5]);
  return c;
}
}  // namespace

extern "C" {
// Returns null, or what went wrong (family.h).
const char* aeup_emulate_upsample_conv(const char* family, const void* input, const void* weight, const void* bias,
                                       const void* grad, void* result, const int64_t* size, const int* how,
                                       double slope) {
  Convolution c = describe(size, how);
  c.slope = slope;
  c.input = input, c.weight = weight, c.bias = bias, c.grad = grad, c.result = result;
  const int64_t weights = c.co * (c.ci / c.groups) * c.fold_h.kernel * c.fold_w.kernel * bytes_of(c.dtype);
  return emulated::run_pass(c, static_cast<Pass>(how[0]), family, weights, how[6] != 0);
}

// Packs a weight for a Hopper family: 0 [taps, ci, co], 1 with the phases as columns, 2 float32 for the forward, 3 the
// same with phases, 4 for the input gradient. `folded`: the weight is the convolution's; else the transposed
// convolution's that it folds to.
const char* aeup_emulate_pack(int kind, bool strict, bool folded, const void* weight, void* result, int64_t bytes,
                              const int64_t* size, const int* how) {
  Convolution c = describe(size, how);
  c.weight = weight;
  if (c.ih == 1) c.sh = c.kh;  // as hopper_plan.h's normal()
  if (c.iw == 1) c.sw = c.kw;
  const int64_t e = bytes_of(c.dtype), pitch = round_up(kind == 4 ? c.co : c.ci, 32);
  Device device(0);
  if (folded) {
    device.reads(weight, c.co * c.ci * c.fold_h.kernel * c.fold_w.kernel * e);
  } else {
    c.fold_h = c.fold_w = Fold{};
    device.reads(weight, c.co * c.ci * c.kh * c.kw * e);
  }
  device.writes(result, bytes);
  if (const char* error = kind == 0   ? pack_weight(c, result, nullptr)
                          : kind == 1 ? pack_phases(c, result, nullptr)
                          : kind == 4 ? pack_float_gradient(c, result, pitch, strict, nullptr)
                                      : pack_float_forward(c, result, pitch, kind == 3, strict, nullptr))
    return answer(error);
  return device.all_stored();
}

// The fold of an axis: to[2 t] .. to[2 t + 1] are the kernel indices that folded tap t sums; then as many of the folded
// taps that hold a kernel index. sizes: number of folded taps, padding.
void aeup_fold_map(int64_t kernel, int64_t scale, int64_t padding, int* sizes, int* to) {
  const Fold f = fold_of(kernel, scale, padding);
  sizes[0] = f.taps(), sizes[1] = f.padding(int(padding));
  for (int t = 0; t < f.taps(); ++t, to += 2) to[0] = f.of_folded(t).first, to[1] = f.of_folded(t).last;
  for (int j = 0; j < kernel; ++j, to += 2) to[0] = f.of_kernel(j).first, to[1] = f.of_kernel(j).last;
}
}
