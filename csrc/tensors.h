// What the operators of ops*.cpp need to know of tensors: memory formats, dtypes, the current stream. LibTorch stable
// ABI only, so that one binary serves every torch from 2.10.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "resample.h"

#ifdef AEUP_WITH_CUDA
// Weak: a torch without CUDA does not have it, and never calls a CUDA operator.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace aeup {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // borrowed
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const std::string& message) {
  throw std::runtime_error(std::string(op) + ": " + message);
}

// TensorImpl::compute_strides_like_channels_last: torch's suggest_memory_format of a 4-D tensor.
inline bool suggests_channels_last(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  if (stride[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (size[d] == 0 || stride[d] < least || (d == 0 && least == stride[1])) return false;
    least = stride[d];
    if (size[d] > 1) least *= size[d];
  }
  return true;
}

// Strides of dimensions of size 1 do not matter.
inline bool is_dense(const Tensor& x, bool channels_last) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  const int nchw[4] = {3, 2, 1, 0}, nhwc[4] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (int i = 0; i < 4; ++i) {
    const int d = channels_last ? nhwc[i] : nchw[i];
    if (size[d] != 1 && stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}
inline Tensor dense(const Tensor& x, bool channels_last) {
  return is_dense(x, channels_last) ? x : torch::stable::contiguous(x, format_of(channels_last));
}
inline Tensor dense(const Tensor& x) {  // of one dimension
  return x.size(0) <= 1 || x.stride(0) == 1 ? x : torch::stable::contiguous(x);
}

// The dtype as the shim's number, which the shim tells at once: a ScalarType takes up to 20 calls.
inline int32_t dtype_code(const Tensor& x) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}
inline int32_t device_type(const Tensor& x) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  return type;
}
inline bool same_device(const Tensor& x, const Tensor& y) {
  return device_type(x) == device_type(y) && x.get_device_index() == y.get_device_index();
}

struct Shape {  // of a tensor of 4 dimensions
  int64_t size[4], stride[4];
  int32_t dtype, device;
  explicit Shape(const Tensor& x) : dtype(dtype_code(x)), device(x.get_device_index()) {
    const Sizes sizes = x.sizes(), strides = x.strides();
    std::copy(sizes.begin(), sizes.end(), size), std::copy(strides.begin(), strides.end(), stride);
  }
  bool operator==(const Shape& other) const {
    return std::equal(size, size + 4, other.size) && std::equal(stride, stride + 4, other.stride) &&
           dtype == other.dtype && device == other.device;
  }
};

// Descriptions of calls, by number. Later calls name theirs: each argument of an operator takes long on its way here.
template <class T>
class Keep {
 public:
  int64_t add(T value) {  // -1 where no more are kept
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_.size() == size_t(1) << 16) return -1;
    kept_.push_back(std::move(value));
    return int64_t(kept_.size()) - 1;
  }
  const T* find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return number >= 0 && number < int64_t(kept_.size()) ? &kept_[size_t(number)] : nullptr;
  }

 private:
  std::mutex mutex_;
  std::deque<T> kept_;  // an element stays where it is
};

// Outputs above malloc's largest mmap threshold (glibc) come from fresh pages every time, and touching those 4 KB at a
// time costs more than the resampling itself.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kPage = 4096, kLarge = 32 << 20;
  if (bytes < kLarge) return;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: refusal changes nothing
#endif
}
// Whether new results on a CPU are filled with ones, NaN in every float format: what a kernel leaves unwritten shows.
// For tests. torch's deterministic mode, which fills what torch itself allocates, costs a pass over each result.
inline std::atomic<bool> fill_new_memory{false};

// The shim's own function, not torch::stable::empty, which looks the operator up by its name in every call.
inline Tensor empty_strided(const Tensor& like, Sizes size, const int64_t* strides, int32_t dtype) {
  const int32_t type = device_type(like);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides, dtype, type,
                                                         like.get_device_index(), &handle));
  Tensor made(handle);
  if (type == aoti_torch_device_type_cpu()) {
    const int64_t bytes = made.numel() * int64_t(made.element_size());
    prefer_huge_pages(made.mutable_data_ptr(), bytes);
    if (fill_new_memory && bytes > 0) std::memset(made.mutable_data_ptr(), 0xFF, size_t(bytes));
  }
  return made;
}
// An uninitialised tensor, of x's dtype unless another one is given.
inline Tensor empty_like(const Tensor& x, Sizes size, bool channels_last, std::optional<int32_t> dtype = {}) {
  int64_t strides[4];
  const int rank = int(size.size());
  const int nchw[4] = {rank - 1, rank - 2, rank - 3, rank - 4}, nhwc[4] = {1, 3, 2, 0};
  int64_t stride = 1;
  for (int i = 0; i < rank; ++i) {
    const int d = channels_last ? nhwc[i] : nchw[i];
    strides[d] = stride, stride *= channels_last || size[d] > 0 ? size[d] : 1;
  }
  return empty_strided(x, size, strides, dtype ? *dtype : dtype_code(x));
}

inline std::optional<DType> dtype_of(const Tensor& x) {
  const int32_t code = dtype_code(x);
  if (code == aoti_torch_dtype_float32()) return DType::f32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (code == aoti_torch_dtype_float16()) return DType::f16;
  if (code == aoti_torch_dtype_float64()) return DType::f64;
  if (code == aoti_torch_dtype_uint8()) return DType::u8;
  return std::nullopt;
}

inline void torch_parallel(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

#ifdef AEUP_WITH_CUDA
inline void* current_stream(const char* op, const Tensor& x) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream) fail(op, "this torch has no CUDA");
  if (aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) != 0) fail(op, "no current CUDA stream");
  return stream;
}
// Device memory for the length of a call: torch's allocator keeps it in the order of the stream.
struct Workspace {
  std::optional<Tensor> memory;
  void* data = nullptr;
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes <= 0) return;
    memory = empty_like(like, {bytes}, false, aoti_torch_dtype_uint8());
    data = memory->mutable_data_ptr();
  }
};
#endif

}  // namespace aeup
