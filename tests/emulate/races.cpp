// The runtime behind -fsanitize=thread (see races.h): shadow memory, and who is ordered after whom. Itself compiled
// without that flag.
#include "races.h"

#include <dlfcn.h>
#include <link.h>

#include <set>
#include <unordered_map>

#include "cuda_on_host.h"

namespace aeup::race {

namespace {
using emu::machine;

constexpr int kMostThreads = 1024, kPage = 4096, kReads = 4;
constexpr size_t kMostReports = 20;

struct Event {
  uint32_t block = 0;  // counted over all launches; 0: no event
  uint32_t stamp = 0;  // the thread's clock
  uint32_t place = 0;  // node of the tree of calls
  uint32_t code = 0;   // address of the access in the library
  uint16_t thread = 0;
  bool pending = false;  // cp.async that was not waited for
};
struct Cell {
  Event store, loads[kReads];
};
// Shadow of kPage bytes, a cell for each 1 << shift of them: as fine as the accesses are.
struct Page {
  int shift = 2;
  std::vector<Cell> cells = std::vector<Cell>(kPage >> 2);
};
struct Clocks {  // by thread: the last stamp that is known to be over
  std::vector<uint32_t> of = std::vector<uint32_t>(kMostThreads, 0);
};
struct Object {
  Clocks clocks;
  uint32_t floor = 0;
};
struct Call {
  uint32_t parent, code;
};

bool on = false;
bool busy = false;  // templates of the standard library may be instrumented: they do not come back in here
int current = -1, threads = 0;
uint32_t block = 0, first_block = 1, now = 1;
uint32_t clock_of[kMostThreads], floor_of[kMostThreads], warp_floor[kMostThreads], place_of[kMostThreads];
std::vector<Clocks> known(kMostThreads, Clocks{{}});  // beyond floors: from objects; most often empty
bool any_known = false;
std::unordered_map<const void*, Object> objects;
std::unordered_map<uintptr_t, Page> pages;
uintptr_t last_key = 0;
Page* last_page = nullptr;
std::vector<Call> calls{{0, 0}};
std::unordered_map<uint64_t, uint32_t> call_index;
std::vector<std::string> reports;
std::set<std::pair<uint32_t, uint32_t>> reported;
thread_local volatile char in_shared;  // a store to it gives this library its thread-local memory
uintptr_t base = 0, static_begin = 0, static_end = 0;

uint32_t offset_of(const void* code) { return uint32_t(reinterpret_cast<uintptr_t>(code) - base); }

// Where this library lies, and its thread-local memory: the static __shared__ arrays.
void locate() {
  in_shared = 1;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const uintptr_t me = reinterpret_cast<uintptr_t>(&locate);
        bool mine = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& h = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + h.p_vaddr;
          mine |= h.p_type == PT_LOAD && me >= begin && me < begin + h.p_memsz;
        }
        if (!mine) return 0;
        base = info->dlpi_addr;
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS) {
            static_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
            static_end = static_begin + info->dlpi_phdr[i].p_memsz;
          }
        return 1;
      },
      nullptr);
}

enum class Space { none, shared, outside, read_only, global };
Space space_of(uintptr_t a) {
  if (a - reinterpret_cast<uintptr_t>(emu::dynamic_shared()) < machine.shared_bytes) return Space::shared;
  if (a - reinterpret_cast<uintptr_t>(machine.shared.data()) < machine.shared.size()) return Space::outside;
  if (a >= static_begin && a < static_end) return Space::shared;
  for (const emu::Buffer& b : machine.buffers)
    if (a >= reinterpret_cast<uintptr_t>(b.begin) && a < reinterpret_cast<uintptr_t>(b.end))
      return b.writable ? Space::global : Space::read_only;
  return Space::none;
}

Page& page_at(uintptr_t key) {
  if (key != last_key || !last_page) last_key = key, last_page = &pages[key];
  return *last_page;
}
void refine(Page& page, int shift) {
  std::vector<Cell> fine(kPage >> shift);
  for (size_t i = 0; i < fine.size(); ++i) fine[i] = page.cells[i >> (page.shift - shift)];
  page.cells.swap(fine);
  page.shift = shift;
}

bool same_warp(int a, int b) { return a / emu::kWarp == b / emu::kWarp; }
bool before(const Event& e) {  // that the current thread's next access comes after e
  if (e.block != block) return e.block < first_block;
  if (e.pending) return false;
  return e.thread == current || e.stamp <= floor_of[current] ||
         (same_warp(e.thread, current) && e.stamp <= warp_floor[current]) ||
         (any_known && !known[current].of.empty() && e.stamp <= known[current].of[e.thread]);
}

