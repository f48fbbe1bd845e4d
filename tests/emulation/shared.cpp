// The shared memory of the block that runs, with guards on either side.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "nan.h"
#include "sanitizer.h"

namespace emulation {
namespace {

constexpr size_t guard_bytes = 4096;  // on either side
constexpr unsigned char guard_byte = 0xa5;
constexpr size_t page_bytes = 4096;

unsigned char* arena;
size_t arena_bytes, shared_bytes;

}  // namespace

void new_shared_memory(size_t bytes) {
  shared_bytes = bytes;
  arena_bytes = (guard_bytes + bytes + guard_bytes + page_bytes - 1) / page_bytes * page_bytes;
  void* pages = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) {
    perror("emulation: mmap");
    abort();
  }
  arena = static_cast<unsigned char*>(pages);
  machine.shared = arena + guard_bytes;
}

void free_shared_memory() {
  sanitizer::unpoison(arena, arena_bytes);
  munmap(arena, arena_bytes);
}

void renew_shared_memory() {
  sanitizer::unpoison(arena, arena_bytes);
  sanitizer::renew(arena, arena_bytes);
  memset(arena, guard_byte, arena_bytes);
  fill_with_nan(machine.shared, shared_bytes);
  sanitizer::poison(arena, guard_bytes);
  sanitizer::poison(machine.shared + shared_bytes, guard_bytes);
}

bool shared_memory_guards_intact() {
  const unsigned char *before = machine.shared - guard_bytes, *after = machine.shared + shared_bytes;
  for (size_t i = 0; i < guard_bytes; ++i)
    if (before[i] != guard_byte || after[i] != guard_byte) return false;
  return true;
}

void* shared_memory() { return machine.shared; }

bool in_shared_memory(const void* p, size_t bytes) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(machine.shared);
  return offset <= shared_bytes && bytes <= shared_bytes - offset;
}

}  // namespace emulation
