#include "cuda/hopper_float.cuh"

namespace aeup {

const char* launch_float_tf32(const FloatParams& p, int config, bool nchw, void* stream) {
  switch (config) {
    case 0: return launch_float<kFloatConfigs[0].bm, kFloatConfigs[0].bn, false>(p, nchw, stream);
    case 1: return launch_float<kFloatConfigs[1].bm, kFloatConfigs[1].bn, false>(p, nchw, stream);
    case 2: return launch_float<kFloatConfigs[2].bm, kFloatConfigs[2].bn, false>(p, nchw, stream);
    case 3: return launch_float<kFloatConfigs[3].bm, kFloatConfigs[3].bn, false>(p, nchw, stream);
    case 4: return launch_float<kFloatConfigs[4].bm, kFloatConfigs[4].bn, false>(p, nchw, stream);
    default: return launch_float<kFloatConfigs[5].bm, kFloatConfigs[5].bn, false>(p, nchw, stream);
  }
}

}  // namespace aeup
