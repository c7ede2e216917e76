// The asynchronous units of hopper_on_host.h.
#pragma GCC optimize("O2", "tree-vectorize")  // it multiplies the matrices; the kernels are compiled without
#include "hopper_on_host.h"

#include <array>

namespace aeup::emu {
namespace {

constexpr int kMostColumns = 256;

void set_error(const std::string& text) {
  if (machine.error.empty()) machine.error = text;
}
// True where the phase is complete: then the next one has begun.
bool complete(Barrier& b) {
  if (b.pending || b.bytes_phase >> 1) return false;
  b.pending = b.arrivals;
  b.bytes_phase ^= 1;
  return true;
}

float rounded_to_tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }

int box_bytes(const CUtensorMap& map) {
  int bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

void run_copy(const BoxCopy& c) {
  const CUtensorMap& m = c.map;
  const int rows = box_bytes(m) / (m.box[0] * m.element), chunks = m.box[0] * m.element / 16, per = 16 / m.element;
  const uint32_t to = address_of(c.to);
  for (int row = 0; row < rows; ++row) {
    const char* from = m.data;
    bool inside = true;
    for (int i = 1, rest = row; i < m.rank; rest /= m.box[i], ++i) {
      const int64_t at = int64_t(c.at[i]) + rest % m.box[i];
      inside = inside && at >= 0 && uint64_t(at) < m.size[i];
      from += at * int64_t(m.stride[i]);
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      char bytes[16] = {};
      const int64_t x = int64_t(c.at[0]) + chunk * per;
      if (inside && x > -per && x < int64_t(m.size[0])) {
        const int first = x < 0 ? int(-x) : 0, last = std::min<int64_t>(per, int64_t(m.size[0]) - x);
        if (last - first == per) {
          check(from + x * m.element, 16, false);
        } else {
          for (int e = first; e < last; ++e) check(from + (x + e) * m.element, m.element, false);
        }
        std::memcpy(bytes + first * m.element, from + (x + first) * m.element, (last - first) * m.element);
        for (int e = 0; m.round_tf32 && e < 4; ++e) {
          float v;
          std::memcpy(&v, bytes + 4 * e, 4);
          v = rounded_to_tf32(v);
          std::memcpy(bytes + 4 * e, &v, 4);
        }
      }
      const uint32_t at = swizzled(to + row * 128 + chunk * 16);
      std::memcpy(shared_at(at, 16), bytes, 16);
      hopper.written[(at - kWindow) / 16] = 0;
    }
  }
  Barrier& b = barrier_at(c.barrier);
  b.bytes_phase -= 2 * box_bytes(m);
  complete(b);
}

float value_of(Operand kind, uint32_t word) {
  static const std::vector<float> halves = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) values[i] = of_half(uint16_t(i));
    return values;
  }();
  return kind == Operand::half ? halves[word] : operand(kind, word, 0);
}

// Element (i, k) of an operand, of rows (columns for b) i and summed index k: PTX ISA, matrix descriptors of wgmma with
// 128-byte swizzle.
struct Descriptor {
  uint32_t start, leading, stride;
  bool transposed;
  explicit Descriptor(uint64_t d, bool transposed)
      : start(uint32_t(d & 0x3fff) << 4),
        leading(uint32_t(d >> 16 & 0x3fff) << 4),
        stride(uint32_t(d >> 32 & 0x3fff) << 4),
        transposed(transposed) {
    if (d >> 62 != 1 || (d >> 49 & 7)) fail("a matrix descriptor that is not of 128-byte swizzle", nullptr, 0);
  }
  // The elements of `count` rows from `first` on: f(i, k, value).
  template <class F>
  void read(Operand kind, int first, int count, F f) const {
    const int element = kind == Operand::tf32 ? 4 : 2, summed = 32 / element, wide = 128 / element, per = 16 / element;
    const int x0 = transposed ? first : 0, xs = transposed ? count : summed;
    const int y0 = transposed ? 0 : first, ys = transposed ? summed : count;
    for (int y = y0; y < y0 + ys; ++y)
      for (int x = x0; x < x0 + xs; x += per) {  // 16 bytes
        const uint32_t tiles = x / wide * leading;
        const uint32_t at = swizzled(start + tiles + y / 8 * stride + y % 8 * 128 + x % wide * element);
        const char* const p = shared_at(at, 16);
        if (hopper.written[(at - kWindow) / 16]) fail("wgmma reads what ordinary stores wrote: no proxy fence", p, 16);
        for (int e = 0; e < per; ++e) {
          uint32_t word = 0;
          std::memcpy(&word, p + e * element, element);
          f((transposed ? x + e : y) - first, transposed ? y : x + e, value_of(kind, word));
        }
      }
  }
};

