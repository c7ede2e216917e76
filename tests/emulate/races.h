// Finds data races of the emulated kernels: two accesses to the same bytes of shared or global memory, one of them a
// store, by different threads, with no barrier between them. Compiled with -fsanitize=thread, the kernels report every
// access; races.cpp takes the place of ThreadSanitizer's runtime and knows what a GPU orders: __syncthreads orders a
// block's threads, __syncwarp those of a warp; shuffles, matrix products and ldmatrix bring a warp together but order
// no memory; what cp.async stores is nobody's before the wait of the thread that issued it; blocks of one launch are
// not ordered at all. Found too: loads of what was never stored, and accesses past a launch's dynamic shared memory.
#pragma once
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#define AEUP_INSTRUMENTED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define AEUP_INSTRUMENTED 1
#endif
#endif

namespace aeup::race {

enum class Access : uint8_t { load, store, copy_issued, copy_done };  // copy: cp.async, to shared memory

void forget();                         // all that was stored and loaded: the memory is another
void begin_launch(bool instrumented);  // the kernels; else nothing is searched
void begin_block(int threads);
void run_thread(int t);            // what follows is done by thread t of the block; -1: by the host
void order(int first, int count);  // a barrier: what these threads did before it, and what they do after it
void release(const void* object);  // what this thread did is before what a thread does that acquires later
void acquire(const void* object);  // (mbarriers, named barriers)
void access(const void* p, int bytes, Access kind, const void* code);  // code: of the kernel
const char* found();                                                   // since the last call; null: nothing

}  // namespace aeup::race
