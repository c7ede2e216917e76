// The vertical-first backward for NCHW (or one channel).
#include "backward_stream.cuh"

namespace aeup::back {

const char* refuses_stream(const Problem& p) { return plan_stream(p).refused; }

const char* launch_stream_nchw(const Problem& p, void* stream) {
  const StreamPlan plan = plan_stream(p);
  if (plan.refused) return plan.refused;
  return with_kernel(p, [&](auto t, auto taps) -> const char* {
    using T = decltype(t);
    constexpr int K = decltype(taps)::value, es = int(sizeof(T)), NQ = quads_in_registers(K);
    const auto run = [&](auto aligned) -> const char* {
      constexpr bool A = decltype(aligned)::value;
      if (plan.large) return launch_stream<T, K, false, 0, made_by_thread(true, es), A>(p, plan, stream);
      return launch_stream<T, K, false, NQ, made_by_thread(false, es), A>(p, plan, stream);
    };
    return plan.a.align == 16 ? run(std::true_type()) : run(std::false_type());
  });
}

}  // namespace aeup::back
