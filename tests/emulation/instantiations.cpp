// See instantiations.h.
#include "instantiations.h"

#include <dlfcn.h>

#include <mutex>
#include <unordered_map>

namespace {

std::mutex mutex;
std::unordered_map<const void*, uint64_t> launches;

}  // namespace

void emulation::count_launch(const void* kernel) {
  const std::lock_guard lock(mutex);
  ++launches[kernel];
}

uint64_t fastconv_emulation_launches(uint64_t offset) {
  Dl_info library;
  if (!dladdr(reinterpret_cast<const void*>(fastconv_emulation_launches), &library)) return 0;
  const std::lock_guard lock(mutex);
  const auto found = launches.find(static_cast<const char*>(library.dli_fbase) + offset);
  return found == launches.end() ? 0 : found->second;
}
