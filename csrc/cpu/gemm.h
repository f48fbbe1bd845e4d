// C[M×N] (+)= A[M×depth] · B[depth×N] on blocks that fit the caches: the heart of the im2col convolutions.
//
// A is read in place, by strides: a[i·a_row + t·a_col]. B is packed into panels, b[panel][t][panel_cols], so that the
// inner loop reads whole vectors at consecutive addresses; columns past N may hold anything and yield columns of C that
// nobody reads. A panel is multiplied by all rows of A, which come from L2, while it stays in L1. A tile of C, 6 rows ×
// 2 vectors, stays in registers over the whole depth: 12 independent chains of multiply-adds, enough to hide their
// latency, for 2 vector loads and 6 broadcasts.
#pragma once

#include <type_traits>

#include "isa.h"

namespace fastconv::cpu {
namespace {

constexpr int tile_rows = 6;
template <typename E>
constexpr int panel_cols = 2 * lanes<E>;

// The loops over a tile are unrolled by pragma, early: otherwise the compiler keeps its sums in memory before and after
// the loop over the depth.

// sums = 0
template <typename V, int Rows, int Vectors>
FASTCONV_INLINE void clear_tile(V (&sums)[Rows][Vectors]) {
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sums[i][v] = V{};
}

// sums[i] += value of row i · values
template <typename V, int Rows, int Vectors, typename Value>
FASTCONV_INLINE void add_products(V (&sums)[Rows][Vectors], const V (&values)[Vectors], const Value& value_of) {
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    const V value = value_of(i);
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sums[i][v] += value * values[v];
  }
}

// sums += c
template <typename E, int Rows, int Vectors>
FASTCONV_INLINE void add_tile(vec_t<E> (&sums)[Rows][Vectors], const E* c, int64_t c_row) {
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i, c += c_row)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sums[i][v] += load(c + v * lanes<E>);
}

// c = sums
template <typename E, int Rows, int Vectors>
FASTCONV_INLINE void store_tile(const vec_t<E> (&sums)[Rows][Vectors], E* c, int64_t c_row) {
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i, c += c_row)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(c + v * lanes<E>, sums[i][v]);
}

// Where sums go, and what they are added to: null, or rows as far apart as those of c.
template <typename E>
struct TileOut {
  E* c;
  int64_t c_row;
  const E* add;
  int64_t add_row;
};

// Rows rows of C, one panel wide, or its first vector alone.
template <typename E, int Rows, int Vectors>
void multiply_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b, const TileOut<E>& to,
                   int64_t row, int64_t col) {
  vec_t<E> sums[Rows][Vectors];
  clear_tile(sums);
  for (int64_t t = 0; t < depth; ++t, a += a_col, b += panel_cols<E>) {
    vec_t<E> values[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) values[v] = load(b + v * lanes<E>);
    add_products(sums, values, [&](int i) { return broadcast<E>(a[i * a_row]); });
  }
  if (to.add) add_tile(sums, to.add + row * to.add_row + col, to.add_row);
  store_tile(sums, to.c + row * to.c_row + col, to.c_row);
}

// Calls tile(first row, integral_constant of its height) for tiles of nearly equal height.
template <typename Tile>
FASTCONV_INLINE void for_row_tiles(int64_t rows, const Tile& tile) {
  const int64_t tiles = ceil_div(rows, tile_rows);
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t i = index * rows / tiles;
    switch ((index + 1) * rows / tiles - i) {
      case 1: tile(i, std::integral_constant<int, 1>()); break;
      case 2: tile(i, std::integral_constant<int, 2>()); break;
      case 3: tile(i, std::integral_constant<int, 3>()); break;
      case 4: tile(i, std::integral_constant<int, 4>()); break;
      case 5: tile(i, std::integral_constant<int, 5>()); break;
      case 6: tile(i, std::integral_constant<int, 6>()); break;
    }
  }
}

// One panel of B, whose `cols` columns are those of C from `col` on.
template <typename E>
void multiply_panel(int64_t rows, int64_t cols, int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b,
                    const TileOut<E>& to, int64_t col) {
  for_row_tiles(rows, [&](int64_t i, auto height) {
    if (cols > lanes<E>)
      multiply_tile<E, height.value, 2>(depth, a + i * a_row, a_row, a_col, b, to, i, col);
    else
      multiply_tile<E, height.value, 1>(depth, a + i * a_row, a_row, a_col, b, to, i, col);
  });
}

}  // namespace
}  // namespace fastconv::cpu
