// Planes, and vectors of their columns as they are taken apart and put together, for depthwise convolution with 3×3
// filters in NCHW.
#pragma once

#include <utility>

#include "conv2d_depthwise_blocks.h"
#include "conv2d_stage.h"

namespace fastconv::cpu {
namespace {

// A plane that is read, from row −pad_h and column −pad_w on.
template <typename T>
struct Plane {
  const T* data;
  int64_t rows, cols, pad_h, pad_w;
};

// Its filter, maybe turned around, and what else makes an output.
template <typename T>
struct PlaneFilter {
  const T* weights;
  bool turned;
  acc_t<T> bias;
  bool with_relu;
};

template <typename E, int... J>
FASTCONV_INLINE vec_t<E> odd_lanes(vec_t<E> a, vec_t<E> b, std::integer_sequence<int, J...>) {
  return shuffle<E, 2 * J + 1 ...>(a, b);
}

// Lanes of even and odd by turns; High: the second half of them.
template <typename E, bool High, int... J>
FASTCONV_INLINE vec_t<E> interleave(vec_t<E> even, vec_t<E> odd, std::integer_sequence<int, J...>) {
  return shuffle<E, J / 2 + (High ? lanes<E> / 2 : 0) + (J % 2 ? lanes<E> : 0)...>(even, odd);
}

template <typename T>
FASTCONV_INLINE void store_row(T* out, vec_t<T> v, int64_t left) {
  if (left >= lanes<T>)
    store(out, v);
  else
    store_first(out, v, left);
}

// Lanes 1 … of a, then lane 0 of b.
template <typename E, int... J>
FASTCONV_INLINE vec_t<E> next_lanes(vec_t<E> a, vec_t<E> b, std::integer_sequence<int, J...>) {
  return shuffle<E, J + 1 ...>(a, b);
}

// dx of stride 2 and padding 1, rows 2i and, if it is there, 2i + 1, from rows i (a) and i + 1 (c) of dy and what lies
// one column to the right of them (b, d). The even and the odd columns are interleaved on their way out.
template <typename T>
FASTCONV_INLINE void store_doubled(const vec_t<T> (&w)[9], vec_t<T> a, vec_t<T> b, vec_t<T> c, vec_t<T> d, T* out,
                                   int64_t cols, int64_t left, bool second) {
  constexpr std::make_integer_sequence<int, lanes<T>> sequence;
  const auto put = [&](T* row, vec_t<T> even, vec_t<T> odd) {
    store_row(row, interleave<acc_t<T>, false>(even, odd, sequence), left);
    if (left > lanes<T>) store_row(row + lanes<T>, interleave<acc_t<T>, true>(even, odd, sequence), left - lanes<T>);
  };
  put(out, w[4] * a, w[5] * a + w[3] * b);
  if (second) put(out + cols, w[7] * a + w[1] * c, (w[8] * a + w[6] * b) + (w[2] * c + w[0] * d));
}

}  // namespace
}  // namespace fastconv::cpu
