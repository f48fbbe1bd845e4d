// The machine that runs CUDA threads as fibers: see emulation.h.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

// The limits of sm_80 (CUDA C++ Programming Guide, Compute Capabilities).
constexpr unsigned max_block_threads = 1024, max_block_z = 64, max_grid_yz = 65535, max_grid_x = 0x7fffffff;
constexpr size_t max_shared_bytes = 163 * 1024;

constexpr size_t stack_bytes = 256 * 1024;  // only the pages that are touched take memory
constexpr size_t stack_guard_bytes = 4096;
constexpr size_t guard_bytes = 256;  // on either side of the shared memory
constexpr unsigned char guard_byte = 0xa5;

enum class State : uint8_t { ready, waiting, done };

// What a thread waits for.
struct Wait {
  const char* what;
  Where where;
  bool block;  // for all threads of the block, or for the lanes in mask
  uint32_t mask;
  int source_lane;  // of a shuffle, else −1
  uint64_t value;   // a predicate, or what a shuffle passes on
};

struct Fiber {
  void* registers[5];  // where it goes on: __builtin_setjmp's frame pointer, address and stack pointer
  char* stack = nullptr;
  bool has_context = false;  // false: it starts anew when it is resumed
  State state = State::ready;
  uint3 thread;
  Wait wait;
  uint64_t result;
  void* asan_stack = nullptr;
};

struct Machine {
  std::mutex mutex;  // one launch at a time
  int order = 0;
  unsigned seed = 0;
  uint64_t switches = 0;

  std::vector<Fiber> fibers{max_block_threads};  // pooled: those of a block are the first of them
  Fiber scheduler;
  Fiber* current = nullptr;
  bool failed = false;

  const char* kernel;
  void (*body)(void*);
  void* context;
  int threads;
  int done;
  // The block barrier: how many wait there, whether all do so where the first does, and how many of their predicates
  // are true; and how many were at the barrier before, which the threads that it released have yet to be told.
  int waiting_in_block, votes, result;
  bool meets;
  Wait meeting;
  unsigned char* shared = nullptr;
} machine;

thread_local std::string message;

int index_of(const Fiber& fiber) { return int(&fiber - machine.fibers.data()); }

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

char* new_stack() {
  void* memory = mmap(nullptr, stack_guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, stack_guard_bytes, PROT_NONE) != 0) {
    perror("emulation: mmap");
    abort();
  }
  return static_cast<char*>(memory) + stack_guard_bytes;
}

void fiber_main();

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

void switch_to(Fiber& to) {
  Fiber& from = *machine.current;
  machine.current = &to;
  threadIdx = to.thread;
  switch_fiber(from, to);
}

void fiber_main() {
  after_switch(*machine.current);
  for (;;) {
    machine.body(machine.context);
    machine.current->state = State::done;
    ++machine.done;
    switch_to(machine.scheduler);
  }
}

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()) + ":" + std::to_string(where.column());
}

std::string describe(const Wait& wait) {
  char text[256];
  if (wait.block)
    snprintf(text, sizeof text, "waits at %s (%s)", wait.what, place(wait.where).c_str());
  else
    snprintf(text, sizeof text, "waits at %s of mask 0x%08x (%s)", wait.what, wait.mask, place(wait.where).c_str());
  return text;
}

std::string name_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

void set_failure(const std::string& text) {
  message = text;
  machine.failed = true;
}

bool same_place(const Wait& a, const Wait& b) {
  return a.where.line() == b.where.line() && a.where.column() == b.where.column() && a.mask == b.mask &&
         (a.where.file_name() == b.where.file_name() || !strcmp(a.where.file_name(), b.where.file_name()));
}

