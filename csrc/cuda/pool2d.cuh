// What the pooling kernels have in common: a thread has one item of the launch, whose coordinates are the digits of its
// number.
#pragma once

#include "index.cuh"

namespace fastconv::cuda {

constexpr int block_threads = 256;

// Blocks on a multiprocessor, for the compiler's choice of registers: without a number it spills for the sake of eight.
template <typename Index>
constexpr int least_blocks = sizeof(Index) == 4 ? 4 : 1;

__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * block_threads + threadIdx.x; }

template <typename Index>
struct PoolItems {
  int64_t items = 0;                   // of the launch
  Divide<Index> inner, middle, outer;  // an item's coordinates, fastest first: see each kernel
  bool whole_vectors = false;          // backward NCHW: rows of dx are made of whole, aligned vectors

  void divide(int64_t count, int64_t inner_size, int64_t middle_size, int64_t outer_size) {
    items = count;
    inner = Divide<Index>(inner_size), middle = Divide<Index>(middle_size), outer = Divide<Index>(outer_size);
  }
};

// Channels in the vectors of an NHWC kernel: 16 bytes, or one element where those would not be aligned.
template <typename T>
int channel_lanes(int64_t C, const void* a, const void* b) {
  constexpr int lanes = 16 / sizeof(T);
  return C % lanes == 0 && is_aligned(a, 16) && is_aligned(b, 16) ? lanes : 1;
}

template <typename Pool, typename... P, typename... A>
Status launch_pool(const char* name, void (*kernel)(Pool, P...), const Pool& pool, Stream stream, A... args) {
  const dim3 grid(unsigned(ceil_div(pool.items, block_threads)));
  return launch(name, kernel, grid, dim3(block_threads), 0, stream, pool, args...);
}

}  // namespace fastconv::cuda
