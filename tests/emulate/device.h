// The memory of an emulated device: what the kernels of a call may touch, and what they must store.
#pragma once
#include "cuda_on_host.h"
#include "resample.h"

namespace emulated {

inline std::string reply;  // keeps the text that an entry point returns

inline int64_t bytes_of(aeup::DType t) {
  static const int element[] = {4, 8, 2, 2, 1};
  return element[static_cast<int>(t)];
}
struct Device {  // the buffers that kernels may touch
  std::vector<uint64_t> workspace;
  std::vector<std::vector<uint8_t>> stores;
  void* at = nullptr;

  explicit Device(int64_t bytes) : workspace(size_t(bytes + 255) / 8 + 34, ~0ull) {
    aeup::emu::machine.buffers.clear();
    aeup::race::forget();
    stores.reserve(4);
    if (!bytes) return;
    at = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
    const char* w = static_cast<const char*>(at);
    aeup::emu::machine.buffers.push_back({w, w + bytes, true, nullptr});
  }
  void reads(const void* p, int64_t bytes) {
    const char* a = static_cast<const char*>(p);
    if (a) aeup::emu::machine.buffers.push_back({a, a + bytes, false, nullptr});
  }
  void writes(const void* p, int64_t bytes) {
    const char* a = static_cast<const char*>(p);
    if (!a) return;
    stores.emplace_back(size_t(bytes), 0);
    aeup::emu::machine.buffers.push_back({a, a + bytes, true, &stores.back()});
  }
  const char* all_stored() const {
    for (const auto& s : stores)
      for (size_t i = 0; i < s.size(); ++i)
        if (s[i] != 1) {
          reply = "byte " + std::to_string(i) + " of the result was not stored";
          return reply.c_str();
        }
    return nullptr;
  }
};

}  // namespace emulated
