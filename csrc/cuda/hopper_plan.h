// How the Hopper families see a problem: phases of an axis, arrangements of the phases, remembered choices. Host code.
#pragma once
#include <array>
#include <cstdlib>
#include <unordered_map>

#include "cuda/hopper.h"
#include "cuda/hopper_gemm.cuh"

namespace aeup {

// Whether of 64 channels in a step the last one has 32 at most: then half the products are zeros.
inline bool short_chunk(int64_t channels) { return (channels - 1) % 64 < 32; }

inline int floor_div(int a, int b) { return (a >= 0 ? a : a - b + 1) / b; }

// One transposed convolution with one input pixel along an axis writes each output once, whatever the stride: then the
// stride is taken as the kernel's extent, so that no tap falls outside; as long as there is a group for each phase.
inline Convolution normal(Convolution c) {
  const auto room = [](int kernel, int stride, int other) { return kernel <= stride || kernel * other <= kGemmGroups; };
  if (c.ih == 1 && c.dh == 1 && c.kh <= 8 && room(c.kh, c.sh, c.sw)) c.sh = c.kh;
  if (c.iw == 1 && c.dw == 1 && c.kw <= 8 && room(c.kw, c.sw, c.sh)) c.sw = c.kw;
  return c;
}

struct Phases {  // an axis of the forward: for each phase, its kernel indices and shifts
  int phases;
  int kernel[kGemmTaps], shift[kGemmTaps], first[kGemmGroups + 1];
};
// Phase r holds the outputs o = r (mod s), o = s * u + r, and takes input u + shift with shift = (r + p - d * k) / s.
inline Phases phases_of(int s, int p, int d, int k) {
  Phases a;
  a.phases = s;
  int count = 0;
  for (int r = 0; r < s; ++r) {
    a.first[r] = count;
    for (int i = 0; i < k; ++i)
      if ((r + p - d * i) % s == 0) a.kernel[count] = i, a.shift[count] = (r + p - d * i) / s, ++count;
  }
  a.first[s] = count;
  return a;
}

inline int forced_config() {
#ifdef AEUP_TUNE
  const char* text = getenv("AEUP_HOPPER");
  return text ? atoi(text) : -1;
#else
  return -1;
#endif
}

// Of the phases: a tile each; four in a tile; all as columns; or, for NCHW, the phases of a row in a tile whose rows
// are channels.
enum class Arrangement { separate, merged, columns, turned };

struct Choice {
  int config = 0;
  Arrangement arrangement = Arrangement::separate;
  Box box{};
  double cost = 1e300;
  int splits = 1;  // ranges of the sum
};

// Phases with equally many taps read the same pixels, phase r at pixel u - early[r]. `most` is the largest of them, -1
// where the phases differ.
struct Early {
  int of[kGemmGroups], most;
};
inline Early early_of(const Phases& a) {
  Early early{{}, 0};
  const int count = a.first[1];
  int least = a.shift[0];
  for (int r = 1; r < a.phases; ++r) {
    if (a.first[r + 1] - a.first[r] != count || count == 0) return {{}, -1};
    least = a.shift[a.first[r]] < least ? a.shift[a.first[r]] : least;
  }
  for (int r = 0; r < a.phases; ++r) {
    early.of[r] = a.shift[a.first[r]] - least;
    for (int i = 0; i < count; ++i)
      if (a.shift[a.first[r] + i] - early.of[r] != a.shift[i] - early.of[0]) return {{}, -1};
    early.most = early.of[r] > early.most ? early.of[r] : early.most;
  }
  return early;
}

template <size_t N>
struct KeyHash {
  size_t operator()(const std::array<int64_t, N>& key) const {
    uint64_t h = 0xcbf29ce484222325;
    for (const int64_t v : key) h = (h ^ uint64_t(v)) * 0x100000001b3, h ^= h >> 29;
    return size_t(h);
  }
};
// Keeps what `plan` finds for a problem: it searches for microseconds, and a model asks for the same few every time,
// a call for the same one several times.
template <class Found>
const Found& remembered(const Convolution& c, Pass pass, Found (*plan)(const Convolution&)) {
  using Key = std::array<int64_t, 17>;
  thread_local std::unordered_map<Key, Found, KeyHash<17>> known;
  thread_local const std::pair<const Key, Found>* last = nullptr;
  const bool end = !is_bound(c.activation);  // what plans depend on
  const int flags = c.tf32 | c.channels_last << 1 | c.weight_channels_last << 2 | c.folded() << 3 | end << 4;
  const int64_t kind = (int64_t(c.dtype) << 5 | flags) * 4 + int64_t(pass);
  const Key key{kind, c.n,  c.ci, c.co, c.ih, c.iw, c.oh, c.ow,           c.kh,
                c.kw, c.sh, c.sw, c.ph, c.pw, c.dh, c.dw, forced_config()};
  if (last && last->first == key) return last->second;
  auto found = known.find(key);
  if (found == known.end()) {
    if (known.size() > 4096) known.clear();
    found = known.emplace(key, plan(c)).first;
  }
  last = &*found;
  return last->second;
}

template <class P>
void set_dividers(P* p) {
  p->by_splits = Divider(p->splits), p->by_groups = Divider(p->groups), p->by_blocks = Divider(p->blocks);
  p->by_c = Divider(p->c);
  p->by_tiles_w = Divider(p->tiles_w), p->by_tiles_h = Divider(p->tiles_h);
}

}  // namespace aeup
