// Plans for one instruction set (the width of a register shapes the lookup blocks).
#pragma once

#include <list>
#include <memory>
#include <tuple>

#include "cpu/plan.h"
#include "cpu/vec.h"

namespace aeup {
namespace AEUP_ISA {

// Source positions of an integer reduction follow step * d; false if taps without weight would read real data.
template <class A>
bool plan_phases(Plan<A>& plan) {
  const Band<A>& h = plan.h;
  if (h.dst == 0 || h.src % h.dst != 0 || h.src / h.dst < 2) return false;
  const int64_t s = h.src / h.dst;
  int64_t before = 0, after = 0;  // dst d reads [s * d - before, s * d + after)
  for (int64_t d = 0; d < h.dst; ++d) {
    before = std::max<int64_t>(before, s * d - h.first[d]);
    after = std::max<int64_t>(after, h.first[d] + h.count[d] - s * d);
  }
  for (int64_t d = 0; d < h.dst; ++d) {
    const int64_t lo = std::max<int64_t>(0, s * d - before), hi = std::min(h.src, s * d + after);
    if (h.count[d] == 0 || lo != h.first[d] || hi != h.first[d] + h.count[d]) return false;
  }
  const int64_t c = plan.channels, n = h.dst * c, lanes = kLanes<A>;
  plan.step = s;
  plan.lead = (before + s - 1) / s * s;
  plan.shift = plan.lead - before;
  plan.reach = before + after;
  plan.columns = h.dst + (plan.shift + plan.reach - 1) / s;
  plan.padded = (n + lanes - 1) / lanes * lanes;
  plan.phase_stride = (plan.columns - h.dst) * c + plan.padded;
  plan.weight.assign(plan.reach * plan.padded, A(0));
  for (int64_t d = 0; d < h.dst; ++d) {
    for (int32_t t = 0; t < h.count[d]; ++t) {
      const int64_t r = h.first[d] + t - (s * d - before);
      for (int64_t i = 0; i < c; ++i) plan.weight[r * plan.padded + d * c + i] = h.weight[d * h.taps + t];
    }
  }
  return true;
}

template <class A>
void plan_lookup(Plan<A>& plan) {
  const Band<A>& h = plan.h;
  const int64_t c = plan.channels, n = h.dst * c, lanes = kLanes<A>;
  for (int64_t e0 = 0; e0 < n; e0 += lanes) {
    typename Plan<A>::Block block{};
    int64_t low = INT64_MAX, high = 0;
    const int64_t d0 = e0 / c, d1 = (std::min(e0 + lanes, n) - 1) / c;
    for (int64_t d = d0; d <= d1; ++d) {
      low = std::min<int64_t>(low, h.first[d] * c);
      high = std::max<int64_t>(high, (h.first[d] + std::max(h.count[d], 1)) * c);
      block.taps = std::max(block.taps, h.count[d]);
      block.ragged = block.ragged || h.count[d] != h.count[d0];
    }
    block.base = int32_t(low);
    block.near = high - low <= 2 * lanes;
    block.at = int32_t(plan.index.size() / lanes);
    for (int32_t t = 0; t < block.taps; ++t) {
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t e = std::min(e0 + l, n - 1), d = e / c;
        const bool real = t < h.count[d];
        plan.index.push_back(real ? int32_t((h.first[d] + t) * c + e % c - low) : 0);
        plan.weight.push_back(real ? h.weight[d * h.taps + t] : A(0));
      }
    }
    plan.blocks.push_back(block);
  }
}

// Destination d is the sum of sources 2d and 2d + 1.
template <class A>
bool adds_pairs(const Band<A>& band) {
  bool good = band.sums && band.src == 2 * band.dst;
  for (int64_t d = 0; good && d < band.dst; ++d) good = band.first[d] == 2 * d && band.count[d] == 2;
  return good;
}

template <class A>
std::shared_ptr<const Plan<A>> make_plan(const Problem& p) {
  auto plan = std::make_shared<Plan<A>>();
  plan->channels = p.channels_last ? p.c : 1;
  plan->v = forward_band<A>(p, true);
  plan->h = forward_band<A>(p, false);
  if (p.backward) {
    plan->v = transpose(plan->v);
    plan->h = transpose(plan->h);
  }
  plan->rows_first = plan->v.dst < plan->v.src;
  plan->pairs = plan->channels == 1 && adds_pairs(plan->v) && adds_pairs(plan->h);
  if (plan->channels >= kLanes<A>) {
    plan->kind = Horizontal::pixels;
  } else if (plan_phases(*plan)) {
    plan->kind = Horizontal::phases;
  } else {
    plan->kind = Horizontal::lookup;
    plan_lookup(*plan);
  }
  return plan;
}

// The last few plans of this thread: a training step calls the same geometries again and again.
template <class A>
std::shared_ptr<const Plan<A>> plan_for(const Problem& p) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double, double, int>;
  const int flags = int(p.mode) * 32 + p.align_corners + 2 * p.antialias + 4 * p.backward + 8 * p.channels_last +
                    16 * cpu_vectorized_rule(p);
  const Key key{p.ih, p.iw, p.oh, p.ow, p.channels_last ? p.c : 1, p.scale_h, p.scale_w, flags};
  thread_local std::list<std::pair<Key, std::shared_ptr<const Plan<A>>>> recent;
  for (auto it = recent.begin(); it != recent.end(); ++it) {
    if (it->first == key) {
      recent.splice(recent.begin(), recent, it);
      return recent.front().second;
    }
  }
  recent.emplace_front(key, make_plan<A>(p));
  if (recent.size() > 16) recent.pop_back();
  return recent.front().second;
}

}  // namespace AEUP_ISA
}  // namespace aeup
