// Max pooling, forward: the scan of windows, and its walk over NCHW and NHWC outputs.
#pragma once

#include "max_pool2d_vectors.h"

namespace fastconv::cpu {
namespace {

// The type of an offset where no gradient is needed.
struct NoOffset {};
template <typename Offset>
constexpr bool is_kept = true;
template <>
constexpr bool is_kept<NoOffset> = false;

// The index range of the taps with 0 ≤ start + tap·dilation < size.
struct Taps {
  int64_t begin, end;
};
FASTCONV_INLINE Taps taps_inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  int64_t begin = 0, end = taps;
  if (start < 0) begin = min_of(ceil_div(-start, dilation), taps);
  if (start + (taps - 1) * dilation >= size) end = start < size ? ceil_div(size - start, dilation) : 0;
  return {begin, max_of(begin, end)};
}

// The scan of `lanes` windows at once.
template <typename T>
struct Best {
  vec_t<T> value;
  mask_t<T> offset;
};
// Scans rows × cols taps, from each lane's offset `start` if nothing is greater than −∞ and from offset `first` on;
// value_at(r, s) gives their values. Without NaNs one comparison a tap
// is enough; the sum of the values, which a NaN makes NaN, tells whether to scan again with all of them.
template <typename T, typename Load>
FASTCONV_INLINE Best<T> scan(int64_t rows, int64_t cols, int64_t first, int64_t window_width, mask_t<T> start,
                             const Load& value_at) {
  const mask_t<T> next_row = all_taps<T>(window_width - cols);
  const vec_t<T> nothing = broadcast<T>(-__builtin_inf());
  mask_t<T> tap = all_taps<T>(first);
  Best<T> best = {nothing, start};
  vec_t<T> sum{};
  for (int64_t r = 0; r < rows; ++r, tap += next_row)
    for (int64_t s = 0; s < cols; ++s, tap += all_taps<T>(1)) {
      const vec_t<T> v = value_at(r, s);
      const mask_t<T> keep = v <= best.value;
      best = {keep ? best.value : v, keep ? best.offset : tap};
      sum += v;
    }
  if (__builtin_expect(!any(sum != sum), true)) return best;
  tap = all_taps<T>(first);
  best = {nothing, start};
#pragma GCC unroll 1
  for (int64_t r = 0; r < rows; ++r, tap += next_row)
#pragma GCC unroll 1
    for (int64_t s = 0; s < cols; ++s, tap += all_taps<T>(1)) {
      const vec_t<T> v = value_at(r, s);
      const mask_t<T> keep = ((v <= best.value) | (best.value != best.value)) & (v == v);
      best = {keep ? best.value : v, keep ? best.offset : tap};
    }
  return best;
}

// One window of one channel. Element (h, w) of the plane is plane[(h·W + w)·pixel].
template <typename T, typename Offset>
__attribute__((noinline)) void forward_window(const MaxPool2dProblem& p, const T* plane, int64_t pixel, int64_t out_row,
                                              int64_t out_column, T* y, Offset* offsets, int64_t i) {
  const int64_t h = out_row * p.stride_h - p.pad_h, w = out_column * p.stride_w - p.pad_w;
  const Taps rows = taps_inside(h, p.dilation_h, p.R, p.H), cols = taps_inside(w, p.dilation_w, p.S, p.W);
  acc_t<T> best = -__builtin_inf();
  int64_t offset = rows.begin < rows.end && cols.begin < cols.end ? rows.begin * p.S + cols.begin : 0;
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t s = cols.begin; s < cols.end; ++s) {
      const acc_t<T> v = to_acc(plane[((h + r * p.dilation_h) * p.W + w + s * p.dilation_w) * pixel]);
      if (v > best || v != v) {
        best = v;
        offset = r * p.S + s;
      }
    }
  y[i] = from_acc<T>(best);
  if constexpr (is_kept<Offset>) offsets[i] = Offset(offset);
}

// The columns of x that load_strided<stride>() loads from column `start` on.
template <int stride, typename T>
FASTCONV_INLINE mask_t<T> columns_from(int64_t start) {
  const mask_t<T> columns = all_taps<T>(start) + lane_numbers<T>() * all_taps<T>(stride);
  return stride == 2 ? in_order(columns) : columns;  // which is its own inverse
}

