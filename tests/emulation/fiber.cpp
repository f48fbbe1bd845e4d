// Fibers: their stacks, and switching between them.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t stack_bytes = 256 * 1024;  // only the pages that are touched take memory
constexpr size_t stack_guard_bytes = 4096;

#if defined(__SANITIZE_ADDRESS__)
struct ThreadStack {  // of the OS thread
  void* bottom;
  size_t size;
  ThreadStack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
  }
};
void before_switch(Fiber& from, Fiber& to) {
  if (&from == &machine.scheduler) {
    if (!to.has_context) ASAN_UNPOISON_MEMORY_REGION(to.stack, stack_bytes);
    __sanitizer_start_switch_fiber(&from.asan_stack, to.stack, stack_bytes);
  } else {
    static thread_local const ThreadStack stack;
    __sanitizer_start_switch_fiber(&from.asan_stack, stack.bottom, stack.size);
  }
}
void after_switch(Fiber& fiber) { __sanitizer_finish_switch_fiber(fiber.asan_stack, nullptr, nullptr); }
#else
void before_switch(Fiber&, Fiber&) {}
void after_switch(Fiber&) {}
#endif

// Switching is GCC's and Clang's __builtin_setjmp and __builtin_longjmp: a few nanoseconds, where swapcontext asks the
// kernel for the signal mask each time. Its two halves must be in different functions. FASTCONV_LEAVES: a function that
// is never returned from, so that ASan must not mark its frame, nor the compiler know.
#define FASTCONV_LEAVES __attribute__((noipa, no_sanitize("address")))

FASTCONV_LEAVES void resume(Fiber& fiber) { __builtin_longjmp(fiber.registers, 1); }

void fiber_main() {
  after_switch(*machine.current);
  for (;;) {
    machine.body(machine.context);
    check_copies_done();
    machine.current->state = State::done;
    ++machine.done;
    switch_to(machine.scheduler);
  }
}

FASTCONV_LEAVES void start(Fiber& fiber) {
  fiber.has_context = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

__attribute__((noinline)) void switch_fiber(Fiber& from, Fiber& to) {
  ++machine.switches;
  before_switch(from, to);
  if (!__builtin_setjmp(from.registers)) {
    if (&to != &machine.scheduler && !to.has_context)
      start(to);
    else
      resume(to);
  }
  after_switch(*machine.current);
}

}  // namespace

void make_stack(Fiber& fiber) {
  void* memory = mmap(nullptr, stack_guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, stack_guard_bytes, PROT_NONE) != 0) {
    perror("emulation: mmap");
    abort();
  }
  fiber.stack = static_cast<char*>(memory) + stack_guard_bytes;
}

void switch_to(Fiber& to) {
  Fiber& from = *machine.current;
  machine.current = &to;
  threadIdx = to.thread;
  switch_fiber(from, to);
}

}  // namespace emulation
