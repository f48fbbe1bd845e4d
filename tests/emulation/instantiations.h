// How often each kernel was launched, and with what. A kernel is known by its address: `nm` tells instantiations of a
// template apart.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

void count_launch(const void* kernel, unsigned threads, size_t shared_bytes);

}  // namespace emulation

// Of a block, the most that a launch had; 0 of a kernel that was not launched.
extern "C" __attribute__((visibility("default"))) uint64_t fastconv_emulation_threads(uint64_t offset);
extern "C" __attribute__((visibility("default"))) uint64_t fastconv_emulation_shared_bytes(uint64_t offset);

// Since the library was loaded; `offset` is a kernel's from the start of the library, as `nm` gives it.
extern "C" __attribute__((visibility("default"))) uint64_t fastconv_emulation_launches(uint64_t offset);