std::string calls_of(const Event& e) {
  std::string text = " by thread " + std::to_string(e.thread) + " of block " + std::to_string(e.block - first_block);
  const auto add = [&](uint32_t code) {
    char at[16];
    std::snprintf(at, sizeof at, " @%x", code);
    if (code) text += at;
  };
  add(e.code);
  int depth = 0;
  for (uint32_t c = e.place; c && depth < 12; c = calls[c].parent, ++depth) add(calls[c].code);
  return text;
}
// Addresses of code are written as @hexadecimal, for addr2line.
void report(const char* what, const Event& me, const Event* other, Space space, uintptr_t at) {
  if (reports.size() >= kMostReports) return;
  const auto of = [](const Event& e) { return e.code ? e.code : e.place << 1 | 1; };
  if (!reported.insert({of(me), other ? of(*other) : 0}).second) return;
  std::string text = std::string(what) + (space == Space::shared ? " in shared memory" : " in global memory");
  const uintptr_t dynamic = reinterpret_cast<uintptr_t>(emu::dynamic_shared());
  if (at - dynamic < machine.shared.size()) text += " at byte " + std::to_string(at - dynamic);
  text += "\n  now" + calls_of(me);
  if (other)
    text += std::string("\n  and ") + (other->pending ? "cp.async not waited for," : "before") + calls_of(*other);
  reports.push_back(text);
}

void load(Cell& cell, const Event& me, Space space, uintptr_t at) {
  const bool stale = space == Space::shared && cell.store.block != block;
  if (!cell.store.block || stale)
    report("load of what was not stored", me, nullptr, space, at);
  else if (!before(cell.store))
    report("load after an unordered store", me, &cell.store, space, at);
  // Keep the loads that no later one makes superfluous. If there are too many, those of two warps do: a store is
  // ordered after at most one of them unless it is ordered after both.
  Event* place = nullptr;
  for (Event& e : cell.loads) {
    if (e.block && !(space == Space::shared && e.block != block) && !before(e)) continue;
    if (place)
      e.block = 0;
    else
      place = &e;
  }
  if (place) {
    *place = me;
    return;
  }
  for (Event& e : cell.loads)
    if (e.block == me.block && same_warp(e.thread, me.thread)) return;
  for (int i = 1; i < kReads; ++i)
    for (int j = 0; j < i; ++j)
      if (cell.loads[i].block == cell.loads[j].block && same_warp(cell.loads[i].thread, cell.loads[j].thread)) {
        cell.loads[i] = me;
        return;
      }
}
void store(Cell& cell, const Event& me, Space space, uintptr_t at) {
  const auto counts = [&](const Event& e) { return e.block && (space != Space::shared || e.block == block); };
  if (counts(cell.store) && !before(cell.store)) report("store after an unordered store", me, &cell.store, space, at);
  for (Event& e : cell.loads) {
    if (counts(e) && !before(e)) report("store after an unordered load", me, &e, space, at);
    e.block = 0;
  }
  cell.store = me;
}

void visit(uintptr_t a, int bytes, Access kind, uint32_t code) {
  const Space space = space_of(a);
  if (space == Space::none || space == Space::read_only) return;
  if (space == Space::outside)
    return report("access outside of the block's memory", {block, 0, place_of[current], code, uint16_t(current)},
                  nullptr, Space::shared, a);
  Event me{block, clock_of[current], place_of[current], code, uint16_t(current), kind == Access::copy_issued};
  for (const uintptr_t end = a + bytes; a < end;) {
    const uintptr_t key = a / kPage, stop = std::min(end, (key + 1) * kPage);
    Page& page = page_at(key);
    int shift = page.shift;
    while ((a | stop) & ((uintptr_t(1) << shift) - 1)) --shift;
    if (shift < page.shift) refine(page, shift);
    for (; a < stop; a += uintptr_t(1) << shift) {
      Cell& cell = page.cells[a % kPage >> shift];
      if (kind == Access::load)
        load(cell, me, space, a);
      else if (kind == Access::copy_done)
        cell.store = me;
      else
        store(cell, me, space, a);
    }
  }
}

struct Enter {
  Enter() { busy = true; }
  ~Enter() { busy = false; }
};
void instrumented(const void* p, int bytes, Access kind, const void* code) {
  if (current < 0 || busy) return;
  const auto& stack = machine.fibers[current].stack;
  const uintptr_t a = reinterpret_cast<uintptr_t>(p);
  if (a - reinterpret_cast<uintptr_t>(stack.data()) < stack.size()) return;
  Enter guard;
  visit(a, bytes, kind, offset_of(code));
}
}  // namespace

