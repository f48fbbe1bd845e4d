// cp.async: what it reads and, when the thread has waited for it, writes.
#include <cstring>

#include "nan.h"
#include "ptx.h"
#include "state.h"

namespace fastconv::cuda::ptx {
namespace {

using emulation::fail;

// The source is read here, so that a stray address is found where it is given.
void copy(const char* what, void* shared, const void* global, int bytes, int src_bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes)
    fail(where, "%s to %p, which is not a multiple of %d", what, shared, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes)
    fail(where, "%s from %p, which is not a multiple of %d", what, global, bytes);
  if (src_bytes < 0 || src_bytes > bytes) fail(where, "%s of %d bytes", what, src_bytes);
  if (!emulation::in_shared_memory(shared, bytes)) fail(where, "%s to an address outside of the shared memory", what);
  if (emulation::in_shared_memory(global, 1)) fail(where, "%s from shared memory", what);
  emulation::Copy copy{static_cast<unsigned char*>(shared), {}, bytes, 0, what, where};
  memcpy(copy.data, global, src_bytes);
  emulation::fill_with_nan(shared, bytes);
  emulation::hold_back(copy);
}

}  // namespace

void cp_async_16(void* shared, const void* global, int src_bytes, const Where& where) {
  copy("cp_async_16", shared, global, 16, src_bytes, where);
}
void cp_async_8(void* shared, const void* global, int src_bytes, const Where& where) {
  copy("cp_async_8", shared, global, 8, src_bytes, where);
}
void cp_async_4(void* shared, const void* global, int src_bytes, const Where& where) {
  copy("cp_async_4", shared, global, 4, src_bytes, where);
}

void cp_async_commit() { emulation::commit_copies(); }

void cp_async_wait_group(int n) {
  emulation::complete_copies(n, [](const emulation::Copy& c) { memcpy(c.destination, c.data, c.bytes); });
}

}  // namespace fastconv::cuda::ptx
