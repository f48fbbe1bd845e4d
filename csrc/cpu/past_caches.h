// Stores past the caches: of what is written whole and is too much to be found there by whoever reads it next.
#pragma once

#include <type_traits>

#include "isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastconv::cpu {
namespace {

constexpr int64_t cache_bytes = 24 << 20;  // what a call may read and write and still have in the caches afterwards

// Stores a register; if `past_caches`, to memory at once, without reading the line first. Then p is aligned to a
// register, the lines are written whole, and end_stores() has to follow.
template <typename T>
FASTCONV_INLINE void store_to(T* p, vec_t<T> v, bool past_caches) {
#if defined(__SSE2__)
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (past_caches) {
#if defined(__AVX512F__)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
      return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
    }
  }
#endif
  store(p, v);
}
FASTCONV_INLINE void end_stores(bool past_caches) {
#if defined(__SSE2__)
  if (past_caches) _mm_sfence();
#endif
}
template <typename T>
FASTCONV_INLINE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % vector_bytes == 0;
}

}  // namespace
}  // namespace fastconv::cpu
