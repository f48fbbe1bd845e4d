// Implicit GEMM, second rung: a tile of registers.
//
//   y[m][n] = bias[n] + Σ_k windows(m, k) · w(k, n),   m a pixel of y, n a filter, k a tap (implicit_gemm.cuh)
//
// What it adds to the tile: a thread computes 8 × 8 outputs. For one k it reads 8 elements of either factor from shared
// memory and makes 64 products of them, so that what bounded the rung below is read 4 times less often than multiplied,
// not twice as often.
//
// A block computes 64 × 64 outputs by 64 threads, in steps of 8 of k. Of an output with k taps:
//
//   operations   2·k
//   from memory  2·k / 64 elements, of float32 k / 8 bytes
//   floor        16 requests to shared memory for 64 multiply-adds of a warp: 16 clocks against the 16 that an SM
//                multiplies for. The two overlap, if all goes well: at most all of its multiply-adds
#include "implicit_gemm.cuh"

namespace fastconv::cuda {
namespace {

constexpr int tile = 64, depth = implicit_gemm_depth, threads = 64;

template <typename T>
struct Shared {
  T windows[depth][tile + 4];  // [k][m]; with 4 more, elements of 8 rows and 4 columns are in 32 different banks
  T matrix[depth][tile + 4];   // [k][n]
};

template <typename T>
__global__ void __launch_bounds__(threads, sizeof(T) == 8 ? 4 : 8)
    conv2d_implicit_gemm_registers_kernel(const __grid_constant__ ImplicitGemm g, int tiles_m, int tiles_n) {
  auto& shared = shared_memory<Shared<T>>();
  const int thread = threadIdx.x;
  const int n0 = blockIdx.x % tiles_n * tile, m0 = blockIdx.x / tiles_n % tiles_m * tile;
  const int group = blockIdx.x / tiles_n / tiles_m;
  const T* windows = static_cast<const T*>(g.windows) + group * g.windows_group;
  const T* matrix = static_cast<const T*>(g.matrix) + group * g.matrix_group;
  // My outputs are every eighth row and column from these on. Neighbours along the lines of y are other threads'.
  const int my_m = g.out_along_m ? thread % 8 : thread / 8, my_n = g.out_along_m ? thread / 8 : thread % 8;

  T sums[8][8] = {};
#pragma unroll 1
  for (int k0 = 0; k0 < g.k; k0 += depth) {  // redundant: one more step would add zeros
    for (int e = thread; e < tile * depth; e += threads) {
      const int m = g.windows_along_k ? e / depth : e % tile, k = g.windows_along_k ? e % depth : e / tile;
      const T* from = window(g, windows, m0 + m, k0 + k);
      shared.windows[k][m] = from ? *from : T(0);
    }
    for (int e = thread; e < tile * depth; e += threads) {  // redundant: padding follows the last element of a row
      const int n = e / depth, k = e % depth;
      const T* from = matrix_element(g, matrix, k0 + k, n0 + n);
      shared.matrix[k][n] = from ? *from : T(0);
    }
    __syncthreads();
#pragma unroll 2  // more at once would take the last registers
    for (int k = 0; k < depth; ++k) {
      T column[8], row[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) column[i] = shared.windows[k][my_m + 8 * i], row[i] = shared.matrix[k][my_n + 8 * i];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] += column[i] * row[j];
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int m = m0 + my_m + 8 * i;
    if (m >= g.m) continue;
    T* y = static_cast<T*>(g.out) + group * g.out_group + offset_of(g.out_m, digits_of(g.m_digits, m));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int n = n0 + my_n + 8 * j;
      if (n < g.n) y[n * g.out_n] = finished(g, group, n, sums[i][j]);
    }
  }
}

}  // namespace

Status conv2d_implicit_gemm_registers_fprop(const Conv2dProblem& p, const Conv2dPlan&, const void* x, const void* w,
                                            const void* bias, void* y, void*, Stream stream) {
  return dispatch_implicit_gemm(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_fprop<T>("conv2d_implicit_gemm_registers_kernel", conv2d_implicit_gemm_registers_kernel<T>, tile,
                           threads, sizeof(Shared<T>), p, x, w, bias, y, stream);
  });
}

}  // namespace fastconv::cuda
