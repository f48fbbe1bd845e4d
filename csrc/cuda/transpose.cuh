// Between NCHW and NHWC: matrices [images][rows][columns] become [images][columns][rows].
#pragma once

#include "index.cuh"

namespace fastconv::cuda {

constexpr int transpose_tile = 32, transpose_rows = 8;

template <typename T>
struct TransposeShared {
  T at[transpose_tile][transpose_tile + 1];  // one more, so that a column lies in different banks
};

// A block moves 32 × 32 elements, reading and writing along rows.
template <typename T>
__global__ void transpose_kernel(const T* from, T* to, int64_t rows, int64_t columns, int64_t row_tiles,
                                 int64_t column_tiles) {
  auto& shared = shared_memory<TransposeShared<T>>();
  const int64_t block = blockIdx.x;
  const int64_t column0 = block % column_tiles * transpose_tile;
  const int64_t row0 = block / column_tiles % row_tiles * transpose_tile;
  const int64_t image = block / column_tiles / row_tiles * rows * columns;
  const int x = threadIdx.x % transpose_tile, y = threadIdx.x / transpose_tile;
#pragma unroll
  for (int i = y; i < transpose_tile; i += transpose_rows)
    if (row0 + i < rows && column0 + x < columns) shared.at[i][x] = from[image + (row0 + i) * columns + column0 + x];
  __syncthreads();
#pragma unroll
  for (int i = y; i < transpose_tile; i += transpose_rows)
    if (column0 + i < columns && row0 + x < rows) to[image + (column0 + i) * rows + row0 + x] = shared.at[x][i];
}

template <typename T>
Status transpose(const T* from, T* to, int64_t images, int64_t rows, int64_t columns, Stream stream) {
  const int64_t row_tiles = ceil_div(rows, transpose_tile), column_tiles = ceil_div(columns, transpose_tile);
  const int64_t blocks = images * row_tiles * column_tiles;
  if (blocks == 0) return {};
  return launch("transpose_kernel", transpose_kernel<T>, dim3(unsigned(blocks)), dim3(transpose_tile * transpose_rows),
                sizeof(TransposeShared<T>), stream, from, to, rows, columns, row_tiles, column_tiles);
}

}  // namespace fastconv::cuda
