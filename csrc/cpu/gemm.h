// C[M×N] (+)= A[M×depth] · B[depth×N] on blocks that fit the caches: the heart of the im2col convolutions.
//
// A is read in place, by strides: a[i·a_row + t·a_col]. B is packed into panels, b[panel][t][panel_cols], so that the
// inner loop reads whole vectors at consecutive addresses; columns past N may hold anything and yield columns of C that
// nobody reads. C has rows of whole panels. A tile of C, 6 rows × 2 vectors, stays in registers over the whole depth:
// 12 independent chains of multiply-adds, enough to hide their latency, for 2 vector loads and 6 broadcasts.
#pragma once

#include <type_traits>

#include "isa.h"

namespace fastconv::cpu {
namespace {

constexpr int tile_rows = 6;
template <typename E>
constexpr int panel_cols = 2 * lanes<E>;

// C (+)= sums
template <typename E, int Rows>
FASTCONV_INLINE void store_tile(vec_t<E> (&sums)[Rows][2], E* c, int64_t c_row, bool add) {
  for (int i = 0; i < Rows; ++i, c += c_row) {
    store(c, add ? load(c) + sums[i][0] : sums[i][0]);
    store(c + lanes<E>, add ? load(c + lanes<E>) + sums[i][1] : sums[i][1]);
  }
}

// Rows rows of C, one panel wide.
template <typename E, int Rows>
void multiply_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b, E* c, int64_t c_row, bool add) {
  const E* rows[Rows];
  for (int i = 0; i < Rows; ++i) rows[i] = a + i * a_row;
  vec_t<E> sums[Rows][2] = {};
  for (int64_t t = 0, at = 0; t < depth; ++t, at += a_col, b += panel_cols<E>) {
    const vec_t<E> left = load(b), right = load(b + lanes<E>);
    for (int i = 0; i < Rows; ++i) {
      const vec_t<E> value = broadcast<E>(rows[i][at]);
      sums[i][0] += value * left;
      sums[i][1] += value * right;
    }
  }
  store_tile<E, Rows>(sums, c, c_row, add);
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

// Panels outside, rows inside: the panel stays in L1 while A comes from L2.
template <typename E>
void multiply_block(int64_t rows, int64_t panels, int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b,
                    int64_t b_panel, E* c, int64_t c_row, bool add) {
  for (int64_t panel = 0; panel < panels; ++panel, b += b_panel, c += panel_cols<E>)
    for_row_tiles(rows, [&](int64_t i, auto height) {
      multiply_tile<E, height.value>(depth, a + i * a_row, a_row, a_col, b, c + i * c_row, c_row, add);
    });
}

}  // namespace
}  // namespace fastconv::cpu
