// Loops that are unrolled before anything else is optimized, so that arrays that they index stay in registers.
#pragma once

#include <type_traits>
#include <utility>

#include "isa.h"

namespace fastconv::cpu {
namespace {

#define FASTCONV_LAMBDA __attribute__((always_inline))

// Calls f with the constants 0 … Count − 1.
template <typename F, int... I>
FASTCONV_INLINE void for_constants(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int Count, typename F>
FASTCONV_INLINE void for_constants(const F& f) {
  for_constants(std::make_integer_sequence<int, Count>(), f);
}

}  // namespace
}  // namespace fastconv::cpu