// Rows of x that are as many bytes as are asked of memory ahead of their use.
template <typename T>
FASTCONV_INLINE int64_t rows_ahead(int64_t W) {
  return ceil_div(prefetch_bytes / int64_t(sizeof(T)), W);
}

// y = the windows [begin, end) of one output row. Those in [inner_begin, inner_end) have every column inside x; all
// touch x. Elements of x can be read from `first_read` to `last_read`, and `room` outputs written from y on.
// `taps` is the size of a square window without dilation, or 0 for any other window.
template <int stride, int taps, typename T, typename Offset>
FASTCONV_INLINE void forward_row(const MaxPool2dProblem& p, const T* plane, const T* first_read, const T* last_read,
                                 int64_t out_row, int64_t begin, int64_t end, int64_t inner_begin, int64_t inner_end,
                                 T* y, Offset* offsets, int64_t room) {
  const int64_t S = taps ? taps : p.S, step = stride ? stride : p.stride_w;
  const int64_t dilation_h = taps ? 1 : p.dilation_h, dilation_w = taps ? 1 : p.dilation_w, W = p.W;
  const int64_t h = out_row * p.stride_h - p.pad_h;
  const Taps rows = taps_inside(h, dilation_h, taps ? taps : p.R, p.H);
  inner_begin = max_of(inner_begin, begin);
  inner_end = min_of(inner_end, end);
  if (rows.begin == rows.end || (!taps && inner_begin >= inner_end)) inner_begin = inner_end = end;

  // Windows over the edge are done one at a time, or, of the usual sizes, in vectors whose columns outside x are −∞.
  const int64_t vectors_begin = taps && rows.begin < rows.end ? begin : inner_begin;
  const int64_t vectors_end = taps ? end : inner_end;
  int64_t q = vectors_begin;
  const T* corner = plane + (h + rows.begin * dilation_h) * W - p.pad_w;  // of window 0, without the rows above x
  const int64_t span =
      (rows.end - rows.begin - 1) * dilation_h * W + (S - 1) * dilation_w + elements_read<stride>(lanes<T>, step);
  // Rows are short, and the processor does not foresee that the next ones follow.
  const int64_t new_rows = taps ? min_of(p.stride_h, int64_t(taps)) : 0, ahead = rows_ahead<T>(W) * W;
  const auto run = [&](int64_t row_count) __attribute__((always_inline)) {
    const auto scan_vector = [&](const T* first, bool over_edge) __attribute__((always_inline)) {
      mask_t<T> start = all_taps<T>(rows.begin * S), columns{};
      if (over_edge) {
        columns = columns_from<stride, T>(q * step - p.pad_w);
        start -= columns < 0 ? columns : mask_t<T>{};
      }
      return scan<T>(row_count, S, rows.begin * S, S, start, [=](int64_t r, int64_t s) __attribute__((always_inline)) {
        const T* row = first + r * dilation_h * W;
        const vec_t<T> v = taps ? load_tap<stride>(row, s, step) : load_strided<stride>(row + s * dilation_w, step);
        if (!over_edge) return v;
        const mask_t<T> column = columns + all_taps<T>(s);
        return (column >= 0) & (column < all_taps<T>(W)) ? v : broadcast<T>(-__builtin_inf());
      });
    };
    for (; q < vectors_end && q - begin + lanes<T> <= room; q += lanes<T>) {
      const T* first = corner + q * step;
      if (first < first_read || first + span > last_read) break;
      for (int64_t r = row_count - min_of(row_count, new_rows); r < row_count; ++r)
        for (int64_t i = 0; i < stride * lanes<T>; i += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(first + ahead + r * W + i, 0, 2);
      const bool over_edge = taps && (q < inner_begin || min_of(q + lanes<T>, end) > inner_end);
      const Best<T> best = over_edge ? scan_vector(first, true) : scan_vector(first, false);
      store(y + q - begin, stride == 2 ? in_order(best.value) : best.value);
      if constexpr (is_kept<Offset>)
        store_offsets<T>(offsets + q - begin, stride == 2 ? in_order(best.offset) : best.offset);
    }
  };
  if (taps && rows.end - rows.begin == taps)
    run(taps);  // of constant length: unrolled
  else
    run(rows.end - rows.begin);
  for (int64_t e = begin; e < vectors_begin; ++e) forward_window(p, plane, 1, out_row, e, y, offsets, e - begin);
  for (int64_t e = min_of(q, vectors_end); e < end; ++e) forward_window(p, plane, 1, out_row, e, y, offsets, e - begin);
}

template <int stride, int taps, typename T, typename Offset>
void forward_nchw(const MaxPool2dProblem& problem, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const int64_t segments = ceil_div(problem.Q, segment_columns), units = problem.N * problem.C * problem.P * segments;
  const int64_t units_per_task = ceil_div(task_elements, min_of(problem.Q, segment_columns));
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const int64_t inner_begin = ceil_div(p.pad_w, p.stride_w);
    const int64_t last_start = p.W - 1 - (p.S - 1) * p.dilation_w + p.pad_w;
    const int64_t inner_end = last_start < 0 ? 0 : last_start / p.stride_w + 1;
    const int64_t unit = task * units_per_task, unit_end = min_of(unit + units_per_task, units);
    Walk walk(unit, p.P, segments);
    int64_t i = unit / segments * p.Q + walk.column * segment_columns;
    const int64_t task_end = unit_end / segments * p.Q + unit_end % segments * segment_columns;
    for (; i < task_end; walk.next()) {
      const int64_t plane = walk.plane * p.H * p.W, begin = walk.column * segment_columns;
      const int64_t end = min_of(begin + segment_columns, p.Q);
      forward_row<stride, taps>(p, x + plane, x, x + p.x_elements(), walk.row, begin, end, inner_begin, inner_end,
                                y + i, is_kept<Offset> ? offsets + i : offsets, task_end - i);
      i += end - begin;
    }
  });
}

