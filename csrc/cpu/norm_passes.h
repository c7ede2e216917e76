// What batch and group normalisation share on the CPU: how they walk the tensors, their sums, their elements. Compiled
// once per instruction set (AEUP_ISA).
//
// Forward: statistics, then output; backward: sums per channel, then the input's gradient. Both layouts are walked in
// the order of memory, a register at a time: lane l of a period stands for one channel, so in channels-last a period is
// a common multiple of the channels and the register. In NCHW short planes of one channel are walked by turns with
// those of the channels beside it. The tensors are cut into pieces by their sizes alone, and what the pieces add up is
// added in their order: the same bits for any number of threads.
//
// Eight values of a lane are added as a tree in the tensors' arithmetic, and that to a double: the error of a long sum
// is about that of eight. Statistics are of distances from a value about in the middle, joined as counts, means and
// squared distances (Chan, Golub & LeVeque, 1983, "Algorithms for computing the sample variance").
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/activations.h"
#include "cpu/parallel.h"
#include "norm.h"

namespace aeup {
namespace AEUP_ISA {

// Of what is called for each register: a call would put the registers of the caller into memory.
#define AEUP_INLINED __attribute__((always_inline))
#define AEUP_INLINE inline AEUP_INLINED

constexpr int64_t kSmall = 1 << 15;     // elements below which a second thread costs more than it brings
constexpr int64_t kPerLane = 512;       // values of a lane in a piece, about
constexpr int64_t kPieces = 64;         // at least, in a large tensor
constexpr int64_t kPiece = 1 << 14;     // elements, at least: sums are joined for each piece and channel
constexpr int64_t kWidePixel = 256;     // channels from which a pixel that does not divide is walked by itself
constexpr int64_t kShortRun = 1 << 10;  // pixels of a plane below which several are walked by turns
constexpr int64_t kTree = 8;

// --- how the tensors are walked ---

// A piece: `runs` stretches of `run` elements, `step` apart, each from lane 0 on; in NCHW as many in each of `planes`
// planes after one another. Its sums go to row `row` of the partial results, those of channels from `channel` on.
struct Piece {
  int64_t at, runs, run, step, row, channel, sample, planes;
};
// Lane l belongs to channel `channel` + l % channels. Of adjacent channels there may be `samples` tensors after one
// another, each with channels of its own: the same number of pieces and rows each. Else plane q of a piece has the
// channel `channel` + q, and lanes of its own: from q * period on.
struct Walk {
  int64_t c, channels, period, lanes;  // lanes: of the period those that stand for a channel
  int64_t samples, pieces, rows;
  int64_t n, pixels, total;                 // of a sample
  int64_t length;                           // channels-last: elements of a piece
  int64_t group, block, segment, segments;  // else: samples and channels of a piece, its run, runs of a plane
  bool adjacent, by_pixel;

