// A float32 weight as the operands of hopper_float.cuh.
#pragma once
#include "common.cuh"

namespace aeup {

// Where channel c of a row goes, in the order in which strict_step reads the source.
AEUP_DEV int float_position(int c) { return c / 32 * 32 + c % 8 / 2 * 8 + c % 2 * 4 + c % 32 / 8; }

template <bool kStrict>
AEUP_DEV void store_split(float* to, int64_t plane, int64_t at, float v) {
  const float hi = __uint_as_float(round_tf32(v));
  store_one(to + at, hi);
  if constexpr (kStrict) store_one(to + plane + at, __uint_as_float(round_tf32(v - hi)));
}

}  // namespace aeup