#if defined(__x86_64__) && defined(__linux__)
__attribute__((target_clones("default", "avx2")))
#endif
void add_products(int columns, int summed, const float* a, const double* b, float* d, bool accumulate) {
  for (int row = 0; row < 16; ++row) {
    double sum[kMostColumns];
    for (int n = 0; n < columns; ++n) sum[n] = accumulate ? d[row * columns + n] : 0.;
    for (int k = 0; k < summed; ++k) {
      const double x = a[row * summed + k];
      const double* const y = b + k * columns;
      for (int n = 0; n < columns; ++n) sum[n] += x * y[n];
    }
    for (int n = 0; n < columns; ++n) {  // cut off
      const float near = float(sum[n]);
      const bool away = (near > 0 && near > sum[n]) || (near < 0 && near < sum[n]);
      uint32_t bits;
      std::memcpy(&bits, &near, 4);
      bits -= away;
      std::memcpy(d + row * columns + n, &bits, 4);
    }
  }
}

bool alike(const Product& x, const Product& y) {
  return x.columns == y.columns && x.kind == y.kind && x.registers == y.registers && x.transpose_a == y.transpose_a &&
         x.transpose_b == y.transpose_b && x.accumulate == y.accumulate && x.a == y.a && x.b == y.b;
}

// The product `index` of the oldest group, for the rows of one warp.
void run_product(int warp, size_t index) {
  static std::vector<float> d, a;
  static std::vector<double> b;
  Lane* const lanes = hopper.lanes.data() + warp * kWarp;
  const Product& p = lanes[0].groups.front()[index];
  const int summed = p.kind == Operand::tf32 ? 8 : 16;
  std::array<Accumulator*, kWarp> of;
  for (int l = 0; l < kWarp; ++l) {
    const Product& mine = lanes[l].groups.front()[index];
    if (!alike(mine, p)) fail("the operands of a wgmma differ in a warp", nullptr, 0);
    of[l] = nullptr;
    for (Accumulator& x : lanes[l].accumulators)
      if (x.registers == mine.d) of[l] = &x;
  }
  // Row g + 8 (e / 2), column 8 i + 2 q + e % 2 is element 4 i + e of lane 4 g + q.
  d.resize(16 * p.columns), a.resize(16 * summed), b.resize(size_t(summed) * p.columns);
  const auto place = [&](int l, int e) { return (l / 4 + e % 4 / 2 * 8) * p.columns + e / 4 * 8 + l % 4 * 2 + e % 2; };
  for (int l = 0; l < kWarp; ++l)
    for (int e = 0; e < p.columns / 2; ++e) d[place(l, e)] = of[l]->values[e];
  const Descriptor rows(p.registers ? p.b : p.a, p.transpose_a), columns(p.b, p.transpose_b);
  if (p.registers) {
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < summed; ++k)
        a[r * summed + k] = value_of(p.kind, lanes[r % 8 * 4 + k % 4].groups.front()[index].words[r / 8 + k / 4 * 2]);
  } else {
    rows.read(p.kind, warp % 4 * 16, 16, [&](int r, int k, float v) { a[r * summed + k] = v; });
  }
  columns.read(p.kind, 0, p.columns, [&](int n, int k, float v) { b[k * p.columns + n] = v; });
  add_products(p.columns, summed, a.data(), b.data(), d.data(), p.accumulate);
  for (int l = 0; l < kWarp; ++l) {
    for (int e = 0; e < p.columns / 2; ++e) of[l]->values[e] = d[place(l, e)];
    if (--of[l]->products) continue;
    std::copy(of[l]->values.begin(), of[l]->values.end(), of[l]->registers);
    lanes[l].accumulators.erase(lanes[l].accumulators.begin() + (of[l] - lanes[l].accumulators.data()));
  }
}

const bool present = [] { return machine.unit = &hopper, true; }();

}  // namespace

Hopper hopper;

