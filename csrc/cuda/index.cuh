// Index arithmetic that the kernels share: division by a launch constant, and where elements lie.
#pragma once

#include "types.cuh"

namespace fastconv::cuda {

// Quotient and remainder of 0 ≤ n < 2^31 by 1 ≤ d < 2^31 with one multiplication.
// With 2^(l−1) < d ≤ 2^l and m = ceil(2^(31+l) / d), n·m / 2^(31+l) exceeds n / d by less than n / (d·2^31) < 1 / d, so
// that both have the same floor.
struct Divisor {
  uint32_t d = 0, multiplier = 0;
  int shift = 0;

  Divisor() = default;
  __host__ __device__ explicit Divisor(int64_t divisor) : d(uint32_t(divisor)), shift(31) {
    while ((uint64_t{1} << (shift - 31)) < d) ++shift;
    multiplier = uint32_t(((uint64_t{1} << shift) + d - 1) / d);
  }
  __device__ __forceinline__ int quotient(int n) const { return int(uint64_t(uint32_t(n)) * multiplier >> shift); }
  // Replaces n by its remainder and returns the quotient: one step of taking a linear index apart.
  __device__ __forceinline__ int split(int& n) const {
    const int q = quotient(n);
    n -= q * int(d);
    return q;
  }
};

// The same for either index type: Divide<int> is Divisor, Divide<int64_t> its method with numbers twice as long, for
// 0 ≤ n < 2^62.
template <typename I>
struct Divide;
template <>
struct Divide<int> : Divisor {
  using Divisor::Divisor;
};
template <>
struct Divide<int64_t> {
  int64_t d = 0;
  uint64_t multiplier = 0;
  int shift = 0;

  Divide() = default;
  explicit Divide(int64_t divisor) : d(divisor) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = uint64_t((((unsigned __int128)(1) << (63 + shift)) + uint64_t(d) - 1) / uint64_t(d));
  }
  __device__ __forceinline__ int64_t quotient(int64_t n) const {
    return int64_t(__umul64hi(2 * uint64_t(n), multiplier) >> shift);
  }
  __device__ __forceinline__ int64_t split(int64_t& n) const {
    const int64_t q = quotient(n);
    n -= q * d;
    return q;
  }
};

// Where index i of a matrix lies: i·stride; or, if i counts the pixels of several images whose planes are not adjacent
// (NCHW), (i / inner)·outer_stride + (i % inner)·stride, with i < 2^31.
struct Index {
  int64_t stride = 0, outer_stride = 0;
  Divisor inner;  // inner.d == 0: one level

  __device__ __forceinline__ int64_t offset(int64_t i) const {
    if (inner.d == 0) return i * stride;
    int rest = int(i);
    const int outer = inner.split(rest);
    return outer * outer_stride + rest * stride;
  }
};

// Of x, y (N×C×H×W) and w (K×C/groups×R×S, whose K is called n here).
struct Strides {
  int64_t n, c, h, w;
};
inline Strides strides_of(Layout layout, int64_t C, int64_t H, int64_t W) {
  return layout == Layout::NCHW ? Strides{C * H * W, H * W, W, 1} : Strides{C * H * W, 1, W * C, C};
}
inline Strides x_strides(const Conv2dProblem& p) { return strides_of(p.layout, p.C, p.H, p.W); }
inline Strides y_strides(const Conv2dProblem& p) { return strides_of(p.layout, p.K, p.P, p.Q); }
inline Strides w_strides(const Conv2dProblem& p) { return strides_of(p.layout, p.channels_per_group(), p.R, p.S); }

// Four consecutive elements, in one or (float64) two vector accesses. p is a multiple of min(16, 4·sizeof(T)) bytes.
template <typename T>
struct Quad {
  T at[4];
};
template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* p) {
  constexpr int n = sizeof(T) == 8 ? 2 : 4;
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < 4; i += n) {
    const Vec<T, n> v = load_vec<n>(p + i);
#pragma unroll
    for (int j = 0; j < n; ++j) quad.at[i + j] = v.at[j];
  }
  return quad;
}
template <typename T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& quad) {
  constexpr int n = sizeof(T) == 8 ? 2 : 4;
#pragma unroll
  for (int i = 0; i < 4; i += n) {
    Vec<T, n> v;
#pragma unroll
    for (int j = 0; j < n; ++j) v.at[j] = quad.at[i + j];
    store_vec(p + i, v);
  }
}
template <typename T>
constexpr size_t quad_alignment = sizeof(T) >= 4 ? 16 : 4 * sizeof(T);

}  // namespace fastconv::cuda
