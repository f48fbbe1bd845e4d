// The shared memory of the block that runs, with guards on either side.
#include <cstdlib>
#include <cstring>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {
namespace {

constexpr size_t guard_bytes = 256;  // on either side
constexpr unsigned char guard_byte = 0xa5;

unsigned char* arena;
size_t arena_bytes, shared_bytes;

}  // namespace

void new_shared_memory(size_t bytes) {
  shared_bytes = bytes;
  arena_bytes = (guard_bytes + bytes + guard_bytes + 127) / 128 * 128;
  arena = static_cast<unsigned char*>(std::aligned_alloc(128, arena_bytes));
  memset(arena, guard_byte, arena_bytes);
  machine.shared = arena + guard_bytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(arena, guard_bytes);
  ASAN_POISON_MEMORY_REGION(machine.shared + shared_bytes, guard_bytes);
#endif
}

void free_shared_memory() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(arena, arena_bytes);
#endif
  std::free(arena);
}

void fill_shared_memory() { memset(machine.shared, 0xff, shared_bytes); }  // a NaN in every floating-point type

// ASan sees a stray access itself, at the place where it happens.
bool shared_memory_guards_intact() {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char *before = machine.shared - guard_bytes, *after = machine.shared + shared_bytes;
  for (size_t i = 0; i < guard_bytes; ++i)
    if (before[i] != guard_byte || after[i] != guard_byte) return false;
#endif
  return true;
}

void* shared_memory() { return machine.shared; }

bool in_shared_memory(const void* p, size_t bytes) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(machine.shared);
  return offset <= shared_bytes && bytes <= shared_bytes - offset;
}

}  // namespace emulation
