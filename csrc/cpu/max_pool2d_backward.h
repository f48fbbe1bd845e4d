// Max pooling, backward: dx gathers from the windows that cover each element, those whose offset names it.
#pragma once

#include "max_pool2d_vectors.h"

namespace fastconv::cpu {
namespace {

// One of the two axes of a pool.
struct Axis {
  int64_t stride, pad, dilation, taps, outs, most;  // most windows over a coordinate, if there is no dilation
};
Axis row_axis(const MaxPool2dProblem& p) {
  return {p.stride_h, p.pad_h, p.dilation_h, p.R, p.P, ceil_div(p.R, p.stride_h)};
}
Axis column_axis(const MaxPool2dProblem& p) {
  return {p.stride_w, p.pad_w, p.dilation_w, p.S, p.Q, ceil_div(p.S, p.stride_w)};
}

// The windows that cover a coordinate: out − i·out_step, by tap + i·tap_step, for 0 ≤ i < count.
struct Cover {
  int64_t out, out_step, tap, tap_step, count;
};

// All solutions of out·stride + tap·dilation = coordinate + pad with 0 ≤ tap < taps; out may lie outside of the output.
// A coordinate that is j·stride further on has the same taps, and windows that are j further on.
Cover cover(const Axis& axis, int64_t coordinate) {
  const int64_t position = coordinate + axis.pad, stride = axis.stride;
  if (axis.dilation == 1) {
    const int64_t out = position / stride, tap = position - out * stride;
    return {out, 1, tap, stride, tap < axis.taps ? ceil_div(axis.taps - tap, stride) : 0};
  }
  int64_t gcd = stride;
  for (int64_t a = axis.dilation; a != 0;) {
    const int64_t rest = gcd % a;
    gcd = a;
    a = rest;
  }
  const int64_t tap_step = stride / gcd, candidates = min_of(axis.taps, tap_step);
  int64_t tap = 0;
  while (tap < candidates && (position - tap * axis.dilation) % stride != 0) ++tap;
  if (tap == candidates) return {0, 1, 0, 1, 0};
  return {(position - tap * axis.dilation) / stride, axis.dilation / gcd, tap, tap_step,
          ceil_div(axis.taps - tap, tap_step)};
}
// The cover of coordinate + 1, from that of coordinate.
FASTCONV_INLINE Cover next_cover(const Axis& axis, int64_t coordinate, Cover c) {
  if (axis.dilation != 1) return cover(axis, coordinate + 1);
  if (++c.tap == axis.stride) return {c.out + 1, 1, 0, axis.stride, axis.most};
  if (c.count > 0 && c.tap + (c.count - 1) * axis.stride >= axis.taps) --c.count;
  return c;
}

// The same j windows further on, without those outside of the output.
FASTCONV_INLINE Cover inside(Cover c, const Axis& axis, int64_t j) {
  c.out += j;
  for (; c.count > 0 && c.out >= axis.outs; --c.count) {
    c.out -= c.out_step;
    c.tap += c.tap_step;
  }
  while (c.count > 0 && c.out < (c.count - 1) * c.out_step) --c.count;
  return c;
}

// The windows over an element of dx: rows × cols of them, the first at index `first` of dy with offset `tap`.
struct Windows {
  int64_t rows, cols, first, row_back, column_back, tap, row_tap, column_tap;
};
// Window (p, q) of the plane is at index (p·Q + q)·pixel.
FASTCONV_INLINE Windows windows_of(const MaxPool2dProblem& p, int64_t pixel, const Cover& rows, const Cover& cols) {
  return {rows.count,
          cols.count,
          (rows.out * p.Q + cols.out) * pixel,
          rows.out_step * p.Q * pixel,
          cols.out_step * pixel,
          rows.tap * p.S + cols.tap,
          rows.tap_step * p.S,
          cols.tap_step};
}

// One element of dx: the sum over its windows that took it.
template <typename T, typename Offset>
__attribute__((noinline)) acc_t<T> gradient(const T* dy, const Offset* offsets, const Windows& windows) {
  acc_t<T> sum = 0;
  for (int64_t a = 0; a < windows.rows; ++a)
    for (int64_t b = 0; b < windows.cols; ++b) {
      const int64_t i = windows.first - a * windows.row_back - b * windows.column_back;
      if (offsets[i] == windows.tap + a * windows.row_tap + b * windows.column_tap) sum += to_acc(dy[i]);
    }
  return sum;
}

// `lanes` elements of dx, whose windows lie side by side. At an edge, those windows that `Columns` says don't exist are
// left out.
template <typename T, typename Offset, typename Columns>
FASTCONV_INLINE vec_t<T> gradients(const T* dy, const Offset* offsets, const Windows& windows, int64_t rows,
                                   int64_t cols, const Columns& exists) {
  vec_t<T> sum{};
  mask_t<T> row_tap = all_taps<T>(windows.tap);
  const mask_t<T> next_row = all_taps<T>(windows.row_tap), next_column = all_taps<T>(windows.column_tap);
  for (int64_t a = 0; a < rows; ++a, row_tap += next_row) {
    mask_t<T> tap = row_tap;
    for (int64_t b = 0; b < cols; ++b, tap += next_column) {
      const int64_t i = windows.first - a * windows.row_back - b * windows.column_back;
      sum += (vec_t<T>)((mask_t<T>)load(dy + i) & (load_offsets<T>(offsets + i) == tap) & exists(b));
    }
  }
  return sum;
}
// Says that all columns exist.
template <typename T>
struct Everywhere {
  FASTCONV_INLINE mask_t<T> operator()(int64_t) const { return all_taps<T>(-1); }
};

// Calls f(rows, a, b), with constants where windows 2 or 3 wide stride by 2: then the loops over them unroll.
template <typename F>
FASTCONV_INLINE void with_counts(int64_t rows, int64_t a, int64_t b, const F& f) {
  if (rows == 1 && a == 1 && b == 1) return f(1, 1, 1);
  if (rows == 1 && a == 1 && b == 2) return f(1, 1, 2);
  if (rows == 1 && a == 2 && b == 1) return f(1, 2, 1);
  if (rows == 2 && a == 1 && b == 1) return f(2, 1, 1);
  if (rows == 2 && a == 1 && b == 2) return f(2, 1, 2);
  if (rows == 2 && a == 2 && b == 1) return f(2, 2, 1);
  f(rows, a, b);
}

// Columns w = phase + j·stride_w of dx share their taps, and their windows lie side by side. A group of them is one
// phase, or for stride 2 both, whose elements are then stored alternately.
struct Group {
  Cover a, b;
  int64_t lowest, highest;  // of their windows' columns, for j = 0
  int64_t begin, end;       // the j for which windows that don't exist need not be left out
};
Group group_of(const MaxPool2dProblem& p, const Axis& column, int64_t phase) {
  Group g;
  g.a = cover(column, phase);
  g.b = p.stride_w == 2 ? cover(column, 1) : g.a;
  g.lowest = min_of(g.a.out - (g.a.count - 1) * g.a.out_step, g.b.out - (g.b.count - 1) * g.b.out_step);
  g.highest = max_of(g.a.out, g.b.out);
  // Without dilation it is enough that j < Q. Where a window doesn't exist, the vector has one of the row above or
  // below instead: there the same tap is Q·stride_w columns further right or left, outside of x, and was not taken.
  const bool plain = p.dilation_h == 1 && p.dilation_w == 1;
  g.begin = plain && p.Q * p.stride_w >= p.W ? 0 : -g.lowest;
  g.end = plain ? p.Q : p.Q - g.highest;
  return g;
}

// A row of dx in the making: its elements [begin, end), of which dx is the first; `rows` of the plane cover it.
template <typename T, typename Offset>
struct Row {
  const T* dy;  // of the plane, like offsets
  const Offset* offsets;
  T* dx;
  int64_t begin, end;
  Cover rows;
};

// Stores elements j … j + lanes of a group, or those in front of j_end.
template <int stride, typename T>
FASTCONV_INLINE void store_group(T* dx, vec_t<T> a, vec_t<T> b, int64_t step, int64_t count) {
  if constexpr (stride == 2) {
    store(dx, low_pairs(a, b));
    store(dx + lanes<T>, high_pairs(a, b));
  } else if constexpr (stride == 1) {
    store(dx, a);
  } else {
    for (int64_t i = 0; i < min_of<int64_t>(lanes<T>, count); ++i) dx[i * step] = from_acc<T>(a[i]);
  }
}

// Elements j … j + lanes of a group, some of whose windows don't exist.
template <int stride, typename T, typename Offset>
__attribute__((noinline)) void backward_edge(const MaxPool2dProblem& p, const Group& group, const Row<T, Offset>& row,
                                             int64_t phase, int64_t j, int64_t count) {
  const auto sum = [&](const Cover& c) __attribute__((always_inline)) {
    const Windows windows = windows_of(p, 1, row.rows, c);
    return gradients(row.dy + j, row.offsets + j, windows, windows.rows, windows.cols, [&](int64_t i) {
      const int64_t q = j + c.out - i * c.out_step;  // of the first lane
      return (lane_numbers<T>() >= all_taps<T>(max_of<int64_t>(-q, 0))) &
             (lane_numbers<T>() < all_taps<T>(max_of<int64_t>(min_of<int64_t>(p.Q - q, lanes<T>), 0)));
    });
  };
  store_group<stride>(row.dx + phase + j * p.stride_w - row.begin, sum(group.a),
                      stride == 2 ? sum(group.b) : vec_t<T>{}, p.stride_w, count);
}

// The same one by one, where a vector would read beyond dy or write beyond the task.
template <int stride, typename T, typename Offset>
__attribute__((noinline)) void backward_single(const MaxPool2dProblem& p, const Axis& column, const Group& group,
                                               const Row<T, Offset>& row, int64_t phase, int64_t j, int64_t j_end) {
  for (; j < j_end; ++j)
    for (int64_t k = 0; k < (stride == 2 ? 2 : 1); ++k)
      if (const int64_t w = phase + k + j * p.stride_w; w < row.end)
        row.dx[w - row.begin] = from_acc<T>(
            gradient(row.dy, row.offsets, windows_of(p, 1, row.rows, inside(k ? group.b : group.a, column, j))));
}

// A group of a row in vectors along j. `plane` is the number of the plane's first window; `room` elements can be
// written from dx on.
template <int stride, typename T, typename Offset>
FASTCONV_INLINE void backward_group(const MaxPool2dProblem& p, const Axis& column, const Group& group,
                                    const Row<T, Offset>& row, int64_t phase, int64_t plane, int64_t room) {
  constexpr int V = lanes<T>;
  const int64_t step = stride ? stride : p.stride_w;
  const Windows a = windows_of(p, 1, row.rows, group.a), b = windows_of(p, 1, row.rows, group.b);
  // Within [safe_begin, safe_end] a vector may read its windows and write itself.
  const bool reads = row.rows.count > 0;
  const int64_t first_window = plane + row.rows.out * p.Q;
  const int64_t safe_begin = reads ? (row.rows.count - 1) * a.row_back - first_window - group.lowest : 0;
  const int64_t safe_end = min_of(reads ? p.y_elements() - V - first_window - group.highest : p.W,
                                  stride ? (row.begin + room) / stride - V : p.W);
  const int64_t j_end = row.end > phase ? (row.end - phase + step - 1) / step : 0;
  const int64_t fast_begin = max_of(safe_begin, group.begin);
  const int64_t fast_end = min_of(safe_end + 1, group.end < j_end ? group.end - V + 1 : j_end);
  int64_t j = row.begin > phase ? (row.begin - phase + step - 1) / step : 0;
  const auto run = [&](int64_t row_count, int64_t a_count, int64_t b_count) __attribute__((always_inline)) {
    const T* dy = row.dy;
    const Offset* offsets = row.offsets;
    T* dx = row.dx + phase - row.begin;
    for (; j < fast_end; j += V)
      store_group<stride>(
          dx + j * step, gradients(dy + j, offsets + j, a, row_count, a_count, Everywhere<T>{}),
          stride == 2 ? gradients(dy + j, offsets + j, b, row_count, b_count, Everywhere<T>{}) : vec_t<T>{}, step,
          j_end - j);
  };
  while (j < j_end) {
    if (j < fast_begin || j >= fast_end) {
      if (j < safe_begin || j > safe_end)
        backward_single<stride>(p, column, group, row, phase, j, min_of(j + V, j_end));
      else
        backward_edge<stride>(p, group, row, phase, j, j_end - j);
      j += V;
    } else if constexpr (stride == 2) {
      with_counts(a.rows, a.cols, b.cols, run);
    } else {
      run(a.rows, a.cols, 0);
    }
  }
}

template <int stride, typename T, typename Offset>
void backward_nchw(const MaxPool2dProblem& problem, const T* dy, const Offset* offsets, T* dx,
                   const Parallel& parallel) {
  const int64_t segments = ceil_div(problem.W, segment_columns), units = problem.N * problem.C * problem.H * segments;
  const int64_t units_per_task = ceil_div(task_elements, min_of(problem.W, segment_columns));
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const Axis row = row_axis(p), column = column_axis(p);
    const Group first_group = group_of(p, column, 0);
    const Cover first_row = cover(row, 0);
    const int64_t unit = task * units_per_task, unit_end = min_of(unit + units_per_task, units);
    Walk walk(unit, p.H, segments);
    int64_t i = unit / segments * p.W + walk.column * segment_columns;
    const int64_t task_end = unit_end / segments * p.W + unit_end % segments * segment_columns;
    Cover rows = cover(row, walk.row);
    while (i < task_end) {
      const int64_t begin = walk.column * segment_columns, end = min_of(begin + segment_columns, p.W);
      const int64_t plane = walk.plane * p.P * p.Q;
      const Row<T, Offset> this_row{dy + plane, offsets + plane, dx + i, begin, end, inside(rows, row, 0)};
      backward_group<stride>(p, column, first_group, this_row, 0, plane, task_end - i);
      for (int64_t phase = 1; stride == 0 && phase < min_of(p.stride_w, p.W); ++phase)
        backward_group<stride>(p, column, group_of(p, column, phase), this_row, phase, plane, task_end - i);
      i += end - begin;
      const int64_t h = walk.row;
      walk.next();
      if (walk.row != h) rows = walk.row == 0 ? first_row : next_cover(row, h, rows);
    }
  });
}

