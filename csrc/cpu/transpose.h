// out[col][row] = in[row][col], with conversion: between the two memory orders, and into panels.
#pragma once

#include <type_traits>
#include <utility>

#include "isa.h"

namespace fastconv::cpu {
namespace {

// Lane j of the result is lane j of a where j & Step is 0 and lane j − Step of b elsewhere; with High, lane j + Step of
// a and lane j of b: one step of a butterfly.
template <typename E, int Step, bool High, int... J>
FASTCONV_INLINE vec_t<E> exchange(vec_t<E> a, vec_t<E> b, std::integer_sequence<int, J...>) {
  return shuffle<E, ((J & Step) ? lanes<E> + J - (High ? 0 : Step) : J + (High ? Step : 0))...>(a, b);
}

template <typename E, int Step>
FASTCONV_INLINE void transpose_registers(vec_t<E>* v) {
  if constexpr (Step < lanes<E>) {
    for (int i = 0; i < lanes<E>; ++i) {
      if (i & Step) continue;
      const vec_t<E> a = v[i], b = v[i + Step];
      v[i] = exchange<E, Step, false>(a, b, std::make_integer_sequence<int, lanes<E>>());
      v[i + Step] = exchange<E, Step, true>(a, b, std::make_integer_sequence<int, lanes<E>>());
    }
    transpose_registers<E, 2 * Step>(v);
  }
}

// One of In and Out may be a narrower type than the sums'.
template <typename In, typename Out>
void transpose(const In* in, int64_t in_pitch, int64_t rows, int64_t cols, Out* out, int64_t out_pitch) {
  using E = acc_t<In>;
  constexpr int L = lanes<E>;
  for (int64_t row = 0; row < rows; row += L) {
    const int64_t height = min_of<int64_t>(L, rows - row);
    for (int64_t col = 0; col < cols; col += L) {
      const int64_t width = min_of<int64_t>(L, cols - col);
      const In* from = in + row * in_pitch + col;
      Out* to = out + col * out_pitch + row;
      vec_t<E> v[L];
      if (height == L && width == L) {
        for (int i = 0; i < L; ++i) v[i] = load(from + i * in_pitch);
        transpose_registers<E, 1>(v);
        for (int i = 0; i < L; ++i) store(to + i * out_pitch, v[i]);
      } else {
        for (int i = 0; i < L; ++i) v[i] = i < height ? load_first(from + i * in_pitch, width) : vec_t<E>{};
        transpose_registers<E, 1>(v);
        for (int i = 0; i < L; ++i)
          if (i < width) store_first(to + i * out_pitch, v[i], height);
      }
    }
  }
}

}  // namespace
}  // namespace fastconv::cpu
