// The vertical-first backward for NHWC.
#include "backward_stream.cuh"

namespace aeup::back {

const char* launch_stream_nhwc(const Problem& p, void* stream) {
  const StreamPlan plan = plan_stream(p);
  if (plan.refused) return plan.refused;
  return with_kernel(p, [&](auto t, auto taps) -> const char* {
    using T = decltype(t);
    constexpr int K = decltype(taps)::value, NE = made_by_thread(true, int(sizeof(T)));
    constexpr int deep = stream_deep(K, true, int(sizeof(T)), true);
    if (plan.a.align == 16 && plan.ring == deep) return launch_stream<T, K, true, 0, NE, true, deep>(p, plan, stream);
    if (plan.a.align == 16) return launch_stream<T, K, true, 0, NE, true>(p, plan, stream);
    return launch_stream<T, K, true, 0, NE, false>(p, plan, stream);
  });
}

}  // namespace aeup::back
