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
  acc_t<T>* c = to.c + row * to.c_row + col;
  if (to.add) add_tile(sums, c, to.c_row);
  if (!to.out) return store_tile(sums, c, to.c_row);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v, col += lanes<T>) {
    const int64_t left = to.cols - col;
    if (left <= 0) return;
    const bool whole = left >= lanes<T>;
    const vec_t<T> bias = !to.bias ? vec_t<T>{} : whole ? load(to.bias + col) : load_first(to.bias + col, left);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const vec_t<T> y = to.relu ? relu(sums[i][v] + bias) : sums[i][v] + bias;
      T* out = to.out + to.out_rows[row + i] + col;
      if (whole)
        store(out, y);
      else
        store_first(out, y, left);
    }
  }
}

// a[piece·a_pieces + row]: where the piece's `length` elements of a row lie. next: how many rows of the next tile there
// are to be asked for.
template <typename T, int Rows>
void multiply_pieces_tile(int64_t pieces, int64_t length, const acc_t<T>* const* a, int64_t a_pieces, const acc_t<T>* b,
                          const PiecesOut<T>& to, int64_t row, int64_t col, int64_t next) {
  using E = acc_t<T>;
  constexpr int64_t line = 64 / sizeof(E);
  if (to.out)  // so that the stores find their lines
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < 2; ++v) __builtin_prefetch(to.out + to.out_rows[row + i] + col + v * lanes<T>, 1);
  vec_t<E> sums[Rows][2];
  clear_tile(sums);
  a += row;
  for (int64_t piece = 0; piece < pieces; ++piece, a += a_pieces) {
    const E* rows[Rows];
    for (int i = 0; i < Rows; ++i) rows[i] = a[i];
    for (int64_t t = 0; t < length;) {
      for (int64_t i = 0; i < next; ++i)
        __builtin_prefetch(a[Rows + i] + t, 0, 2);  // to L2: in L1 all may have one set
      for (const int64_t end = min_of(length, t + line); t < end; ++t, b += panel_cols<E>) {
        const vec_t<E> values[2] = {load(b), load(b + lanes<E>)};
        add_products(sums, values, [&](int i) { return broadcast<E>(rows[i][t]); });
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
      multiply_pieces_tile<T, height.value>(pieces, length, a, a_pieces, b, to, row, panel * panel_cols<acc_t<T>>,
                                            min_of<int64_t>(height.value, rows - row - height.value));
    });
}

}  // namespace
}  // namespace fastconv::cpu