template <typename T, typename Offset>
void backward_nhwc(const MaxPool2dProblem& problem, const T* dy, const Offset* offsets, T* dx,
                   const Parallel& parallel) {
  const int64_t pixels = problem.N * problem.H * problem.W, pixels_per_task = ceil_div(task_elements, problem.C);
  for_each_task(parallel, ceil_div(pixels, pixels_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const Axis row = row_axis(p), column = column_axis(p);
    const int64_t C = p.C, task_end = min_of((task + 1) * pixels_per_task, pixels);
    Walk walk(task * pixels_per_task, p.H, p.W);
    Cover rows = inside(cover(row, walk.row), row, 0), cols = cover(column, walk.column);
    for (int64_t pixel = task * pixels_per_task; pixel < task_end; ++pixel) {
      const Windows windows = windows_of(p, C, rows, inside(cols, column, 0));
      const int64_t image = walk.plane * p.P * p.Q * C;
      const T* from = dy + image;
      const Offset* from_offsets = offsets + image;
      T* to = dx + pixel * C;
      // The first window is the last in memory.
      const int64_t room = min_of(p.y_elements() - image - windows.first, (task_end - pixel) * C);
      const auto run = [&](int64_t row_count, int64_t column_count) __attribute__((always_inline)) {
        for (int64_t c = 0; c < C; c += lanes<T>) {
          if (c + lanes<T> > C && C >= lanes<T>) c = C - lanes<T>;  // once more some of those before
          store(to + c, gradients(from + c, from_offsets + c, windows, row_count, column_count, Everywhere<T>{}));
        }
      };
      if (lanes<T> > max_of(C, room))
        for (int64_t c = 0; c < C; ++c) to[c] = from_acc<T>(gradient(from + c, from_offsets + c, windows));
      else if (windows.rows == 1 && windows.cols == 1)
        run(1, 1);  // of constant length, like the next: unrolled
      else if (windows.rows == 1 && windows.cols == 2)
        run(1, 2);
      else if (windows.rows == 2 && windows.cols == 1)
        run(2, 1);
      else if (windows.rows == 2 && windows.cols == 2)
        run(2, 2);
      else
        run(windows.rows, windows.cols);
      const int64_t w = walk.column, h = walk.row;
      walk.next();
      cols = walk.column == 0 ? cover(column, 0) : next_cover(column, w, cols);
      if (walk.row != h) rows = inside(cover(row, walk.row), row, 0);
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
