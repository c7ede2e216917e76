// float32 as the operands of hopper_float*: rounded to tf32, or split into two such parts.
#pragma once
#include "common.cuh"

namespace aeup {

// Where channel c of a row goes, in the order in which strict_step reads the source.
AEUP_DEV int float_position(int c) { return c / 32 * 32 + c % 8 / 2 * 8 + c % 2 * 4 + c % 32 / 8; }

// v = hi + lo; of lo, the lower 13 bits, which wgmma does not read, are left as they come.
AEUP_DEV void split_tf32(float v, uint32_t* hi, uint32_t* lo) {
  *hi = round_tf32(v);
  *lo = __float_as_uint(v - __uint_as_float(*hi)) + 0x1000u;
}

template <bool kStrict>
AEUP_DEV void store_split(float* to, int64_t plane, int64_t at, float v) {
  const float hi = __uint_as_float(round_tf32(v));
  store_one(to + at, hi);
  if constexpr (kStrict) store_one(to + plane + at, __uint_as_float(round_tf32(v - hi)));
}

}  // namespace aeup
