// Barriers of a block, memory fences, and waiting for nothing in particular.
#pragma once

#include "machine.h"

// CUDA C++ Programming Guide, Synchronization Functions. The hardware lets a barrier pass without the threads that have
// exited; here every thread must come.

inline void __syncthreads(const emulation::Where& where = emulation::Where::current()) {
  emulation::block_barrier("__syncthreads", where, false);
}
inline int __syncthreads_or(int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::block_barrier("__syncthreads_or", where, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::block_barrier("__syncthreads_and", where, predicate == 0) == 0;
}
inline int __syncthreads_count(int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::block_barrier("__syncthreads_count", where, predicate != 0);
}

// CUDA C++ Programming Guide, Memory Fence Functions. One fiber runs at a time, so that every write is seen at once;
// but only what is fenced on both sides is ordered for ThreadSanitizer.
inline void __threadfence() { emulation::fence_grid(); }
inline void __threadfence_block() { emulation::fence_block(); }

// CUDA C++ Programming Guide, Nanosleep Function. Lets the other threads of the block run: every spin wait sleeps.
inline void __nanosleep(unsigned) { emulation::yield(); }
