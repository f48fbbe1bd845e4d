// The padded, converted copy of a block of planes, from which windows are read without any test of borders.
#pragma once

#include "conv2d_axes.h"
#include "isa.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

template <typename T>
FASTCONV_INLINE void fill_zero(acc_t<T>* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
}

// out[i] = source[i·step]
template <typename T>
FASTCONV_INLINE void copy_strided(const T* source, int64_t step, acc_t<T>* out, int64_t count) {
  int64_t i = 0;
  if (step == 1)
    for (; i + lanes<T> <= count; i += lanes<T>) store(out + i, load(source + i));
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

// One strip of an axis: out[i] = source[(first + i·axis.step)·pitch], 0 outside the source.
template <typename T>
void stage_strip(const T* source, const Axis& axis, int64_t first, acc_t<T>* out, int64_t length) {
  const auto [begin, end] = inside_strip(axis, first, length);
  fill_zero<T>(out, begin);
  copy_strided(source + first + begin * axis.step, axis.step, out + begin, end - begin);
  fill_zero<T>(out + end, length - end);
}

// out[row strip][row][col strip][col]: what the outputs from (i0, j0) on read of a plane.
template <typename T>
void stage_plane(const T* plane, const Axis& rows, const Strips& row_strips, int64_t i0, const Axis& cols,
                 const Strips& col_strips, int64_t j0, acc_t<T>* out) {
  for (int64_t a = 0; a < row_strips.count; ++a) {
    for (int64_t i = 0; i < row_strips.length; ++i) {
      const int64_t row = row_strips.origin(rows, a, i0) + i * rows.step;
      if (row < 0 || row >= rows.source) {
        fill_zero<T>(out, col_strips.elements());
      } else {
        for (int64_t b = 0; b < col_strips.count; ++b)
          stage_strip(plane + row * cols.source, cols, col_strips.origin(cols, b, j0), out + b * col_strips.length,
                      col_strips.length);
      }
      out += col_strips.elements();
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
        const Inside inside = row < 0 || row >= rows.source ? Inside{0, 0} : inside_strip(cols, first, col_strips.length);
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