template <int taps, typename T, typename Offset>
void forward_nhwc(const MaxPool2dProblem& problem, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const int64_t pixels = problem.N * problem.P * problem.Q, pixels_per_task = ceil_div(task_elements, problem.C);
  for_each_task(parallel, ceil_div(pixels, pixels_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const int64_t R = taps ? taps : p.R, S = taps ? taps : p.S, C = p.C;
    const int64_t row_step = (taps ? 1 : p.dilation_h) * p.W * C, column_step = (taps ? 1 : p.dilation_w) * C;
    const int64_t task_end = min_of((task + 1) * pixels_per_task, pixels);
    T* y_here = y;
    Offset* offsets_here = offsets;
    Walk walk(task * pixels_per_task, p.P, p.Q);
    for (int64_t pixel = task * pixels_per_task; pixel < task_end; ++pixel, walk.next()) {
      const T* image = x + walk.plane * p.H * p.W * C;
      const int64_t h = walk.row * p.stride_h - p.pad_h, w = walk.column * p.stride_w - p.pad_w;
      const Taps rows = taps_inside(h, taps ? 1 : p.dilation_h, R, p.H);
      const Taps cols = taps_inside(w, taps ? 1 : p.dilation_w, S, p.W);
      const bool empty = rows.begin == rows.end || cols.begin == cols.end;
      const T* corner = image + (h * p.W + w) * C + rows.begin * row_step + cols.begin * column_step;
      const T* last = corner + (rows.end - rows.begin - 1) * row_step + (cols.end - cols.begin - 1) * column_step;
      const int64_t room = empty ? 0 : min_of(x + p.x_elements() - last, (task_end - pixel) * C);
      const auto run = [&](int64_t row_count, int64_t column_count) __attribute__((always_inline)) {
        for (int64_t c = 0; c < C; c += lanes<T>) {
          if (c + lanes<T> > C && C >= lanes<T>) c = C - lanes<T>;  // once more some of those before
          const T* first = corner + c;
          const Best<T> best =
              scan<T>(row_count, column_count, rows.begin * S + cols.begin, S, all_taps<T>(rows.begin * S + cols.begin),
                      [=](int64_t r, int64_t s)
                          __attribute__((always_inline)) { return load(first + r * row_step + s * column_step); });
          store(y_here + pixel * C + c, best.value);
          if constexpr (is_kept<Offset>) store_offsets<T>(offsets_here + pixel * C + c, best.offset);
        }
      };
      if (lanes<T> > max_of(C, room) || empty)
        for (int64_t c = 0; c < C; ++c)
          forward_window(p, image + c, C, walk.row, walk.column, y, offsets, pixel * C + c);
      else if (taps && rows.end - rows.begin == taps && cols.end - cols.begin == taps)
        run(taps, taps);  // of constant length: unrolled
      else
        run(rows.end - rows.begin, cols.end - cols.begin);
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
