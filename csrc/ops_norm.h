// What the operators of normalisation share (ops_batch_norm.cpp, ops_group_norm.cpp). `op` is the operator's name in
// messages. Dtypes are the shim's numbers.
#pragma once
#include "norm.h"
#include "ops_convolution.h"

namespace aeup {

using OptionalTensor = std::optional<Tensor>;

inline int32_t arithmetic(DType t) { return t == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(); }
inline void describe_norm(const char* op, AnyNorm* b, const Tensor& input, double eps, int64_t activation,
                          double slope) {
  check(op, input, "input", 4);
  b->dtype = float_dtype_of(op, input);
  b->activation = activation_of(op, activation);
  b->n = input.size(0), b->c = input.size(1), b->pixels = input.size(2) * input.size(3);
  b->channels_last = suggests_channels_last(input);
  b->eps = eps, b->slope = slope;
  if (input.numel() == 0) fail(op, "the input is empty");
}
// A tensor of `size` elements of `dtype` that the kernels may read and write as it lies.
inline void* values_of(const char* op, int64_t size, const Tensor& input, const Tensor& x, int32_t dtype,
                       const char* name) {
  if (x.dim() != 1 || x.size(0) != size)
    fail(op, std::string(name) + " must have " + std::to_string(size) + " elements");
  if (dtype_code(x) != dtype) fail(op, std::string(name) + " has another dtype");
  if (!same_device(x, input)) fail(op, std::string(name) + " is on another device");
  if (size > 1 && x.stride(0) != 1) fail(op, std::string(name) + " must be contiguous");
  return const_cast<void*>(x.const_data_ptr());
}
// The dtype of the parameters, one for all: the input's or that of the arithmetic.
inline int32_t set_narrow(AnyNorm* b, const Tensor& input, const OptionalTensor& one, const OptionalTensor& other) {
  const OptionalTensor& first = one ? one : other;
  const int32_t code = dtype_code(input), own = arithmetic(b->dtype);
  b->narrow = first && dtype_code(*first) == code && code != own;
  return b->narrow ? code : own;
}
inline Tensor empty_values(const Tensor& input, int64_t size, int32_t dtype) {
  return empty_like(input, {size}, false, dtype);
}
struct OnDevice {  // of the input, for the length of a call
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const Tensor& input) {
    if (!input.is_cpu()) guard.emplace(input.get_device_index());
  }
};
// The gradients of input, weight and bias; what is not wanted is an empty tensor. One tensor each: results of an
// operator may not share memory.
struct NormGradients {
  Tensor input, weight, bias;
  NormGradients(AnyNorm* b, const Tensor& x, int32_t dtype, bool want_input, bool want_weight, bool want_bias)
      : input(empty_like(x, want_input ? x.sizes() : Sizes({0}), want_input && b->channels_last)),
        weight(empty_values(x, want_weight ? b->c : 0, dtype)),
        bias(empty_values(x, want_bias ? b->c : 0, dtype)) {
    b->input_grad = want_input ? input.mutable_data_ptr() : nullptr;
    b->weight_grad = want_weight ? weight.mutable_data_ptr() : nullptr;
    b->bias_grad = want_bias ? bias.mutable_data_ptr() : nullptr;
  }
};
#ifdef AEUP_WITH_CUDA
template <class Launch>
void run_norm(const char* op, const Tensor& input, int64_t workspace_bytes, Launch launch) {
  void* const stream = current_stream(op, input);
  const Workspace workspace(input, workspace_bytes);
  if (const char* error = launch(workspace.data, stream)) fail(op, std::string("CUDA kernel: ") + error);
}
#endif

}  // namespace aeup
