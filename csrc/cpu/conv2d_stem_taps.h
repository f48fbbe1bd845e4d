// The product of wgrad and dgrad: C[t][lane] (+)= Σ_i a[i][t] · b[i][lane], two vectors wide, for some neighbours t.
#pragma once

#include "conv2d_stem_stage.h"
#include "gemm.h"

namespace fastconv::cpu {
namespace {

// Sums of so many taps fill the registers.
constexpr int stem_taps = vector_bytes == 64 ? 14 : 6;

// i runs over rows and columns, whose pitches these are.
struct StemSteps {
  int64_t rows, cols;
  int64_t a_row, a_col, b_row, b_col;
};

template <typename E, int Taps, int Vectors>
void stem_taps_tile(const StemSteps& steps, const E* a, const E* b, E* c, int64_t c_row, bool add, StemAhead& next) {
  vec_t<E> sums[Taps][Vectors];
  FASTCONV_UNROLL
  for (int t = 0; t < Taps; ++t)
    for (int v = 0; v < Vectors; ++v) sums[t][v] = add ? load(c + t * c_row + v * lanes<E>) : vec_t<E>{};
  StemAhead ahead = next;
  for (int64_t i = 0; i < steps.rows; ++i) {
    const E *a_at = a + i * steps.a_row, *b_at = b + i * steps.b_row;
    for (int64_t j = 0; j < steps.cols; ++j, a_at += steps.a_col, b_at += steps.b_col) {
      ahead.fetch_line();
      vec_t<E> right[Vectors];
      for (int v = 0; v < Vectors; ++v) right[v] = load(b_at + v * lanes<E>);
      FASTCONV_UNROLL
      for (int t = 0; t < Taps; ++t) {
        const vec_t<E> value = broadcast<E>(a_at[t]);
        for (int v = 0; v < Vectors; ++v) sums[t][v] += value * right[v];
      }
    }
  }
  next = ahead;
  FASTCONV_UNROLL
  for (int t = 0; t < Taps; ++t)
    for (int v = 0; v < Vectors; ++v) store(c + t * c_row + v * lanes<E>, sums[t][v]);
}

// `count` neighbours t.
template <int Vectors, typename E, int... I>
void stem_taps_row(const StemSteps& steps, int64_t count, const E* a, const E* b, E* c, int64_t c_row, bool add,
                   StemAhead& next, std::integer_sequence<int, I...>) {
  static constexpr void (*tiles[])(const StemSteps&, const E*, const E*, E*, int64_t, bool,
                                   StemAhead&) = {stem_taps_tile<E, I + 1, Vectors>...};
  const int64_t pieces = ceil_div(count, stem_taps);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = piece * count / pieces, end = (piece + 1) * count / pieces;
    tiles[end - first - 1](steps, a + first, b, c + first * c_row, c_row, add, next);
  }
}
template <typename E>
void multiply_stem_taps(const StemSteps& steps, int64_t count, const E* a, const E* b, int64_t width, E* c,
                        int64_t c_row, bool add, StemAhead& next) {
  constexpr auto sizes = std::make_integer_sequence<int, stem_taps>();
  if (width > lanes<E>)
    stem_taps_row<2>(steps, count, a, b, c, c_row, add, next, sizes);
  else
    stem_taps_row<1>(steps, count, a, b, c, c_row, add, next, sizes);
}

}  // namespace
}  // namespace fastconv::cpu
