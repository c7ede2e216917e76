// Which kernel serves resampling and convolution.
#include "resample_conv_families.h"
#include "resample_conv_weight.cuh"

namespace aeup {
namespace {

// A product on tensor cores takes 8 or 16 channels: groups of a few waste most of it.
bool direct(const ResampleConv& c) {
  return c.dtype == DType::f64 || (c.groups > 1 && c.ci / c.groups < 8 && c.co / c.groups < 8);
}

template <class Q>
int64_t gemm_shared(const ResampleConv& c, bool forward) {
  const int64_t operands = operand_bytes<Q>(map_of<typename Q::T>(c, !forward, Q::kHeight));
  if (forward) return max(operands, int64_t(stage_bytes<Q>(c.channels_last)));
  return max(operands, int64_t(stage_bytes<Q>(true))) + 4 * Q::kColumns;  // one input pixel at least
}
template <class T, bool kSplit>
int64_t gemm_shared(const ResampleConv& c, Pass pass) {
  const auto of = [&](auto q) { return gemm_shared<decltype(q)>(c, pass == Pass::forward); };
  return pass == Pass::forward ? with_gemm_tile<T, kSplit, true>(c.co / c.groups, of)
                               : with_gemm_tile<T, kSplit, false>(c.ci / c.groups, of);
}
// Bytes of shared memory that a block needs.
int64_t shared_bytes(const ResampleConv& c, Pass pass) {
  const bool half = c.dtype != DType::f32;
  if (pass == Pass::weight_gradient) return half ? weight_shared<Half>(c) : weight_shared<float>(c);
  if (half) return gemm_shared<Half, false>(c, pass);
  return c.tf32 ? gemm_shared<float, false>(c, pass) : gemm_shared<float, true>(c, pass);
}

}  // namespace

const char* refuses_resample_conv(const ResampleConv& c, Pass pass, int major, int minor) {
  if (c.kh > kMaxKernel || c.kw > kMaxKernel) return "the kernel is larger than 7 pixels";
  for (const int64_t side : {c.ih, c.iw, c.uh, c.uw, c.oh, c.ow})
    if (side >= kMaxSide) return "an image side is 2^22 pixels or longer";
  if (c.dtype == DType::u8) return "uint8 is not served";
  if (direct(c)) return nullptr;
  if (major < 8) return "the GPU's compute capability is below 8.0";
  if (shared_bytes(c, pass) > shared_limit(major, minor))
    return "a tile and the window of the input that it reads do not fit the GPU's shared memory";
  return nullptr;
}

const char* resample_conv_label(const ResampleConv& c, Pass) {
  if (direct(c)) return "resample_conv, direct";
  if (c.dtype != DType::f32) return "resample_conv, tensor cores";
  return c.tf32 ? "resample_conv, tensor cores (tf32)" : "resample_conv, tensor cores (three tf32 products)";
}

int64_t resample_conv_workspace(const ResampleConv& c, Pass pass) {
  if (direct(c)) return resample_direct_workspace(c, pass);
  if (pass == Pass::weight_gradient) return weight_ranges(c).splits * weight_partial_bytes(c);
  return packs_weight(c, pass) ? packed_bytes(c, pass) : 0;
}

const char* launch_resample_conv(const ResampleConv& c, Pass pass, void* workspace, void* stream) {
  if (direct(c)) return launch_resample_direct(c, pass, workspace, stream);
  const bool half = c.dtype != DType::f32;
  if (pass == Pass::weight_gradient)
    return half ? launch_resample_weight_half(c, workspace, stream)
                : launch_resample_weight_float(c, workspace, stream);
  if (packs_weight(c, pass))
    if (const char* error = launch_pack_weight(c, pass, workspace, stream)) return error;
  if (pass == Pass::forward)
    return half ? launch_resample_forward_half(c, workspace, stream)
                : launch_resample_forward_float(c, workspace, stream);
  return half ? launch_resample_input_half(c, workspace, stream) : launch_resample_input_float(c, workspace, stream);
}

}  // namespace aeup
