// Batch normalisation with the activation after it, on the CPU. Compiled once per instruction set (AEUP_ISA);
// csrc/cpu/dispatch.cpp chooses at run time.
//
// Forward: statistics, then output; backward: sums per channel, then the input's gradient. Both layouts are walked in
// the order of memory, a register at a time: lane l of a period stands for one channel, so in channels-last a period is
// a common multiple of the channels and the register. The tensors are cut into pieces by their sizes alone, and
// what the pieces add up is added in their order: the same bits for any number of threads.
//
// Eight values of a lane are added as a tree in the tensors' arithmetic, and that to a double: the error of a long sum
// is about that of eight. Statistics are of distances from a value about in the middle, joined as counts, means and
// squared distances (Chan, Golub & LeVeque, 1983, "Algorithms for computing the sample variance").
#include "cpu/batch_norm.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/activations.h"

namespace aeup {
namespace AEUP_ISA {
namespace {

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
  int64_t at, runs, run, step, row, channel;
};
// Lane l belongs to channel `channel` + l % channels.
struct Walk {
  int64_t c, channels, period, lanes;  // lanes: of the period those that stand for a channel
  int64_t pieces, rows;
  int64_t n, pixels, total;
  int64_t length;                    // channels-last: elements of a piece
  int64_t group, segment, segments;  // else: planes of a piece, their elements, pieces of a plane
  bool adjacent, by_pixel;

