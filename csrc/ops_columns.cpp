// The compiled operators torch.ops.aeup_native.{to,from}_columns: a convolution's taps as a matrix, on the CPU;
// aeup/ops/conv_columns.py multiplies with it.
#include <array>

#include "cpu/columns.h"
#include "ops_convolution.h"

namespace {

using torch::stable::Tensor;

constexpr const char* kName = "aeup: columns of a convolution";

aeup::Taps describe(const Tensor& x, int64_t ih, int64_t iw, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph,
                    int64_t pw, int64_t dh, int64_t dw, bool channels_last) {
  aeup::Taps t{};
  t.dtype = aeup::float_dtype_of(kName, x);
  if (t.dtype != aeup::DType::f32 && t.dtype != aeup::DType::bf16) aeup::fail(kName, "float32 and bfloat16 are served");
  for (const int64_t size : {ih, iw, kh, kw, sh, sw, dh, dw}) {
    if (size < 1) aeup::fail(kName, "sizes, strides and dilations must be at least 1");
  }
  t.ih = ih, t.iw = iw, t.kh = kh, t.kw = kw, t.sh = sh, t.sw = sw, t.ph = ph, t.pw = pw, t.dh = dh, t.dw = dw;
  t.channels_last = channels_last;
  return t;
}

// image [n, c, h, w] -> [c * kh * kw, n * ih * iw], or [n * ih * iw, kh * kw * c] with channels_last.
Tensor to_columns(const Tensor& given, int64_t ih, int64_t iw, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                  int64_t ph, int64_t pw, int64_t dh, int64_t dw, bool channels_last) {
  aeup::check(kName, given, "the image", 4);
  aeup::Taps t = describe(given, ih, iw, kh, kw, sh, sw, ph, pw, dh, dw, channels_last);
  const Tensor image = aeup::dense(given, channels_last);
  t.n = image.size(0), t.c = image.size(1), t.h = image.size(2), t.w = image.size(3);
  const int64_t taps = t.c * kh * kw, pixels = t.n * ih * iw;
  const std::array<int64_t, 2> size = channels_last ? std::array{pixels, taps} : std::array{taps, pixels};
  Tensor columns = aeup::empty_like(image, aeup::Sizes(size.data(), 2), false);
  if (columns.numel() == 0) return columns;
  t.image = const_cast<void*>(image.const_data_ptr()), t.columns = columns.mutable_data_ptr();
  aeup::to_columns_cpu(t, aeup::torch_parallel);
  return columns;
}

// The other way, sums and bias [c]: columns as above -> images [first, first + n) of `image` [at least that, c, h, w].
void from_columns(const Tensor& image, const Tensor& given, const std::optional<Tensor>& bias, int64_t first, int64_t n,
                  int64_t ih, int64_t iw, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                  int64_t dh, int64_t dw, bool channels_last) {
  aeup::check(kName, image, "the image", 4);
  aeup::check(kName, given, "the matrix", 2);
  aeup::same_kind(kName, given, image, "the matrix");
  aeup::Taps t = describe(given, ih, iw, kh, kw, sh, sw, ph, pw, dh, dw, channels_last);
  if (n < 0 || first < 0 || first > image.size(0) - n) aeup::fail(kName, "there are no such images");
  t.n = n, t.c = image.size(1), t.h = image.size(2), t.w = image.size(3);
  const int64_t taps = t.c * kh * kw, pixels = n * ih * iw;
  if (given.size(0) != (channels_last ? pixels : taps) || given.size(1) != (channels_last ? taps : pixels))
    aeup::fail(kName, "the matrix is not that of the images");
  const int64_t before = first * t.c * t.h * t.w;
  if (n * t.c * t.h * t.w == 0) return;
  if (!aeup::is_dense(image, channels_last)) aeup::fail(kName, "the image is not dense in its layout");
  const Tensor columns = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const auto added = aeup::bias_of(kName, bias, columns, t.c);
  t.columns = const_cast<void*>(columns.const_data_ptr());
  t.image = static_cast<char*>(image.mutable_data_ptr()) + before * image.element_size();
  t.bias = added ? added->const_data_ptr() : nullptr;
  aeup::from_columns_cpu(t, aeup::torch_parallel);
}

STABLE_TORCH_LIBRARY_FRAGMENT(aeup_native, m) {
  m.def(
      "to_columns(Tensor image, int ih, int iw, int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw, bool "
      "channels_last) -> Tensor");
  m.def(
      "from_columns(Tensor(a!) image, Tensor columns, Tensor? bias, int first, int n, int ih, int iw, int kh, int kw, "
      "int sh, int sw, int ph, int pw, int dh, int dw, bool channels_last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aeup_native, CPU, m) {
  m.impl("to_columns", TORCH_BOX(&to_columns));
  m.impl("from_columns", TORCH_BOX(&from_columns));
}

}  // namespace
