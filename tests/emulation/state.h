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

// See copies.cpp.
struct Copy {
  unsigned char* destination;
  unsigned char data[16];
  int bytes;
  int group;
  const char* what;
  Where where;
};

struct Fiber {
  void* registers[5];  // where it goes on: __builtin_setjmp's frame pointer, address and stack pointer
  char* stack = nullptr;
  bool has_context = false;  // false: it starts anew when it is resumed
  State state = State::ready;
  bool yielded = false;
  uint3 thread;
  Wait wait;
  std::vector<Copy> copies;  // held back
  int copy_groups = 0;       // that were committed
  void* sanitizer_context = nullptr;
  // What the sanitizer is told to order. Lanes of a mask: what each brings and takes. In the first fiber of a warp:
  // where all of it meets; of the block: its fence and its barriers. Of meetings and barriers there are two, in turns,
  // since some come to the next while others have yet to leave.
  char arrived, passed, meetings[2], fence, barriers[2];
  unsigned met = 0;  // how often the warp did
};

struct Machine {
  std::mutex mutex;  // one launch at a time
  int order = 0;
  unsigned seed = 0;
  uint64_t switches = 0;

  std::vector<Fiber> pool;
  Fiber* fibers;  // of the block that runs
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
  unsigned barriers_passed;
  unsigned char* shared;
  char begin, end, fence;  // of the launch and of the grid, for the sanitizer to order
};
extern Machine machine;

inline int index_of(const Fiber& fiber) { return int(&fiber - machine.fibers); }

// fiber.cpp
constexpr size_t stack_bytes = 256 * 1024;  // only the pages that are touched take memory
void create(Fiber& fiber);
void destroy(Fiber& fiber);
void switch_to(Fiber& to);  // from the one that runs

// waits.cpp
void wait_for(const Wait& wait);
void report_divergence();  // when nobody can go on

// copies.cpp
void hold_back(const Copy& copy);
void commit_copies();
void complete_copies(int n, void (*apply)(const Copy&));  // but for the n latest groups
void check_copies_done();                                 // of the thread that exits

// machine.cpp
void set_failure(const std::string& text);
std::string place(const Where& where);
std::string name_of(uint3 index);

// shared.cpp
void new_shared_memory(size_t bytes);
void free_shared_memory();
void renew_shared_memory();          // filled with NaN
bool shared_memory_guards_intact();  // whether nothing was written past its ends

}  // namespace emulation
