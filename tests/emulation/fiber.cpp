// Fibers: their stacks, and switching between them.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#include "sanitizer.h"

namespace emulation {
namespace {

constexpr size_t stack_guard_bytes = 4096;

// Switching is GCC's and Clang's __builtin_setjmp and __builtin_longjmp: a few nanoseconds, where swapcontext asks the
// kernel for the signal mask each time. Its two halves must be in different functions. FASTCONV_LEAVES: a function that
// is never returned from, which the compiler must not know.
#define FASTCONV_LEAVES __attribute__((noipa))

FASTCONV_LEAVES void resume(Fiber& fiber) { __builtin_longjmp(fiber.registers, 1); }

void fiber_main() {
  sanitizer::after_switch(*machine.current);
  for (;;) {
    sanitizer::begin_thread();
    machine.body(machine.context);
    check_copies_done();
    sanitizer::end_thread();
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
  sanitizer::before_switch(from, to);
  if (!__builtin_setjmp(from.registers)) {
    if (&to != &machine.scheduler && !to.has_context)
      start(to);
    else
      resume(to);
  }
  sanitizer::after_switch(*machine.current);
}

}  // namespace

void create(Fiber& fiber) {
  void* memory = mmap(nullptr, stack_guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, stack_guard_bytes, PROT_NONE) != 0) {
    perror("emulation: mmap");
    abort();
  }
  fiber.stack = static_cast<char*>(memory) + stack_guard_bytes;
  sanitizer::create(fiber);
}

void destroy(Fiber& fiber) {
  sanitizer::destroy(fiber);
  munmap(fiber.stack - stack_guard_bytes, stack_guard_bytes + stack_bytes);
  fiber.stack = nullptr;
  fiber.has_context = false;
  fiber.copies.clear();
  fiber.copy_groups = 0;
}

void switch_to(Fiber& to) {
  Fiber& from = *machine.current;
  machine.current = &to;
  threadIdx = to.thread;
  switch_fiber(from, to);
}

}  // namespace emulation
