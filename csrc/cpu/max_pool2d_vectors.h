// Max pooling: vectors of strided elements and of window offsets, and how the work is cut.
#pragma once

#include <utility>

#include "isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastconv::cpu {
namespace {

constexpr int64_t task_elements = 1 << 14;    // outputs (or elements of dx) of a task
constexpr int64_t segment_columns = 1 << 12;  // NCHW: a row longer than this is done in segments
constexpr int64_t prefetch_bytes = 8192;      // NCHW: of x, asked of memory ahead of their use

// A walk over planes of rows × columns.
struct Walk {
  int64_t rows, columns, column, row, plane;
  Walk(int64_t i, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), column(i % columns), row(i / columns % rows), plane(i / columns / rows) {}
  FASTCONV_INLINE void next() {
    if (++column < columns) return;
    column = 0;
    if (++row < rows) return;
    row = 0;
    ++plane;
  }
};

// even, odd: every second element of a and b, in an order of its own, which in_order() undoes.
// low_pairs, high_pairs: a[0], b[0], a[1], b[1] … and the same of the upper halves.

#if defined(__AVX512F__)
FASTCONV_INLINE vfloat even(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
FASTCONV_INLINE vfloat odd(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
FASTCONV_INLINE vec_t<double> even(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
FASTCONV_INLINE vec_t<double> odd(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
template <typename V>
FASTCONV_INLINE V in_order(V v) {
  return v;
}
FASTCONV_INLINE vfloat low_pairs(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
FASTCONV_INLINE vfloat high_pairs(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
FASTCONV_INLINE vec_t<double> low_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
FASTCONV_INLINE vec_t<double> high_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif defined(__AVX2__)
FASTCONV_INLINE vfloat even(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14); }
FASTCONV_INLINE vfloat odd(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15); }
FASTCONV_INLINE vec_t<double> even(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 4, 2, 6);
}
FASTCONV_INLINE vec_t<double> odd(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 1, 5, 3, 7);
}
template <typename V>
FASTCONV_INLINE V in_order(V v) {
  const vec_t<double> pairs = (vec_t<double>)v;
  return (V)__builtin_shufflevector(pairs, pairs, 0, 2, 1, 3);
}
FASTCONV_INLINE vfloat low_pairs(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
FASTCONV_INLINE vfloat high_pairs(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
FASTCONV_INLINE vec_t<double> low_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
FASTCONV_INLINE vec_t<double> high_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#else
FASTCONV_INLINE vfloat even(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
FASTCONV_INLINE vfloat odd(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
FASTCONV_INLINE vec_t<double> even(vec_t<double> a, vec_t<double> b) { return __builtin_shufflevector(a, b, 0, 2); }
FASTCONV_INLINE vec_t<double> odd(vec_t<double> a, vec_t<double> b) { return __builtin_shufflevector(a, b, 1, 3); }
template <typename V>
FASTCONV_INLINE V in_order(V v) {
  return v;
}
FASTCONV_INLINE vfloat low_pairs(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
FASTCONV_INLINE vfloat high_pairs(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
FASTCONV_INLINE vec_t<double> low_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 2);
}
FASTCONV_INLINE vec_t<double> high_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 1, 3);
}
#endif

// One lane to the right, with the last of `before` in front.
template <typename T, int... lane>
FASTCONV_INLINE vec_t<T> moved_right(vec_t<T> before, vec_t<T> v, std::integer_sequence<int, lane...>) {
  return shuffle<T, (lane + lanes<T> - 1)...>(before, v);
}
// One lane to the left, with the first of `after` behind.
template <typename T, int... lane>
FASTCONV_INLINE vec_t<T> moved_left(vec_t<T> v, vec_t<T> after, std::integer_sequence<int, lane...>) {
  return shuffle<T, (lane + 1)...>(v, after);
}

// p[0], p[stride], …: `stride` is 1, 2 or, for any other, 0: then it is `step`.
template <int stride, typename T>
FASTCONV_INLINE vec_t<T> load_strided(const T* p, int64_t step) {
  if constexpr (stride == 1) {
    return load(p);
  } else if constexpr (stride == 2) {
    return even(load(p), load(p + lanes<T>));
  } else {
    vec_t<T> v;
    for (int i = 0; i < lanes<T>; ++i) v[i] = to_acc(p[i * step]);
    return v;
  }
}
// p[s], p[s + stride], …: taps 2i and 2i + 1 of stride 2 come from the same two loads.
template <int stride, typename T>
FASTCONV_INLINE vec_t<T> load_tap(const T* p, int64_t s, int64_t step) {
  return stride == 2 && s % 2 ? odd(load(p + s - 1), load(p + s - 1 + lanes<T>)) : load_strided<stride>(p + s, step);
}
template <int stride>
FASTCONV_INLINE int64_t elements_read(int64_t lanes, int64_t step) {
  return stride == 0 ? (lanes - 1) * step + 1 : stride * lanes;
}

// All taps of windows two apart, p[s], p[s + 2], … for each s.
template <int taps, typename T>
FASTCONV_INLINE void load_taps(const T* p, vec_t<T>* v) {
#if defined(__AVX512F__)
  const vec_t<T> low = load(p), high = load(p + lanes<T>);
  v[0] = even(low, high);
  v[1] = odd(low, high);
  if constexpr (taps == 3)
    v[2] = moved_left<T>(v[0], broadcast<T>(to_acc(p[2 * lanes<T>])), std::make_integer_sequence<int, lanes<T>>());
#else
  for (int s = 0; s < taps; ++s) v[s] = load_tap<2>(p, s, 2);
#endif
}

// 0, 1, 2, …
template <typename T>
FASTCONV_INLINE mask_t<T> lane_numbers() {
  mask_t<T> v{};
  for (int i = 0; i < lanes<T>; ++i) v[i] = i;
  return v;
}

// Is any lane's mask set?
template <typename M>
FASTCONV_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  uint64_t words[sizeof mask / 8], bits = 0;
  memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) bits |= word;
  return bits != 0;
#endif
}

template <typename T>
FASTCONV_INLINE bool has_nan(vec_t<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t<T>) == 4) return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0;
#endif
  return any(v != v);
}

// `tap` in every lane.
template <typename T>
FASTCONV_INLINE mask_t<T> all_taps(int64_t tap) {
  if constexpr (sizeof(acc_t<T>) == 4)
    return mask_t<T>{} + int32_t(tap);
  else
    return mask_t<T>{} + tap;
}

// Offsets within a window are kept in 1, 2 or 4 bytes and computed in the lanes of mask_t<T>. Bytes, the usual case,
// are spelled out: GCC 12 converts them one by one.
template <typename T, typename Offset>
struct OffsetVector {
  typedef Offset type __attribute__((vector_size(lanes<T> * sizeof(Offset))));
};
template <typename T, typename Offset>
FASTCONV_INLINE mask_t<T> load_offsets(const Offset* p) {
  typename OffsetVector<T, Offset>::type narrow;
  memcpy(&narrow, p, sizeof narrow);
#if defined(__SSE2__)
  if constexpr (sizeof(Offset) == 1) {
    __m128i bytes = _mm_setzero_si128();
    memcpy(&bytes, &narrow, sizeof narrow);
#if defined(__AVX512F__)
    return lanes<T> == 16 ? (mask_t<T>)_mm512_maskz_cvtepu8_epi32(0xffff, bytes)
                          : (mask_t<T>)_mm512_maskz_cvtepu8_epi64(0xff, bytes);
#elif defined(__AVX2__)
    return lanes<T> == 8 ? (mask_t<T>)_mm256_cvtepu8_epi32(bytes) : (mask_t<T>)_mm256_cvtepu8_epi64(bytes);
#else
    const __m128i zero = _mm_setzero_si128();
    const __m128i ints = _mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero);
    return (mask_t<T>)(lanes<T> == 4 ? ints : _mm_unpacklo_epi32(ints, zero));
#endif
  }
#endif
  return __builtin_convertvector(narrow, mask_t<T>);
}
template <typename T, typename Offset>
FASTCONV_INLINE void store_offsets(Offset* p, mask_t<T> v) {
#if defined(__SSE2__)
  if constexpr (sizeof(Offset) == 1) {
#if defined(__AVX512F__)
    const __m128i bytes =
        lanes<T> == 16 ? _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v) : _mm512_maskz_cvtepi64_epi8(0xff, (__m512i)v);
#elif defined(__AVX2__)
    const __m256i even_ints = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256i ints = lanes<T> == 8 ? (__m256i)v : _mm256_permutevar8x32_epi32((__m256i)v, even_ints);
    const __m128i low = _mm256_castsi256_si128(ints), high = _mm256_extracti128_si256(ints, 1);
    const __m128i words = _mm_packs_epi32(low, high), bytes = _mm_packus_epi16(words, words);
#else
    const __m128i low = lanes<T> == 4 ? (__m128i)v : _mm_shuffle_epi32((__m128i)v, 0x88), high = low;
    const __m128i words = _mm_packs_epi32(low, high), bytes = _mm_packus_epi16(words, words);
#endif
    memcpy(p, &bytes, lanes<T>);
    return;
  }
#endif
  const auto narrow = __builtin_convertvector(v, typename OffsetVector<T, Offset>::type);
  memcpy(p, &narrow, sizeof narrow);
}

template <typename T, typename Offset>
__attribute__((noinline)) void store_first_offsets(Offset* p, mask_t<T> v, int64_t count) {
  Offset all[lanes<T>];
  store_offsets<T>(all, v);
  memcpy(p, all, size_t(count) * sizeof(Offset));
}

}  // namespace
}  // namespace fastconv::cpu
