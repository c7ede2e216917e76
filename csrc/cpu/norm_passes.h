// What batch and group normalisation share on the CPU: how they walk the tensors, their sums, their elements. Compiled
// once per instruction set (AEUP_ISA).
//
// Forward: statistics, then output; backward: sums per channel, then the input's gradient. Both layouts are walked in
// the order of memory, a register at a time: lane l of a period stands for one channel, so in channels-last a period is
// a common multiple of the channels and the register. The tensors are cut into pieces by their sizes alone, and
// what the pieces add up is added in their order: the same bits for any number of threads.
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

constexpr int64_t kSmall = 1 << 15;  // elements below which a second thread costs more than it brings
constexpr int64_t kPerLane = 512;    // values of a lane in a piece, about
constexpr int64_t kPieces = 64;      // at least, in a large tensor
constexpr int64_t kPiece = 1 << 14;  // elements, at least: sums are joined for each piece and channel
constexpr int64_t kWidePixel = 256;  // channels from which a pixel that does not divide is walked by itself
constexpr int64_t kTree = 8;

// --- how the tensors are walked ---

// A piece: `runs` stretches of `run` elements, `step` apart, each from lane 0 on. Its sums go to row `row` of the
// partial results, `channels` of them from `channel` on.
struct Piece {
  int64_t at, runs, run, step, row, channel, sample;
};
// Lane l belongs to channel `channel` + l % channels. Of adjacent channels there may be `samples` tensors after one
// another, each with channels of its own: the same number of pieces and rows each.
struct Walk {
  int64_t c, channels, period, lanes;  // lanes: of the period those that stand for a channel
  int64_t samples, pieces, rows;
  int64_t n, pixels, total;          // of a sample
  int64_t length;                    // channels-last: elements of a piece
  int64_t group, segment, segments;  // else: planes of a piece, their elements, pieces of a plane
  bool adjacent, by_pixel;

  Piece piece(int64_t i) const {
    if (adjacent) {
      const int64_t each = pieces / samples, sample = i / each, in_sample = i % each * length;
      const int64_t at = sample * total + in_sample, size = std::min(length, total - in_sample);
      return by_pixel ? Piece{at, size / c, c, c, i, 0, sample} : Piece{at, 1, size, 0, i, 0, sample};
    }
    const int64_t s = i % segments, channel = i / segments % c, g = i / (segments * c);
    const int64_t runs = std::min(group, n - g * group), run = std::min(segment, pixels - s * segment);
    return {(g * group * c + channel) * pixels + s * segment, runs, run, c * pixels, g * segments + s, channel, 0};
  }
  // Values of a channel that row `row` is about.
  int64_t count(int64_t row) const {
    const Piece p = piece(adjacent ? row : row / segments * segments * c + row % segments);
    return adjacent ? p.runs * p.run / c : p.runs * p.run;
  }
  // f(lane, channel of the piece, values that the piece has of the lane), for all lanes that have any.
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
    w.group = std::max<int64_t>(1, std::min(b.n, most / b.pixels));
    w.rows = (b.n + w.group - 1) / w.group * w.segments;
    w.pieces = w.rows * b.c;
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
// N coefficients a lane. In channels-last made once, else by each piece, of its channel.
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
  // [N][period]; `own`: room for those of one channel.
  const S* of(const Walk& w, const Piece& p, S (&own)[N * kLanes<S>]) const {
    if (w.adjacent) return table.data() + p.sample * N * w.period;
    for (int k = 0; k < N; ++k) std::fill_n(own + k * kLanes<S>, kLanes<S>, of_channel[k][p.channel]);
    return own;
  }
};

// --- sums of a piece ---

