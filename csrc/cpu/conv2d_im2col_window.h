// C[M×N] = A[M×depth] · B[depth×N] where row t of B lies anywhere, at b + offsets[t]: the planes of a convolution, in x
// or where they are staged. A panel of their columns at a time is packed, so that all rows of A find it in L1 or close
// by. Rows of C are channels; its columns are pixels, which the last product of a block adds to the bias and writes to
// the result itself, where that has them side by side.
#pragma once

#include "conv2d_stage.h"
#include "gemm.h"

namespace fastconv::cpu {
namespace {

// Where the rows of a tile go: to c, or, if out is not null, through the bias and the ReLU to out.
template <typename T>
struct WindowOut {
  acc_t<T>* c;
  int64_t c_row;
  bool add;  // to what c holds
  T* out;
  int64_t out_row, cols;  // of out: elements between rows, and in one
  const T* bias;          // of the rows, or null
  bool relu;
};

template <typename T, int Rows, int Vectors>
FASTCONV_INLINE void store_window_tile(vec_t<T> (&sums)[Rows][Vectors], const WindowOut<T>& to, int64_t row,
                                       int64_t col) {
  acc_t<T>* c = to.c + row * to.c_row + col;
  if (to.add) add_tile(sums, c, to.c_row);
  if (!to.out) return store_tile(sums, c, to.c_row);
  const int64_t left = to.cols - col;
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    const vec_t<T> bias = broadcast<T>(to.bias ? to_acc(to.bias[row + i]) : 0);
    T* out = to.out + (row + i) * to.out_row + col;
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const vec_t<T> y = to.relu ? relu(sums[i][v] + bias) : sums[i][v] + bias;
      if (left >= (v + 1) * lanes<T>)
        store(out + v * lanes<T>, y);
      else
        store_first(out + v * lanes<T>, y, left - v * lanes<T>);
    }
  }
}

// A: element (row, channel, tap) at data[row·rows + channel·channels + tap]
template <typename E>
struct WindowFilters {
  const E* data;
  int64_t rows, channels;
};

// Columns of B: `cols` pixels of images that have `image` of them side by side and are `plane` apart.
template <typename E>
struct WindowLine {
  const E* data;
  int64_t image, plane, cols;
};

// out[t][panel_cols]: columns col … col + count − 1. Vectors spill into what is written next, and past the end.
template <typename E>
void pack_windows(const WindowLine<E>& line, const int64_t* offsets, int64_t depth, int64_t col, int64_t count,
                  E* out) {
  constexpr int64_t width = panel_cols<E>, bytes = 64 / sizeof(E);
  const E* from = line.data + col / line.image * line.plane + col % line.image;
  const int64_t first = line.image - col % line.image;  // pixels of the first image
  if (count == width && first >= width) {
    for (int64_t t = 0; t < depth; ++t, out += width) {
      const E* row = from + offsets[t];
      for (int64_t i = 0; i < width; i += bytes) __builtin_prefetch(row + width + i, 0, 2);  // the next panel, to L2
      const vec_t<E> left = load(row), right = load(row + lanes<E>);
      store(out, left);
      store(out + lanes<E>, right);
    }
    return;
  }
  for (int64_t t = 0; t < depth; ++t, out += width) {
    const E* row = from + offsets[t];
    for (int64_t done = 0, piece = min_of(first, count); done < count; piece = min_of(line.image, count - done)) {
      copy_strided<true>(row, 1, out + done, piece);
      row += line.plane + (done == 0 ? first - line.image : 0);
      done += piece;
    }
  }
}

template <typename T, int Rows, int Vectors>
__attribute__((noinline)) void multiply_window_tile(int64_t channels, int64_t taps, const WindowFilters<acc_t<T>>& a,
                                                    const acc_t<T>* b, const WindowOut<T>& to, int64_t row,
                                                    int64_t col) {
  using E = acc_t<T>;
  constexpr int64_t line = 64 / sizeof(E);
  const E* rows[Rows];
  for (int i = 0; i < Rows; ++i) rows[i] = a.data + (row + i) * a.rows;
  if (to.out)  // so that the stores find their lines
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(to.out + (row + i) * to.out_row + col + v * lanes<T>, 1);
  vec_t<E> sums[Rows][Vectors];
  clear_tile(sums);
  // A's elements, `piece` of them `next` apart: neighbours in a row, one of each channel, or the taps of a channel.
  const bool joined = a.channels == taps, apart = !joined && taps == 1;
  const int64_t depth = channels * taps, piece = joined ? line : apart ? depth : taps;
  const int64_t step = joined ? line : a.channels, next = apart ? a.channels : 1;
  for (int64_t t = 0, first = 0; t < depth; t += piece, first += step) {
    if (!apart)  // the rows of the next tile: short pieces, far apart, come late otherwise
      for (int i = 0; i < Rows; ++i)
        for (int64_t at = 0; at < piece; at += line) __builtin_prefetch(rows[i] + Rows * a.rows + first + at);
    for (int64_t i = 0, at = first, end = min_of(piece, depth - t); i < end; ++i, at += next, b += panel_cols<E>) {
      vec_t<E> values[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) values[v] = load(b + v * lanes<E>);
      add_products(sums, values, [&](int row) { return broadcast<E>(rows[row][at]); });
    }
  }
  store_window_tile<T>(sums, to, row, col);
}

// Panel by panel, of which the last may be a single vector.
template <typename T>
void multiply_windows(int64_t rows, const WindowLine<acc_t<T>>& line, int64_t channels, int64_t taps,
                      const WindowFilters<acc_t<T>>& a, const int64_t* offsets, acc_t<T>* panel,
                      const WindowOut<T>& to) {
  for (int64_t col = 0; col < line.cols; col += panel_cols<acc_t<T>>) {
    const int64_t count = min_of<int64_t>(panel_cols<acc_t<T>>, line.cols - col);
    pack_windows(line, offsets, channels * taps, col, count, panel);
    for_row_tiles(rows, [&](int64_t row, auto height) {
      if (count > lanes<T>)
        multiply_window_tile<T, height.value, 2>(channels, taps, a, panel, to, row, col);
      else
        multiply_window_tile<T, height.value, 1>(channels, taps, a, panel, to, row, col);
    });
  }
}

}  // namespace
}  // namespace fastconv::cpu
