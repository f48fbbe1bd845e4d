// C[rows × panel] (+)= A[rows × depth] · B[depth × panel] of one chain: so short a sum that what surrounds the inner
// loop counts. The pitches of A are known to the compiler, and a tile of C takes nearly all registers.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace fastconv::cpu {
namespace {

constexpr int product_rows = vector_bytes == 64 ? 14 : 6;  // × 2 vectors, of 32 and 16 registers

// a[i·Row + t·Col], b[t][panel_cols], c[i·c_row]. Cache lines from `next` on are on their way meanwhile, one a step.
template <int Row, int Col, int Rows, typename E>
void multiply_rows(int64_t depth, const E* a, const E* b, E* c, int64_t c_row, bool add, const E* next) {
  vec_t<E> left[Rows], right[Rows];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) left[i] = right[i] = vec_t<E>{};
  for (int64_t t = 0; t < depth; ++t, a += Col, b += panel_cols<E>, next += 64 / sizeof(E)) {
    __builtin_prefetch(next);
    const vec_t<E> b_left = load(b), b_right = load(b + lanes<E>);
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      const vec_t<E> value = broadcast<E>(a[i * Row]);
      left[i] += value * b_left;
      right[i] += value * b_right;
    }
  }
  if (add) {
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i, c += c_row) {
      store(c, load(c) + left[i]);
      store(c + lanes<E>, load(c + lanes<E>) + right[i]);
    }
  } else {
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i, c += c_row) {
      store(c, left[i]);
      store(c + lanes<E>, right[i]);
    }
  }
}

// Calls f(integral_constant of rows), 1 ≤ rows ≤ Most.
template <int Most, typename F>
FASTCONV_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (Most > 1)
    if (rows < Most) return with_rows<Most - 1>(rows, f);
  f(std::integral_constant<int, Most>());
}

// Rows of C in tiles of nearly equal height. `after`: what will be read after A.
template <int Row, int Col, typename E>
void multiply_chain(int64_t rows, int64_t depth, const E* a, const E* b, E* c, int64_t c_row, bool add,
                    const E* after) {
  const int64_t tiles = ceil_div(rows, product_rows);
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t i = index * rows / tiles, end = (index + 1) * rows / tiles;
    const E* next = end < rows ? a + end * Row : after;
    with_rows<product_rows>(end - i, [&](auto height) {
      multiply_rows<Row, Col, height.value>(depth, a + i * Row, b, c + i * c_row, c_row, add, next);
    });
  }
}

}  // namespace
}  // namespace fastconv::cpu