inline void add_to(double* sum, Vec<double> x) { store(sum, load(sum) + x); }
inline void add_to(double* sum, VF x) {
  using Half __attribute__((vector_size(kVectorBytes / 2), may_alias)) = float;
  Half half[2];
  std::memcpy(half, &x, sizeof x);
  add_to(sum, __builtin_convertvector(half[0], Vec<double>));
  add_to(sum + kLanes<double>, __builtin_convertvector(half[1], Vec<double>));
}
template <class V>
struct Two {
  V a, b;
};
template <class V>
Two(V, V) -> Two<V>;
template <int K, class F>
inline auto tree(F f, int64_t first, int64_t step) {
  if constexpr (K == 1) {
    return f(first);
  } else {
    const auto x = tree<K / 2>(f, first, step), y = tree<K / 2>(f, first + K / 2 * step, step);
    return Two{x.a + y.a, x.b + y.b};
  }
}
// sums[2][period] += both results of f(lane, values of N tensors, where they are, how many), over all elements of the
// piece. Where a register reaches past a run, f gets `filler(lane, k)` there, whose results must be 0.
template <int N, class T, class F, class Filler>
void add_piece(const Walk& w, const Piece& p, const T* const (&from)[N], double* sums, F f, Filler filler) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  constexpr int64_t L = kLanes<S>;
  const int64_t period = w.period;
  const auto add = [&](auto x, int64_t l) { add_to(sums + l, x.a), add_to(sums + period + l, x.b); };
  auto pending = Two{V{}, V{}};  // where a period is one register: of short runs
  int waiting = 0;
  for (int64_t r = 0; r < p.runs; ++r) {
    const int64_t end = p.at + r * p.step + p.run;
    int64_t e = p.at + r * p.step;
    const auto one = [&](int64_t at, int64_t l) {
      V x[N];
      for (int k = 0; k < N; ++k) x[k] = load(from[k] + at);
      return f(l, x, at, L);
    };
    const auto rest = [&](int64_t l) {
      V x[N];
      for (int k = 0; k < N; ++k) x[k] = load_first(from[k] + e, int(end - e), filler(l, k));
      return f(l, x, e, end - e);
    };
    for (; e + kTree * period <= end; e += kTree * period)
      for (int64_t l = 0; l < period; l += L)
        add(tree<kTree>([&](int64_t at) { return one(at, l); }, e + l, period), l);
    if (period == L) {
      const auto wait = [&](auto x) {
        pending.a += x.a, pending.b += x.b;
        if (++waiting < kTree) return;
        add(pending, 0);
        pending.a = pending.b = V{}, waiting = 0;
      };
      for (; e + L <= end; e += L) wait(one(e, 0));
      if (e < end) wait(rest(0));
    } else {
      int64_t l = 0;
      for (; e + L <= end; e += L, l = l + L < period ? l + L : 0) add(one(e, l), l);
      if (e < end) add(rest(l), l);
    }
  }
  if (waiting) add(pending, 0);
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
    const int64_t period = w.period;
    std::vector<double> sums(2 * period);
    // Distances are from the mean of a few values of the lane, so that one far from the others does no harm.
    std::vector<S> center(period);
    Piece few = p;
    few.runs = std::min(p.runs, p.run < kTree * period ? kTree : 1), few.run = std::min(p.run, kTree * period);
    const auto value = [](int64_t, const V(&x)[1], int64_t, int64_t) { return Two{x[0], x[0]}; };
    add_piece<1>(w, few, from, sums.data(), value, [](int64_t, int) { return V{}; });
    const auto add_up = [&](const double* of) { return std::accumulate(of, of + period, 0.0); };
    if (w.channels == 1)
      std::fill(center.begin(), center.end(), S(add_up(sums.data()) / double(few.runs * few.run)));
    else
      w.for_lanes(few, [&](int64_t l, int64_t, double n) { center[l] = S(sums[l] / n); });
    std::fill(sums.begin(), sums.end(), 0.0);
    const auto distance = [&](int64_t l, const V(&x)[1], int64_t, int64_t) {
      const V d = x[0] - load(center.data() + l);
      return Two{d, d * d};
    };
    add_piece<1>(w, p, from, sums.data(), distance, [&](int64_t l, int) { return load(center.data() + l); });
    double *means = partials.row(p.row, 0) + p.channel, *squares = partials.row(p.row, 1) + p.channel;
    double* const of_squares = sums.data() + period;
    if (w.channels == 1) {  // one value in the middle for all lanes
      const double n = double(p.runs * p.run), d = add_up(sums.data()) / n;
      means[0] = center[0] + d, squares[0] = std::max(add_up(of_squares) - n * d * d, 0.0);  // NaN stays
      return;
    }
    w.for_lanes(p, [&](int64_t l, int64_t j, double n) {
      of_squares[l] = std::max(of_squares[l] - sums[l] * sums[l] / n, 0.0);  // NaN stays
      sums[l] = center[l] + sums[l] / n;
      means[j] += n * sums[l];
    });
    const double count = double(w.count(p.row));
    for (int64_t j = 0; j < w.channels; ++j) means[j] /= count;
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
    S own[5 * kLanes<S>];
    const S* const table = k.of(w, p, own);
    std::vector<double> found(2 * w.period);
    const auto both = [&](int64_t l, const V(&x)[2], int64_t at, int64_t n) {
      const V d = x[0] - load(table + l);
      const V z = d * load(table + w.period + l) + load(table + 2 * w.period + l);
      const V g = activation.gradient(z, x[1]);
      if (kept && n == kLanes<S>) store(kept + at, g);
      if (kept && n < kLanes<S>) store_first(kept + at, g, int(n));
      return Two{g, g * d};
    };
    add_piece<2>(w, p, from, found.data(), both, [](int64_t, int) { return V{}; });
    double *of_grad = partials.row(p.row, 0) + p.channel, *of_product = partials.row(p.row, 1) + p.channel;
    w.for_lanes(p, [&](int64_t l, int64_t j, double) { of_grad[j] += found[l], of_product[j] += found[w.period + l]; });
  });
  const int64_t rows = w.rows / w.samples, channels = w.samples * w.c;
  std::vector<double> total(2 * channels);
  for (int64_t i = 0; i < w.rows; ++i)
    for (int which = 0; which < 2; ++which)
      for (int64_t j = 0; j < w.c; ++j) total[which * channels + i / rows * w.c + j] += partials.row(i, which)[j];
  return total;
}

// --- elements ---

// to[i] = f(lane, values of N tensors) over all pieces.
template <int N, class T, class S, int M, class F>
void map_elements(const Walk& w, ParallelFor parallel, const T* const (&from)[N], T* to,
                  const Coefficients<S, M>& coefficients, F f) {
  using V = Vec<S>;
  constexpr int64_t L = kLanes<S>;
  over_pieces(w, parallel, [&](int64_t i) {
    const Piece p = w.piece(i);
    S own[M * L];
    const S* const table = coefficients.of(w, p, own);
    for (int64_t r = 0; r < p.runs; ++r) {
      const int64_t start = p.at + r * p.step, end = start + p.run;
      const auto at_lane = [&](int64_t l, const V(&x)[N]) {
        V k[M];
        for (int m = 0; m < M; ++m) k[m] = load(table + m * w.period + l);
        return f(x, k);
      };
      int64_t e = start, l = 0;
      for (; e + L <= end; e += L, l = l + L < w.period ? l + L : 0) {
        V x[N];
        for (int k = 0; k < N; ++k) x[k] = load(from[k] + e);
        store(to + e, at_lane(l, x));
      }
      if (e == end) continue;
      V x[N];
      for (int k = 0; k < N; ++k) x[k] = load_first(from[k] + e, int(end - e), V{});
      store_first(to + e, at_lane(l, x), int(end - e));
    }
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
