// What the Hopper kernels take of the driver's header: tensor maps, for the host (hopper_on_host.h reads them).
#pragma once
#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_INT32,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  static constexpr uint32_t kEncoded = 0x74656e73;
  uint32_t tag;  // kEncoded
  uint8_t rank, element;
  bool round_tf32;
  uint16_t box[5];
  const char* data;
  uint64_t size[5], stride[5];  // elements; bytes
};
static_assert(sizeof(CUtensorMap) == 128, "as the driver's");

namespace aeup::emu {
// cuTensorMapEncodeTiled: what the driver refuses is refused.
CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* size,
                    const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
}  // namespace aeup::emu
