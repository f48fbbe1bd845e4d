// C = A·B for the convolutions that are matrix products: C[m][n] = Σ_k A[m][k]·B[k][n], for each of `batches` (groups).
//
// A block computes tile × tile outputs, eight by eight a thread. It walks the contraction in steps of 8: while it
// multiplies one step out of shared memory, the next one is on its way from global memory to registers, to be stored
// into the other half of the shared buffers; one barrier a step. Elements are converted to the accumulation type on
// their way into shared memory, as A[k][m] and B[k][n], so that the inner loop is the same for every dtype and layout:
// four 16-byte loads for 64 multiply-adds.
//
// The contraction may be cut into `splits`, whose sums go to separate partial results and are added in order
// (sum_splits): what is computed depends on the plan alone, never on which block ends first.
#pragma once

#include "index.cuh"

namespace fastconv::cuda {

constexpr int gemm_depth = 8;

// A, seen as (m, k), or B, seen as (n, k).
struct Matrix {
  const void* data = nullptr;
  Index i, k;
  int64_t batch_stride = 0;
  bool along_k = false;  // which of the two is contiguous
  bool quads = false;    // four elements along it, from a multiple of four, are always readable with vector loads
};

struct Gemm {
  Matrix a, b;
  int m, n, k;
  int batches;
  int splits, k_per_split;  // k_per_split is a multiple of gemm_depth
  int tiles_m, tiles_n;

  // Either the result, in the elements' type …
  void* c;
  Index c_m, c_n;
  int64_t c_batch_stride;
  bool c_quads;
  const void* bias;  // may be null
  int bias_batch_stride, bias_m_stride, bias_n_stride;
  bool relu;  // after the bias
  // … or, if not null, partial sums [splits][batches][m][pitch] in the accumulation type, pitch = n rounded up to 4;
  // row_sums, if not null, [splits][batches][m], are the sums of A's rows, which cost nothing extra.
  void* partial;
  void* row_sums;
  bool accumulate;  // adds to the partial sums that are there
};

__host__ __device__ constexpr int round_up_4(int n) { return (n + 3) & ~3; }

template <typename T, int tile>
struct GemmShared {
  // The 4 more keep the columns of transposed stores in different banks.
  alignas(16) acc_t<T> a[2][gemm_depth][tile + 4];
  alignas(16) acc_t<T> b[2][gemm_depth][tile + 4];
};

// Loads the elements (i … i + 3, k) or (i, k … k + 3), zeros outside of the matrix.
template <typename T>
__device__ __forceinline__ Quad<T> gemm_fetch(const Matrix& matrix, const T* data, int i, int k, int end_i, int end_k) {
  Quad<T> quad;
#pragma unroll
  for (int j = 0; j < 4; ++j) quad.at[j] = from_acc<T>(0);
  if (i >= end_i || k >= end_k) return quad;
  if (matrix.quads) return load_quad(data + matrix.i.offset(i) + matrix.k.offset(k));
  // Adds 0, which the compiler cannot know: otherwise it would work the four offsets out before the loop over k, and
  // spill the registers that keep them.
  i += k >> 31;
  if (matrix.along_k) {
    data += matrix.i.offset(i);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (k + j < end_k) quad.at[j] = data[matrix.k.offset(k + j)];
  } else {
    data += matrix.k.offset(k);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j < end_i) quad.at[j] = data[matrix.i.offset(i + j)];
  }
  return quad;
}

template <typename T, int tile>
__device__ __forceinline__ void gemm_store(acc_t<T> (&shared)[gemm_depth][tile + 4], const Quad<T>& quad, bool along_k,
                                           int i, int k) {
  Quad<acc_t<T>> values;
#pragma unroll
  for (int j = 0; j < 4; ++j) values.at[j] = to_acc(quad.at[j]);
  if (along_k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) shared[k + j][i] = values.at[j];
  } else {
    store_quad(&shared[k][i], values);
  }
}

// Blocks an SM can hold, which limits the registers of a thread to 128 or 168, of float64 to 255.
template <typename T, int tile>
constexpr int gemm_blocks_per_sm = tile == 128      ? 2
                                   : sizeof(T) == 8 ? 4
                                                    : 6;

