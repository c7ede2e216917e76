// ctypes entry points of the emulated CUDA kernels (see emulator.py).
#include "cuda_on_host.h"
#include "launch.h"

namespace {
std::string answer;
aeup::Problem problem(const void* src, void* dst, const int64_t* size, const double* scale, const int* how) {
  return {src,
          dst,
          size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          size[5],
          scale[0],
          scale[1],
          static_cast<aeup::Mode>(how[0]),
          static_cast<aeup::DType>(how[1]),
          how[2] != 0,
          how[3] != 0,
          how[4] != 0,
          how[5] != 0};
}
int64_t bytes_of(const aeup::Problem& p, bool input) {
  static const int element[] = {4, 8, 2, 2, 1};
  return p.n * p.c * (input ? p.ih * p.iw : p.oh * p.ow) * element[static_cast<int>(p.dtype)];
}
}  // namespace

extern "C" {
// size: n c ih iw oh ow; scale: h w; how: mode dtype align_corners antialias channels_last backward.
// Returns null, or what went wrong: an error of the launch, a bad access, or an element stored not exactly once.
const char* aeup_emulate(const void* src, void* dst, const int64_t* size, const double* scale, const int* how) {
  using namespace aeup;
  const Problem p = problem(src, dst, size, scale, how);
  const int64_t work = interpolate_cuda_workspace(p);
  std::vector<uint64_t> workspace(size_t(work + 15) / 8 + 2, ~0ull);
  void* const at = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
  std::vector<uint8_t> stores(size_t(bytes_of(p, p.backward)), 0);
  const char *s = static_cast<const char*>(src), *d = static_cast<const char*>(dst), *w = static_cast<const char*>(at);
  race::forget();
  emu::machine.buffers = {{s, s + bytes_of(p, !p.backward), false, nullptr},
                          {d, d + bytes_of(p, p.backward), true, &stores},
                          {w, w + work, true, nullptr}};
  if (const char* error = launch_interpolate_cuda(p, work ? at : nullptr, nullptr)) {
    answer = error;
    return answer.c_str();
  }
  for (size_t i = 0; i < stores.size(); ++i)
    if (stores[i] != 1) {
      answer = "byte " + std::to_string(i) + " of the result was not stored";
      return answer.c_str();
    }
  return nullptr;
}
// The last `blocks` blocks of every launch only, and no count of the stores: for tensors past 2^31 elements.
const char* aeup_emulate_end(const void* src, void* dst, const int64_t* size, const double* scale, const int* how,
                             int64_t blocks) {
  using namespace aeup;
  const Problem p = problem(src, dst, size, scale, how);
  if (interpolate_cuda_workspace(p)) return "this kernel needs a workspace";
  const char *s = static_cast<const char*>(src), *d = static_cast<const char*>(dst);
  race::forget();
  emu::machine.buffers = {{s, s + bytes_of(p, !p.backward), false, nullptr},
                          {d, d + bytes_of(p, p.backward), true, nullptr}};
  emu::machine.last_blocks = blocks;
  const char* error = launch_interpolate_cuda(p, nullptr, nullptr);
  emu::machine.last_blocks = -1;
  answer = error ? error : "";
  return error ? answer.c_str() : nullptr;
}
const char* aeup_kernel(const void* src, void* dst, const int64_t* size, const double* scale, const int* how) {
  return aeup::interpolate_cuda_kernel(problem(src, dst, size, scale, how));
}
const char* aeup_refusal(const void* src, void* dst, const int64_t* size, const double* scale, const int* how) {
  return aeup::interpolate_cuda_refusal(problem(src, dst, size, scale, how));
}
int64_t aeup_launches() { return aeup::emu::machine.launches; }
}