// Releases the block if all of it waits, at the same place.
void arrive_at_block_barrier(const Wait& arrived) {
  if (machine.waiting_in_block++ == 0) {
    machine.meeting = arrived;
    machine.votes = 0;
    machine.meets = true;
  }
  machine.votes += int(arrived.value);
  machine.meets = machine.meets && same_place(machine.meeting, arrived);
  if (machine.waiting_in_block < machine.threads || !machine.meets) return;
  machine.result = machine.votes;
  for (int i = 0; i < machine.threads; ++i) machine.fibers[i].state = State::ready;
  machine.waiting_in_block = 0;
}

void release_warp(const Wait& arrived) {
  Fiber* lanes = &machine.fibers[index_of(*machine.current) & ~31];
  const int present = min(32, machine.threads - index_of(*lanes));
  const auto takes_part = [&](int i) { return i < present && (arrived.mask >> i & 1); };
  uint32_t ballot = 0;
  for (int i = 0; i < present; ++i) {
    if (!takes_part(i)) continue;
    if (lanes[i].state != State::waiting || !same_place(lanes[i].wait, arrived)) return;
    ballot |= uint32_t(lanes[i].wait.value != 0) << i;
  }
  for (int i = 0; i < present; ++i) {
    if (!takes_part(i)) continue;
    const int source = lanes[i].wait.source_lane;
    if (source >= 0 && !takes_part(source))
      fail(arrived.where, "%s: lane %d reads lane %d, which does not take part", arrived.what, i, source);
    lanes[i].result = source >= 0 ? lanes[source].wait.value : ballot;
    lanes[i].state = State::ready;
  }
}

uint64_t wait_for(const Wait& wait) {
  Fiber& self = *machine.current;
  self.wait = wait;
  self.state = State::waiting;
  if (wait.block) {
    arrive_at_block_barrier(wait);
  } else {
    release_warp(wait);
  }
  switch_to(machine.scheduler);
  return wait.block ? machine.result : self.result;
}

// Nobody can go on: names a thread that waits, and one that does not come.
void report_divergence() {
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& a = machine.fibers[i];
    if (a.state != State::waiting) continue;
    const int first = a.wait.block ? 0 : i & ~31;
    const int last = a.wait.block ? machine.threads : min(machine.threads, first + 32);
    for (int j = first; j < last; ++j) {
      const Fiber& b = machine.fibers[j];
      if (!a.wait.block && !(a.wait.mask >> (j - first) & 1)) continue;
      if (b.state == State::waiting && same_place(a.wait, b.wait)) continue;
      return set_failure("kernel " + std::string(machine.kernel) + ", block " + name_of(blockIdx) + ": thread " +
                         name_of(a.thread) + " " + describe(a.wait) + ", but thread " + name_of(b.thread) + " " +
                         (b.state == State::done ? "has exited" : describe(b.wait)));
    }
  }
}

// Walks over 0 … n−1 in the order that was set: from b on in steps of a, modulo n, with a prime to n.
struct Permutation {
  uint64_t a = 1, b = 0, n;
  Permutation(uint64_t n, std::mt19937& random) : n(n) {
    if (machine.order == 1) a = n - 1, b = n - 1;
    if (machine.order == 2) {
      b = random() % n;
      do a = n == 1 ? 1 : 1 + random() % (n - 1);
      while (std::gcd(a, n) != 1);
    }
  }
  uint64_t next() {
    const uint64_t here = b;
    b += a;
    if (b >= n) b -= n;
    return here;
  }
};

void run_block(std::mt19937& random) {
  machine.waiting_in_block = machine.done = 0;
  for (int i = 0; i < machine.threads; ++i) machine.fibers[i].state = State::ready;
  while (machine.done < machine.threads && !machine.failed) {
    bool progress = false;
    Permutation order(machine.threads, random);
    for (int i = 0; i < machine.threads && !machine.failed; ++i) {
      Fiber& fiber = machine.fibers[order.next()];
      if (fiber.state != State::ready) continue;
      progress = true;
      switch_to(fiber);
    }
    if (!progress && !machine.failed) report_divergence();
  }
}

