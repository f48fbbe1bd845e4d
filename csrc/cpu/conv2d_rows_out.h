// Rows of sums on their way out.
#pragma once

#include <utility>

#include "isa.h"

namespace fastconv::cpu {
namespace {

// out[j·step] = values[j] + bias, or ReLU of it
template <typename T>
FASTCONV_INLINE void write_row(const acc_t<T>* values, int64_t count, acc_t<T> bias, bool with_relu, T* out,
                               int64_t step) {
  for (int64_t j = 0; j < count; j += lanes<T>) {
    const int64_t left = count - j;
    const vec_t<T> sum = load(values + j) + broadcast<T>(bias), v = with_relu ? relu(sum) : sum;
    if (step == 1 && left >= lanes<T>)
      store(out + j, v);
    else if (step == 1)
      store_first(out + j, v, left);
    else
      for (int64_t lane = 0; lane < min_of<int64_t>(left, lanes<T>); ++lane)
        out[(j + lane) * step] = from_acc<T>(v[lane]);
  }
}

template <typename E, int... J>
FASTCONV_INLINE void interleave(vec_t<E> even, vec_t<E> odd, vec_t<E>* out, std::integer_sequence<int, J...>) {
  out[0] = shuffle<E, (J / 2 + J % 2 * lanes<E>)...>(even, odd);
  out[1] = shuffle<E, (lanes<E> / 2 + J / 2 + J % 2 * lanes<E>)...>(even, odd);
}

// out[2·j] = even[j], out[2·j + 1] = odd[j], `count` of both together
template <typename T>
FASTCONV_INLINE void write_interleaved(const acc_t<T>* even, const acc_t<T>* odd, int64_t count, T* out) {
  constexpr int64_t width = lanes<T>;
  for (int64_t i = 0; i < count; i += 2 * width, even += width, odd += width) {
    vec_t<T> v[2];
    interleave<acc_t<T>>(load(even), load(odd), v, std::make_integer_sequence<int, lanes<T>>());
    for (int64_t half = 0; half < 2 && i + half * width < count; ++half) {
      const int64_t left = count - i - half * width;
      if (left >= width)
        store(out + i + half * width, v[half]);
      else
        store_first(out + i + half * width, v[half], left);
    }
  }
}

}  // namespace
}  // namespace fastconv::cpu
