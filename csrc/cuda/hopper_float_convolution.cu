// The Hopper family for float32: the problems of hopper_convolution.cu in tf32, or in three tf32 products of float32's
// error.
#include <cuda_runtime.h>

#include "cuda/convolution.h"
#include "cuda/hopper_float.h"
#include "cuda/hopper_gemm.cuh"
#include "cuda/hopper_plan.h"

namespace aeup {
namespace {

// Estimated cycles of a launch: whole waves, each the larger of the products and of the bytes from L2.
double cost_of(int config, bool strict, int64_t tiles, int64_t steps) {
  const double bm = kFloatConfigs[config].bm, bn = kFloatConfigs[config].bn;
  const double products = bm * bn / (strict ? 7.7 : 27),
               bytes = (bm + bn * (strict ? 2 : 1)) * 128 / (strict ? 24 : 57);
  const double step = products > bytes ? products : bytes;
  const double tile = double(steps) * step + (strict ? 900 + bm * bn * 0.2 : 585 + bm * bn * 0.29);
  return double(ceil_div(tiles, 132)) * tile;
}

bool skips(const Convolution& c, int config, Arrangement arrangement) {
  if (!c.tf32 && config < kFirstStrictConfig) return true;
  return forced_config() >= 0 && forced_config() != config + 10 * int(arrangement);
}

Choice plan_forward(const Convolution& c) {
  const Phases ah = phases_of(c.sh, c.ph, c.dh, c.kh), aw = phases_of(c.sw, c.pw, c.dw, c.kw);
  const Early eh = early_of(ah), ew = early_of(aw);
  const int phases = c.sh * c.sw;
  const bool alike = eh.most >= 0 && ew.most >= 0 && c.dh == 1 && c.dw == 1 && phases > 1;
  const int64_t steps = ceil_div(c.ci, 32) * ceil_div(c.kh, c.sh) * ceil_div(c.kw, c.sw);
  Choice best;
  for (int config = 0; config < kFloatConfigCount; ++config)
    for (const auto arrangement : {Arrangement::separate, Arrangement::columns}) {
      const bool columns = arrangement == Arrangement::columns;
      if ((columns && !alike) || skips(c, config, arrangement)) continue;
      const int64_t h = ceil_div(c.oh, c.sh) + (columns ? eh.most : 0);
      const int64_t w = ceil_div(c.ow, c.sw) + (columns ? ew.most : 0);
      const int bn = kFloatConfigs[config].bn;
      const Box box = choose_box(c.n, h, w, kFloatConfigs[config].bm, false);
      const int64_t pixels = ceil_div(c.n, box.n) * ceil_div(h, box.h) * ceil_div(w, box.w);
      const int64_t tiles = pixels * (columns ? ceil_div(c.co * phases, bn) : ceil_div(c.co, bn) * phases);
      const double cost = cost_of(config, !c.tf32, tiles, steps);
      if (cost < best.cost) best = {config, arrangement, box, cost};
    }
  return best;
}

Choice plan_input_gradient(const Convolution& c) {
  Choice best;
  for (int config = 0; config < kFloatConfigCount; ++config) {
    if (skips(c, config, Arrangement::separate)) continue;
    const Box box = choose_box(c.n, c.ih, c.iw, kFloatConfigs[config].bm, false);
    const int64_t pixels = ceil_div(c.n, box.n) * ceil_div(c.ih, box.h) * ceil_div(c.iw, box.w);
    const int64_t tiles = pixels * ceil_div(c.ci, kFloatConfigs[config].bn);
    const double cost = cost_of(config, !c.tf32, tiles, ceil_div(c.co, 32) * c.kh * c.kw);
    if (cost < best.cost) best = {config, Arrangement::separate, box, cost};
  }
  return best;
}

const Choice& choice_of(const Convolution& c, Pass pass) {
  return pass == Pass::forward ? remembered(c, pass, plan_forward) : remembered(c, pass, plan_input_gradient);
}

struct Operand {  // the weight: rows of `pitch` elements from `row` to `row`, `taps` slices; strict: twice as many
  const void* data;
  int64_t channels, rows, taps, row, tap;
};

// What both passes share, when groups, taps and columns are set: sizes, maps of the weight, launch.
const char* finish(FloatParams* p, const Convolution& c, const Choice& choice, const Operand& w, int64_t h,
                   int64_t width, void* stream) {
  const bool strict = !c.tf32;
  const int bn = kFloatConfigs[choice.config].bn;
  const auto type = strict ? CU_TENSOR_MAP_DATA_TYPE_INT32 : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  const int64_t size[3] = {w.channels, w.rows, w.taps * (strict ? 2 : 1)}, stride[2] = {w.row, w.tap};
  const int boxes[3] = {32, bn, 1};
  if (const char* e = make_map(&p->weight, type, 4, w.data, 3, size, stride, boxes)) return e;
  const Box box = choice.box;
  p->merged = 1, p->add[0] = 0, p->add[1] = int16_t(w.taps);  // of the second plane, if there is one
  p->n = c.n;
  p->blocks = int(ceil_div(p->columns, bn));
  p->box_n = box.n, p->box_h = box.h, p->box_w = box.w;
  p->tiles_h = int(ceil_div(h, box.h)), p->tiles_w = int(ceil_div(width, box.w));
  p->tiles = int(ceil_div(c.n, box.n)) * p->tiles_h * p->tiles_w * p->blocks * p->groups;
  p->source_bytes = uint32_t(box.n * box.h * box.w * 128);
  set_dividers(p);
  const auto launch = strict ? launch_float_strict : launch_float_tf32;
  return launch(*p, choice.config, !c.channels_last, stream);
}

CUtensorMapDataType source_type(const Convolution& c) {
  return c.tf32 ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : CU_TENSOR_MAP_DATA_TYPE_INT32;
}

const char* launch_forward(const Convolution& c, const void* x, Operand w, void* out, void* stream) {
  FloatParams p;
  const Choice& choice = choice_of(c, Pass::forward);
  const bool columns = choice.arrangement == Arrangement::columns;
  const Phases ah = phases_of(c.sh, c.ph, c.dh, c.kh), aw = phases_of(c.sw, c.pw, c.dw, c.kw);
  const Early none{{}, 0}, eh = columns ? early_of(ah) : none, ew = columns ? early_of(aw) : none;
  int taps = 0;
  for (int r = 0; r < c.sh; ++r)
    for (int q = 0; q < c.sw; ++q) {
      GemmGroup& g = p.group[r * c.sw + q];
      g.first_tap = int16_t(taps);
      g.oh = int16_t(r - c.sh * eh.of[r]), g.ow = int16_t(q - c.sw * ew.of[q]);
      if (!columns || r + q == 0)
        for (int i = ah.first[r]; i < ah.first[r + 1]; ++i)
          for (int j = aw.first[q]; j < aw.first[q + 1]; ++j) {
            const int at = columns ? i * aw.first[1] + j : ah.kernel[i] * c.kw + aw.kernel[j];
            p.tap[taps++] = {at, 0, ah.shift[i] - eh.of[r], aw.shift[j] - ew.of[q]};
          }
      g.taps = int16_t(taps - g.first_tap);
    }
  const int64_t ci4 = round_up(c.ci, 4);
  const int64_t size[4] = {ci4, c.iw, c.ih, c.n}, stride[3] = {ci4, c.iw * ci4, c.ih * c.iw * ci4};
  const int boxes[4] = {32, choice.box.w, choice.box.h, choice.box.n};
  if (const char* e = make_map(&p.source[0], source_type(c), 4, x, 4, size, stride, boxes)) return e;
  p.groups = columns ? 1 : c.sh * c.sw;
  p.out = out, p.bias = c.bias;
  p.oh = int(c.oh), p.ow = int(c.ow), p.c = int(c.co), p.columns = int(w.rows), p.stride_h = c.sh, p.stride_w = c.sw;
  p.activation = int(c.activation), p.slope = c.slope;
  p.chunks = int(ceil_div(c.ci, 32));
  return finish(&p, c, choice, w, ceil_div(c.oh, c.sh) + eh.most, ceil_div(c.ow, c.sw) + ew.most, stream);
}

const char* launch_input_gradient(const Convolution& c, const void* grad, Operand w, void* out, void* stream) {
  FloatParams p;
  const Choice& choice = choice_of(c, Pass::input_gradient);
  const int boxes[4] = {32, choice.box.w, choice.box.h, choice.box.n};
  if (const char* e = map_phases(p.source, source_type(c), 4, grad, c, round_up(c.co, 4), boxes)) return e;
  int taps = 0;
  for (int i = 0; i < c.kh; ++i)
    for (int j = 0; j < c.kw; ++j) {
      const int h = c.dh * i - c.ph, width = c.dw * j - c.pw, at = i * c.kw + j;
      const int fh = floor_div(h, c.sh), fw = floor_div(width, c.sw), a = h - fh * c.sh, b = width - fw * c.sw;
      if (a < c.oh && b < c.ow) p.tap[taps++] = {at, a * c.sw + b, fh, fw};
    }
  p.groups = 1;
  p.group[0] = {0, int16_t(taps), 0, 0};
  p.out = out, p.bias = c.bias;
  p.oh = int(c.ih), p.ow = int(c.iw), p.c = p.columns = int(c.ci), p.stride_h = p.stride_w = 1;
  p.activation = int(c.activation), p.slope = c.slope;
  p.chunks = int(ceil_div(c.co, 32));
  return finish(&p, c, choice, w, c.ih, c.iw, stream);
}

struct Layout {  // of the workspace: offsets in bytes, -1 where the tensor is used as it is
  int64_t source = -1, weight = -1, gradient = -1, bytes = 0;
  void add(int64_t* at, int64_t size) { *at = bytes, bytes += round_up(size, 256); }
};
bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
bool as_it_is(const Convolution& c, int64_t channels, const void* data) {
  return c.channels_last && channels % 4 == 0 && aligned(data);
}
int64_t gradient_bytes(const Convolution& c) { return c.n * c.oh * c.ow * round_up(c.co, 4) * 4; }
Layout layout_of(const Convolution& c, Pass pass) {
  Layout l;
  const bool forward = pass == Pass::forward;
  const int64_t from = forward ? c.ci : c.co, to = forward ? c.co : c.ci;
  if (forward ? !as_it_is(c, c.ci, c.input) : !c.shared_grad && !as_it_is(c, c.co, c.grad))
    l.add(&l.source, forward ? c.n * c.ih * c.iw * round_up(c.ci, 4) * 4 : gradient_bytes(c));
  if (pass == Pass::weight_gradient)
    l.add(&l.gradient, float_weight_gradient_workspace(c));
  else if (forward || c.folded() || !c.tf32 || !c.weight_channels_last || c.co % 4 || !aligned(c.weight))
    l.add(&l.weight, int64_t(c.kh) * c.kw * to * round_up(from, 32) * (c.tf32 ? 4 : 8));
  return l;
}

const char* refuses(const Convolution& c, Pass pass, int major, int minor) {
  if (c.dtype != DType::f32) return "float32 only";
  Convolution half = c;  // the same kernels but for the elements
  half.dtype = DType::bf16;
  return kHopperConvolution.refuses(half, pass, major, minor);
}

int64_t workspace(const Convolution& c, Pass pass) {
  return layout_of(pass == Pass::forward ? normal(c) : c, pass).bytes;
}

// Copies the channels-last form of the input (forward) or of the output's gradient, where there is not one yet.
const char* copy_source(const Convolution& c, bool forward, void* to, void* stream) {
  const void* from = forward ? c.input : c.grad;
  const int64_t channels = forward ? c.ci : c.co, pixels = forward ? c.ih * c.iw : c.oh * c.ow;
  return c.channels_last ? pad_channels(from, to, c.n * pixels, channels, round_up(channels, 4), stream, 4)
                         : to_channels_last(from, to, c.n, channels, pixels, round_up(channels, 4), stream, 4);
}

const char* run(const Convolution& given, Pass pass, void* memory, void* stream) {
  const bool forward = pass == Pass::forward;
  const Convolution c = forward ? normal(given) : given;
  const Layout l = layout_of(c, pass);
  char* workspace = static_cast<char*>(memory);
  const char* e = nullptr;
  const void* source = forward ? c.input : c.shared_grad ? c.shared_grad : c.grad;
  if (l.source >= 0) {
    if ((e = copy_source(c, forward, workspace + l.source, stream))) return e;
    source = workspace + l.source;
  }
  if (pass == Pass::weight_gradient) return float_weight_gradient(c, source, workspace + l.gradient, stream);
  const int64_t from = forward ? c.ci : c.co, to = forward ? c.co : c.ci, taps = int64_t(c.kh) * c.kw;
  const int64_t pitch = round_up(from, 32);
  Operand w{c.weight, c.co, c.ci, taps, taps * c.co, c.co};  // [ci, taps, co] as it is
  if (l.weight >= 0) {
    void* packed = workspace + l.weight;
    const bool columns = forward && choice_of(c, pass).arrangement == Arrangement::columns;
    const int64_t phases = columns ? c.sh * c.sw : 1;
    w = {packed, pitch, to * phases, taps / phases, pitch, to * phases * pitch};
    e = forward ? pack_float_forward(c, packed, pitch, columns, !c.tf32, stream)
                : pack_float_gradient(c, packed, pitch, !c.tf32, stream);
    if (e) return e;
  }
  return forward ? launch_forward(c, source, w, c.result, stream)
                 : launch_input_gradient(c, source, w, c.result, stream);
}

int64_t shared(const Convolution& c) { return as_it_is(c, c.co, c.grad) ? 0 : gradient_bytes(c); }
const char* share(const Convolution& c, void* to, void* stream) { return copy_source(c, false, to, stream); }

}  // namespace

const ConvolutionFamily kHopperFloatConvolution = {"hopper_float", refuses, workspace, run, shared, share};

}  // namespace aeup
