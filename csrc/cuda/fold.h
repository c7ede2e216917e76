// Weights of convolutions after nearest upsampling, added up to those of transposed convolutions (../fold.h), and their
// gradients, added up the other way. Plain C++.
#pragma once
#include "convolution.h"

namespace aeup {

// Where the folded weight goes, and as what. Element (tap (y, x), ci, co) of group g goes to g * group + step * of_step
// + phase * of_phase + ci * of_ci + co * of_co, where the phase of a tap is ((y - ph) mod sh, (x - pw) mod sw), and its
// step counts the taps of that phase.
struct FoldedPlace {
  enum Form { plain, tf32, tf32_pair } form;          // c.dtype; float32 rounded to tf32, or as two planes, hi and lo
  bool along_ci;                                      // ci is the contiguous one, else co
  int64_t of_group, of_step, of_phase, of_ci, of_co;  // in elements
  int64_t padded;     // zeros follow the contiguous channels up to here (where phases share a row: those of the last)
  int64_t plane = 0;  // from hi to lo; then each 32 of the contiguous channels are in the order of float_position
  int sh = 1, sw = 1, ph = 0, pw = 0;
};
const char* launch_fold(const Convolution& c, const FoldedPlace& place, void* to, void* stream);

// For families that read a transposed convolution's weight: makes `c` one with such a weight (channels-last), and
// returns the workspace that it needs; then, at the launch, puts it there and moves `workspace` past it.
int64_t fold_workspace(Convolution* c, Pass pass);
const char* fold_weight(Convolution* c, Pass pass, void** workspace, void* stream);

// Adds the partial sums of the gradient of a folded weight, and the taps that each kernel index is part of, in fixed
// order: partial [splits][ci * co * taps] at ci * ci_stride + tap * tap_stride + co (float64: double) -> c.result.
const char* launch_fold_back(const Convolution& c, const void* partial, int64_t splits, int64_t ci_stride,
                             int64_t tap_stride, void* stream);

}  // namespace aeup
