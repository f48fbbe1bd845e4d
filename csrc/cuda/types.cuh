// Element types: conversions to the type they are computed in, vectors of them, and dispatch on a problem's dtype.
#pragma once

#include <cstring>

#include "launch.cuh"

namespace fastconv::cuda {

// acc_t<T>: what elements of T are computed and added up in.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulator<T>::type;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ T from_acc(acc_t<T> v);
template <>
__device__ __forceinline__ float from_acc<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_acc<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// torch's ReLU: NaN stays NaN, −0 stays −0.
template <typename A>
__device__ __forceinline__ A relu(A v) {
  return v < A(0) ? A(0) : v;
}

// n elements that one instruction loads or stores: n · sizeof(T) is 1, 2, 4, 8 or 16, the address a multiple of it.
template <typename T, int n>
struct alignas(n * sizeof(T)) Vec {
  T at[n];
};
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <int n, typename T>
__device__ __forceinline__ Vec<T, n> load_vec(const T* p) {
  using W = typename Word<n * sizeof(T)>::type;
  check_aligned(p, sizeof(W));
  const W word = *reinterpret_cast<const W*>(p);
  Vec<T, n> v;
  memcpy(&v, &word, sizeof v);
  return v;
}
template <typename T, int n>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, n>& v) {
  using W = typename Word<n * sizeof(T)>::type;
  check_aligned(p, sizeof(W));
  W word;
  memcpy(&word, &v, sizeof v);
  *reinterpret_cast<W*>(p) = word;
}

// Host: calls f(T{}) with the element type of a problem and returns its status.
template <typename F>
Status dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::float16: return f(__half{});
    case DType::bfloat16: return f(__nv_bfloat16{});
  }
  return {"dispatch", "unknown dtype"};
}

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastconv::cuda
