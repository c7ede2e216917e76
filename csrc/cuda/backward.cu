// Which fast backward kernel serves a problem.
#include "backward.cuh"

namespace aeup {
namespace back {
namespace {

// What all families need.
const char* refuses_all(const Problem& p) {
  if (p.antialias) return "the fast backward kernels have no antialias";
  if (p.dtype != DType::f32 && p.dtype != DType::f16 && p.dtype != DType::bf16)
    return "the fast backward kernels serve float32, float16 and bfloat16: their accumulators are float32 registers";
  if (p.oh < p.ih || p.ow < p.iw) return "the fast backward kernels serve enlargement";
  if (p.oh > kMaxSide || p.ow > kMaxSide) return "an image side is longer than 2^20 pixels";
  if (p.ow * pixel_of(p) >= 1 << 30) return "a row has 2^30 elements or more";
  for (const bool vertical : {true, false}) {
    const Map m = make_map(p, vertical);
    // The output does not reach beyond the input, and an input pixel not over more than 64 outputs.
    if (!(m.axis.scale > 0)) return "an axis has scale 0";
    if (m.per > 64) return "the scale is more than 64";
    if (double(m.axis.scale) * (m.out - (m.axis.align_corners ? 1 : 0)) > m.in + 0.5)
      return "the scale factor given does not match the sizes";
  }
  return nullptr;
}

struct Family {
  const char* name;
  const char* (*refuses)(const Problem&);
  const char* (*launch)(const Problem&, void*);
};
const char* refuses_stream_nchw(const Problem& p) {
  return pixel_of(p) == 1 ? refuses_stream(p) : "it needs one element per pixel";
}
const char* refuses_stream_nhwc(const Problem& p) {
  return pixel_of(p) > 1 ? refuses_stream(p) : "it needs more than one element per pixel";
}
// In the order of preference.
const Family kFamilies[] = {{"backward_row_x2", refuses_row_x2, launch_row_x2},
                            {"backward_pair_x2", refuses_pair_x2, launch_pair_x2},
                            {"backward_matrix", refuses_matrix, launch_matrix},
                            {"backward_window", refuses_window, launch_window},
                            {"backward_stream_nchw", refuses_stream_nchw, launch_stream_nchw},
                            {"backward_stream_nhwc", refuses_stream_nhwc, launch_stream_nhwc}};

// Equal sizes are a copy in every mode, as in torch: nearest's single tap keeps an Inf in its place.
Problem simplified(Problem p) {
  if (p.oh == p.ih && p.ow == p.iw) p.mode = Mode::nearest, p.align_corners = false;
  return p;
}
const Family* family_of(const Problem& p, const char** why_not) {
  *why_not = refuses_all(p);
  if (*why_not) return nullptr;
  for (const Family& f : kFamilies) {
    *why_not = f.refuses(p);
    if (!*why_not) return &f;
  }
  return nullptr;
}

}  // namespace
}  // namespace back

namespace cuda {

const char* backward_fast_kernel(const Problem& p, const char** why_not) {
  const back::Family* f = back::family_of(back::simplified(p), why_not);
  return f ? f->name : nullptr;
}

const char* launch_backward_fast(const Problem& p, void* stream) {
  if (p.n == 0 || p.c == 0) return nullptr;
  const char* why_not = nullptr;
  const Problem q = back::simplified(p);
  const back::Family* f = back::family_of(q, &why_not);
  return f ? f->launch(q, stream) : why_not;
}

}  // namespace cuda
}  // namespace aeup

#ifdef AEUP_EMULATE
// Tests: threads of a launch; 0 restores the real limit.
extern "C" void aeup_backward_limit(int64_t threads) { aeup::back::max_threads = threads ? threads : 0x7fffffff; }
#endif
