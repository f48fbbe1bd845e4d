// Vectors, element conversions and task distribution for the CPU kernels. Only kernel files include this.
//
// The same file is compiled for several instruction sets; FASTCONV_ISA names the one at hand and the compiler's own
// vectors (GCC and Clang `vector_size`) take its width. Everything here is in an unnamed namespace: see kernels.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef FASTCONV_ISA
#error "compile kernel files with -DFASTCONV_ISA=baseline, avx2 or avx512"
#endif

namespace fastconv::cpu {
namespace {

#define FASTCONV_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

struct float16_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

// acc_t<T>: what elements of T are added up in. vec_t<T>: one register of acc_t<T>; `lanes<T>` of them.
template <typename T>
struct Traits {
  using acc = float;
  typedef float vec __attribute__((vector_size(vector_bytes)));
  typedef int32_t mask __attribute__((vector_size(vector_bytes)));
};
template <>
struct Traits<double> {
  using acc = double;
  typedef double vec __attribute__((vector_size(vector_bytes)));
  typedef int64_t mask __attribute__((vector_size(vector_bytes)));
};
template <typename T>
using acc_t = typename Traits<T>::acc;
template <typename T>
using vec_t = typename Traits<T>::vec;  // comparisons of vec_t give mask_t: −1 where true
template <typename T>
using mask_t = typename Traits<T>::mask;
template <typename T>
constexpr int lanes = vector_bytes / int(sizeof(acc_t<T>));

using vfloat = vec_t<float>;
typedef uint32_t vuint32 __attribute__((vector_size(vector_bytes)));
typedef uint16_t vuint16 __attribute__((vector_size(vector_bytes / 2)));

// One element to and from the type it is computed in.

FASTCONV_INLINE float to_acc(float v) { return v; }
FASTCONV_INLINE double to_acc(double v) { return v; }
FASTCONV_INLINE float to_acc(bfloat16_t v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
FASTCONV_INLINE float to_acc(float16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(__aarch64__)
  __fp16 h;
  memcpy(&h, &v, 2);
  return h;
#else
  // Exponent and mantissa moved into place, then scaled by 2^112 to undo the difference of the two biases; that
  // multiplication also normalizes the subnormals. Infinity and NaN keep the largest exponent.
  uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  float f;
  memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((v.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  bits |= uint32_t(v.bits & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

template <typename T>
T from_acc(acc_t<T> v);
template <>
FASTCONV_INLINE float from_acc<float>(float v) {
  return v;
}
template <>
FASTCONV_INLINE double from_acc<double>(double v) {
  return v;
}
template <>
FASTCONV_INLINE bfloat16_t from_acc<bfloat16_t>(float v) {  // round to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
FASTCONV_INLINE float16_t from_acc<float16_t>(float v) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#elif defined(__aarch64__)
  __fp16 h = __fp16(v);
  float16_t out;
  memcpy(&out, &h, 2);
  return out;
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 2^16 or more: infinity
  if (bits < 0x38800000) {                                   // below 2^−14: subnormal, a multiple of 2^−24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    const float shifted = magnitude + 0.5f;  // ulp(0.5) = 2^−24: the addition rounds to even
    uint32_t out;
    memcpy(&out, &shifted, 4);
    return {uint16_t(sign | (out - 0x3f000000))};
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);  // rebias the exponent by −112 and round to even
  return {uint16_t(sign | (bits >> 13))};
#endif
}

// One register of elements.

FASTCONV_INLINE vec_t<float> load(const float* p) {
  vec_t<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTCONV_INLINE vec_t<double> load(const double* p) {
  vec_t<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
// In intrinsics, where GCC would convert one half of the register after the other.
FASTCONV_INLINE vec_t<float> load(const bfloat16_t* p) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
  return (vec_t<float>)((vuint32)bits << 16);
#elif defined(__AVX2__)
  return (vec_t<float>)((vuint32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  vuint16 h;
  memcpy(&h, p, sizeof h);
  return (vec_t<float>)(__builtin_convertvector(h, vuint32) << 16);
#endif
}
FASTCONV_INLINE vec_t<float> load(const float16_t* p) {
#if defined(__AVX512F__)
  return (vec_t<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vec_t<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec_t<float> v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}
FASTCONV_INLINE void store(float* p, vec_t<float> v) { memcpy(p, &v, sizeof v); }
FASTCONV_INLINE void store(double* p, vec_t<double> v) { memcpy(p, &v, sizeof v); }
FASTCONV_INLINE void store(bfloat16_t* p, vec_t<float> v) {
#if defined(__AVX512BF16__)  // the same but for subnormal numbers, which become zeros
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(1));
  rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i h = _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, rounded, 16));
#else
  const vuint32 bits = (vuint32)v;
  const vuint32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint32 nan = (bits >> 16) | 0x40;
  const vuint32 is_nan = (vuint32)(v != v);
  const vuint16 h = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vuint16);
#endif
  memcpy(p, &h, sizeof h);
}
FASTCONV_INLINE void store(float16_t* p, vec_t<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = from_acc<float16_t>(v[i]);
#endif
}
template <typename T>
FASTCONV_INLINE vec_t<T> broadcast(acc_t<T> value) {
  return value - vec_t<T>{};  // exact for −0 too, so the compiler emits the broadcast alone
}

// torch's ReLU: NaN stays NaN, −0 stays −0.
FASTCONV_INLINE float relu(float v) { return v < 0 ? 0 : v; }
FASTCONV_INLINE double relu(double v) { return v < 0 ? 0 : v; }
FASTCONV_INLINE vec_t<float> relu(vec_t<float> v) { return (vec_t<float>)((mask_t<float>)v & ~(v < 0)); }
FASTCONV_INLINE vec_t<double> relu(vec_t<double> v) { return (vec_t<double>)((mask_t<double>)v & ~(v < 0)); }

// The first `count` ≤ lanes elements at p, and zeros.
template <typename T>
FASTCONV_INLINE vec_t<T> load_first(const T* p, int64_t count) {
  vec_t<T> v{};
  for (int i = 0; i < lanes<T>; ++i)
    if (i < count) v[i] = to_acc(p[i]);
  return v;
}
template <typename T>
FASTCONV_INLINE void store_first(T* p, vec_t<T> v, int64_t count) {
  for (int i = 0; i < lanes<T>; ++i)
    if (i < count) p[i] = from_acc<T>(v[i]);
}
#if defined(__AVX512F__)
FASTCONV_INLINE vec_t<float> load_first(const float* p, int64_t count) {
  return (vec_t<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
FASTCONV_INLINE void store_first(float* p, vec_t<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
FASTCONV_INLINE vec_t<float> load_first(const bfloat16_t* p, int64_t count) {
  const __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
  return (vec_t<float>)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, h), 16);
}
FASTCONV_INLINE vec_t<float> load_first(const float16_t* p, int64_t count) {
  return (vec_t<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
// 16-bit types: rounded as a whole register, of which the first elements are kept.
template <typename T>
FASTCONV_INLINE void store_first_16_bits(T* p, vec_t<float> v, int64_t count) {
  __m256i h;
  T whole[lanes<T>];
  store(whole, v);
  memcpy(&h, whole, sizeof h);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), h);
}
FASTCONV_INLINE void store_first(bfloat16_t* p, vec_t<float> v, int64_t count) { store_first_16_bits(p, v, count); }
FASTCONV_INLINE void store_first(float16_t* p, vec_t<float> v, int64_t count) { store_first_16_bits(p, v, count); }
#elif defined(__AVX2__)
FASTCONV_INLINE vec_t<float> load_first(const float* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (vec_t<float>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane));
}
FASTCONV_INLINE void store_first(float* p, vec_t<float> v, int64_t count) {  // masked stores are slow on AMD
  if (count >= lanes<float>) return store(p, v);
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (count & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, part);
}
#endif

// Lanes J of a followed by b.
template <typename E, int... J>
FASTCONV_INLINE vec_t<E> shuffle(vec_t<E> a, vec_t<E> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, mask_t<E>{J...});
#endif
}

template <typename T>
FASTCONV_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
FASTCONV_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

// Asks for the cache lines of `count` elements, into L1 or L2, to be read or written. Inlined by force, as are its
// callers: GCC takes a function that only prefetches for one without effect and leaves out its calls.
template <bool Write, int Level = 2, typename T>
FASTCONV_INLINE void prefetch_lines(const T* from, int64_t count) {
  for (const char *at = (const char*)from, *end = (const char*)(from + count); at < end; at += 64)
    __builtin_prefetch(at, Write, 4 - Level);
}

// Distributes tasks 0 … tasks−1 over the workers: task(worker, index). Each begins with a run of tasks of its own, far
// from the others', so that its caches keep what one call after the other works on and no other's take lines from them;
// then it helps with what is left. Which worker takes a task is left to chance, so a task must write its own outputs
// only, and compute them in an order of its own: then the bits do not depend on it. If `backwards`, the last of a run
// comes first: after a call with as many tasks that worked on the same, of that most is still in the worker's caches.
template <bool backwards = false, typename Task>
void for_each_task(const Parallel& parallel, int64_t tasks, const Task& task) {
  const int workers = int(tasks < parallel.workers ? tasks : parallel.workers);
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(0, backwards ? tasks - 1 - i : i);
    return;
  }
  struct Run {
    alignas(64) int64_t next;
    int64_t begin, end;
  };
  struct Context {
    const Task& task;
    int runs;
    Run run[32];
  };
  Context context{task, min_of(workers, 32), {}};
  for (int k = 0; k < context.runs; ++k) {
    const int64_t begin = tasks * k / context.runs;
    context.run[k] = {begin, begin, tasks * (k + 1) / context.runs};
  }
  const auto body = [](int worker, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    for (int k = 0; k < c.runs; ++k) {
      Run& run = c.run[(worker + k) % c.runs];
      for (int64_t i; (i = __atomic_fetch_add(&run.next, 1, __ATOMIC_RELAXED)) < run.end;)
        c.task(worker, backwards ? run.begin + run.end - 1 - i : i);
    }
  };
  parallel.run(workers, body, &context);
}

// Calls f(T{}) with the element type of a problem.
template <typename F>
FASTCONV_INLINE void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::float16: return f(float16_t{});
    case DType::bfloat16: return f(bfloat16_t{});
  }
}

FASTCONV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastconv::cpu