// ASan sees a stray access itself, at the place where it happens.
bool guards_intact([[maybe_unused]] size_t shared_bytes) {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char *before = machine.shared - guard_bytes, *after = machine.shared + shared_bytes;
  for (size_t i = 0; i < guard_bytes; ++i)
    if (before[i] != guard_byte || after[i] != guard_byte) return false;
#endif
  return true;
}

}  // namespace

void* shared_memory() { return machine.shared; }

int lane() { return index_of(*machine.current) % 32; }

void fail(const Where& where, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  set_failure("kernel " + std::string(machine.kernel) + ", block " + name_of(blockIdx) + ", thread " +
              name_of(threadIdx) + ", " + place(where) + ": " + text);
  switch_to(machine.scheduler);
  abort();  // a failed launch resumes nobody
}

int block_barrier(const char* what, const Where& where, bool predicate) {
  return int(wait_for({what, where, true, ~0u, -1, predicate}));
}

uint32_t warp_vote(const char* what, const Where& where, uint32_t mask, bool predicate) {
  if (!(mask >> lane() & 1)) fail(where, "%s of mask 0x%08x, which this lane is not in", what, mask);
  return uint32_t(wait_for({what, where, false, mask, -1, predicate}));
}

uint64_t warp_shuffle(const char* what, const Where& where, uint32_t mask, int source_lane, uint64_t value) {
  if (!(mask >> lane() & 1)) fail(where, "%s of mask 0x%08x, which this lane is not in", what, mask);
  return wait_for({what, where, false, mask, source_lane, value});
}

const char* run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                     void* context) {
  const std::lock_guard lock(machine.mutex);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > max_block_threads || block.z > max_block_z) return "invalid block size";
  if (!grid.x || !grid.y || !grid.z || grid.x > max_grid_x || grid.y > max_grid_yz || grid.z > max_grid_yz)
    return "invalid grid size";
  if (shared_bytes > max_shared_bytes) return "too much shared memory";

  machine.kernel = kernel;
  machine.body = body;
  machine.context = context;
  machine.threads = int(threads);
  machine.failed = false;
  machine.current = &machine.scheduler;
  for (unsigned i = 0; i < threads; ++i) {
    if (!machine.fibers[i].stack) machine.fibers[i].stack = new_stack();
    machine.fibers[i].thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  blockDim = block;
  gridDim = grid;

  const size_t arena_bytes = (guard_bytes + shared_bytes + guard_bytes + 127) / 128 * 128;
  unsigned char* arena = static_cast<unsigned char*>(std::aligned_alloc(128, arena_bytes));
  memset(arena, guard_byte, arena_bytes);
  machine.shared = arena + guard_bytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(arena, guard_bytes);
  ASAN_POISON_MEMORY_REGION(machine.shared + shared_bytes, guard_bytes);
#endif

  std::mt19937 random(machine.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  Permutation order(blocks, random);
  for (uint64_t i = 0; i < blocks && !machine.failed; ++i) {
    const uint64_t b = order.next();
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    memset(machine.shared, 0xff, shared_bytes);  // a NaN in every floating-point type
    run_block(random);
    if (!machine.failed && !guards_intact(shared_bytes))
      set_failure("kernel " + std::string(kernel) + ", block " + name_of(blockIdx) +
                  ": wrote outside of its shared memory");
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(arena, arena_bytes);
#endif
  std::free(arena);
  if (!machine.failed) return nullptr;
  for (Fiber& fiber : machine.fibers) fiber.has_context = false;  // some are left in the midst of the kernel
  return message.c_str();
}

}  // namespace emulation

void fastconv_emulation_set_order(int order, unsigned seed) {
  const std::lock_guard lock(emulation::machine.mutex);
  emulation::machine.order = order;
  emulation::machine.seed = seed;
}

uint64_t fastconv_emulation_switches() { return emulation::machine.switches; }
