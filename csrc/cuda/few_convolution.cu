// The family for 1 to 4 output channels: which calls it takes.
#include "few.h"
#include "fold.h"

namespace aeup {
namespace {

const char* refuses(const Convolution& c, Pass pass, int major, int minor) {
  if (major < 8) return "needs compute capability 8.0";
  if (c.dtype == DType::f64) return "float64";
  if (c.co > 4) return "more than 4 output channels";
  if (c.groups != 1) return "groups";
  if (c.sh != 2 || c.sw != 2 || c.dh != 1 || c.dw != 1) return "a stride other than 2, or a dilation";
  if (c.ph > 1 || c.pw > 1 || c.kh > 3 + c.ph || c.kw > 3 + c.pw || c.oh > 2 * c.ih + 1 || c.ow > 2 * c.iw + 1)
    return "a kernel outside of the window of 4 taps from padding 1";
  if (c.ow > (1 << 28) || c.ci > (1 << 28)) return "too wide";
  const int64_t shared = pass == Pass::forward          ? few_forward_shared(c)
                         : pass == Pass::input_gradient ? few_input_gradient_shared(c)
                                                        : few_weight_gradient_shared(c);
  const int64_t most = major == 8 && minor == 0 ? 163 : major == 9 || major == 10 ? 227 : 99;  // KiB of a block
  return shared > most << 10 ? "too many input channels for shared memory" : nullptr;
}
int64_t workspace(const Convolution& given, Pass pass) {
  Convolution c = given;
  return fold_workspace(&c, pass) + (pass == Pass::weight_gradient ? few_weight_gradient_workspace(c) : 0);
}
const char* launch(const Convolution& given, Pass pass, void* workspace, void* stream) {
  Convolution c = given;
  if (const char* error = fold_weight(&c, pass, &workspace, stream)) return error;
  switch (pass) {
    case Pass::forward: return launch_few_forward(c, stream);
    case Pass::input_gradient: return launch_few_input_gradient(c, stream);
    default: return launch_few_weight_gradient(c, workspace, stream);
  }
}

}  // namespace

const ConvolutionFamily kFewConvolution = {"few", refuses, workspace, launch};

}  // namespace aeup
