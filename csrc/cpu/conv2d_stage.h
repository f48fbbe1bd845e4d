// The padded, converted copy of a block of planes, from which windows are read without any test of borders.
#pragma once

#include <utility>

#include "conv2d_axes.h"
#include "isa.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

template <typename T>
FASTCONV_INLINE void fill_zero(acc_t<T>* out, int64_t count) {
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(out + i, vec_t<T>{});
  if (i < count) store_first(out + i, vec_t<T>{}, count - i);
}

template <typename E, int... J>
FASTCONV_INLINE vec_t<E> even_lanes(vec_t<E> a, vec_t<E> b, std::integer_sequence<int, J...>) {
  return shuffle<E, 2 * J...>(a, b);
}

// out[i] = source[i·step]. Spill: whole vectors may be stored past the end of out.
template <bool Spill = false, typename T>
FASTCONV_INLINE void copy_strided(const T* source, int64_t step, acc_t<T>* out, int64_t count) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + lanes<T> <= count; i += lanes<T>) store(out + i, load(source + i));
    if (i == count) return;
    const vec_t<T> rest = load_first(source + i, count - i);
    if (Spill)
      store(out + i, rest);
    else
      store_first(out + i, rest, count - i);
    return;
  }
  if (step == 2) {
    constexpr std::make_integer_sequence<int, lanes<T>> all;
    for (; i + lanes<T> < count; i += lanes<T>)  // the second load reads one element past the last one that is needed
      store(out + i, even_lanes<acc_t<T>>(load(source + 2 * i), load(source + 2 * i + lanes<T>), all));
    if (Spill && i < count) {
      const int64_t left = 2 * (count - i) - 1;  // elements from the next one to the last one
      const vec_t<T> low = load_first(source + 2 * i, min_of<int64_t>(left, lanes<T>));
      const vec_t<T> high = left > lanes<T> ? load_first(source + 2 * i + lanes<T>, left - lanes<T>) : vec_t<T>{};
      store(out + i, even_lanes<acc_t<T>>(low, high, all));
      return;
    }
  }
  for (; i < count; ++i) out[i] = to_acc(source[i * step]);
}

// The elements of a strip that lie inside the source.
struct Inside {
  int64_t begin, end;
};
FASTCONV_INLINE Inside inside_strip(const Axis& axis, int64_t first, int64_t length) {
  const int64_t begin = min_of(length, first < 0 ? ceil_div(-first, axis.step) : 0);
  const int64_t end = min_of(length, first < axis.source ? (axis.source - 1 - first) / axis.step + 1 : 0);
  return {begin, max_of(begin, end)};
}

// out[row strip][row][col strip][col]: what the outputs from (i0, j0) on read of a plane. Vectors spill into what is
// written next, and past the end. The same rows `ahead` elements further are asked for, unless that is 0.
template <typename T>
void stage_plane(const T* plane, const Axis& rows, const Strips& row_strips, int64_t i0, const Axis& cols,
                 const Strips& col_strips, int64_t j0, acc_t<T>* out, int64_t ahead = 0) {
  const auto zero = [](acc_t<T>* to, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes<T>) store(to + i, vec_t<T>{});
  };
  int64_t first = col_strips.origin(cols, 0, j0);
  Inside inside = inside_strip(cols, first, col_strips.length);
  for (int64_t a = 0; a < row_strips.count; ++a) {
    int64_t row = row_strips.origin(rows, a, i0);
    for (int64_t i = 0; i < row_strips.length; ++i, row += rows.step) {
      if (ahead && row >= 0 && row < rows.source)
        for (int64_t at = 0; at < cols.source; at += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(plane + ahead + row * cols.source + at);
      for (int64_t b = 0; b < col_strips.count; ++b, out += col_strips.length) {
        if (row < 0 || row >= rows.source) {
          zero(out, col_strips.length);
          continue;
        }
        if (col_strips.count > 1) {
          first = col_strips.origin(cols, b, j0);
          inside = inside_strip(cols, first, col_strips.length);
        }
        zero(out, inside.begin);
        copy_strided<true>(plane + row * cols.source + first + inside.begin * cols.step, cols.step, out + inside.begin,
                           inside.end - inside.begin);
        zero(out + inside.end, col_strips.length - inside.end);
      }
    }
  }
}

// The same for `channels` neighbouring channels of an NHWC image, whose pixels are `pitch` apart: plane by plane.
template <typename T>
void stage_pixels(const T* image, int64_t pitch, int64_t channels, const Axis& rows, const Strips& row_strips,
                  int64_t i0, const Axis& cols, const Strips& col_strips, int64_t j0, acc_t<T>* out,
                  int64_t plane_pitch) {
  for (int64_t a = 0; a < row_strips.count; ++a) {
    for (int64_t i = 0; i < row_strips.length; ++i) {
      const int64_t row = row_strips.origin(rows, a, i0) + i * rows.step;
      for (int64_t b = 0; b < col_strips.count; ++b, out += col_strips.length) {
        const int64_t first = col_strips.origin(cols, b, j0);
        const Inside inside =
            row < 0 || row >= rows.source ? Inside{0, 0} : inside_strip(cols, first, col_strips.length);
        for (int64_t channel = 0; channel < channels; ++channel) {
          fill_zero<T>(out + channel * plane_pitch, inside.begin);
          fill_zero<T>(out + channel * plane_pitch + inside.end, col_strips.length - inside.end);
        }
        if (inside.begin < inside.end)
          transpose(image + (row * cols.source + first + inside.begin * cols.step) * pitch, cols.step * pitch,
                    inside.end - inside.begin, channels, out + inside.begin, plane_pitch);
      }
    }
  }
}

}  // namespace
}  // namespace fastconv::cpu
