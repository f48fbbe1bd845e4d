// cp.async: each thread's copies, held back until it waits for the group that they are in.
#include <cstring>
#include <vector>

#include "ptx.h"
#include "state.h"

namespace emulation {
namespace {

struct Copy {
  unsigned char* destination;
  unsigned char data[16];
  int bytes;
  int group;
  const char* what;
  Where where;
};
struct Copies {
  std::vector<Copy> pending;
  int groups = 0;  // that were committed; what is copied next belongs to the group of this number
};
std::vector<Copies> threads(max_block_threads);

Copies& copies() { return threads[index_of(*machine.current)]; }

// The source is read here, so that a stray address is found where it is given.
void copy(const char* what, void* shared, const void* global, int bytes, int src_bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes)
    fail(where, "%s to %p, which is not a multiple of %d", what, shared, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes)
    fail(where, "%s from %p, which is not a multiple of %d", what, global, bytes);
  if (src_bytes < 0 || src_bytes > bytes) fail(where, "%s of %d bytes", what, src_bytes);
  if (!in_shared_memory(shared, bytes)) fail(where, "%s to an address outside of the shared memory", what);
  if (in_shared_memory(global, 1)) fail(where, "%s from shared memory", what);
  Copy copy{static_cast<unsigned char*>(shared), {}, bytes, copies().groups, what, where};
  memcpy(copy.data, global, src_bytes);
  memset(shared, 0xff, bytes);
  copies().pending.push_back(copy);
}

}  // namespace

void forget_copies() {
  for (Copies& c : threads) c = {};
}

void check_copies_done() {
  Copies& c = copies();
  if (!c.pending.empty()) fail(c.pending[0].where, "%s, which the thread never waits for", c.pending[0].what);
  c.groups = 0;
}

}  // namespace emulation

namespace fastconv::cuda::ptx {

void cp_async_16(void* shared, const void* global, int src_bytes, const Where& where) {
  emulation::copy("cp_async_16", shared, global, 16, src_bytes, where);
}
void cp_async_8(void* shared, const void* global, int src_bytes, const Where& where) {
  emulation::copy("cp_async_8", shared, global, 8, src_bytes, where);
}
void cp_async_4(void* shared, const void* global, int src_bytes, const Where& where) {
  emulation::copy("cp_async_4", shared, global, 4, src_bytes, where);
}

void cp_async_commit() { ++emulation::copies().groups; }

void cp_async_wait_group(int n) {
  auto& c = emulation::copies();
  std::erase_if(c.pending, [&](const emulation::Copy& copy) {
    if (copy.group >= c.groups - n) return false;
    memcpy(copy.destination, copy.data, copy.bytes);
    return true;
  });
}

}  // namespace fastconv::cuda::ptx
