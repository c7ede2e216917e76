// The Hopper family: which problems it serves, and how a problem becomes tiles, taps and tensor maps.
#include <cuda_runtime.h>

#include <cmath>

#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"
#include "cuda/hopper_plan.h"

namespace aeup {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encoder() {
  static const Encode found = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(e == cudaSuccess && result == cudaDriverEntryPointSuccess ? f : nullptr);
  }();
  return found;
}

}  // namespace

const char* make_map(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* data, int rank,
                     const int64_t* size, const int64_t* stride, const int* box) {
  // A model's tensors come back at the same addresses: the last maps are kept, each in the slot of its key.
  using Key = std::array<int64_t, 16>;
  struct Known {
    Key key{};  // no map is of rank 0
    CUtensorMap map;
  };
  thread_local std::array<Known, 256> known;
  Key key{int64_t(reinterpret_cast<uintptr_t>(data)), int64_t(type) << 8 | rank};
  for (int i = 0; i < rank; ++i) {
    key[2 + i] = size[i], key[7 + i] = box[i];
    if (i > 0) key[11 + i] = stride[i - 1];
  }
  Known& slot = known[KeyHash<16>()(key) % known.size()];
  if (slot.key != key) {
    const Encode encode = encoder();
    if (!encode) return "this driver has no tensor maps";
    cuuint64_t sizes[5], strides[5];
    cuuint32_t boxes[5], steps[5];
    for (int i = 0; i < rank; ++i) {
      sizes[i] = cuuint64_t(size[i]);
      boxes[i] = cuuint32_t(box[i]);
      steps[i] = 1;
      if (i > 0) strides[i - 1] = cuuint64_t(stride[i - 1]) * bytes;
    }
    const CUresult e = encode(&slot.map, type, cuuint32_t(rank), const_cast<void*>(data), sizes, strides, boxes, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    slot.key = e == CUDA_SUCCESS ? key : Key{};
    if (e != CUDA_SUCCESS) return "a tensor map was refused";
  }
  *map = slot.map;
  return nullptr;
}
const char* make_map(CUtensorMap* map, DType dtype, const void* data, int rank, const int64_t* size,
                     const int64_t* stride, const int* box) {
  return make_map(map, map_type(dtype), 2, data, rank, size, stride, box);
}

const char* map_phases(CUtensorMap* maps, CUtensorMapDataType type, int bytes, const void* grad, const Convolution& c,
                       int64_t channels, const int* box) {
  for (int a = 0; a < c.sh; ++a)
    for (int b = 0; b < c.sw; ++b) {
      CUtensorMap* map = maps + a * c.sw + b;
      if (a >= c.oh || b >= c.ow) {
        *map = maps[0];
        continue;
      }
      const int64_t size[4] = {channels, ceil_div(c.ow - b, c.sw), ceil_div(c.oh - a, c.sh), c.n};
      const int64_t stride[3] = {c.sw * channels, c.sh * c.ow * channels, c.oh * c.ow * channels};
      const auto* first = static_cast<const char*>(grad) + (a * c.ow + b) * channels * bytes;
      if (const char* e = make_map(map, type, bytes, first, 4, size, stride, box)) return e;
    }
  return nullptr;
}

Box choose_box(int64_t n, int64_t h, int64_t w, int most, bool exact) {
  Box best{1, 1, 1};
  double least = 1e300;
  for (int bw = 1; bw <= most && (exact || bw <= w); exact ? bw *= 2 : ++bw)
    for (int bh = 1; bh * bw <= most && (exact || bh <= h); exact ? bh *= 2 : ++bh) {
      int bn = most / (bw * bh);
      if (!exact && bn > n) bn = int(n);
      if (bw > 256 || bh > 256 || bn > 256) continue;
      const double tiles = double(ceil_div(n, bn)) * double(ceil_div(h, bh)) * double(ceil_div(w, bw));
      if (tiles < least || (tiles == least && bw >= best.w)) least = tiles, best = {bn, bh, bw};
    }
  return best;
}

namespace {

const char* channels_last_of(const Convolution& c, const void** data, int64_t channels, int64_t h, int64_t w,
                             int64_t offset, char* workspace, void* stream) {
  if (offset < 0) return nullptr;
  void* to = workspace + offset;
  const int64_t padded = round_up(channels, 8);
  const char* e = c.channels_last ? pad_channels(*data, to, c.n * h * w, channels, padded, stream)
                                  : to_channels_last(*data, to, c.n, channels, h * w, padded, stream);
  *data = to;
  return e;
}

// Estimated microseconds, for choosing. What limits the main loop is shared memory, which moves 128 bytes a cycle: each
// step brings `loaded` rows of 128 bytes and reads them for products m64 x n. At 1.7 GHz, and with a bound on bytes per
// microsecond, that is within 8 % of 21 and within 20 % of 35 out of 38 channels-last launches on an H100.
struct Work {
  double steps, full_steps;  // of a tile; full_steps counts one with at most 32 channels as a half
  double bytes;              // of all tensors
};
Work work_of(const Convolution& c, int64_t channels, int64_t taps) {
  const int64_t chunks = ceil_div(channels, 64), shortened = short_chunk(channels) ? taps : 0;
  const int64_t pixels = c.n * (c.ih * c.iw * c.ci + c.oh * c.ow * c.co);
  return {double(chunks * taps), chunks * taps - shortened * 0.5, 2. * (pixels + c.ci * c.co * c.kh * c.kw)};
}
double cost_of(int64_t tiles, const Work& w, double bm, double bn, double loaded, double n, double results) {
  const double cycles = w.steps * loaded + w.full_steps * bm * bn * (1. / 64 + 1. / n) + results;
  const double compute = double(ceil_div(tiles, 132)) * cycles / 1700, memory = w.bytes / 2.53e6;
  return 3.3 + (compute > memory ? compute + memory * 0.1 : memory + compute * 0.1);
}
constexpr double kWholeResult = 0.127, kResult = 0.3, kPartialResult = 0.254;  // cycles of the epilogue

// A second kernel that moves so many bytes.
double pass_cost(double bytes) { return 2.4 + bytes / 2.9e6; }

// Tiles for a result in NCHW, of `phases` neighbouring columns; `w` is that of one phase.
Choice plan_turned(int64_t n, int64_t h, int64_t w, int64_t channels, int phases, int64_t groups, Work work,
                   bool smooth) {
  Choice best;
  work.steps *= phases, work.full_steps *= phases;
  for (int config = 0; config < kNchwConfigCount; ++config) {
    if (forced_config() >= 0 && forced_config() != 30 + config) continue;
    if (smooth && config == kNchwPlainConfig) continue;
    const double bm = kNchwConfigs[config].bm, bn = kNchwConfigs[config].bn;
    const Box box = choose_box(n, h, w, kNchwConfigs[config].bn, false);
    const int64_t tiles = ceil_div(n, box.n) * ceil_div(h, box.h) * ceil_div(w, box.w) * groups *
                          ceil_div(channels, kNchwConfigs[config].bm);
    const double result = w * phases % 8 || box.w * phases % 8 ? kResult : kWholeResult;
    const double cost = cost_of(tiles, work, bm, bn, bm + bn, kNchwConfigs[config].columns, bm * bn * phases * result);
    if (cost < best.cost) best = {config, Arrangement::turned, box, cost};
  }
  return best;
}

Choice plan_forward(const Convolution& c) {
  const Phases ah = phases_of(c.sh, c.ph, c.dh, c.kh), aw = phases_of(c.sw, c.pw, c.dw, c.kw);
  const Early eh = early_of(ah), ew = early_of(aw);
  const bool alike = eh.most >= 0 && ew.most >= 0;
  const Work work = work_of(c, c.ci, ceil_div(c.kh, c.sh) * ceil_div(c.kw, c.sw));
  Choice best;
  if (!c.channels_last && c.sw <= 2)
    best =
        plan_turned(c.n, ceil_div(c.oh, c.sh), ceil_div(c.ow, c.sw), c.co, c.sw, c.sh, work, !is_bound(c.activation));
  const double after = c.channels_last ? 0 : pass_cost(4. * c.n * c.oh * c.ow * c.co);
  const double result = c.co % 4 ? kResult : kWholeResult;
  for (int config = 0; config < kGemmConfigCount; ++config)
    for (const auto arrangement : {Arrangement::separate, Arrangement::merged, Arrangement::columns}) {
      const bool together = arrangement != Arrangement::separate;
      const int bm = kGemmConfigs[config].bm, bn = kGemmConfigs[config].bn, phases = c.sh * c.sw;
      if (together && !alike) continue;
      if (arrangement == Arrangement::merged && (c.sh != 2 || c.sw != 2 || bn != 256)) continue;
      if (arrangement == Arrangement::columns && (c.dh != 1 || c.dw != 1 || phases == 1 || c.co >= 64)) continue;
      if (forced_config() >= 0 && forced_config() != config + 10 * int(arrangement)) continue;
      const int64_t h = ceil_div(c.oh, c.sh) + (together ? eh.most : 0);
      const int64_t w = ceil_div(c.ow, c.sw) + (together ? ew.most : 0);
      const Box box = choose_box(c.n, h, w, bm, false);
      int64_t tiles = ceil_div(c.n, box.n) * ceil_div(h, box.h) * ceil_div(w, box.w);
      if (arrangement == Arrangement::separate)
        tiles *= ceil_div(c.co, bn) * phases;
      else if (arrangement == Arrangement::merged)
        tiles *= ceil_div(c.co, bn / 4);
      else
        tiles *= ceil_div(c.co * phases, bn);
      const double seen = arrangement == Arrangement::merged ? 1.12 : 1;  // measured, of what is estimated
      const double cost = seen * cost_of(tiles, work, bm, bn, bm + (bn < 64 ? 64 : bn), bn, bm * bn * result) + after +
                          (arrangement == Arrangement::columns ? 2.9 : 0);
      if (cost < best.cost) best = {config, arrangement, box, cost};
    }
  return best;
}

// How many kernel indices of an axis meet output at all: those whose phase has a pixel.
int reaching(int k, int s, int p, int d, int64_t out) {
  int count = 0;
  for (int i = 0; i < k; ++i) count += (d * i - p) - floor_div(d * i - p, s) * s < out;
  return count;
}

Choice plan_input_gradient(const Convolution& c) {
  const int taps = reaching(c.kh, c.sh, c.ph, c.dh, c.oh) * reaching(c.kw, c.sw, c.pw, c.dw, c.ow);
  const Work work = work_of(c, c.co, max(taps, 1));
  Choice best;
  const bool bound = is_bound(c.activation);
  if (!c.channels_last && bound) best = plan_turned(c.n, c.ih, c.iw, c.ci, 1, 1, work, false);
  const double elements = double(c.n * c.ih * c.iw * c.ci);
  const double after = c.channels_last ? 0 : pass_cost(4 * elements);
  const double result = c.ci % 4 ? kResult : kWholeResult;
  const int forced = forced_config();
  for (int config = 0; config < kGemmConfigCount; ++config)
    for (int splits = 1; splits == 1 || (splits <= 32 && 4 * splits <= work.steps); splits *= 2) {
      if (forced >= 0 && forced != config + (splits == 1 ? 0 : 100 * splits)) continue;
      const int bm = kGemmConfigs[config].bm, bn = kGemmConfigs[config].bn;
      const Box box = choose_box(c.n, c.ih, c.iw, bm, false);
      const int64_t pixels = ceil_div(c.n, box.n) * ceil_div(c.ih, box.h) * ceil_div(c.iw, box.w);
      const int64_t tiles = pixels * ceil_div(c.ci, bn);
      // Ranges of the sum keep more multiprocessors busy where there are few tiles; a second kernel adds them.
      if (splits > 1 && forced < 0 && tiles * splits > 2 * 132) continue;
      const bool partial = has_partial(splits, c.activation);
      Work part = work;
      part.steps = std::ceil(work.steps / splits), part.full_steps = work.full_steps / splits;
      part.bytes += partial ? 4 * splits * elements : 0;
      const double cost = cost_of(tiles * splits, part, bm, bn, bm + (bn < 64 ? 64 : bn), bn,
                                  bm * bn * (partial ? kPartialResult : result)) +
                          (partial ? pass_cost((4 * splits + 2) * elements) : after);
      if (cost < best.cost) best = {config, Arrangement::separate, box, cost, splits};
    }
  return best;
}

const Choice& gradient_choice(const Convolution& c) { return remembered(c, Pass::input_gradient, plan_input_gradient); }
const Choice& forward_choice(const Convolution& c) { return remembered(c, Pass::forward, plan_forward); }

// Elements of a store that may start at every multiple of that many columns: v = (r * sw + q) * co + channel.
int word_of(const Convolution& c, const Early& ew) {
  for (const int word : {8, 4}) {
    bool whole = c.sw * c.co % word == 0 && c.ow * c.co % word == 0;
    for (int q = 0; q < c.sw; ++q)  // the phases from q on follow each other in memory
      if (q == 0 || ew.of[q] != ew.of[q - 1])
        whole = whole && q * c.co % word == 0 && (q - c.sw * ew.of[q]) * c.co % word == 0;
    if (whole) return word;
  }
  return 1;
}
int word_of(int64_t channels) { return channels % 8 == 0 ? 8 : channels % 4 == 0 ? 4 : 1; }

// `w` is [taps, ci, co]; or, where the phases are columns, [taps of a phase, ci, phases * co].
const char* launch_forward(const Convolution& c, const Choice& choice, const void* x, const void* w, int64_t w_channel,
                           int64_t w_tap, void* out, void* stream) {
  ForwardParams p;
  const Phases ah = phases_of(c.sh, c.ph, c.dh, c.kh), aw = phases_of(c.sw, c.pw, c.dw, c.kw);
  const bool together = choice.arrangement == Arrangement::merged || choice.arrangement == Arrangement::columns;
  const bool turned = choice.arrangement == Arrangement::turned;
  const Early none{{}, 0}, eh = together ? early_of(ah) : none, ew = together ? early_of(aw) : none;
  const int64_t h = ceil_div(c.oh, c.sh) + eh.most, width = ceil_div(c.ow, c.sw) + ew.most;
  const bool columns = choice.arrangement == Arrangement::columns;
  int taps = 0;
  p.groups = together ? 1 : turned ? c.sh : c.sh * c.sw;
  p.merged = choice.arrangement == Arrangement::merged ? 4 : 1;
  p.columns = int(columns ? c.co * c.sh * c.sw : c.co);
  const int per_phase_w = aw.first[1];
  for (int r = 0; r < (together ? 1 : c.sh); ++r)
    for (int q = 0; q < (together ? 1 : c.sw); ++q) {
      GemmGroup& g = p.group[r * c.sw + q];
      g.first_tap = int16_t(taps);
      for (int i = ah.first[r]; i < ah.first[r + 1]; ++i)
        for (int j = aw.first[q]; j < aw.first[q + 1]; ++j) {
          const int weight = columns ? i * per_phase_w + j : ah.kernel[i] * c.kw + aw.kernel[j];
          p.tap[taps++] = {weight, 0, ah.shift[i] - eh.of[r], aw.shift[j] - ew.of[q]};
        }
      g.taps = int16_t(taps - g.first_tap);
      if (g.taps == 0) g.first_tap = kNoTap, g.taps = 1;
    }
  p.tap[kNoTap] = {kNoWeight, 0, 0, 0};
  // The kernel indices of every phase are equally far apart.
  for (int m = 0; m < 4; ++m)
    p.add[m] =
        p.merged == 1
            ? 0
            : int16_t((ah.kernel[ah.first[m / 2]] - ah.kernel[0]) * c.kw + (aw.kernel[aw.first[m % 2]] - aw.kernel[0]));
  for (int r = 0; r < c.sh; ++r)
    for (int q = 0; q < c.sw; ++q) {
      GemmGroup& g = p.group[r * c.sw + q];
      g.oh = int16_t(r - c.sh * eh.of[r]), g.ow = int16_t(q - c.sw * ew.of[q]);
    }
  const Box box = choice.box;
  const int64_t ci8 = round_up(c.ci, 8);
  {
    const int64_t size[4] = {ci8, c.iw, c.ih, c.n}, stride[3] = {ci8, c.iw * ci8, c.ih * c.iw * ci8};
    const int boxes[4] = {64, box.w, box.h, box.n};
    if (const char* e = make_map(&p.source[0], c.dtype, x, 4, size, stride, boxes)) return e;
  }
  {
    const int64_t kernel = int64_t(c.kh) * c.kw / (columns ? c.sh * c.sw : 1);
    const int64_t size[3] = {round_up(p.columns, 8), c.ci, kernel}, stride[2] = {w_channel, w_tap};
    const int boxes[3] = {64, 64, 1};
    if (const char* e = make_map(&p.weight, c.dtype, w, 3, size, stride, boxes)) return e;
  }
  p.out = out, p.bias = c.bias, p.n = c.n;
  p.oh = int(c.oh), p.ow = int(c.ow), p.c = int(c.co), p.stride_h = c.sh, p.stride_w = c.sw;
  p.word = columns ? word_of(c, ew) : word_of(c.co);
  p.activation = int(c.activation), p.slope = c.slope;
  p.chunks = int(ceil_div(c.ci, 64)), p.short_chunk = short_chunk(c.ci);
  p.blocks =
      int(ceil_div(p.columns, turned ? kNchwConfigs[choice.config].bm : kGemmConfigs[choice.config].bn / p.merged));
  p.box_n = box.n, p.box_h = box.h, p.box_w = box.w;
  p.tiles_h = int(ceil_div(h, box.h)), p.tiles_w = int(ceil_div(width, box.w));
  p.tiles = int(ceil_div(c.n, box.n)) * p.tiles_h * p.tiles_w * p.blocks * p.groups;
  p.source_bytes = uint32_t(box.n * box.h * box.w * 128);
  set_dividers(&p);
  if (turned) return launch_gemm_nchw(p, choice.config, c.sw, c.dtype, stream);
  return launch_gemm(p, choice.config, c.dtype, stream);
}

template <int kMaps>
const char* launch_input_gradient(const Convolution& c, const void* grad, const void* w, int64_t w_channel,
                                  int64_t w_tap, void* out, void* stream) {
  GradientParams<kMaps> p;
  const int64_t chunks = ceil_div(c.co, 64), co8 = round_up(c.co, 8);
  const Choice& best = gradient_choice(c);
  const bool turned = best.arrangement == Arrangement::turned;
  const Box box = best.box;
  const int bn = turned ? kNchwConfigs[best.config].bm : kGemmConfigs[best.config].bn;
  const int boxes[4] = {64, box.w, box.h, box.n};
  if (const char* e = map_phases(p.source, map_type(c.dtype), 2, grad, c, co8, boxes)) return e;
  int taps = 0;
  for (int i = 0; i < c.kh; ++i)
    for (int j = 0; j < c.kw; ++j) {
      const int h = c.dh * i - c.ph, width = c.dw * j - c.pw;
      const int fh = floor_div(h, c.sh), fw = floor_div(width, c.sw), a = h - fh * c.sh, b = width - fw * c.sw;
      if (a < c.oh && b < c.ow) p.tap[taps++] = {i * c.kw + j, a * c.sw + b, fh, fw};
    }
  {
    const int64_t size[3] = {co8, c.ci, int64_t(c.kh) * c.kw}, stride[2] = {w_channel, w_tap};
    const int weights[3] = {64, bn < 64 ? 64 : bn, 1};
    if (const char* e = make_map(&p.weight, c.dtype, w, 3, size, stride, weights)) return e;
  }
  p.groups = 1, p.merged = 1;
  p.group[0] = {0, int16_t(taps), 0, 0};
  if (taps == 0) p.group[0] = {kNoTap, 1, 0, 0}, p.tap[kNoTap] = {kNoWeight, 0, 0, 0};  // nothing reaches the output
  const bool partial = has_partial(best.splits, c.activation);
  p.out = out, p.bias = partial ? nullptr : c.bias, p.n = c.n;
  p.splits = best.splits;
  p.oh = int(c.ih), p.ow = int(c.iw), p.c = p.columns = int(partial ? round_up(c.ci, 8) : c.ci);
  p.word = word_of(c.ci), p.stride_h = p.stride_w = 1;
  p.activation = int(c.activation);
  p.chunks = int(chunks), p.short_chunk = short_chunk(c.co);
  p.blocks = int(ceil_div(c.ci, bn));
  p.box_n = box.n, p.box_h = box.h, p.box_w = box.w;
  p.tiles_h = int(ceil_div(c.ih, box.h)), p.tiles_w = int(ceil_div(c.iw, box.w));
  p.tiles = int(ceil_div(c.n, box.n)) * p.tiles_h * p.tiles_w * p.blocks * p.splits;
  p.source_bytes = uint32_t(box.n * box.h * box.w * 128);
  set_dividers(&p);
  if (turned) return launch_gemm_nchw(p, best.config, c.dtype, stream);
  return launch_gemm(p, best.config, c.dtype, stream);
}

struct Layout {  // of the workspace: offsets in bytes, -1 where the tensor is used as it is
  int64_t source = -1, second = -1, weight = -1, out = -1, partial = -1, bytes = 0;
  void add(int64_t* at, int64_t size) { *at = bytes, bytes += round_up(size, 256); }
};
bool as_it_is(const Convolution& c, int64_t channels, const void* data) {
  return c.channels_last && channels % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
Layout layout_of(const Convolution& c, Pass pass) {
  Layout l;
  const int64_t x = c.n * c.ih * c.iw * round_up(c.ci, 8) * 2, y = c.n * c.oh * c.ow * round_up(c.co, 8) * 2;
  if (pass != Pass::input_gradient && !as_it_is(c, c.ci, c.input)) l.add(&l.source, x);
  if (pass != Pass::forward && !c.shared_grad && !as_it_is(c, c.co, c.grad))
    l.add(pass == Pass::input_gradient ? &l.source : &l.second, y);
  if (pass == Pass::weight_gradient) {
    l.add(&l.partial, hopper_weight_gradient_workspace(c));
    return l;
  }
  if (pass == Pass::forward && forward_choice(c).arrangement == Arrangement::columns)
    l.add(&l.weight, int64_t(c.kh) * c.kw / (c.sh * c.sw) * c.ci * round_up(c.sh * c.sw * c.co, 8) * 2);
  else if (c.folded() || !c.weight_channels_last || c.co % 8 || reinterpret_cast<uintptr_t>(c.weight) % 16)
    l.add(&l.weight, int64_t(c.kh) * c.kw * c.ci * round_up(c.co, 8) * 2);
  const Choice& choice = pass == Pass::forward ? forward_choice(c) : gradient_choice(c);
  if (pass == Pass::input_gradient && has_partial(choice.splits, c.activation))
    l.add(&l.out, choice.splits * c.n * c.ih * c.iw * round_up(c.ci, 8) * 4);
  else if (!c.channels_last && choice.arrangement != Arrangement::turned)
    l.add(&l.out, pass == Pass::forward ? c.n * c.oh * c.ow * c.co * 2 : c.n * c.ih * c.iw * c.ci * 2);
  return l;
}

const char* refuses(const Convolution& c, Pass pass, int major, int) {
#ifdef AEUP_WITHOUT_HOPPER
  return "built without sm_90a";
#endif
  if (major != 9) return "made for compute capability 9 (Hopper)";
  if (c.dtype != DType::bf16 && c.dtype != DType::f16) return "bfloat16 and float16 only";
  if (c.groups != 1) return "one group only";
  if (c.ci < 16 || c.co < 16) return "fewer than 16 channels";
  if (int64_t(c.kh) * c.kw > 256) return "more than 256 kernel elements";
  if (int64_t(c.sh) * c.sw > (pass == Pass::forward ? kGemmGroups : kGemmMaps)) return "the stride has too many phases";
  const int reach_h = (c.dh * c.kh + c.ph) / c.sh + 2, reach_w = (c.dw * c.kw + c.pw) / c.sw + 2;
  if (reach_h > 120 || reach_w > 120) return "kernel, dilation or padding is too long for the stride";
  // A kernel index that meets no output takes the box 128 pixels before: that must be outside, whatever the tile.
  if (pass == Pass::weight_gradient && (c.oh < c.sh || c.ow < c.sw) && c.ih > 64 && c.iw > 64)
    return "padding leaves an output shorter than the stride";
  const int64_t most = 1 << 30;
  if (c.n * c.ih * c.iw >= most || c.n * c.oh * c.ow >= most || c.ci >= 65536 || c.co >= 65536)
    return "2^30 pixels or 2^16 channels";
  if (c.n * c.oh * c.ow / 32 * ceil_div(c.co, 32) >= most || c.n * c.ih * c.iw / 32 * ceil_div(c.ci, 32) >= most)
    return "too many tiles";
  return nullptr;
}

// As which problem it runs. An upsampling by 1 is a convolution alone: the input's gradient of the transposed
// convolution with the same weight, with nothing to fold.
Convolution as_run(const Convolution& given, Pass* pass) {
  if (*pass != Pass::forward) return given;
  const bool alone = given.folded() && given.fold_h.scale == 1 && given.fold_w.scale == 1;
  if (!alone || !is_bound(given.activation)) return normal(given);
  *pass = Pass::input_gradient;
  Convolution c = given;
  c.ci = given.co, c.ih = given.oh, c.iw = given.ow, c.co = given.ci, c.oh = given.ih, c.ow = given.iw;
  c.kh = given.fold_h.kernel, c.kw = given.fold_w.kernel;
  c.ph = c.kh - 1 + given.fold_h.margin - given.ph, c.pw = c.kw - 1 + given.fold_w.margin - given.pw;
  c.fold_h = c.fold_w = Fold{};
  c.grad = given.input;
  return c;
}

int64_t workspace(const Convolution& given, Pass pass) {
  const Convolution c = as_run(given, &pass);
  return layout_of(c, pass).bytes;
}

const char* run(const Convolution& given, Pass pass, void* memory, void* stream) {
  const Convolution c = as_run(given, &pass);
  const Layout l = layout_of(c, pass);
  char* workspace = static_cast<char*>(memory);
  const void *x = c.input, *grad = c.shared_grad ? c.shared_grad : c.grad;
  const char* e = nullptr;
  if (pass == Pass::weight_gradient) {
    if ((e = channels_last_of(c, &x, c.ci, c.ih, c.iw, l.source, workspace, stream))) return e;
    if ((e = channels_last_of(c, &grad, c.co, c.oh, c.ow, l.second, workspace, stream))) return e;
    return hopper_weight_gradient(c, x, grad, workspace + l.partial, stream);
  }
  const void* weight = c.weight;
  const int64_t taps = int64_t(c.kh) * c.kw, co8 = round_up(c.co, 8);
  int64_t w_channel = taps * c.co, w_tap = c.co;
  const bool columns = pass == Pass::forward && forward_choice(c).arrangement == Arrangement::columns;
  if (columns) {
    void* to = workspace + l.weight;
    if ((e = pack_phases(c, to, stream))) return e;
    weight = to, w_channel = round_up(c.sh * c.sw * c.co, 8), w_tap = c.ci * w_channel;
  } else if (l.weight >= 0) {
    void* to = workspace + l.weight;
    if ((e = pack_weight(c, to, stream))) return e;
    weight = to, w_channel = co8, w_tap = c.ci * co8;
  }
  void* out = l.out >= 0 ? workspace + l.out : c.result;
  if (pass == Pass::forward) {
    if ((e = channels_last_of(c, &x, c.ci, c.ih, c.iw, l.source, workspace, stream))) return e;
    if ((e = launch_forward(c, forward_choice(c), x, weight, w_channel, w_tap, out, stream))) return e;
    if (l.out >= 0) e = from_channels_last(out, c.result, c.n, c.co, c.oh * c.ow, c.co, stream);
  } else {
    if ((e = channels_last_of(c, &grad, c.co, c.oh, c.ow, l.source, workspace, stream))) return e;
    const auto launch = c.sh * c.sw <= 4 ? launch_input_gradient<4> : launch_input_gradient<kGemmMaps>;
    if ((e = launch(c, grad, weight, w_channel, w_tap, out, stream))) return e;
    const int splits = gradient_choice(c).splits;
    if (has_partial(splits, c.activation))
      e = add_ranges(c, static_cast<const float*>(out), splits, stream);
    else if (l.out >= 0)
      e = from_channels_last(out, c.result, c.n, c.ci, c.ih * c.iw, c.ci, stream);
  }
  return e;
}

int64_t shared(const Convolution& c) {
  return as_it_is(c, c.co, c.grad) ? 0 : c.n * c.oh * c.ow * round_up(c.co, 8) * 2;
}
const char* share(const Convolution& c, void* to, void* stream) {
  const void* grad = c.grad;
  return channels_last_of(c, &grad, c.co, c.oh, c.ow, 0, static_cast<char*>(to), stream);
}

}  // namespace

const ConvolutionFamily kHopperConvolution = {"hopper", refuses, workspace, run, shared, share};

}  // namespace aeup
