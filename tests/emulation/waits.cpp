// What threads wait for: barriers of the block, and lanes of a warp that do something together.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "sanitizer.h"

namespace emulation {
namespace {

std::string describe(const Wait& wait) {
  char text[256];
  if (wait.barrier)
    snprintf(text, sizeof text, "waits at %s (%s), where %d of %d threads have come", wait.what,
             place(wait.where).c_str(), wait.barrier->come, wait.barrier->threads);
  else if (wait.block)
    snprintf(text, sizeof text, "waits at %s (%s)", wait.what, place(wait.where).c_str());
  else
    snprintf(text, sizeof text, "waits at %s of mask 0x%08x (%s)", wait.what, wait.mask, place(wait.where).c_str());
  return text;
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
  machine.votes += int(arrived.predicate);
  machine.meets = machine.meets && same_place(machine.meeting, arrived);
  if (machine.waiting_in_block < machine.threads || !machine.meets) return;
  machine.result = machine.votes;
  for (int i = 0; i < machine.threads; ++i) machine.fibers[i].state = State::ready;
  machine.waiting_in_block = 0;
  ++machine.barriers_passed;
}

Fiber* current_warp() { return &machine.fibers[index_of(*machine.current) & ~31]; }

// Where a whole warp meets: for the sanitizer half the work of what each lane brings and takes. The lanes of another
// mask cannot meet there, since they would be ordered after lanes of other meetings.
const char* meeting_of(const Fiber* warp, uint32_t mask) {
  return mask == ~0u ? &warp->meetings[warp->met % 2] : nullptr;
}

// Releases the lanes of the mask if all of them wait, at the same place, with what they have computed together.
void arrive_in_warp(const Wait& arrived) {
  Fiber* fibers = current_warp();
  Lanes lanes{arrived.what, arrived.where, present_lanes(arrived.mask), {}};
  for (int i = 0; i < 32; ++i) {
    if (!lanes.take_part(i)) continue;
    if (fibers[i].state != State::waiting || !same_place(fibers[i].wait, arrived)) return;
    lanes.operands[i] = fibers[i].wait.operands;
  }
  const char* meeting = meeting_of(fibers, arrived.mask);
  if (meeting)
    sanitizer::acquire(meeting);
  else
    lanes.each([&](int i) { sanitizer::acquire(&fibers[i].arrived); });
  if (arrived.collective) arrived.collective(lanes);
  if (meeting) {
    sanitizer::release(meeting);
    ++fibers->met;
  } else {
    lanes.each([&](int i) { sanitizer::release(&fibers[i].passed); });
  }
  lanes.each([&](int i) { fibers[i].state = State::ready; });
}

}  // namespace

void wait_for(const Wait& wait) {
  Fiber& self = *machine.current;
  self.wait = wait;
  self.state = State::waiting;
  if (wait.block)
    arrive_at_block_barrier(wait);
  else if (!wait.barrier)
    arrive_in_warp(wait);
  switch_to(machine.scheduler);
}

int block_barrier(const char* what, const Where& where, bool predicate) {
  const char* barrier = &machine.fibers->barriers[machine.barriers_passed % 2];
  sanitizer::release(barrier);
  wait_for({what, where, true, ~0u, predicate, nullptr, nullptr});
  sanitizer::acquire(barrier);
  return machine.result;
}

void warp_collective(const char* what, const Where& where, uint32_t mask, void* operands, Collective collective) {
  if (!(mask >> lane() & 1)) fail(where, "%s of mask 0x%08x, which this lane is not in", what, mask);
  const Fiber& self = *machine.current;
  const char* meeting = meeting_of(current_warp(), mask);
  sanitizer::release(meeting ? meeting : &self.arrived);
  wait_for({what, where, false, mask, false, operands, collective});
  sanitizer::acquire(meeting ? meeting : &self.passed);
}

void yield() {
  machine.current->yielded = true;
  switch_to(machine.scheduler);
}

void fence_block() {
  sanitizer::release(&machine.fibers->fence);
  sanitizer::acquire(&machine.fibers->fence);
}
void fence_grid() {
  sanitizer::release(&machine.fence);
  sanitizer::acquire(&machine.fence);
}

void whole_warp(const char* what, const Where& where, void* operands, Collective collective) {
  if (present_lanes(~0u) != ~0u) fail(where, "%s in a warp of fewer than 32 threads", what);
  warp_collective(what, where, ~0u, operands, collective);
}

// Names a thread that waits, and one that does not come.
void report_divergence() {
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& a = machine.fibers[i];
    if (a.state != State::waiting) continue;
    if (a.wait.barrier)
      return set_failure("kernel " + std::string(machine.kernel) + ", block " + name_of(blockIdx) + ": thread " +
                         name_of(a.thread) + " " + describe(a.wait));
    const int first = a.wait.block ? 0 : i & ~31;
    const int last = a.wait.block ? machine.threads : std::min(machine.threads, first + 32);
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

}  // namespace emulation
