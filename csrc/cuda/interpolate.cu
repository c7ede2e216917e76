// Which kernel serves a problem: the fast ones of its direction, else the generic ones.
#include "backward.h"
#include "families.h"
#include "launch.h"

namespace aeup {
namespace {

// Why no CUDA kernel serves p; nullptr where one does.
const char* refuses_all(const Problem& p) {
  if (p.n < 0 || p.c < 0 || p.ih < 0 || p.iw < 0 || p.oh < 0 || p.ow < 0) return "a size is negative";
  if (p.ih >= kMaxAxis || p.iw >= kMaxAxis || p.oh >= kMaxAxis || p.ow >= kMaxAxis)
    return "an image side is 2^30 pixels or longer";
  const bool nearest = p.mode == Mode::nearest || p.mode == Mode::nearest_exact;
  if (p.antialias && nearest) return "antialias needs mode bilinear or bicubic";
  if (p.dtype == DType::u8 && (!nearest || p.backward))
    return "uint8 has only the forward of nearest and nearest-exact";
  return nullptr;
}
bool empty(const Problem& p) {
  return p.n == 0 || p.c == 0 || (p.backward ? p.ih == 0 || p.iw == 0 : p.oh == 0 || p.ow == 0);
}
const char* lacks_source(const Problem& p) {
  const bool none = p.backward ? p.oh == 0 || p.ow == 0 : p.ih == 0 || p.iw == 0;
  return none ? "the source has no pixels" : nullptr;
}

}  // namespace

const char* interpolate_cuda_refusal(const Problem& p) {
  if (const char* why = refuses_all(p)) return why;
  if (!p.backward) return refuses_forward_fast(p);
  const char* why = nullptr;
  return cuda::backward_fast_kernel(p, &why) ? nullptr : why;
}

const char* interpolate_cuda_kernel(const Problem& p) {
  if (refuses_all(p)) return nullptr;
  if (empty(p)) return "none";
  if (lacks_source(p)) return nullptr;
  if (interpolate_cuda_refusal(p)) return generic_kernel(p);
  const char* why = nullptr;
  return p.backward ? cuda::backward_fast_kernel(p, &why) : forward_fast_kernel(p);
}

int64_t interpolate_cuda_workspace(const Problem& p) {
  if (refuses_all(p) || empty(p) || lacks_source(p) || !interpolate_cuda_refusal(p)) return 0;
  return generic_workspace(p);
}

const char* launch_interpolate_cuda(const Problem& p, void* workspace, void* stream) {
  if (const char* why = refuses_all(p)) return why;
  if (empty(p)) return nullptr;
  if (const char* why = lacks_source(p)) return why;
  if (interpolate_cuda_refusal(p)) return launch_generic(p, workspace, stream);
  return p.backward ? cuda::launch_backward_fast(p, stream) : launch_forward_fast(p, stream);
}

}  // namespace aeup
