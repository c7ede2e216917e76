// The compiled operators: torch.ops.aeup_native.*. They are kernels without autograd; aeup/ops builds the public
// operators on them. LibTorch stable ABI only, so that one binary serves every torch from 2.10.
#include <string>
#include <vector>

#include "cpu/plan.h"
#include "tensors.h"
#ifdef AEUP_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace {

using aeup::dense;
using aeup::suggests_channels_last;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) { aeup::fail("aeup.interpolate", message); }

aeup::DType dtype_of(const Tensor& x) {
  const auto dtype = aeup::dtype_of(x);
  if (!dtype) fail("unsupported dtype; float64, float32, float16, bfloat16 and uint8 (forward) are served");
  return *dtype;
}

// The sizes are those of the forward map; backward takes the gradient of the output as `src`.
aeup::Problem describe(const Tensor& src, int64_t ih, int64_t iw, int64_t oh, int64_t ow, int64_t mode,
                       bool align_corners, bool antialias, double scale_h, double scale_w, bool backward) {
  if (src.dim() != 4) fail("input must have 4 dimensions, got " + std::to_string(src.dim()));
  const int64_t h = backward ? oh : ih, w = backward ? ow : iw;
  if (src.size(2) != h || src.size(3) != w) fail("spatial size of the tensor and of the map differ");
  if (ih < 1 || iw < 1 || oh < 1 || ow < 1) fail("spatial sizes must be at least 1");
  for (const int64_t size : {ih, iw, oh, ow}) {
    if (size >= aeup::kMaxAxis) fail("spatial sizes must be below 2^30, got " + std::to_string(size));
  }
  if (mode < 0 || mode > 3) fail("mode must be 0 to 3, got " + std::to_string(mode));
  aeup::Problem p{};
  p.n = src.size(0);
  p.c = src.size(1);
  p.ih = ih;
  p.iw = iw;
  p.oh = oh;
  p.ow = ow;
  p.scale_h = scale_h;
  p.scale_w = scale_w;
  p.mode = static_cast<aeup::Mode>(mode);
  p.dtype = dtype_of(src);
  p.align_corners = align_corners;
  p.antialias = antialias;
  p.channels_last = suggests_channels_last(src);
  p.backward = backward;
  if (backward && p.dtype == aeup::DType::u8) fail("uint8 has no gradient");
  return p;
}

template <class Launch>
Tensor interpolate(const Tensor& given, aeup::Problem p, const Launch& launch) {
  const Tensor src = dense(given, p.channels_last);
  Tensor dst = aeup::empty_like(src, {p.n, p.c, p.backward ? p.ih : p.oh, p.backward ? p.iw : p.ow}, p.channels_last);
  if (dst.numel() == 0) return dst;
  p.src = src.const_data_ptr();
  p.dst = dst.mutable_data_ptr();
  launch(p, src);
  return dst;
}

struct Kept {
  aeup::Problem p;
  aeup::Shape src;
};
aeup::Keep<Kept> kept;

// Keeps the description of a call for interpolate_planned, under a number or -1.
int64_t interpolate_plan(const Tensor& src, int64_t ih, int64_t iw, int64_t oh, int64_t ow, int64_t mode,
                         bool align_corners, bool antialias, double scale_h, double scale_w, bool backward) {
  const auto p = describe(src, ih, iw, oh, ow, mode, align_corners, antialias, scale_h, scale_w, backward);
  return kept.add({p, aeup::Shape(src)});
}
const aeup::Problem& planned(const Tensor& src, int64_t number) {
  const Kept* plan = kept.find(number);
  if (!plan) fail("there is no plan " + std::to_string(number));
  if (src.dim() != 4 || !(aeup::Shape(src) == plan->src))
    fail("the tensor is not that of plan " + std::to_string(number));
  return plan->p;
}

