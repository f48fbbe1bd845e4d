// bar: the barriers 1 to 15 of a block, each for as many threads as those that come to it say. A warp comes as a whole.
// Barrier 0 is __syncthreads: of all threads, at one place.
#include "ptx.h"
#include "sanitizer.h"

namespace emulation {
namespace {

// What the sanitizer is told to order: of each block apart, as its own barrier is in its first fiber.
const void* order_of(int id) { return machine.fibers[id].barriers; }

// Counts the thread in. Returns whether the barrier is complete, and then releases those that wait there.
bool arrive(const char* what, const Where& where, int id, int threads) {
  if (id < 1 || id > 15) fail(where, "%s at barrier %d", what, id);
  if (threads < 32 || threads % 32 || threads > machine.threads)
    fail(where, "%s for %d threads in a block of %d", what, threads, machine.threads);
  whole_warp(what, where, nullptr, nullptr);
  NamedBarrier& barrier = machine.barriers[id];
  sanitizer::release(order_of(id));
  if (barrier.come > 0 && barrier.threads != threads)
    fail(where, "%s at barrier %d for %d threads, where others came for %d", what, id, threads, barrier.threads);
  barrier.threads = threads;
  if (++barrier.come < threads) return false;
  barrier.come = 0;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::waiting && fiber.wait.barrier == &barrier) fiber.state = State::ready;
  }
  return true;
}

}  // namespace
}  // namespace emulation

namespace fastconv::cuda::ptx {

void bar_sync(int id, int threads, const Where& where) {
  using namespace emulation;
  if (id == 0 && threads == machine.threads)
    block_barrier("bar_sync", where, false);
  else if (!arrive("bar_sync", where, id, threads))
    wait_for({"bar_sync", where, false, ~0u, false, nullptr, nullptr, &machine.barriers[id]});
  if (id > 0) sanitizer::acquire(order_of(id));
}

void bar_arrive(int id, int threads, const Where& where) { emulation::arrive("bar_arrive", where, id, threads); }

}  // namespace fastconv::cuda::ptx
