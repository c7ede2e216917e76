// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "cpu/batch_norm.h"
#include "cpu/columns.h"
#include "cpu/group_norm.h"
#include "cpu/plan.h"

namespace aeup {
namespace {

#if defined(__x86_64__)
enum class Isa { baseline, avx2, avx512 };

// AEUP_ISA (baseline, avx2) asks for less than the processor has, for tests.
Isa detect() {
  const char* asked = std::getenv("AEUP_ISA");
  const int most = !asked ? 2 : (!std::strcmp(asked, "baseline") ? 0 : (!std::strcmp(asked, "avx2") ? 1 : 2));
  __builtin_cpu_init();
  if (most > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  return most > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
             ? Isa::avx2
             : Isa::baseline;
}
const Isa kIsa = detect();
#define AEUP_BEST(f) (kIsa == Isa::avx512 ? avx512::f : kIsa == Isa::avx2 ? avx2::f : baseline::f)
#else
#define AEUP_BEST(f) baseline::f
#endif

}  // namespace

void interpolate_cpu(const Problem& p, int64_t threads, ParallelFor parallel) {
  AEUP_BEST(interpolate)(p, threads, parallel);
}
void batch_norm_cpu(const BatchNorm& b, ParallelFor parallel) { AEUP_BEST(batch_norm)(b, parallel); }
void batch_norm_backward_cpu(const BatchNorm& b, ParallelFor parallel) { AEUP_BEST(batch_norm_backward)(b, parallel); }
void group_norm_cpu(const GroupNorm& g, ParallelFor parallel) { AEUP_BEST(group_norm)(g, parallel); }
void group_norm_backward_cpu(const GroupNorm& g, ParallelFor parallel) { AEUP_BEST(group_norm_backward)(g, parallel); }
void to_columns_cpu(const Taps& t, ParallelFor parallel) { AEUP_BEST(to_columns)(t, parallel); }
void from_columns_cpu(const Taps& t, ParallelFor parallel) { AEUP_BEST(from_columns)(t, parallel); }

const char* cpu_instruction_set() {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return "avx512";
  if (kIsa == Isa::avx2) return "avx2";
#endif
  return "baseline";
}

}  // namespace aeup
