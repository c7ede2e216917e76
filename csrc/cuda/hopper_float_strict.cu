#include "cuda/hopper_float.cuh"

namespace aeup {

const char* launch_float_strict(const FloatParams& p, int config, bool nchw, void* stream) {
  switch (config) {
    case 2: return launch_float<kFloatConfigs[2].bm, kFloatConfigs[2].bn, true>(p, nchw, stream);
    case 3: return launch_float<kFloatConfigs[3].bm, kFloatConfigs[3].bn, true>(p, nchw, stream);
    case 4: return launch_float<kFloatConfigs[4].bm, kFloatConfigs[4].bn, true>(p, nchw, stream);
    default: return launch_float<kFloatConfigs[5].bm, kFloatConfigs[5].bn, true>(p, nchw, stream);
  }
}

}  // namespace aeup
