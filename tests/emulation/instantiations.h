// How often each kernel was launched. A kernel is known by its address: `nm` tells instantiations of a template apart.
#pragma once

#include <cstdint>

namespace emulation {

void count_launch(const void* kernel);

}  // namespace emulation

// Since the library was loaded; `offset` is a kernel's from the start of the library, as `nm` gives it.
extern "C" __attribute__((visibility("default"))) uint64_t fastconv_emulation_launches(uint64_t offset);
