// What every CPU kernel is given, and that each is compiled once per instruction set.
#pragma once
#include <cstdint>

namespace aeup {

// Runs body(begin, end, context) over [0, n) in torch's thread pool.
using ParallelFor = void (*)(int64_t n, void (*body)(int64_t, int64_t, void*), void* context);

#if defined(__x86_64__)
#define AEUP_FOR_EACH_ISA(declaration) \
  namespace baseline {                 \
  declaration                          \
  }                                    \
  namespace avx2 {                     \
  declaration                          \
  }                                    \
  namespace avx512 {                   \
  declaration                          \
  }
#else
#define AEUP_FOR_EACH_ISA(declaration) \
  namespace baseline {                 \
  declaration                          \
  }
#endif

const char* cpu_instruction_set();  // the best that this processor has

}  // namespace aeup
