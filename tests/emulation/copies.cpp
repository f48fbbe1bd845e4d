// The asynchronous copies of each thread, held back until it waits for the group that they are in.
#include "state.h"

namespace emulation {

void hold_back(const Copy& copy) {
  Fiber& self = *machine.current;
  self.copies.push_back(copy);
  self.copies.back().group = self.copy_groups;
}

void commit_copies() { ++machine.current->copy_groups; }

void complete_copies(int n, void (*apply)(const Copy&)) {
  Fiber& self = *machine.current;
  size_t kept = 0;
  for (size_t i = 0; i < self.copies.size(); ++i) {
    const Copy copy = self.copies[i];
    if (copy.group < self.copy_groups - n)
      apply(copy);
    else
      self.copies[kept++] = copy;
  }
  self.copies.resize(kept);
}

void check_copies_done() {
  Fiber& self = *machine.current;
  if (!self.copies.empty()) fail(self.copies[0].where, "%s, which the thread never waits for", self.copies[0].what);
  self.copy_groups = 0;
}

}  // namespace emulation