template <typename T, int tile>
__global__ void __launch_bounds__(tile* tile / 64, gemm_blocks_per_sm<T, tile>)
    gemm_kernel(const __grid_constant__ Gemm g) {
  using acc = acc_t<T>;
  constexpr int threads = tile * tile / 64, half = tile / 2;
  constexpr int quads = tile * gemm_depth / 4 / threads;  // of each matrix and step, a thread
  auto& shared = shared_memory<GemmShared<T, tile>>();
  const int thread = threadIdx.x, thread_m = thread / (tile / 8), thread_n = thread % (tile / 8);

  // Neighbouring blocks share the larger matrix: the index with fewer tiles runs fastest.
  int block = blockIdx.x;
  const bool m_first = g.tiles_m <= g.tiles_n;  // redundant: any order of the blocks gives the same result
  const int fast = block % (m_first ? g.tiles_m : g.tiles_n);
  block /= m_first ? g.tiles_m : g.tiles_n;
  const int slow = block % (m_first ? g.tiles_n : g.tiles_m);
  block /= m_first ? g.tiles_n : g.tiles_m;
  const int split = block % g.splits, batch = block / g.splits;
  const int m0 = (m_first ? fast : slow) * tile, n0 = (m_first ? slow : fast) * tile;
  const int k_begin = split * g.k_per_split, k_end = min(g.k, k_begin + g.k_per_split);

  const T* a = static_cast<const T*>(g.a.data) + batch * g.a.batch_stride;
  const T* b = static_cast<const T*>(g.b.data) + batch * g.b.batch_stride;
  // Where in a step the j-th quad of this thread lies: two quads a row along k, tile / 4 quads a row along i.
  const auto quad_i = [&](const Matrix& matrix, int j) {
    const int quad = thread + j * threads;
    return matrix.along_k ? quad / 2 : quad % (tile / 4) * 4;
  };
  const auto quad_k = [&](const Matrix& matrix, int j) {
    const int quad = thread + j * threads;
    return matrix.along_k ? quad % 2 * 4 : quad / (tile / 4);
  };
  Quad<T> next_a[quads], next_b[quads];
  const auto fetch = [&](int k) {
#pragma unroll
    for (int j = 0; j < quads; ++j) {
      next_a[j] = gemm_fetch(g.a, a, m0 + quad_i(g.a, j), k + quad_k(g.a, j), g.m, k_end);
      next_b[j] = gemm_fetch(g.b, b, n0 + quad_i(g.b, j), k + quad_k(g.b, j), g.n, k_end);
    }
  };
  const auto store = [&](int buffer) {
#pragma unroll
    for (int j = 0; j < quads; ++j) {
      gemm_store<T, tile>(shared.a[buffer], next_a[j], g.a.along_k, quad_i(g.a, j), quad_k(g.a, j));
      gemm_store<T, tile>(shared.b[buffer], next_b[j], g.b.along_k, quad_i(g.b, j), quad_k(g.b, j));
    }
  };

  acc sums[8][8] = {};
  acc row_sum = 0;
  const bool sum_rows = g.row_sums && n0 == 0 && thread < tile;
  if (k_begin < k_end) {  // redundant: an empty split would store zeros that nobody multiplies
    fetch(k_begin);
    store(0);
  }
  __syncthreads();
  int buffer = 0;
#pragma unroll 1
  for (int k = k_begin; k < k_end; k += gemm_depth, buffer ^= 1) {
    const bool more = k + gemm_depth < k_end;  // redundant: beyond the end, zeros that nobody multiplies are stored
    if (more) fetch(k + gemm_depth);
#pragma unroll(sizeof(T) == 8 ? 2 : 4)  // all eight at once would spill
    for (int step = 0; step < gemm_depth; ++step) {
      acc column[8], row[8];  // of A and of B
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Quad<acc> va = load_quad(&shared.a[buffer][step][h * half + thread_m * 4]);
        const Quad<acc> vb = load_quad(&shared.b[buffer][step][h * half + thread_n * 4]);
#pragma unroll
        for (int j = 0; j < 4; ++j) column[h * 4 + j] = va.at[j], row[h * 4 + j] = vb.at[j];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] += column[i] * row[j];
      }
    }
    if (sum_rows) {
#pragma unroll
      for (int step = 0; step < gemm_depth; ++step) row_sum += shared.a[buffer][step][thread];
    }
    if (more) store(buffer ^ 1);
    __syncthreads();
  }

  const int64_t partial_row = (int64_t(split) * g.batches + batch) * g.m;  // of m = 0
  if (sum_rows && m0 + thread < g.m) {
    acc* out = static_cast<acc*>(g.row_sums) + partial_row + m0 + thread;
    *out = g.accumulate ? *out + row_sum : row_sum;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int m = m0 + i / 4 * half + thread_m * 4 + i % 4;
    if (m >= g.m) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = n0 + h * half + thread_n * 4;
      if (n >= g.n) continue;
      Quad<acc> value;
#pragma unroll
      for (int j = 0; j < 4; ++j) value.at[j] = sums[i][h * 4 + j];
      if (g.partial) {
        acc* out = static_cast<acc*>(g.partial) + (partial_row + m) * round_up_4(g.n) + n;
        if (g.accumulate) {
          const Quad<acc> before = load_quad(out);
#pragma unroll
          for (int j = 0; j < 4; ++j) value.at[j] += before.at[j];
        }
        store_quad(out, value);
        continue;
      }
      T* out = static_cast<T*>(g.c) + batch * g.c_batch_stride + g.c_m.offset(m);
      const T* bias =
          g.bias ? static_cast<const T*>(g.bias) + batch * g.bias_batch_stride + m * g.bias_m_stride : nullptr;
      Quad<T> rounded;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (bias && n + j < g.n) value.at[j] += to_acc(bias[(n + j) * g.bias_n_stride]);
        rounded.at[j] = from_acc<T>(g.relu ? relu(value.at[j]) : value.at[j]);
      }
      if (g.c_quads) {
        store_quad(out + g.c_n.offset(n), rounded);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (n + j < g.n) out[g.c_n.offset(n + j)] = rounded.at[j];
    }
  }
}