Tensor run_cpu(const Tensor& src, const aeup::Problem& p) {
  return interpolate(src, p, [](const aeup::Problem& q, const Tensor&) {
    aeup::interpolate_cpu(q, torch::stable::get_num_threads(), aeup::torch_parallel);
  });
}
Tensor interpolate_cpu(const Tensor& src, int64_t ih, int64_t iw, int64_t oh, int64_t ow, int64_t mode,
                       bool align_corners, bool antialias, double scale_h, double scale_w, bool backward) {
  return run_cpu(src, describe(src, ih, iw, oh, ow, mode, align_corners, antialias, scale_h, scale_w, backward));
}
Tensor interpolate_planned_cpu(const Tensor& src, int64_t number) { return run_cpu(src, planned(src, number)); }

#ifdef AEUP_WITH_CUDA
Tensor run_cuda(const Tensor& src, const aeup::Problem& p) {
  const torch::stable::accelerator::DeviceGuard guard(src.get_device_index());
  return interpolate(src, p, [](const aeup::Problem& q, const Tensor& x) {
    void* const stream = aeup::current_stream("aeup.interpolate", x);
    const aeup::Workspace workspace(x, aeup::interpolate_cuda_workspace(q));
    const char* error = aeup::launch_interpolate_cuda(q, workspace.data, stream);
    if (error) fail(std::string("CUDA kernel: ") + error);
  });
}
Tensor interpolate_cuda(const Tensor& src, int64_t ih, int64_t iw, int64_t oh, int64_t ow, int64_t mode,
                        bool align_corners, bool antialias, double scale_h, double scale_w, bool backward) {
  return run_cuda(src, describe(src, ih, iw, oh, ow, mode, align_corners, antialias, scale_h, scale_w, backward));
}
Tensor interpolate_planned_cuda(const Tensor& src, int64_t number) { return run_cuda(src, planned(src, number)); }
#endif

// Which kernel would serve, for aeup.explain; `src` is a meta tensor with the sizes and strides.
std::string kernel_name(const Tensor& src, int64_t ih, int64_t iw, int64_t oh, int64_t ow, int64_t mode,
                        bool align_corners, bool antialias, double scale_h, double scale_w, bool backward, bool cuda) {
  const auto p = describe(src, ih, iw, oh, ow, mode, align_corners, antialias, scale_h, scale_w, backward);
  if (cuda) {
#ifdef AEUP_WITH_CUDA
    const char *name = aeup::interpolate_cuda_kernel(p), *why_not_fast = aeup::interpolate_cuda_refusal(p);
    if (!name) fail(why_not_fast ? why_not_fast : "no CUDA kernel serves this call");
    return why_not_fast ? std::string(name) + ": " + why_not_fast : name;
#else
    fail("built without CUDA");
#endif
  }
  return std::string("banded, ") + aeup::cpu_instruction_set();
}

STABLE_TORCH_LIBRARY(aeup_native, m) {
  m.def(
      "interpolate(Tensor src, int ih, int iw, int oh, int ow, int mode, bool align_corners, bool antialias, "
      "float scale_h, float scale_w, bool backward) -> Tensor");
  m.def(
      "interpolate_plan(Tensor src, int ih, int iw, int oh, int ow, int mode, bool align_corners, bool antialias, "
      "float scale_h, float scale_w, bool backward) -> int");
  m.def("interpolate_planned(Tensor src, int number) -> Tensor");
  m.def(
      "interpolate_kernel(Tensor src, int ih, int iw, int oh, int ow, int mode, bool align_corners, bool antialias, "
      "float scale_h, float scale_w, bool backward, bool cuda) -> str");
  m.def("cpu_instruction_set() -> str");
  m.def("fill_new_memory(bool on) -> bool");
}

std::string instruction_set() { return aeup::cpu_instruction_set(); }
bool fill_new_memory(bool on) { return aeup::fill_new_memory.exchange(on); }

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cpu));
  m.impl("interpolate_planned", TORCH_BOX(&interpolate_planned_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CompositeExplicitAutograd, m) {
  m.impl("interpolate_kernel", TORCH_BOX(&kernel_name));
  m.impl("interpolate_plan", TORCH_BOX(&interpolate_plan));
  m.impl("cpu_instruction_set", TORCH_BOX(&instruction_set));
  m.impl("fill_new_memory", TORCH_BOX(&fill_new_memory));
}

#ifdef AEUP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(aeup_native, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cuda));
  m.impl("interpolate_planned", TORCH_BOX(&interpolate_planned_cuda));
}
#endif

}  // namespace
