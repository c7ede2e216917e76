// What one call needs besides its pointers: two bands, and how the horizontal pass reads them. Made once per geometry.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tables.h"
#include "resample.h"

namespace aeup {

enum class Horizontal : int {
  pixels,  // a pixel has at least one register of channels: taps are whole vectors
  lookup,  // lanes are neighbouring elements of the flat row, taps come by index
  phases   // source positions s * d + r: the row is split into its s phases, then taps are contiguous
};

template <class A>
struct Plan {
  int64_t channels = 1;  // elements of a pixel that lie together: C in channels-last, else 1
  Band<A> v, h;
  bool rows_first = false;  // vertical pass first (the destination has fewer rows)
  bool pairs = false;       // the gradient of nearest by 2, elements of a row side by side
  Horizontal kind = Horizontal::pixels;

  // lookup: per block of lanes, `taps` index vectors (relative to base) and weight vectors
  struct Block {
    int32_t base, taps, at;  // `at`: first vector in index and weight
    bool near, ragged;       // near: indices below two registers; ragged: some lanes have fewer taps (weight 0)
  };
  std::vector<Block> blocks;
  std::vector<int32_t> index;
  std::vector<A> weight;

  // phases: behind `lead` zero pixels, tap r of dst d is source pixel step * d + shift + r, that is column
  // d + (shift + r) / step of phase (shift + r) % step. weight[r * padded + e] for flat dst element e.
  int64_t step = 0, lead = 0, shift = 0, reach = 0, columns = 0, phase_stride = 0, padded = 0;
};

AEUP_FOR_EACH_ISA(void interpolate(const Problem& p, int64_t threads, ParallelFor parallel);)
void interpolate_cpu(const Problem& p, int64_t threads, ParallelFor parallel);  // csrc/cpu/dispatch.cpp

}  // namespace aeup
