// Max pooling: y[n,c,p,q] = max over r, s of x[n, c, p·stride_h − pad_h + r·dilation_h, q·stride_w − pad_w + s·dilation_w],
// over the taps (r, s) that lie inside x. What backward needs to know is kept as one offset r·S + s for each output.
//
// A window is scanned in row-major order; a tap is taken if it is greater than all before it or a NaN, so that of equal
// maxima the first counts and of NaNs the last. The scan starts at −∞ with the first tap inside x, which is the answer
// for a window of nothing but −∞. A window without any tap inside x keeps −∞ and offset 0: a position outside x.
//
// NCHW runs along the columns q of an output row (or w of a row of dx), NHWC along the channels of an output pixel.
// A last vector may hang over into what follows: the lanes beyond are garbage, and are written again afterwards by
// whoever computes what follows. It never reads beyond the tensor and never writes beyond its task; where it would, the
// rest is done one element at a time.
#include "max_pool2d_vectors.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t task_elements = 1 << 14;    // outputs (or elements of dx) of a task
constexpr int64_t segment_columns = 1 << 12;  // NCHW: a row longer than this is done in segments

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

// A walk over planes of rows × columns.
struct Walk {
  int64_t rows, columns, column, row, plane;
  Walk(int64_t i, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), column(i % columns), row(i / columns % rows), plane(i / columns / rows) {}
  FASTCONV_INLINE void next() {
    if (++column < columns) return;
    column = 0;
    if (++row < rows) return;
    row = 0;
    ++plane;
  }
};

template <typename T>
FASTCONV_INLINE mask_t<T> all_taps(int64_t tap) {
  if constexpr (sizeof(acc_t<T>) == 4)
    return mask_t<T>{} + int32_t(tap);
  else
    return mask_t<T>{} + tap;
}

// The scan of `lanes` windows at once.
template <typename T>
struct Best {
  vec_t<T> value, sum;
  mask_t<T> offset;
};
// Scans `rows` × `cols` taps from offset `first` on; load_tap(r, s) gives their values. Without NaNs one comparison a
// tap is enough; the sum of the values, which a NaN makes NaN, tells whether to scan again with both.
template <bool with_nans, typename T, typename Load>
FASTCONV_INLINE Best<T> scan(int64_t rows, int64_t cols, int64_t first, int64_t window_width, const Load& load_tap) {
  mask_t<T> tap = all_taps<T>(first);
  Best<T> best = {broadcast<T>(-__builtin_inf()), vec_t<T>{}, tap};
  const mask_t<T> next_row = all_taps<T>(window_width - cols);
  for (int64_t r = 0; r < rows; ++r, tap += next_row)
    for (int64_t s = 0; s < cols; ++s, tap += all_taps<T>(1)) {
      const vec_t<T> v = load_tap(r, s);
      mask_t<T> keep = v <= best.value;
      if (with_nans) keep = (keep | (best.value != best.value)) & (v == v);
      best.value = keep ? best.value : v;
      best.offset = keep ? best.offset : tap;
      best.sum += v;
    }
  return best;
}
template <typename T, typename Load>
FASTCONV_INLINE Best<T> scan(int64_t rows, int64_t cols, int64_t first, int64_t window_width, const Load& load_tap) {
  const Best<T> best = scan<false, T>(rows, cols, first, window_width, load_tap);
  if (__builtin_expect(!any(best.sum != best.sum), true)) return best;
  return scan<true, T>(rows, cols, first, window_width, load_tap);
}

