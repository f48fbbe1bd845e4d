// Average pooling: which elements a window has, which windows an element is in, and what the sums are divided by.
#pragma once

#include "max_pool2d_vectors.h"

namespace fastconv::cpu {
namespace {

// One of the two axes of a pool.
struct PoolAxis {
  int64_t size, outs, taps, stride, pad;
  bool adaptive, include_pad;
  int64_t divisor;  // 0: the number of elements
};
PoolAxis row_axis(const AvgPool2dProblem& p) {
  return {p.H, p.P, p.R, p.stride_h, p.pad_h, p.adaptive_h, p.count_include_pad, p.divisor};
}
PoolAxis column_axis(const AvgPool2dProblem& p) {
  return {p.W, p.Q, p.S, p.stride_w, p.pad_w, p.adaptive_w, p.count_include_pad, p.divisor != 0};
}

// The elements [begin, end) of a window, and how many it counts for: a sum is divided by rows' count · columns' count.
struct Window {
  int64_t begin, end, count;
};
FASTCONV_INLINE Window window(const PoolAxis& axis, int64_t out) {
  Window w;
  if (axis.adaptive) {
    w.begin = out * axis.size / axis.outs;
    w.end = ceil_div((out + 1) * axis.size, axis.outs);
    w.count = w.end - w.begin;
  } else {
    const int64_t start = out * axis.stride - axis.pad, stop = min_of(start + axis.taps, axis.size + axis.pad);
    w.begin = max_of<int64_t>(start, 0);
    w.end = max_of(min_of(stop, axis.size), w.begin);
    w.count = axis.include_pad ? stop - start : w.end - w.begin;
  }
  if (axis.divisor) w.count = axis.divisor;
  return w;
}

// The windows [begin, end) that have an element. An adaptive axis is its own inverse: with h, H in the place of p, P.
struct Cover {
  int64_t begin, end;
};
FASTCONV_INLINE Cover cover(const PoolAxis& axis, int64_t i) {
  if (axis.adaptive) return {i * axis.outs / axis.size, ceil_div((i + 1) * axis.outs, axis.size)};
  const int64_t position = i + axis.pad;
  return {position < axis.taps ? 0 : (position - axis.taps) / axis.stride + 1,
          min_of(position / axis.stride + 1, axis.outs)};
}

template <typename T>
FASTCONV_INLINE acc_t<T> divisor_of(int64_t row_count, int64_t column_count) {
  return acc_t<T>(row_count) * acc_t<T>(column_count);
}

}  // namespace
}  // namespace fastconv::cpu