  Piece piece(int64_t i) const {
    if (adjacent) {
      const int64_t at = i * length, size = std::min(length, total - at);
      return by_pixel ? Piece{at, size / c, c, c, i, 0} : Piece{at, 1, size, 0, i, 0};
    }
    const int64_t s = i % segments, channel = i / segments % c, g = i / (segments * c);
    const int64_t runs = std::min(group, n - g * group), run = std::min(segment, pixels - s * segment);
    return {(g * group * c + channel) * pixels + s * segment, runs, run, c * pixels, g * segments + s, channel};
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
    for (int64_t first = 0; first < present; first += channels)
      for (int64_t j = 0; j < channels; ++j)
        if (first + j < present) f(first + j, j, double(p.runs * (whole + (first + j < more))));
  }
};
template <class S>
Walk walk_of(const BatchNorm& b) {
  constexpr int64_t L = kLanes<S>;
  Walk w{};
  w.c = b.c, w.n = b.n, w.pixels = b.pixels, w.total = b.n * b.c * b.pixels;
  w.adjacent = b.channels_adjacent();
  if (w.adjacent) {
    w.by_pixel = b.c > kWidePixel && b.c % L;
    w.channels = b.c;
    w.period = w.by_pixel ? (b.c + L - 1) / L * L : std::lcm(b.c, L);
    w.lanes = w.by_pixel ? b.c : w.period;
    const int64_t unit = w.by_pixel ? b.c : kTree * w.period, units = (w.total + unit - 1) / unit;
    const int64_t most = w.by_pixel ? kPerLane : kPerLane / kTree;
    const int64_t least = std::max<int64_t>((kPiece + unit - 1) / unit, 8);
    w.length = unit * std::min(std::max((units + kPieces - 1) / kPieces, least), most);
    w.pieces = w.rows = (w.total + w.length - 1) / w.length;
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
  if (w.total < kSmall) return body(0, w.pieces, &f);
  parallel(w.pieces, body, &f);
}

// --- values per channel ---

template <class S>
struct Channels {
  const BatchNorm& b;
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
  std::vector<S> of_channel[N], table;
  explicit Coefficients(int64_t c) {
    for (auto& v : of_channel) v.resize(c);
  }
  void spread(const Walk& w) {
    if (!w.adjacent) return;
    table.resize(N * w.period);
    for (int k = 0; k < N; ++k)
      for (int64_t l = 0; l < w.lanes; l += w.c)
        std::copy(of_channel[k].begin(), of_channel[k].end(), table.begin() + k * w.period + l);
  }
  // [N][period]; `own`: room for those of one channel.
  const S* of(const Walk& w, int64_t channel, S (&own)[N * kLanes<S>]) const {
    if (w.adjacent) return table.data();
    for (int k = 0; k < N; ++k) std::fill_n(own + k * kLanes<S>, kLanes<S>, of_channel[k][channel]);
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

// count, mean and sum of squared distances from it, of all values of each channel.
template <class T>
void statistics(const BatchNorm& b, const Walk& w, ParallelFor parallel, std::vector<double>& mean,
                std::vector<double>& square) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  const T* const input = static_cast<const T*>(b.input);
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
    w.for_lanes(few, [&](int64_t l, int64_t, double n) { center[l] = S(sums[l] / n); });
    std::fill(sums.begin(), sums.end(), 0.0);
    const auto distance = [&](int64_t l, const V(&x)[1], int64_t, int64_t) {
      const V d = x[0] - load(center.data() + l);
      return Two{d, d * d};
    };
    add_piece<1>(w, p, from, sums.data(), distance, [&](int64_t l, int) { return load(center.data() + l); });
    double *means = partials.row(p.row, 0) + p.channel, *squares = partials.row(p.row, 1) + p.channel;
    double* const of_squares = sums.data() + period;
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
  mean.assign(w.c, 0.0), square.assign(w.c, 0.0);
  for (int64_t i = 0; i < w.rows; ++i) {
    const double part = double(w.count(i)) / double(b.n * b.pixels);
    for (int64_t j = 0; j < w.c; ++j) mean[j] += part * partials.row(i, 0)[j];
  }
  for (int64_t i = 0; i < w.rows; ++i) {
    const double n = double(w.count(i));
    for (int64_t j = 0; j < w.c; ++j) {
      const double d = partials.row(i, 0)[j] - mean[j];
      square[j] += partials.row(i, 1)[j] + n * d * d;
    }
  }
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
    const S* const table = coefficients.of(w, p.channel, own);
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

template <class T, class F>
void forward(const BatchNorm& b, ParallelFor parallel, F activation) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  const Walk w = walk_of<S>(b);
  const Channels<S> channels{b};
  std::vector<double> mean, square;
  if (b.training) statistics<T>(b, w, parallel, mean, square);
  Coefficients<S, 3> k(b.c);
  const double n = double(b.n * b.pixels);
  for (int64_t i = 0; i < b.c; ++i) {
    const S old_mean = channels.get(b.running_mean, i, S(0)), old_var = channels.get(b.running_var, i, S(0));
    const double var = b.training ? square[i] / n : old_var;
    const S center = b.training ? S(mean[i]) : old_mean, invstd = S(1.0 / std::sqrt(var + b.eps));
    if (b.training && b.next_mean) {
      channels.set(b.next_mean, i, S((1 - b.momentum) * old_mean + b.momentum * mean[i]));
      channels.set(b.next_var, i, S((1 - b.momentum) * old_var + b.momentum * (square[i] / (n - 1))));
    }
    static_cast<S*>(b.mean)[i] = center, static_cast<S*>(b.invstd)[i] = invstd;
    const S scale = invstd * channels.get(b.weight, i, S(1)), rounding = b.training ? S(mean[i] - center) : S(0);
    k.of_channel[0][i] = center, k.of_channel[1][i] = scale;
    k.of_channel[2][i] = channels.get(b.bias, i, S(0)) - rounding * scale;
  }
  if (b.training && b.next_counter) *b.next_counter = *b.counter + 1;
  k.spread(w);
  const T* const from[1] = {static_cast<const T*>(b.input)};
  map_elements<1>(w, parallel, from, static_cast<T*>(b.output), k,
                  [=](const V(&x)[1], const V(&c)[3]) { return activation.value((x[0] - c[0]) * c[1] + c[2]); });
}

template <class T, class F>
void backward(const BatchNorm& b, ParallelFor parallel, F activation) {
  using S = typename Arith<T>::type;
  using V = Vec<S>;
  const Walk w = walk_of<S>(b);
  const Channels<S> channels{b};
  const T* const from[2] = {static_cast<const T*>(b.input), static_cast<const T*>(b.grad)};
  const S *mean = static_cast<const S*>(b.mean), *invstd = static_cast<const S*>(b.invstd);
  Coefficients<S, 5> k(b.c);  // mean, scale, bias; of the sums: subtracted, and subtracted times the distance
  for (int64_t i = 0; i < b.c; ++i) {
    k.of_channel[0][i] = mean[i];
    k.of_channel[1][i] = invstd[i] * channels.get(b.weight, i, S(1));
    k.of_channel[2][i] = channels.get(b.bias, i, S(0));
  }
  // The gradient before a smooth activation is kept where the input's goes: cheaper than to compute it again.
  T* const kept = static_cast<T*>(b.input_grad);
  const bool keep = F::smooth && kept;
  const bool sums = b.training ? b.input_grad || b.weight_grad || b.bias_grad : b.weight_grad || b.bias_grad;
  if (sums) {
    k.spread(w);
    Partials partials(w);
    over_pieces(w, parallel, [&](int64_t i) {
      const Piece p = w.piece(i);
      S own[5 * kLanes<S>];
      const S* const table = k.of(w, p.channel, own);
      std::vector<double> found(2 * w.period);
      const auto both = [&](int64_t l, const V(&x)[2], int64_t at, int64_t n) {
        const V d = x[0] - load(table + l);
        const V z = d * load(table + w.period + l) + load(table + 2 * w.period + l);
        const V g = activation.gradient(z, x[1]);
        if (keep && n == kLanes<S>) store(kept + at, g);
        if (keep && n < kLanes<S>) store_first(kept + at, g, int(n));
        return Two{g, g * d};
      };
      add_piece<2>(w, p, from, found.data(), both, [](int64_t, int) { return V{}; });
      double *of_grad = partials.row(p.row, 0) + p.channel, *of_product = partials.row(p.row, 1) + p.channel;
      w.for_lanes(p,
                  [&](int64_t l, int64_t j, double) { of_grad[j] += found[l], of_product[j] += found[w.period + l]; });
    });
    std::vector<double> total(2 * b.c);
    for (int64_t i = 0; i < w.rows; ++i)
      for (int64_t j = 0; j < 2 * b.c; ++j) total[j] += partials.row(i, 0)[j];
    const double n = double(b.n * b.pixels);
    for (int64_t i = 0; i < b.c; ++i) {
      const double of_weight = total[b.c + i] * invstd[i];
      if (b.weight_grad) channels.set(b.weight_grad, i, S(of_weight));
      if (b.bias_grad) channels.set(b.bias_grad, i, S(total[i]));
      k.of_channel[3][i] = S(total[i] / n), k.of_channel[4][i] = S(of_weight * invstd[i] / n);
    }
  }
  if (!b.input_grad) return;
  k.spread(w);
  const T* const input = from[0];
  if (keep && sums) {
    const T* const again[2] = {input, kept};
    return map_elements<2>(w, parallel, again, kept, k, [=](const V(&x)[2], const V(&c)[5]) {
      return c[1] * (b.training ? x[1] - c[3] - (x[0] - c[0]) * c[4] : x[1]);
    });
  }
  map_elements<2>(w, parallel, from, kept, k, [=](const V(&x)[2], const V(&c)[5]) {
    const V d = x[0] - c[0], before = activation.gradient(d * c[1] + c[2], x[1]);
    return c[1] * (b.training ? before - c[3] - d * c[4] : before);
  });
}

template <class F>
void with_type(DType t, F f) {
  if (t == DType::f64) return f(double());
  if (t == DType::f32) return f(float());
  if (t == DType::f16) return f(f16());
  f(bf16());
}

}  // namespace

void batch_norm(const BatchNorm& b, ParallelFor parallel) {
  with_type(b.dtype, [&](auto t) {
    using T = decltype(t);
    with_activation<typename Arith<T>::type>(b.activation, b.slope,
                                             [&](auto activation) { forward<T>(b, parallel, activation); });
  });
}
void batch_norm_backward(const BatchNorm& b, ParallelFor parallel) {
  with_type(b.dtype, [&](auto t) {
    using T = decltype(t);
    with_activation<typename Arith<T>::type>(b.activation, b.slope,
                                             [&](auto activation) { backward<T>(b, parallel, activation); });
  });
}

}  // namespace AEUP_ISA
}  // namespace aeup
