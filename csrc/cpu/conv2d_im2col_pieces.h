// C[M×N] = A[M×depth] · B[depth×N] where a row of A is made of pieces that lie anywhere: the channels of the pixels
// that an output reads, where they are in the source. Rows of C are pixels; its columns are channels, in packed panels
// of B. The last product of a block adds the bias and writes to the result itself.
#pragma once

#include "gemm.h"

namespace fastconv::cpu {
namespace {

// Where the rows of a tile go: to c, or, if out is not null, through the bias and the ReLU to out + out_rows[row].
template <typename T>
struct PiecesOut {
  acc_t<T>* c;
  int64_t c_row;
  bool add;  // to what c holds
  T* out;
  const int64_t* out_rows;
  int64_t cols;
  const T* bias;  // of the columns, or null
  bool relu;
};

template <typename T, int Rows>
FASTCONV_INLINE void store_pieces_tile(vec_t<T> (&sums)[Rows][2], const PiecesOut<T>& to, int64_t row, int64_t col) {
  for (int v = 0; v < 2; ++v, col += lanes<T>) {
    const int64_t left = to.cols - col;
    if (to.out && left <= 0) return;
    vec_t<T> bias{};
    if (to.out && to.bias) bias = left >= lanes<T> ? load(to.bias + col) : load_first(to.bias + col, left);
    for (int i = 0; i < Rows; ++i) {
      acc_t<T>* c = to.c + (row + i) * to.c_row + col;
      const vec_t<T> sum = to.add ? load(c) + sums[i][v] : sums[i][v];
      const vec_t<T> y = to.relu ? relu(sum + bias) : sum + bias;
      if (!to.out)
        store(c, sum);
      else if (left >= lanes<T>)
        store(to.out + to.out_rows[row + i] + col, y);
      else
        store_first(to.out + to.out_rows[row + i] + col, y, left);
    }
  }
}

// a[piece·a_pieces + row]: where the piece's `length` elements of a row lie
template <typename T, int Rows>
void multiply_pieces_tile(int64_t pieces, int64_t length, const acc_t<T>* const* a, int64_t a_pieces, const acc_t<T>* b,
                          const PiecesOut<T>& to, int64_t row, int64_t col) {
  using E = acc_t<T>;
  if (to.out)  // so that the stores find their lines
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < 2; ++v) __builtin_prefetch(to.out + to.out_rows[row + i] + col + v * lanes<T>, 1);
  vec_t<E> sums[Rows][2] = {};
  a += row;
  for (int64_t piece = 0; piece < pieces; ++piece, a += a_pieces) {
    const E* rows[Rows];
    for (int i = 0; i < Rows; ++i) rows[i] = a[i];
    for (int64_t t = 0; t < length; ++t, b += panel_cols<E>) {
      const vec_t<E> left = load(b), right = load(b + lanes<E>);
      for (int i = 0; i < Rows; ++i) {
        const vec_t<E> value = broadcast<E>(rows[i][t]);
        sums[i][0] += value * left;
        sums[i][1] += value * right;
      }
    }
  }
  store_pieces_tile<T>(sums, to, row, col);
}

template <typename T>
void multiply_pieces(int64_t rows, int64_t panels, int64_t pieces, int64_t length, const acc_t<T>* const* a,
                     int64_t a_pieces, const acc_t<T>* b, int64_t b_panel, const PiecesOut<T>& to) {
  for (int64_t panel = 0; panel < panels; ++panel, b += b_panel)
    for_row_tiles(rows, [&](int64_t row, auto height) {
      multiply_pieces_tile<T, height.value>(pieces, length, a, a_pieces, b, to, row, panel * panel_cols<acc_t<T>>);
    });
}

}  // namespace
}  // namespace fastconv::cpu