  Piece piece(int64_t i) const {
    if (adjacent) {
      const int64_t each = pieces / samples, sample = i / each, in_sample = i % each * length;
      const int64_t at = sample * total + in_sample, size = std::min(length, total - in_sample);
      return by_pixel ? Piece{at, size / c, c, c, i, 0, sample, 1} : Piece{at, 1, size, 0, i, 0, sample, 1};
    }
    const int64_t blocks = (c + block - 1) / block, s = i % segments, g = i / (segments * blocks);
    const int64_t channel = i / segments % blocks * block, planes = std::min(block, c - channel);
    const int64_t runs = std::min(group, n - g * group), run = std::min(segment, pixels - s * segment);
    return {
        (g * group * c + channel) * pixels + s * segment, runs, run, c * pixels, g * segments + s, channel, 0, planes};
  }
  // Values of a channel that row `row` is about.
  int64_t count(int64_t row) const {
    const Piece p = piece(adjacent ? row : row / segments * segments * ((c + block - 1) / block) + row % segments);
    return adjacent ? p.runs * p.run / c : p.runs * p.run;
  }
  int64_t lanes_of(const Piece& p) const { return p.planes * period; }
  int64_t channels_of(const Piece& p) const { return p.planes * channels; }
  // Of adjacent channels: f(lane, channel, values that the piece has of the lane), for all lanes that have any.
  template <class F>
  void for_lanes(const Piece& p, F f) const {
    const int64_t whole = p.run / period, more = p.run % period, present = whole ? lanes : std::min(lanes, more);
    const double n = double(p.runs * whole), longer = double(p.runs * (whole + 1));
    for (int64_t first = 0; first < present; first += channels) {
      const int64_t here = std::min(channels, present - first), of_longer = std::clamp<int64_t>(more - first, 0, here);
      for (int64_t j = 0; j < of_longer; ++j) f(first + j, j, longer);
      for (int64_t j = of_longer; j < here; ++j) f(first + j, j, n);
    }
  }
  // f(where it begins, its plane in the piece) for each run, in the order of memory; `after` when all planes have one.
  template <class F, class G>
  void for_runs(const Piece& p, F f, G after) const {
    const int64_t between = pixels;
    for (int64_t r = 0; r < p.runs; ++r) {
      for (int64_t q = 0; q < p.planes; ++q) f(p.at + r * p.step + q * between, q);
      after();
    }
  }
};
template <class S>
Walk walk_of(const AnyNorm& b, int64_t samples = 1) {
  constexpr int64_t L = kLanes<S>;
  Walk w{};
  w.c = b.c, w.n = b.n, w.pixels = b.pixels, w.total = b.n * b.c * b.pixels;
  w.adjacent = b.channels_adjacent(), w.samples = samples;
  if (w.adjacent) {
    w.by_pixel = b.c > kWidePixel && b.c % L;
    w.channels = b.c;
    w.period = w.by_pixel ? (b.c + L - 1) / L * L : std::lcm(b.c, L);
    w.lanes = w.by_pixel ? b.c : w.period;
    const int64_t unit = w.by_pixel ? b.c : kTree * w.period, units = (w.total + unit - 1) / unit;
    const int64_t most = w.by_pixel ? kPerLane : kPerLane / kTree;
    const int64_t least = std::max<int64_t>((kPiece + unit - 1) / unit, 8);
    w.length = unit * std::min(std::max((units + kPieces - 1) / kPieces, least), most);
    w.pieces = w.rows = samples * ((w.total + w.length - 1) / w.length);
  } else {
    w.channels = 1, w.period = w.lanes = L;
    const int64_t most = kPerLane * L;
    w.segments = (b.pixels + most - 1) / most;
    w.segment = ((b.pixels + w.segments - 1) / w.segments + kTree * L - 1) / (kTree * L) * (kTree * L);
    w.segments = (b.pixels + w.segment - 1) / w.segment;
    w.group = std::max<int64_t>(1, std::min(b.n, most / b.pixels)), w.block = 1;
    if (b.pixels < kShortRun) {
      const int64_t planes = std::max(kPiece, w.total / kPieces) / b.pixels, beside = kShortRun / b.pixels;
      w.group = std::clamp<int64_t>(planes / std::min(b.c, beside), 1, w.group);
      w.block = std::clamp<int64_t>(planes / w.group, 1, b.c);
    }
    w.rows = (b.n + w.group - 1) / w.group * w.segments;
    w.pieces = w.rows * ((b.c + w.block - 1) / w.block);
  }
  return w;
}
template <class F>
void over_pieces(const Walk& w, ParallelFor parallel, F f) {
  const auto body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(context))(i);
  };
  if (w.samples * w.total < kSmall) return body(0, w.pieces, &f);
  parallel(w.pieces, body, &f);
}

// --- values per channel ---