// One window of one channel. Element (h, w) of the plane is plane[(h·W + w)·pixel].
template <typename T, typename Offset>
__attribute__((noinline)) void forward_window(const MaxPool2dProblem& p, const T* plane, int64_t pixel, int64_t out_row, int64_t out_column, T* y,
                    Offset* offsets, int64_t i) {
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

// y = the windows [begin, end) of one output row. Those in [inner_begin, inner_end) have every column inside x.
// `available` elements of x can be read from `plane` on, and `room` outputs written from y on.
// `taps` is the size of a square window without dilation, or 0 for any other window.
template <int stride, int taps, typename T, typename Offset>
FASTCONV_INLINE void forward_row(const MaxPool2dProblem& p, const T* plane, int64_t available, int64_t out_row,
                                 int64_t begin, int64_t end, int64_t inner_begin, int64_t inner_end, T* y,
                                 Offset* offsets, int64_t room) {
  const int64_t S = taps ? taps : p.S, step = stride ? stride : p.stride_w;
  const int64_t dilation_h = taps ? 1 : p.dilation_h, dilation_w = taps ? 1 : p.dilation_w, W = p.W;
  const int64_t h = out_row * p.stride_h - p.pad_h;
  const Taps rows = taps_inside(h, dilation_h, taps ? taps : p.R, p.H);
  inner_begin = max_of(inner_begin, begin);
  inner_end = min_of(inner_end, end);
  if (rows.begin == rows.end || inner_begin >= inner_end) inner_begin = inner_end = end;

  int64_t q = inner_begin;
  const T* corner = plane + (h + rows.begin * dilation_h) * W - p.pad_w;  // of window 0, without the rows above x
  const int64_t span = (rows.end - rows.begin - 1) * dilation_h * W + (S - 1) * dilation_w +
                       elements_read<stride>(lanes<T>, step);
  // Rows are short, and the processor does not foresee that the next ones follow.
  const int64_t prefetched = taps ? p.stride_h : 0;
  const auto run = [&](int64_t row_count) __attribute__((always_inline)) {
    for (; q < inner_end && corner + q * step - plane + span <= available && q - begin + lanes<T> <= room;
         q += lanes<T>) {
      const T* first = corner + q * step;
      for (int64_t r = 0; r < min_of(row_count, prefetched); ++r) __builtin_prefetch(first + (row_count + r) * W);
      const Best<T> best = scan<T>(row_count, S, rows.begin * S, S,
                                   [=](int64_t r, int64_t s) __attribute__((always_inline)) {
                                     const T* row = first + r * dilation_h * W;
                                     return taps ? load_tap<stride>(row, s, step)
                                                 : load_strided<stride>(row + s * dilation_w, step);
                                   });
      store(y + q - begin, stride == 2 ? in_order(best.value) : best.value);
      if constexpr (is_kept<Offset>)
        store_offsets<T>(offsets + q - begin, stride == 2 ? in_order(best.offset) : best.offset);
    }
  };
  if (taps && rows.end - rows.begin == taps)
    run(taps);  // of constant length: unrolled
  else
    run(rows.end - rows.begin);
  for (int64_t e = begin; e < inner_begin; ++e) forward_window(p, plane, 1, out_row, e, y, offsets, e - begin);
  for (int64_t e = min_of(q, inner_end); e < end; ++e) forward_window(p, plane, 1, out_row, e, y, offsets, e - begin);
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
      forward_row<stride, taps>(p, x + plane, p.x_elements() - plane, walk.row, begin, end, inner_begin, inner_end, y + i,
                                is_kept<Offset> ? offsets + i : offsets, task_end - i);
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
      const Taps rows = taps_inside(h, taps ? 1 : p.dilation_h, R, p.H), cols = taps_inside(w, taps ? 1 : p.dilation_w, S, p.W);
      const bool empty = rows.begin == rows.end || cols.begin == cols.end;
      const T* corner = image + (h * p.W + w) * C + rows.begin * row_step + cols.begin * column_step;
      const T* last = corner + (rows.end - rows.begin - 1) * row_step + (cols.end - cols.begin - 1) * column_step;
      const int64_t room = empty ? 0 : min_of(x + p.x_elements() - last, (task_end - pixel) * C);
      const auto run = [&](int64_t row_count, int64_t column_count) __attribute__((always_inline)) {
        for (int64_t c = 0; c < C; c += lanes<T>) {
          if (c + lanes<T> > C && C >= lanes<T>) c = C - lanes<T>;  // once more some of those before
          const T* first = corner + c;
          const Best<T> best = scan<T>(row_count, column_count, rows.begin * S + cols.begin, S,
                                       [=](int64_t r, int64_t s) __attribute__((always_inline)) {
                                         return load(first + r * row_step + s * column_step);
                                       });
          store(y_here + pixel * C + c, best.value);
          if constexpr (is_kept<Offset>) store_offsets<T>(offsets_here + pixel * C + c, best.offset);
        }
      };
      if (lanes<T> > max_of(C, room) || empty)
        for (int64_t c = 0; c < C; ++c) forward_window(p, image + c, C, walk.row, walk.column, y, offsets, pixel * C + c);
      else if (taps && rows.end - rows.begin == taps && cols.end - cols.begin == taps)
        run(taps, taps);  // of constant length: unrolled
      else
        run(rows.end - rows.begin, cols.end - cols.begin);
    }
  });
}

