// The machine's state, for its own files: fibers, what they wait for, and the block that runs.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "machine.h"

namespace emulation {

constexpr unsigned max_block_threads = 1024;

enum class State : uint8_t { ready, waiting, done };

// See ptx_barriers.cpp.
struct NamedBarrier {
  int threads = 0, come = 0;  // how many are expected, and how many have come
};

// What a thread waits for.
struct Wait {
  const char* what;
  Where where;
  bool block;  // for all threads of the block, or for the lanes in mask
  uint32_t mask;
  bool predicate;         // of a block barrier
  void* operands;         // of a warp's collective
  Collective collective;  // may be null
  const NamedBarrier* barrier = nullptr;
};

struct Fiber {
  void* registers[5];  // where it goes on: __builtin_setjmp's frame pointer, address and stack pointer
  char* stack = nullptr;
  bool has_context = false;  // false: it starts anew when it is resumed
  State state = State::ready;
  uint3 thread;
  Wait wait;
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
  NamedBarrier barriers[16];
  unsigned char* shared = nullptr;
};
extern Machine machine;

inline int index_of(const Fiber& fiber) { return int(&fiber - machine.fibers.data()); }

// fiber.cpp
void make_stack(Fiber& fiber);
void switch_to(Fiber& to);  // from the one that runs

// waits.cpp
void wait_for(const Wait& wait);
void report_divergence();  // when nobody can go on

// ptx_copy.cpp
void forget_copies();      // of a launch that failed
void check_copies_done();  // of the thread that exits

// machine.cpp
void set_failure(const std::string& text);
std::string place(const Where& where);
std::string name_of(uint3 index);

// shared.cpp
void new_shared_memory(size_t bytes);
void free_shared_memory();
void fill_shared_memory();           // with NaN
bool shared_memory_guards_intact();  // whether nothing was written past its ends

}  // namespace emulation
