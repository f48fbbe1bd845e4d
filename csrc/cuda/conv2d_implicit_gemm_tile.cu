// Implicit GEMM, first rung: the shared-memory tile of the lectures.
//
//   y[m][n] = bias[n] + Σ_k windows(m, k) · w(k, n),   m a pixel of y, n a filter, k a tap (implicit_gemm.cuh)
//
// What it adds to im2col: the matrix of windows is nowhere. An element of it is looked up in x when it is brought to
// shared memory, so that no buffer is written and read, and none need be as large as R·S copies of x.
//
// A block computes 32 × 32 outputs, one a thread, in steps of 32 of k. In each, a thread brings one element of either
// factor, and each element is used 32 times. Of an output with k taps:
//
//   operations   2·k
//   from memory  2·k / 32 elements, of float32 8·k / 32 = k / 4 bytes: 32 times fewer than direct_naive
//   floor        shared memory. A multiply-add reads two elements: 32 threads ask for one of `windows`, the same for
//                all, and 32 of `matrix`. An SM answers one such request a clock, and could multiply four warps in it:
//                at most 1/8 of its multiply-adds
#include "implicit_gemm.cuh"

namespace fastconv::cuda {
namespace {

constexpr int tile = 32;

template <typename T>
struct Shared {
  T windows[tile][tile + 1];  // [m][k]; the one more puts a column into 32 different banks
  T matrix[tile][tile + 1];   // [n][k]
};

template <typename T>
__global__ void __launch_bounds__(tile* tile)
    conv2d_implicit_gemm_tile_kernel(const __grid_constant__ ImplicitGemm g, int tiles_m, int tiles_n) {
  auto& shared = shared_memory<Shared<T>>();
  const int lane = threadIdx.x % tile, line = threadIdx.x / tile;
  const int n0 = blockIdx.x % tiles_n * tile, m0 = blockIdx.x / tiles_n % tiles_m * tile;
  const int group = blockIdx.x / tiles_n / tiles_m;
  const T* windows = static_cast<const T*>(g.windows) + group * g.windows_group;
  const T* matrix = static_cast<const T*>(g.matrix) + group * g.matrix_group;

  // Neighbouring threads (lanes) take neighbours in memory: taps or pixels of x, pixels or filters of y.
  const int load_m = g.windows_along_k ? line : lane, load_k = g.windows_along_k ? lane : line;
  const int my_m = g.out_along_m ? lane : line, my_n = g.out_along_m ? line : lane;

  T sum = 0;
  for (int k0 = 0; k0 < g.k; k0 += tile) {  // redundant: one more step would add zeros
    const T* from = window(g, windows, m0 + load_m, k0 + load_k);
    shared.windows[load_m][load_k] = from ? *from : T(0);
    from = matrix_element(g, matrix, k0 + lane, n0 + line);
    shared.matrix[line][lane] = from ? *from : T(0);
    __syncthreads();  // the tiles are there
    for (int k = 0; k < tile; ++k) sum += shared.windows[my_m][k] * shared.matrix[my_n][k];
    __syncthreads();  // and may be overwritten
  }

  const int m = m0 + my_m, n = n0 + my_n;
  if (m >= g.m || n >= g.n) return;
  T* y = static_cast<T*>(g.out) + group * g.out_group + offset_of(g.out_m, digits_of(g.m_digits, m));
  y[n * g.out_n] = finished(g, group, n, sum);
}

}  // namespace

Status conv2d_implicit_gemm_tile_fprop(const Conv2dProblem& p, const Conv2dPlan&, const void* x, const void* w,
                                       const void* bias, void* y, void*, Stream stream) {
  return dispatch_implicit_gemm(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_fprop<T>("conv2d_implicit_gemm_tile_kernel", conv2d_implicit_gemm_tile_kernel<T>, tile, tile * tile,
                           sizeof(Shared<T>), p, x, w, bias, y, stream);
  });
}

}  // namespace fastconv::cuda