template <typename T, typename Offset>
void forward_as(const MaxPool2dProblem& p, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const bool plain = p.R == p.S && p.dilation_h == 1 && p.dilation_w == 1;
  if (p.layout == Layout::NHWC && p.C > 1) {
    if constexpr (sizeof(Offset) == 1) {
      if (plain && p.R == 2) return forward_nhwc<2>(p, x, y, offsets, parallel);
      if (plain && p.R == 3) return forward_nhwc<3>(p, x, y, offsets, parallel);
    }
    return forward_nhwc<0>(p, x, y, offsets, parallel);
  }
  if constexpr (sizeof(Offset) == 1) {
    if (p.stride_w == 2) {
      if (plain && p.R == 2) return forward_nchw<2, 2>(p, x, y, offsets, parallel);
      if (plain && p.R == 3) return forward_nchw<2, 3>(p, x, y, offsets, parallel);
      return forward_nchw<2, 0>(p, x, y, offsets, parallel);
    }
    if (p.stride_w == 1 && plain && p.R == 3) return forward_nchw<1, 3>(p, x, y, offsets, parallel);
    if (p.stride_w == 1) return forward_nchw<1, 0>(p, x, y, offsets, parallel);
  }
  forward_nchw<0, 0>(p, x, y, offsets, parallel);  // windows of more than 256 taps are rarely many
}

// The windows over an element of dx: rows × cols of them, the first at index `first` of dy with offset `tap`.
struct Windows {
  int64_t rows, cols, first, row_back, column_back, tap, row_tap, column_tap;
};
// Window (p, q) of the plane is at index (p·Q + q)·pixel.
FASTCONV_INLINE Windows windows_of(const MaxPool2dProblem& p, int64_t pixel, const Cover& rows, const Cover& cols) {
  return {rows.count, cols.count, (rows.out * p.Q + cols.out) * pixel, rows.out_step * p.Q * pixel, cols.out_step * pixel,
          rows.tap * p.S + cols.tap, rows.tap_step * p.S, cols.tap_step};
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

// Calls f(rows, a, b) with constants where they are small, so that the loops over windows unroll.
template <typename Offset, typename F>
FASTCONV_INLINE void with_counts(int64_t rows, int64_t a, int64_t b, const F& f) {
  if (sizeof(Offset) > 1) return f(rows, a, b);  // windows of more than 256 taps are not worth the code
  const int64_t counts = rows << 4 | a << 2 | b;
  if (max_of(rows, max_of(a, b)) > 3) return f(rows, a, b);
  switch (counts) {
    case 1 << 4 | 1 << 2 | 1: return f(1, 1, 1);
    case 1 << 4 | 1 << 2 | 2: return f(1, 1, 2);
    case 1 << 4 | 2 << 2 | 1: return f(1, 2, 1);
    case 1 << 4 | 2 << 2 | 2: return f(1, 2, 2);
    case 2 << 4 | 1 << 2 | 1: return f(2, 1, 1);
    case 2 << 4 | 1 << 2 | 2: return f(2, 1, 2);
    case 2 << 4 | 2 << 2 | 1: return f(2, 2, 1);
    case 2 << 4 | 2 << 2 | 2: return f(2, 2, 2);
    default: return f(rows, a, b);
  }
}

// Columns w = phase + j·stride_w of dx share their taps, and their windows lie side by side. A group of them is one phase,
// or for stride 2 both, whose elements are then stored alternately.
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
  // Without dilation it is enough that j < Q. Where a window doesn't exist, the vector has one of the row above or below
  // instead: there the same tap is Q·stride_w columns to the right or left, outside of x, so that no window took it.
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
  store_group<stride>(row.dx + phase + j * p.stride_w - row.begin, sum(group.a), stride == 2 ? sum(group.b) : vec_t<T>{},
                      p.stride_w, count);
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

// A group of a row in vectors along j. `plane` is the number of the plane's first window; `room` elements can be written
// from dx on.
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
      with_counts<Offset>(a.rows, a.cols, b.cols, run);
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
      for (int64_t phase = 1; stride == 0 && phase < p.stride_w; ++phase)
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
      if (lanes<T> > max_of(C, room))
        for (int64_t c = 0; c < C; ++c) to[c] = from_acc<T>(gradient(from + c, from_offsets + c, windows));
      else
        with_counts<Offset>(windows.rows, windows.cols, windows.cols,
                            [&](int64_t r, int64_t s, int64_t) __attribute__((always_inline)) {
                              for (int64_t c = 0; c < C; c += lanes<T>) {
                                if (c + lanes<T> > C && C >= lanes<T>) c = C - lanes<T>;  // once more some of those before
                                store(to + c, gradients(from + c, from_offsets + c, windows, r, s, Everywhere<T>{}));
                              }
                            });
      const int64_t w = walk.column, h = walk.row;
      walk.next();
      cols = walk.column == 0 ? cover(column, 0) : next_cover(column, w, cols);
      if (walk.row != h) rows = inside(cover(row, walk.row), row, 0);
    }
  });
}

