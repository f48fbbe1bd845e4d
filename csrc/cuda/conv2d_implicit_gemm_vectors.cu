// Implicit GEMM, third rung: vectors of 16 bytes.
//
//   y[m][n] = bias[n] + Σ_k windows(m, k) · w(k, n),   m a pixel of y, n a filter, k a tap (implicit_gemm.cuh)
//
// What it adds to the tile of registers: four neighbours in memory are one access. From memory, where they are four
// channels of a pixel (NHWC), four taps of a filter, or four pixels of a 1×1 convolution in NCHW: one look-up instead
// of four. From shared memory always, since a thread's rows and columns are now two runs of four. And to y.
//
// A block computes 64 × 64 outputs by 64 threads, in steps of 8 of k. Of an output with k taps:
//
//   operations   2·k
//   from memory  2·k / 64 elements, of float32 k / 8 bytes, by a quarter of the instructions
//   floor        4 loads from shared memory and 64 multiply-adds a thread and k: 94 % of the instructions multiply,
//   were
//                it not for the copying, which nothing here overlaps but other blocks
#include "implicit_gemm.cuh"

namespace fastconv::cuda {
namespace {

constexpr int tile = 64, depth = implicit_gemm_depth, threads = 64;

template <typename T>
struct Shared {
  alignas(16) T windows[depth][tile + 4];  // [k][m]
  alignas(16) T matrix[depth][tile + 4];   // [k][n]
};

// Brings four elements, k … k + 3 of row i or i … i + 3 of k; at(i, k) is an element's address, null where it is zero.
template <typename T, typename At>
__device__ __forceinline__ void copy_quad(T (&to)[depth][tile + 4], int i, int k, bool along_k, bool quads, At&& at) {
  Quad<T> quad;
  if (quads) {
    const T* from = at(i, k);
    if (from) quad = load_quad(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) quad.at[j] = from ? quad.at[j] : T(0);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* from = along_k ? at(i, k + j) : at(i + j, k);
      quad.at[j] = from ? *from : T(0);
    }
  }
  if (!along_k) return store_quad(&to[k][i], quad);
#pragma unroll
  for (int j = 0; j < 4; ++j) to[k + j][i] = quad.at[j];
}

template <typename T>
__global__ void __launch_bounds__(threads, sizeof(T) == 8 ? 4 : 6)
    conv2d_implicit_gemm_vectors_kernel(const __grid_constant__ ImplicitGemm g, int tiles_m, int tiles_n) {
  auto& shared = shared_memory<Shared<T>>();
  const int thread = threadIdx.x;
  const int n0 = blockIdx.x % tiles_n * tile, m0 = blockIdx.x / tiles_n % tiles_m * tile;
  const int group = blockIdx.x / tiles_n / tiles_m;
  const T* windows = static_cast<const T*>(g.windows) + group * g.windows_group;
  const T* matrix = static_cast<const T*>(g.matrix) + group * g.matrix_group;
  const int my_m = 4 * (g.out_along_m ? thread % 8 : thread / 8), my_n = 4 * (g.out_along_m ? thread / 8 : thread % 8);

  T sums[8][8] = {};
#pragma unroll 1
  for (int k0 = 0; k0 < g.k; k0 += depth) {  // redundant: one more step would add zeros
#pragma unroll 1
    for (int quad = thread; quad < tile * depth / 4; quad += threads) {
      const int m = g.windows_along_k ? quad / 2 : quad % (tile / 4) * 4;
      const int k = g.windows_along_k ? quad % 2 * 4 : quad / (tile / 4);
      copy_quad(shared.windows, m, k, g.windows_along_k, g.windows_quads,
                [&](int i, int j) { return window(g, windows, m0 + i, k0 + j); });
    }
#pragma unroll 1
    // redundant: padding follows the last element of a row
    for (int quad = thread; quad < tile * depth / 4; quad += threads)
      copy_quad(shared.matrix, quad / 2, quad % 2 * 4, true, g.matrix_quads,
                [&](int i, int j) { return matrix_element(g, matrix, k0 + j, n0 + i); });
    __syncthreads();
#pragma unroll 2  // more at once would take the last registers
    for (int k = 0; k < depth; ++k) multiply_quads(sums, shared.windows[k], shared.matrix[k], my_m, my_n, tile / 2);
    __syncthreads();
  }
  const OutputTile<T> out = {static_cast<T*>(g.out) + group * g.out_group, g.m_digits, g.m, group};
  store_sums(g, out, sums, m0 + my_m, n0 + my_n, tile / 2);
}

}  // namespace

Status conv2d_implicit_gemm_vectors_fprop(const Conv2dProblem& p, const Conv2dPlan&, const void* x, const void* w,
                                          const void* bias, void* y, void*, Stream stream) {
  return dispatch_implicit_gemm(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_fprop<T>("conv2d_implicit_gemm_vectors_kernel", conv2d_implicit_gemm_vectors_kernel<T>, tile, threads,
                           sizeof(Shared<T>), p, x, w, bias, y, stream);
  });
}

}  // namespace fastconv::cuda
