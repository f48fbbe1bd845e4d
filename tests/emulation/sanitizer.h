// What the machine tells the sanitizer that the kernels are compiled with. One of sanitizers/*.cpp is linked; the
// machine's own files are compiled without any.
#pragma once

#include "state.h"

namespace emulation::sanitizer {

// How many sets of fibers a grid's blocks take in turns.
int sets(int threads);

// On the host's thread, around a launch: what it did before is seen by every thread of the grid, and it sees what they
// did. Then around a block, and around a thread of it.
void begin_launch();
void end_launch();
void begin_block();
void begin_thread();
void end_thread();

void create(Fiber& fiber);
void destroy(Fiber& fiber);
void name(Fiber& fiber);  // after its thread and block
void before_switch(Fiber& from, Fiber& to);
void after_switch(Fiber& now);

// Happens-before: what a thread did before release(p) is seen after acquire(p).
void release(const void* p);
void acquire(const void* p);

// Pages whose next users know nothing of the last; and bytes that nobody may touch.
void renew(void* pages, size_t bytes);
void poison(const void* p, size_t bytes);
void unpoison(const void* p, size_t bytes);

}  // namespace emulation::sanitizer