template <typename T, typename Offset>
void backward_as(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, T* dx, const Parallel& parallel) {
  if (p.layout == Layout::NHWC && p.C > 1) return backward_nhwc(p, dy, offsets, dx, parallel);
  if constexpr (sizeof(Offset) == 1) {
    if (p.stride_w == 1) return backward_nchw<1>(p, dy, offsets, dx, parallel);
    if (p.stride_w == 2) return backward_nchw<2>(p, dy, offsets, dx, parallel);
  }
  backward_nchw<0>(p, dy, offsets, dx, parallel);
}

// Calls visit(i, index, plane) for every output i: the element it names is index·pixel from x + plane, or index is −1.
// Offsets may come from anyone, so one that names no element of x is like that of a window without any.
template <typename Offset, typename Visit>
void for_each_index(const MaxPool2dProblem& p, const Offset* offsets, const Parallel& parallel, const Visit& visit) {
  const bool nhwc = p.layout == Layout::NHWC;
  const int64_t inner = nhwc ? p.C : 1, total = p.y_elements();  // y is planes × P × Q × inner
  for_each_task(parallel, ceil_div(total, task_elements), [&](int, int64_t task) {
    int64_t i = task * task_elements;
    int64_t c = i % inner, out_column = i / inner % p.Q, out_row = i / inner / p.Q % p.P;
    int64_t plane = i / inner / p.Q / p.P;
    for (const int64_t end = min_of(i + task_elements, total); i < end; ++i) {
      const int64_t offset = offsets[i], r = offset / p.S, s = offset % p.S;
      const int64_t h = out_row * p.stride_h - p.pad_h + r * p.dilation_h;
      const int64_t w = out_column * p.stride_w - p.pad_w + s * p.dilation_w;
      const bool inside = r < p.R && h >= 0 && h < p.H && w >= 0 && w < p.W;
      visit(i, inside ? h * p.W + w : -1, plane * p.H * p.W * inner + c);
      if (++c < inner) continue;
      c = 0;
      if (++out_column < p.Q) continue;
      out_column = 0;
      if (++out_row < p.P) continue;
      out_row = 0;
      ++plane;
    }
  });
}

// Calls f(Offset{}) with the offsets' type.
template <typename F>
FASTCONV_INLINE void dispatch_offsets(const MaxPool2dProblem& p, F&& f) {
  switch (p.offset_bytes()) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    default: return f(uint32_t{});
  }
}

void forward(const MaxPool2dProblem& p, const MaxPool2dPlan&, const void* x, void* y, void* offsets,
             const Parallel& parallel) {
  if (p.y_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x_t = static_cast<const T*>(x);
    T* y_t = static_cast<T*>(y);
    if (!offsets) return forward_as(p, x_t, y_t, static_cast<NoOffset*>(nullptr), parallel);
    dispatch_offsets(p, [&](auto o) { forward_as(p, x_t, y_t, static_cast<decltype(o)*>(offsets), parallel); });
  });
}

void backward(const MaxPool2dProblem& p, const MaxPool2dPlan&, const void* dy, const void* offsets, void* dx,
              const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_offsets(p, [&](auto o) {
      backward_as(p, static_cast<const T*>(dy), static_cast<const decltype(o)*>(offsets), static_cast<T*>(dx),
                  parallel);
    });
  });
}

void indices(const MaxPool2dProblem& p, const void* offsets, int64_t* indices, const Parallel& parallel) {
  dispatch_offsets(p, [&](auto o) {
    for_each_index(p, static_cast<const decltype(o)*>(offsets), parallel,
                   [&](int64_t i, int64_t index, int64_t) { indices[i] = max_of<int64_t>(index, 0); });
  });
}

void gather(const MaxPool2dProblem& p, const void* x, const void* offsets, void* y, const Parallel& parallel) {
  const int64_t pixel = p.layout == Layout::NHWC ? p.C : 1;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_offsets(p, [&](auto o) {
      for_each_index(p, static_cast<const decltype(o)*>(offsets), parallel,
                     [&](int64_t i, int64_t index, int64_t plane) {
                       T* out = static_cast<T*>(y) + i;
                       *out = index < 0 ? T{} : static_cast<const T*>(x)[plane + index * pixel];
                     });
    });
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const MaxPool2dKernels max_pool2d;
const MaxPool2dKernels max_pool2d = {forward, backward, indices, gather};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
