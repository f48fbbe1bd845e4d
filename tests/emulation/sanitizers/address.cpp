// AddressSanitizer keeps each stack apart, and the ends of the shared memory closed.
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include "../sanitizer.h"

namespace emulation::sanitizer {
namespace {

struct HostStack {
  void* bottom;
  size_t size;
  HostStack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
  }
};

}  // namespace

void before_switch(Fiber& from, Fiber& to) {
  if (&to == &machine.scheduler) {
    static thread_local const HostStack stack;
    __sanitizer_start_switch_fiber(&from.sanitizer_context, stack.bottom, stack.size);
  } else {
    __sanitizer_start_switch_fiber(&from.sanitizer_context, to.stack, stack_bytes);
  }
}
void after_switch(Fiber& now) { __sanitizer_finish_switch_fiber(now.sanitizer_context, nullptr, nullptr); }
void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
void destroy(Fiber& fiber) { __asan_unpoison_memory_region(fiber.stack, stack_bytes); }  // of its abandoned frames

}  // namespace emulation::sanitizer