// Whether four elements along the contiguous index, of `extent` elements, are aligned and inside the matrix together.
template <typename T>
bool has_quads(const void* data, const Index& contiguous, const Index& other, int64_t batch_stride, int extent) {
  const auto aligned = [](const Index& i) { return i.outer_stride % 4 == 0 && i.inner.d % 4 == 0; };
  return is_aligned(data, quad_alignment<T>) && extent % 4 == 0 && batch_stride % 4 == 0 && contiguous.stride == 1 &&
         aligned(contiguous) && other.stride % 4 == 0 && other.outer_stride % 4 == 0;
}

// Fills in what follows from the rest and launches. `tile` and `splits` are the plan's.
template <typename T>
Status run_gemm(Gemm g, int tile, int splits, Stream stream) {
  if (g.batches == 1) g.a.batch_stride = g.b.batch_stride = g.c_batch_stride = 0;
  g.a.quads = has_quads<T>(g.a.data, g.a.along_k ? g.a.k : g.a.i, g.a.along_k ? g.a.i : g.a.k, g.a.batch_stride,
                           g.a.along_k ? g.k : g.m) ||
              g.a.quads;
  g.b.quads = has_quads<T>(g.b.data, g.b.along_k ? g.b.k : g.b.i, g.b.along_k ? g.b.i : g.b.k, g.b.batch_stride,
                           g.b.along_k ? g.k : g.n) ||
              g.b.quads;
  g.c_quads = g.c && has_quads<T>(g.c, g.c_n, g.c_m, g.c_batch_stride, g.n);
  g.splits = splits;
  g.k_per_split = int(ceil_div(ceil_div(g.k, splits), gemm_depth)) * gemm_depth;
  g.tiles_m = int(ceil_div(g.m, tile));
  g.tiles_n = int(ceil_div(g.n, tile));
  const int64_t blocks = int64_t(g.tiles_m) * g.tiles_n * g.batches * splits;
  if (blocks == 0) return {};
  if constexpr (sizeof(T) != 8) {  // 8 × 8 float64 sums a thread leave no room for a second block of 256 threads
    if (tile == 128)
      return launch("gemm_kernel", gemm_kernel<T, 128>, dim3(unsigned(blocks)), dim3(256), sizeof(GemmShared<T, 128>),
                    stream, g);
  }
  return launch("gemm_kernel", gemm_kernel<T, 64>, dim3(unsigned(blocks)), dim3(64), sizeof(GemmShared<T, 64>), stream,
                g);
}

}  // namespace fastconv::cuda