void forget() {
  pages.clear();
  last_page = nullptr;
}
void begin_launch(bool instrumented) {
  on = instrumented;
  if (!on) return;
  if (!base) locate();
  first_block = block + 1;
}
void begin_block(int count) {
  if (!on) return;
  ++block, now = 1, threads = count, any_known = false;
  for (int t = 0; t < count; ++t) {
    clock_of[t] = 1, floor_of[t] = warp_floor[t] = place_of[t] = 0;
    if (!known[t].of.empty()) known[t].of.clear();
  }
  objects.clear();
}
void run_thread(int t) { current = on ? t : -1; }
void order(int first, int count) {
  if (!on) return;
  Enter guard;
  const bool all = first == 0 && count == threads;
  const uint32_t over = now++;
  if (any_known) {
    Clocks most;
    for (int t = first; t < first + count; ++t)
      for (int u = 0; u < int(known[t].of.size()); ++u) most.of[u] = std::max(most.of[u], known[t].of[u]);
    for (int t = first; t < first + count; ++t) known[t] = most;
  }
  for (int t = first; t < first + count; ++t) clock_of[t] = now, (all ? floor_of : warp_floor)[t] = over;
}
void release(const void* object) {
  if (!on || current < 0) return;
  Enter guard;
  Object& o = objects[object];
  o.floor = std::max(o.floor, floor_of[current]);
  const auto raise = [&](int u, uint32_t stamp) { o.clocks.of[u] = std::max(o.clocks.of[u], stamp); };
  for (int u = current / emu::kWarp * emu::kWarp; u < threads && same_warp(u, current); ++u)
    raise(u, warp_floor[current]);
  for (int u = 0; u < int(known[current].of.size()); ++u) raise(u, known[current].of[u]);
  raise(current, clock_of[current]);
  clock_of[current] = ++now;
}
void acquire(const void* object) {
  if (!on || current < 0) return;
  Enter guard;
  const auto found = objects.find(object);
  if (found == objects.end()) return;
  any_known = true;
  auto& mine = known[current].of;
  if (mine.empty()) mine.assign(kMostThreads, 0);
  for (int u = 0; u < threads; ++u) mine[u] = std::max(mine[u], found->second.clocks.of[u]);
  floor_of[current] = std::max(floor_of[current], found->second.floor);
}
void access(const void* p, int bytes, Access kind, const void* code) {
  if (!on || current < 0 || busy) return;
  Enter guard;
  visit(reinterpret_cast<uintptr_t>(p), bytes, kind, offset_of(code));
}
const char* found() {
  static std::string text;
  text.clear();
  for (const std::string& r : reports) text += r + "\n";
  reports.clear();
  reported.clear();
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace aeup::race

using aeup::race::Access;

extern "C" {
// --- what the compiler calls ---
#define AEUP_HERE __builtin_return_address(0)
#define AEUP_ACCESS(n)                                                                                \
  void __tsan_read##n(void* p) { aeup::race::instrumented(p, n, Access::load, AEUP_HERE); }           \
  void __tsan_write##n(void* p) { aeup::race::instrumented(p, n, Access::store, AEUP_HERE); }         \
  void __tsan_unaligned_read##n(void* p) { aeup::race::instrumented(p, n, Access::load, AEUP_HERE); } \
  void __tsan_unaligned_write##n(void* p) { aeup::race::instrumented(p, n, Access::store, AEUP_HERE); }
AEUP_ACCESS(1)
AEUP_ACCESS(2)
AEUP_ACCESS(4)
AEUP_ACCESS(8)
AEUP_ACCESS(16)
void __tsan_read_range(void* p, size_t n) { aeup::race::instrumented(p, int(n), Access::load, AEUP_HERE); }
void __tsan_write_range(void* p, size_t n) { aeup::race::instrumented(p, int(n), Access::store, AEUP_HERE); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_init() {}
void __tsan_func_entry(void* code) {
  using namespace aeup::race;
  if (current < 0 || busy) return;
  Enter guard;
  const Call call{place_of[current], offset_of(code)};
  const auto [at, added] = call_index.try_emplace(uint64_t(call.parent) << 32 | call.code, uint32_t(calls.size()));
  if (added) calls.push_back(call);
  place_of[current] = at->second;
}
void __tsan_func_exit(void*) {
  using namespace aeup::race;
  if (current >= 0 && !busy) place_of[current] = calls[place_of[current]].parent;
}
#define AEUP_ATOMIC(bits)                                                               \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {    \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                        \
  }                                                                                     \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) { \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                           \
  }
AEUP_ATOMIC(8)
AEUP_ATOMIC(32)
AEUP_ATOMIC(64)
}
