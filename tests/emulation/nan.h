// What memory holds before a kernel writes to it.
#pragma once

#include <cstddef>

namespace emulation {

// 0x7fff in every two bytes: a NaN in every floating-point type and, as an integer, an index far outside of everything.
inline void fill_with_nan(void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(memory)[i] = i % 2 ? 0x7f : 0xff;
}

}  // namespace emulation
