// The family that serves every argument, layout and dtype.
#include "conv_generic.h"
#include "fold.h"

namespace aeup {
namespace {

const char* refuses(const Convolution&, Pass, int, int) { return nullptr; }

int64_t workspace(const Convolution& given, Pass pass) {
  Convolution c = given;
  const int64_t folded = fold_workspace(&c, pass);
  if (conv_direct_serves(c, pass)) return folded + conv_direct_workspace(c, pass);
  return folded + (pass == Pass::weight_gradient ? conv_weight_workspace(c) : conv_gemm_workspace(c, pass));
}

const char* launch(const Convolution& given, Pass pass, void* workspace, void* stream) {
  Convolution c = given;
  if (const char* error = fold_weight(&c, pass, &workspace, stream)) return error;
  if (conv_direct_serves(c, pass)) return launch_conv_direct(c, pass, workspace, stream);
  return pass == Pass::weight_gradient ? launch_conv_weight(c, workspace, stream)
                                       : launch_conv_gemm(c, pass, workspace, stream);
}

}  // namespace

const ConvolutionFamily kGenericConvolution = {"generic", refuses, workspace, launch};

}  // namespace aeup