template <class S>
struct Channels {
  const AnyNorm& b;
  S get(const void* from, int64_t i, S otherwise) const {
    if (!from) return otherwise;
    if (!b.narrow) return static_cast<const S*>(from)[i];
    if (b.dtype == DType::bf16) return S(to_arith(static_cast<const bf16*>(from)[i]));
    return S(to_arith(static_cast<const f16*>(from)[i]));
  }
  void set(void* to, int64_t i, S value) const {
    if (!b.narrow)
      static_cast<S*>(to)[i] = value;
    else if (b.dtype == DType::bf16)
      from_arith(float(value), static_cast<bf16*>(to) + i);
    else
      from_arith(float(value), static_cast<f16*>(to) + i);
  }
};
// N coefficients of the channels of a piece: of lanes as they lie in a table [N][period], or of each plane.
template <class S, int N>
struct OfPiece {
  const S* table;
  int64_t period;
  const S* of_plane[N];
  void at_lane(int64_t l, Vec<S> (&k)[N]) const {
    for (int i = 0; i < N; ++i) k[i] = load(table + i * period + l);
  }
  void at_run(int64_t plane, Vec<S> (&k)[N]) const {
    if (table) return at_lane(0, k);
    for (int i = 0; i < N; ++i) k[i] = Vec<S>{} + of_plane[i][plane];
  }
};
template <class S, int N>
struct Coefficients {
  std::vector<S> of_channel[N], table;  // [samples * c], [samples][N][period]
  explicit Coefficients(const Walk& w) {
    for (auto& v : of_channel) v.resize(w.samples * w.c);
  }
  void spread(const Walk& w) {
    if (!w.adjacent) return;
    table.resize(w.samples * N * w.period);
    for (int64_t s = 0; s < w.samples; ++s)
      for (int k = 0; k < N; ++k)
        for (int64_t l = 0; l < w.lanes; l += w.c)
          std::copy_n(of_channel[k].begin() + s * w.c, w.c, table.begin() + (s * N + k) * w.period + l);
  }
  OfPiece<S, N> of(const Walk& w, const Piece& p) const {
    OfPiece<S, N> k{w.adjacent ? table.data() + p.sample * N * w.period : nullptr, w.period, {}};
    for (int i = 0; i < N; ++i) k.of_plane[i] = of_channel[i].data() + p.channel;
    return k;
  }
};

// --- sums of a piece ---

