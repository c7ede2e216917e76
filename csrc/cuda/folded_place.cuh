// Where the taps of a weight go: FoldedPlace (fold.h) on the device.
#pragma once
#include "common.cuh"
#include "fold.h"

namespace aeup {

// Of one axis: tap t is of the phase (t + shift) mod phases, and its step there is t / phases.
struct PlacedAxis {
  Divider phases;
  int shift;
  int64_t step, phase;  // how far each moves the result

  PlacedAxis() = default;
  PlacedAxis(int phases, int padding, int64_t step, int64_t phase)
      : phases(phases), shift(((-padding) % phases + phases) % phases), step(step), phase(phase) {}
  AEUP_HD int phase_of(int t) const { return t + shift - phases.divide(t + shift) * int(phases.divisor); }
  AEUP_HD bool is_last(int t) const { return phase_of(t) + 1 == int(phases.divisor); }
  AEUP_HD int64_t offset(int t) const { return phases.divide(t) * step + phase_of(t) * phase; }
};
// Tap (y, x) goes to h.offset(y) + w.offset(x).
struct PlacedTaps {
  PlacedAxis h, w;
  PlacedTaps() = default;
  PlacedTaps(const FoldedPlace& place, int taps_w)
      : h(place.sh, place.ph, taps_w / place.sw * place.of_step, place.sw * place.of_phase),
        w(place.sw, place.pw, place.of_step, place.of_phase) {}
  AEUP_HD bool is_last(int y, int x) const { return h.is_last(y) && w.is_last(x); }
};

// Takes the remainder by `d` off `n`, and leaves the quotient.
AEUP_HD int take(int* n, const Divider& d) {
  const int q = d.divide(*n), r = *n - q * int(d.divisor);
  *n = q;
  return r;
}

}  // namespace aeup