void Hopper::start() {
  const int threads = block_size.x * block_size.y * block_size.z;
  copies.clear();
  lanes.assign(threads, {});
  waiting.assign((threads + kWarp - 1) / kWarp, 0);
  written.assign(machine.shared_bytes / 16 + 1, 0);
  for (Named& b : named) b = {};
}
bool Hopper::idle() {
  if (copies.empty()) return false;
  const auto next = block_index.x % 2 ? copies.end() - 1 : copies.begin();
  try {
    run_copy(*next);
  } catch (const std::exception& e) {
    set_error(e.what());
  }
  copies.erase(next);
  return true;
}
void Hopper::finish() {
  if (!copies.empty()) set_error("a block ended before its copies");
  for (const Lane& lane : lanes)
    if (!lane.accumulators.empty() || !lane.open.empty()) set_error("a block ended before its products");
}

Barrier& barrier_at(uint64_t* bar, uint16_t tag) {
  auto& b = *reinterpret_cast<Barrier*>(shared_at(address_of(bar), 8));
  if (tag && b.tag != tag) fail("a barrier that is not initialised, or before its fence", bar, 8);
  return b;
}
void arrive(uint64_t* bar, int32_t bytes) {
  Barrier& b = barrier_at(bar);
  race::release(bar);
  if (!b.pending) fail("more arrivals than the barrier has", bar, 8);
  b.bytes_phase += 2 * bytes;
  --b.pending;
  complete(b);
}

void issue(const BoxCopy& c, int rank) {
  if (c.map.tag != CUtensorMap::kEncoded || c.map.rank != rank) fail("not a tensor map of this rank", &c.map, rank);
  if (machine.overlaps && !machine.current->after_previous) fail("a copy before after_previous()", c.to, 0);
  const uint32_t to = address_of(c.to);
  if (to % 1024) fail("the box is not aligned to 1024 bytes of shared memory", c.to, box_bytes(c.map));
  barrier_at(c.barrier);
  for (int at = 0; at < box_bytes(c.map); at += 16) std::memset(shared_at(to + at, 16), 0xff, 16);
  hopper.copies.push_back(c);
}

void multiply(const Product& p) {
  Lane& lane = hopper.lanes[thread_number()];
  if (!lane.fenced) fail("wgmma without a wgmma.fence since the last wait", p.d, p.columns);
  Accumulator* mine = nullptr;
  for (Accumulator& x : lane.accumulators)
    if (x.registers == p.d) mine = &x;
  if (!mine) {
    lane.accumulators.push_back({p.d, std::vector<float>(p.d, p.d + p.columns / 2), 0});
    mine = &lane.accumulators.back();
    std::fill(p.d, p.d + p.columns / 2, NAN);
  }
  ++mine->products;
  lane.open.push_back(p);
}
void commit() {
  Lane& lane = hopper.lanes[thread_number()];
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
}
void wait(int pending) {
  const int me = thread_number(), warp = me / kWarp;
  Lane* const lanes = hopper.lanes.data() + warp * kWarp;
  lanes[me % kWarp].fenced = false;
  if (++hopper.waiting[warp] == kWarp) {  // the last of the warp works for all
    hopper.waiting[warp] = 0;
    while (int(lanes[0].groups.size()) > pending) {
      for (int l = 0; l < kWarp; ++l)
        if (lanes[l].groups.size() != lanes[0].groups.size() ||
            lanes[l].groups.front().size() != lanes[0].groups.front().size())
          fail("the lanes of a warp have committed different products", nullptr, 0);
      for (size_t i = 0; i < lanes[0].groups.front().size(); ++i) run_product(warp, i);
      for (int l = 0; l < kWarp; ++l) lanes[l].groups.erase(lanes[l].groups.begin());
    }
  }
  exchange();
}

void ordinary_store(uint32_t address, const void* from, int bytes) {
  std::memcpy(shared_at(address, bytes), from, bytes);
  hopper.written[(address - kWindow) / 16] = 1;
}

CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* size,
                    const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  *map = {CUtensorMap::kEncoded, uint8_t(rank), uint8_t(half ? 2 : 4), type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32};
  map->data = static_cast<const char*>(data);
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && rank >= 1 && rank <= 5 &&
              reinterpret_cast<uintptr_t>(data) % 16 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (cuuint32_t i = 0; good && i < rank; ++i) {
    map->box[i] = uint16_t(box[i]), map->size[i] = size[i];
    good = size[i] >= 1 && size[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
    if (i == 0) {
      good = good && box[0] * map->element == 128;
    } else {
      map->stride[i] = stride[i - 1];
      good = good && stride[i - 1] % 16 == 0 && stride[i - 1] < uint64_t(1) << 40;
    }
  }
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace aeup::emu