inline void add_to(double* sum, Vec<double> x) { store(sum, load(sum) + x); }
inline void add_to(double* sum, VF x) {
#if defined(__AVX512F__)  // as in vec.h: one instruction each
  add_to(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  add_to(sum + kLanes<double>, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
  add_to(sum, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
  add_to(sum + kLanes<double>, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
#else
  using Half __attribute__((vector_size(kVectorBytes / 2), may_alias)) = float;
  Half half[2];
  std::memcpy(half, &x, sizeof x);
  add_to(sum, __builtin_convertvector(half[0], Vec<double>));
  add_to(sum + kLanes<double>, __builtin_convertvector(half[1], Vec<double>));
#endif
}
// Of the lanes of a plane: a register's worth of the tensors' arithmetic.
inline double sum_of_plane(const double* p, int64_t lanes) {
  Vec<double> sum = load(p);
  for (int64_t l = kLanes<double>; l < lanes; l += kLanes<double>) sum += load(p + l);
  double half[kLanes<double>];
  store(half, sum);
  for (int width = kLanes<double> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}
template <class V>
struct Two {
  V a, b;
};
template <class V>
Two(V, V) -> Two<V>;
template <class S>
struct TwoSums {
  Vec<S> a{}, b{};
};
template <int K, class F>
AEUP_INLINE auto tree(F f, int64_t first, int64_t step) {
  if constexpr (K == 1) {
    return f(first);
  } else {
    const auto x = tree<K / 2>(f, first, step), y = tree<K / 2>(f, first + K / 2 * step, step);
    return Two{x.a + y.a, x.b + y.b};
  }
}
// sums[2][lanes of the piece] += both results of f(coefficients, values of N tensors, where they are, how many), over
// all elements of the piece. Where a register reaches past a run, f gets `filler(coefficients, i)` there, for which its
// results must be 0.
template <int N, class T, class S, int M, class F, class Filler>
void add_piece(const Walk& w, const Piece& p, const T* const (&from)[N], double* sums, const OfPiece<S, M>& k, F f,
               Filler filler) {
  using V = Vec<S>;
  constexpr int64_t L = kLanes<S>;
  const int64_t period = w.period, width = w.lanes_of(p), run = p.run;
  const auto add = [=](auto x, int64_t l) AEUP_INLINED { add_to(sums + l, x.a), add_to(sums + width + l, x.b); };
  // What a run has beyond whole trees waits for that of the next, where a period is one register.
  std::vector<TwoSums<S>> pending(period == L ? p.planes : 0);
  const int64_t registers = (run % (kTree * period) + L - 1) / L;
  int64_t waiting = 0;
  const auto flush = [&] {
    for (int64_t q = 0; q < p.planes; ++q) add(pending[q], q * L), pending[q] = {};
    waiting = 0;
  };
  const OfPiece<S, M> of = k;
  const T* in[N];
  std::copy_n(from, N, in);
  const auto over_run = [&](int64_t e, int64_t q) AEUP_INLINED {
    const int64_t end = e + run;
    V c[M];
    of.at_run(q, c);
    const auto one = [&](int64_t at) AEUP_INLINED {
      V x[N];
      for (int i = 0; i < N; ++i) x[i] = load(in[i] + at);
      return f(c, x, at, L);
    };
    const auto rest = [&]() AEUP_INLINED {
      V x[N];
      for (int i = 0; i < N; ++i) x[i] = load_first(in[i] + e, int(end - e), filler(c, i));
      return f(c, x, e, end - e);
    };
    if (period == L) {
      for (; e + kTree * L <= end; e += kTree * L) add(tree<kTree>(one, e, L), q * L);
      auto sum = pending[q];
      const auto wait = [&](auto x) AEUP_INLINED { sum.a += x.a, sum.b += x.b; };
      for (; e + L <= end; e += L) wait(one(e));
      if (e < end) wait(rest());
      pending[q] = sum;
      return;
    }
    for (; e + kTree * period <= end; e += kTree * period)
      for (int64_t l = 0; l < period; l += L) of.at_lane(l, c), add(tree<kTree>(one, e + l, period), l);
    int64_t l = 0;
    for (; e + L <= end; e += L, l = l + L < period ? l + L : 0) of.at_lane(l, c), add(one(e), l);
    if (e < end) of.at_lane(l, c), add(rest(), l);
  };
  w.for_runs(p, over_run, [&] {
    if (period == L && (waiting += registers) >= kTree) flush();
  });
  if (waiting) flush();
}

// Rows [2][c] of partial results; a piece writes those of its channels.
struct Partials {
  std::vector<double> sums;
  int64_t c;
  explicit Partials(const Walk& w) : sums(w.rows * 2 * w.c), c(w.c) {}
  double* row(int64_t i, int which) { return sums.data() + (2 * i + which) * c; }
};

// Mean and sum of squared distances from it, of all values of each channel of each sample: [samples * c].
template <class T>
void statistics(const T* input, const Walk& w, ParallelFor parallel, std::vector<double>& mean,
                std::vector<double>& square) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  Partials partials(w);
  over_pieces(w, parallel, [&](int64_t i) {
    const Piece p = w.piece(i);
    const T* const from[1] = {input};
    const int64_t lanes = w.lanes_of(p), channels = w.channels_of(p);
    std::vector<double> sums(2 * lanes);
    // Distances are from the mean of a few values of the lane (in NCHW: of the plane), so that one far from the others
    // does no harm.
    std::vector<S> center(w.adjacent ? lanes : channels);
    const OfPiece<S, 1> centers{w.adjacent ? center.data() : nullptr, w.period, {center.data()}};
    const auto distance = [](const V(&k)[1], const V(&x)[1], int64_t, int64_t) AEUP_INLINED {
      const V d = x[0] - k[0];
      return Two{d, d * d};
    };
    const auto filler = [](const V(&k)[1], int) { return k[0]; };
    const auto of_plane = [&](int64_t q) { return sum_of_plane(sums.data() + q * w.period, w.period); };
    Piece few = p;
    few.runs = std::min(p.runs, p.run < kTree * w.period ? kTree : 1), few.run = std::min(p.run, kTree * w.period);
    add_piece(w, few, from, sums.data(), centers, distance, filler);
    if (w.adjacent)
      w.for_lanes(few, [&](int64_t l, int64_t, double n) { center[l] = S(sums[l] / n); });
    else
      for (int64_t q = 0; q < channels; ++q) center[q] = S(of_plane(q) / double(few.runs * few.run));
    std::fill(sums.begin(), sums.end(), 0.0);
    add_piece(w, p, from, sums.data(), centers, distance, filler);
    double *means = partials.row(p.row, 0) + p.channel, *squares = partials.row(p.row, 1) + p.channel;
    double* const of_squares = sums.data() + lanes;
    if (!w.adjacent) {
      const double n = double(p.runs * p.run);
      for (int64_t q = 0; q < channels; ++q) {
        const double d = of_plane(q) / n;
        const double square = sum_of_plane(of_squares + q * w.period, w.period);
        means[q] = center[q] + d, squares[q] = std::max(square - n * d * d, 0.0);  // NaN stays
      }
      return;
    }
    w.for_lanes(p, [&](int64_t l, int64_t j, double n) {
      of_squares[l] = std::max(of_squares[l] - sums[l] * sums[l] / n, 0.0);  // NaN stays
      sums[l] = center[l] + sums[l] / n;
      means[j] += n * sums[l];
    });
    const double count = double(w.count(p.row));
    for (int64_t j = 0; j < channels; ++j) means[j] /= count;
    w.for_lanes(p, [&](int64_t l, int64_t j, double n) {
      const double d = sums[l] - means[j];
      squares[j] += of_squares[l] + n * d * d;
    });
  });
  const int64_t rows = w.rows / w.samples;
  mean.assign(w.samples * w.c, 0.0), square.assign(w.samples * w.c, 0.0);
  for (int64_t s = 0; s < w.samples; ++s) {
    double *const means = mean.data() + s * w.c, *const squares = square.data() + s * w.c;
    for (int64_t i = s * rows; i < (s + 1) * rows; ++i) {
      const double part = double(w.count(i)) / double(w.n * w.pixels);
      for (int64_t j = 0; j < w.c; ++j) means[j] += part * partials.row(i, 0)[j];
    }
    for (int64_t i = s * rows; i < (s + 1) * rows; ++i) {
      const double n = double(w.count(i));
      for (int64_t j = 0; j < w.c; ++j) {
        const double d = partials.row(i, 0)[j] - means[j];
        squares[j] += partials.row(i, 1)[j] + n * d * d;
      }
    }
  }
}

// For [2][samples * c]: of each channel of each sample the sums of the gradient before the activation, and of it times
// the distance from the mean. k: mean, scale, bias. Where `kept` is given, the gradient before the activation goes
// there.
template <class T, class S, class F>
std::vector<double> gradient_sums(const Walk& w, ParallelFor parallel, const T* const (&from)[2], T* kept,
                                  const Coefficients<S, 5>& k, F activation) {
  using V = Vec<S>;
  Partials partials(w);
  over_pieces(w, parallel, [&](int64_t i) {
    const Piece p = w.piece(i);
    const int64_t lanes = w.lanes_of(p);
    std::vector<double> found(2 * lanes);
    const auto both = [=](const V(&c)[5], const V(&x)[2], int64_t at, int64_t n) AEUP_INLINED {
      const V d = x[0] - c[0], g = activation.gradient(d * c[1] + c[2], x[1]);
      if (F::smooth && kept && n == kLanes<S>) store(kept + at, g);
      if (F::smooth && kept && n < kLanes<S>) store_first(kept + at, g, int(n));
      return Two{g, g * d};
    };
    add_piece(w, p, from, found.data(), k.of(w, p), both, [](const V(&)[5], int) { return V{}; });
    double *of_grad = partials.row(p.row, 0) + p.channel, *of_product = partials.row(p.row, 1) + p.channel;
    if (!w.adjacent) {
      for (int64_t q = 0; q < p.planes; ++q) {
        of_grad[q] = sum_of_plane(&found[q * w.period], w.period);
        of_product[q] = sum_of_plane(&found[lanes + q * w.period], w.period);
      }
      return;
    }
    w.for_lanes(p, [&](int64_t l, int64_t j, double) { of_grad[j] += found[l], of_product[j] += found[lanes + l]; });
  });
  const int64_t rows = w.rows / w.samples, channels = w.samples * w.c;
  std::vector<double> total(2 * channels);
  for (int64_t i = 0; i < w.rows; ++i)
    for (int which = 0; which < 2; ++which)
      for (int64_t j = 0; j < w.c; ++j) total[which * channels + i / rows * w.c + j] += partials.row(i, which)[j];
  return total;
}

// --- elements ---

// to[i] = f(values of N tensors, coefficients) over all pieces.
template <int N, class T, class S, int M, class F>
void map_elements(const Walk& w, ParallelFor parallel, const T* const (&from)[N], T* to, const Coefficients<S, M>& all,
                  F f) {
  using V = Vec<S>;
  constexpr int64_t L = kLanes<S>;
  over_pieces(w, parallel, [&](int64_t i) {
    // Copies: what lies behind a reference is read again after every store.
    const Piece p = w.piece(i);
    const OfPiece<S, M> k = all.of(w, p);
    const int64_t period = w.period, run = p.run;
    const F of = f;
    T* const out = to;
    const T* in[N];
    std::copy_n(from, N, in);
    const auto over_run = [=](int64_t e, int64_t q) AEUP_INLINED {
      const int64_t end = e + run;
      V c[M], x[N];
      k.at_run(q, c);
      for (int64_t l = 0; e + L <= end; e += L) {
        for (int n = 0; n < N; ++n) x[n] = load(in[n] + e);
        store(out + e, of(x, c));
        if (period == L) continue;
        l = l + L < period ? l + L : 0;
        k.at_lane(l, c);
      }
      if (e == end) return;
      for (int n = 0; n < N; ++n) x[n] = load_first(in[n] + e, int(end - e), V{});
      store_first(out + e, of(x, c), int(end - e));
    };
    w.for_runs(p, over_run, [] {});
  });
}

// to = scale * g - k[3] - k[4] * (x - mean), g the gradient before the activation; k: mean, scale, bias, and what is
// subtracted (`subtracts`), alone and times the distance. `kept`: g is in `to`.
template <class T, class S, class F>
void input_gradient(const Walk& w, ParallelFor parallel, const T* const (&from)[2], T* to, const Coefficients<S, 5>& k,
                    F activation, bool subtracts, bool kept) {
  using V = Vec<S>;
  if (kept) {
    const T* const again[2] = {from[0], to};
    return map_elements<2>(w, parallel, again, to, k, [=](const V(&x)[2], const V(&c)[5]) {
      return subtracts ? c[1] * x[1] - c[3] - (x[0] - c[0]) * c[4] : c[1] * x[1];
    });
  }
  map_elements<2>(w, parallel, from, to, k, [=](const V(&x)[2], const V(&c)[5]) {
    const V d = x[0] - c[0], before = activation.gradient(d * c[1] + c[2], x[1]);
    return subtracts ? c[1] * before - c[3] - d * c[4] : c[1] * before;
  });
}

template <class F>
void with_type(DType t, F f) {
  if (t == DType::f64) return f(double());
  if (t == DType::f32) return f(float());
  if (t == DType::f16) return f(f16());
  f(bf16());
}

}  // namespace AEUP_ISA
}  // namespace aeup
