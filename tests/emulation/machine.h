// The machine behind CUDA's functions: what the headers beside this one are built on.
#pragma once

#include <cstddef>
#include <source_location>

#include "types.h"

// Those of the fiber that runs: launches take turns, so there is never more than one.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

using Where = std::source_location;

// Runs body(context) as every thread of the grid. Returns null, or what went wrong.
const char* run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                     void* context);
void* shared_memory();
bool in_shared_memory(const void* p, size_t bytes);
int lane();
uint32_t present_lanes(uint32_t mask);  // without those beyond the end of the block
// Ends the launch with an error that names the kernel, the block, the thread and the place.
[[noreturn]] void fail(const Where& where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Waits until all threads of the block wait at the same place. Returns how many predicates are true.
int block_barrier(const char* what, const Where& where, bool predicate);

// Lets other threads run first. A block whose threads do nothing but yield ends the launch with an error.
void yield();
void fence_block();
void fence_grid();

// The lanes of a warp that do something together.
struct Lanes {
  const char* what;
  Where where;
  uint32_t mask;       // without lanes beyond the end of the block
  void* operands[32];  // one for each lane of the mask

  bool take_part(int i) const { return mask >> i & 1; }
  template <typename T>
  T& operand(int i) const {
    return *static_cast<T*>(operands[i]);
  }
  template <typename F>
  void each(F&& f) const {
    for (int i = 0; i < 32; ++i)
      if (take_part(i)) f(i);
  }
};
// Waits until all lanes in the mask wait at the same place with the same mask. The last to come then calls
// `collective`, which reads and writes everybody's operands: they lie on the lanes' stacks.
using Collective = void (*)(const Lanes& lanes);
void warp_collective(const char* what, const Where& where, uint32_t mask, void* operands, Collective collective);
// The same for instructions that all 32 lanes must execute together.
void whole_warp(const char* what, const Where& where, void* operands, Collective collective);

}  // namespace emulation

extern "C" {
// The order in which a block's threads, and a grid's blocks, take their turns: 0 forward, 1 reverse, 2 shuffled by
// `seed`. Right kernels give the same bits in any.
__attribute__((visibility("default"))) void fastconv_emulation_set_order(int order, unsigned seed);
// For tests: how often fibers were switched since the library was loaded.
__attribute__((visibility("default"))) uint64_t fastconv_emulation_switches();
}
