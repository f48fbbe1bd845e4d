// ThreadSanitizer sees every CUDA thread as a thread of its own, ordered by nothing but what release() and acquire()
// say.
//
// It knows a thread by its fiber, and a fiber costs it about 0.85 MB and half a millisecond to make. So they are kept,
// and the blocks of a grid take sets of them in turns: two blocks that share a set are ordered where the same thread of
// the set runs, all others are not.
#include <sanitizer/tsan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "../sanitizer.h"

namespace emulation::sanitizer {
namespace {

constexpr int kept_fibers = 512;

}  // namespace

int sets(int threads) { return std::max(2, kept_fibers / threads); }

void begin_launch() { machine.scheduler.sanitizer_context = __tsan_get_current_fiber(); }
void end_launch() { acquire(&machine.end); }
void begin_block() { release(&machine.begin); }
void begin_thread() { acquire(&machine.begin); }
void end_thread() { release(&machine.end); }

void create(Fiber& fiber) { fiber.sanitizer_context = __tsan_create_fiber(0); }
void destroy(Fiber& fiber) {
  // The launch failed before the thread came to its end: a switch back from it orders what it did before what follows.
  __tsan_switch_to_fiber(fiber.sanitizer_context, __tsan_switch_to_fiber_no_sync);
  __tsan_switch_to_fiber(machine.scheduler.sanitizer_context, 0);
  __tsan_destroy_fiber(fiber.sanitizer_context);
}
void name(Fiber& fiber) {
  char text[64];  // ThreadSanitizer cuts off what is longer
  snprintf(text, sizeof text, "thread %s, block %s of %s", name_of(fiber.thread).c_str(), name_of(blockIdx).c_str(),
           machine.kernel);
  __tsan_set_fiber_name(fiber.sanitizer_context, text);
}
void before_switch(Fiber&, Fiber& to) { __tsan_switch_to_fiber(to.sanitizer_context, __tsan_switch_to_fiber_no_sync); }

void release(const void* p) { __tsan_release(const_cast<void*>(p)); }
void acquire(const void* p) { __tsan_acquire(const_cast<void*>(p)); }

// It forgets all accesses to pages that are mapped anew.
void renew(void* pages, size_t bytes) {
  if (mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) return;
  perror("emulation: mmap");
  abort();
}

}  // namespace emulation::sanitizer
