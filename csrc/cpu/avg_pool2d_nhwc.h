// Average pooling of x[n][h][w][c]: vectors along the channels, and a block of them at a time, so that what is fetched
// of a pixel is adjacent.
#pragma once

#include "avg_pool2d.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t task_channels = 512;  // so that one image of many channels makes several tasks

// y = Σ x over rows × columns pixels / divisor, of n vectors of channels, or the first `count` of one. Rows are added
// up apart, for accuracy.
template <int n, typename T>
FASTCONV_INLINE void average(const T* x, int64_t row_pitch, int64_t pixel_pitch, int64_t rows, int64_t columns,
                             acc_t<T> divisor, T* y, int64_t count) {
  const bool whole = count >= n * lanes<T>;
  vec_t<T> total[n] = {};
  for (int64_t r = 0; r < rows; ++r) {
    vec_t<T> sum[n] = {};
    for (int64_t s = 0; s < columns; ++s) {
      const T* from = x + r * row_pitch + s * pixel_pitch;
      for (int k = 0; k < n; ++k) sum[k] += whole ? load(from + k * lanes<T>) : load_first(from, count);
    }
    for (int k = 0; k < n; ++k) total[k] += sum[k];
  }
  for (int k = 0; k < n; ++k) {
    const vec_t<T> mean = total[k] / broadcast<T>(divisor);
    if (whole)
      store(y + k * lanes<T>, mean);
    else
      store_first(y, mean, count);
  }
}

// Calls visit(walk, pixel, c, channels) for all planes × rows × columns pixels, and for pieces of their channels from c
// on, in tasks of neighbouring pixels.
template <typename Visit>
void for_each_pixel(const Parallel& parallel, int64_t planes, int64_t rows, int64_t columns, int64_t channels,
                    int64_t pixel_work, const Visit& visit) {
  const int64_t pixels = planes * rows * columns, pieces = ceil_div(channels, task_channels);
  const int64_t pixels_per_task = ceil_div(task_elements, pixel_work * min_of(channels, task_channels));
  const int64_t tasks_per_piece = ceil_div(pixels, pixels_per_task);
  for_each_task(parallel, pieces * tasks_per_piece, [&](int, int64_t task) {
    const int64_t c = task / tasks_per_piece * task_channels, begin = task % tasks_per_piece * pixels_per_task;
    Walk walk(begin, rows, columns);
    for (int64_t pixel = begin; pixel < min_of(begin + pixels_per_task, pixels); ++pixel, walk.next())
      visit(walk, pixel, c, min_of(task_channels, channels - c));
  });
}

template <typename T>
void forward_nhwc(const AvgPool2dProblem& p, const T* x, T* y, const Parallel& parallel) {
  const PoolAxis row = row_axis(p), column = column_axis(p);
  const int64_t pixel_work = max_of<int64_t>(min_of(p.R, p.H) * min_of(p.S, p.W), 1);
  for_each_pixel(parallel, p.N, p.P, p.Q, p.C, pixel_work,
                 [&](const Walk& walk, int64_t pixel, int64_t first, int64_t channels) {
                   const Window rows = window(row, walk.row), columns = window(column, walk.column);
                   const int64_t height = rows.end - rows.begin, width = columns.end - columns.begin;
                   const T* from = x + ((walk.plane * p.H + rows.begin) * p.W + columns.begin) * p.C + first;
                   T* to = y + pixel * p.C + first;
                   const acc_t<T> divisor = divisor_of<T>(rows.count, columns.count);
                   int64_t c = 0;
                   for (; c + 4 * lanes<T> <= channels; c += 4 * lanes<T>)
                     average<4>(from + c, p.W * p.C, p.C, height, width, divisor, to + c, channels - c);
                   for (; c < channels; c += lanes<T>)
                     average<1>(from + c, p.W * p.C, p.C, height, width, divisor, to + c, channels - c);
                 });
}

// dx = Σ dy / divisor over the windows rows × columns that have a pixel, of n vectors of channels, or the first `count`
// of one. dy is that of window (0, 0), at the first of these channels.
template <int n, typename T>
FASTCONV_INLINE void gather(const AvgPool2dProblem& p, const PoolAxis& row, const PoolAxis& column, Cover rows,
                            Cover columns, const T* dy, T* dx, int64_t count) {
  const bool whole = count >= n * lanes<T>;
  vec_t<T> sum[n] = {};
  for (int64_t out = rows.begin; out < rows.end; ++out)
    for (int64_t q = columns.begin; q < columns.end; ++q) {
      const vec_t<T> share = broadcast<T>(1 / divisor_of<T>(window(row, out).count, window(column, q).count));
      const T* from = dy + (out * p.Q + q) * p.C;
      for (int k = 0; k < n; ++k) sum[k] += (whole ? load(from + k * lanes<T>) : load_first(from, count)) * share;
    }
  for (int k = 0; k < n; ++k) {
    if (whole)
      store(dx + k * lanes<T>, sum[k]);
    else
      store_first(dx, sum[k], count);
  }
}

template <typename T>
void backward_nhwc(const AvgPool2dProblem& p, const T* dy, T* dx, const Parallel& parallel) {
  const PoolAxis row = row_axis(p), column = column_axis(p);
  for_each_pixel(parallel, p.N, p.H, p.W, p.C, 1,
                 [&](const Walk& walk, int64_t pixel, int64_t first, int64_t channels) {
                   const Cover rows = cover(row, walk.row), columns = cover(column, walk.column);
                   const T* from = dy + walk.plane * p.P * p.Q * p.C + first;
                   T* to = dx + pixel * p.C + first;
                   int64_t c = 0;
                   for (; c + 4 * lanes<T> <= channels; c += 4 * lanes<T>)
                     gather<4>(p, row, column, rows, columns, from + c, to + c, channels - c);
                   for (; c < channels; c += lanes<T>)
                     gather<1>(p, row, column, rows, columns, from + c, to + c, channels - c);
                 });
}

}  // namespace
}  // namespace fastconv::cpu
