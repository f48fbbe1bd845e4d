// Barriers of a block and memory fences.
#pragma once

#include "machine.h"

// Block barriers (CUDA C++ Programming Guide, Synchronization Functions). The hardware lets a barrier pass without the
// threads that have exited; here every thread must come.

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

// One fiber runs at a time: every write is seen at once.
inline void __threadfence() {}
