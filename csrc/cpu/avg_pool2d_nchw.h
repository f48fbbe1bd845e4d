// Average pooling of x[n][c][h][w]. Sums are separable: rows are added up first, in vectors along the columns whatever
// the windows are, and columns after that, in a buffer that fits the first-level cache.
#pragma once

#include "avg_pool2d.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t most_columns = 1 << 11;    // of the buffers
constexpr int64_t most_segment = 1 << 10;    // outputs, or columns of dx, done at once
constexpr int64_t least_wide_window = 16;    // whose rows are added up on their own
constexpr int64_t block_elements = 1 << 12;  // of long sums: blocks are added up apart, for accuracy
constexpr int64_t slack = vector_bytes;      // elements that a last vector may hang over by, and more
constexpr int64_t buffer_columns = most_columns + 2 * slack;

// Of `count` adjacent elements.
template <typename T>
acc_t<T> sum_of(const T* x, int64_t count) {
  acc_t<T> total = 0;
  for (int64_t begin = 0; begin < count; begin += block_elements) {
    const int64_t end = min_of(begin + block_elements, count);
    vec_t<T> a{}, b{}, c{}, d{};
    int64_t i = begin;
    for (; i + 4 * lanes<T> <= end; i += 4 * lanes<T>) {
      a += load(x + i), b += load(x + i + lanes<T>);
      c += load(x + i + 2 * lanes<T>), d += load(x + i + 3 * lanes<T>);
    }
    for (; i + lanes<T> <= end; i += lanes<T>) a += load(x + i);
    if (i < end) b += load_first(x + i, end - i);
    const vec_t<T> sum = (a + b) + (c + d);
    acc_t<T> block = 0;
    for (int k = 0; k < lanes<T>; ++k) block += sum[k];
    total += block;
  }
  return total;
}

// to[i] = from[i] / (row_count · counts[i])
template <typename T>
void divide(const acc_t<T>* from, int64_t row_count, const acc_t<T>* counts, int64_t count, T* to) {
  const vec_t<T> rows = broadcast<T>(acc_t<T>(row_count));
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(to + i, load(from + i) / (rows * load(counts + i)));
  if (i < count) store_first(to + i, load(from + i) / (rows * load(counts + i)), count - i);
}

// ---- Forward ----

// sums[i] = Σ_rows x[row][i], of `count` adjacent columns. May write a vector's lanes more.
template <typename T>
void add_rows(const T* x, int64_t pitch, int64_t rows, int64_t count, acc_t<T>* sums) {
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) {
    vec_t<T> sum{};
    for (int64_t row = 0; row < rows; ++row) sum += load(x + row * pitch + i);
    store(sums + i, sum);
  }
  if (i == count) return;
  vec_t<T> sum{};
  for (int64_t row = 0; row < rows; ++row) sum += load_first(x + row * pitch + i, count - i);
  store(sums + i, sum);
}

// out[q] = Σ_s sums[q·stride + s]. May read and write a vector's lanes more.
template <int stride, typename A>
FASTCONV_INLINE void add_columns(const A* sums, int64_t taps, int64_t count, A* out) {
  for (int64_t q = 0; q < count; q += lanes<A>) {
    vec_t<A> sum{};
    for (int64_t s = 0; s < taps; ++s) sum += load_tap<stride>(sums + q * stride, s, stride);
    store(out + q, stride == 2 ? in_order(sum) : sum);
  }
}

// One average of each plane, a row of W elements.
template <typename T>
void forward_global(const AvgPool2dProblem& p, const T* x, T* y, const Parallel& parallel) {
  const acc_t<T> divisor = divisor_of<T>(window(row_axis(p), 0).count, window(column_axis(p), 0).count);
  const int64_t planes = p.N * p.C, planes_per_task = ceil_div(task_elements, max_of<int64_t>(p.W, 1));
  for_each_task(parallel, ceil_div(planes, planes_per_task), [&](int, int64_t task) {
    const int64_t end = min_of((task + 1) * planes_per_task, planes);
    for (int64_t plane = task * planes_per_task; plane < end; ++plane)
      y[plane] = from_acc<T>(sum_of(x + plane * p.W, p.W) / divisor);
  });
}

template <typename T>
void forward_nchw(const AvgPool2dProblem& p, const T* x, T* y, const Parallel& parallel) {
  using A = acc_t<T>;
  const PoolAxis row = row_axis(p), column = column_axis(p);
  const bool wide = p.S >= least_wide_window;
  const int64_t step = p.adaptive_w ? p.S : p.stride_w;  // columns for one more output, at most
  const int64_t segment = min_of(max_of<int64_t>((most_columns - p.S) / step, 1), most_segment);
  const int64_t segments = ceil_div(p.Q, segment), units = p.N * p.C * segments * p.P;
  const int64_t unit_work = min_of(segment, p.Q) * min_of(wide ? p.S : min_of(step, p.S), p.W) * min_of(p.R, p.H);
  const int64_t units_per_task = ceil_div(task_elements, max_of<int64_t>(unit_work, 1));
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    A sums[buffer_columns], out[buffer_columns], counts[buffer_columns];
    int64_t counted = -1;  // the segment that `counts` is of
    Walk walk(task * units_per_task, segments, p.P);
    for (int64_t unit = task * units_per_task; unit < min_of((task + 1) * units_per_task, units); ++unit, walk.next()) {
      const int64_t first = walk.row * segment, outs = min_of(segment, p.Q - first);
      const Window rows = window(row, walk.column);
      const T* plane = x + walk.plane * p.H * p.W;
      if (counted != walk.row)
        for (int64_t q = 0; q < outs; ++q) counts[q] = A(window(column, first + q).count);
      counted = walk.row;
      if (wide) {
        for (int64_t q = 0; q < outs; ++q) {
          const Window columns = window(column, first + q);
          out[q] = 0;
          for (int64_t h = rows.begin; h < rows.end; ++h)
            out[q] += sum_of(plane + h * p.W + columns.begin, columns.end - columns.begin);
        }
      } else {
        // Column `origin` is at sums[0]; the padding's are zeros.
        const int64_t origin = p.adaptive_w ? window(column, first).begin : first * p.stride_w - p.pad_w;
        const int64_t last = window(column, first + outs - 1).end;
        const int64_t begin = max_of<int64_t>(origin, 0), end = max_of(last, begin);
        for (int64_t w = origin; w < begin; ++w) sums[w - origin] = 0;
        add_rows(plane + rows.begin * p.W + begin, p.W, rows.end - rows.begin, end - begin, sums + begin - origin);
        for (int64_t i = end - origin; i < end - origin + least_wide_window; ++i) sums[i] = 0;
        if (p.adaptive_w || p.stride_w > 2)
          for (int64_t q = 0; q < outs; ++q) {
            const Window columns = window(column, first + q);
            A sum = 0;
            for (int64_t w = columns.begin; w < columns.end; ++w) sum += sums[w - origin];
            out[q] = sum;
          }
        else if (p.stride_w == 2)
          add_columns<2>(sums, p.S, outs, out);
        else
          add_columns<1>(sums, p.S, outs, out);
      }
      divide(out, rows.count, counts, outs, y + (walk.plane * p.P + walk.column) * p.Q + first);
    }
  });
}

// ---- Backward ----

// gradients[q − first] = Σ_p dy[p][q] / divisor(p, q), of `count` outputs q and the rows p that cover a row of dx.
template <typename T>
void add_gradients(const PoolAxis& axis, const T* dy, int64_t pitch, Cover rows, const acc_t<T>* counts, int64_t count,
                   acc_t<T>* gradients) {
  for (int64_t q = 0; q < count; q += lanes<T>) {
    vec_t<T> sum{};
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const T* from = dy + p * pitch + q;
      const vec_t<T> g = count - q >= lanes<T> ? load(from) : load_first(from, count - q);
      sum += g / (broadcast<T>(acc_t<T>(window(axis, p).count)) * load(counts + q));
    }
    if (count - q >= lanes<T>)
      store(gradients + q, sum);
    else
      store_first(gradients + q, sum, count - q);
  }
}

// The buffers of a task: some columns of dx, and the windows that have them.
template <typename T>
struct Segment {
  int64_t begin, end;                                // columns of dx
  int64_t first, outs;                               // windows
  acc_t<T> counts[buffer_columns];                   // of the windows
  int32_t from[buffer_columns], to[buffer_columns];  // their columns, counted from `begin`
  acc_t<T> gradients[buffer_columns], dx[buffer_columns];

  void place(const PoolAxis& axis, int64_t new_begin, int64_t new_end) {
    begin = new_begin, end = new_end;
    first = cover(axis, begin).begin;
    outs = max_of<int64_t>(cover(axis, end - 1).end - first, 0);
    for (int64_t q = 0; q < outs; ++q) {
      const Window w = window(axis, first + q);
      counts[q] = acc_t<T>(w.count);
      from[q] = int32_t(max_of(w.begin, begin) - begin);
      to[q] = int32_t(min_of(w.end, end) - begin);
    }
    for (int64_t q = outs; q < outs + slack; ++q) counts[q] = 1;
  }
  // dx[w] = Σ gradients of the windows that have column w.
  void spread() {
    for (int64_t w = 0; w < end - begin; ++w) dx[w] = 0;
    for (int64_t q = 0; q < outs; ++q)
      for (int32_t w = from[q]; w < to[q]; ++w) dx[w] += gradients[q];
  }
};

// The same for stride 1, where the windows of neighbours lie side by side: gradients[0] is that of window begin + pad −
// taps + 1, and zeros stand for those that don't exist.
template <typename A>
void add_neighbours(const A* gradients, int64_t taps, int64_t count, A* dx) {
  for (int64_t w = 0; w < count; w += lanes<A>) {
    vec_t<A> sum{};
    for (int64_t s = 0; s < taps; ++s) sum += load(gradients + w + s);
    store(dx + w, sum);
  }
}

// One element of dx.
template <typename T>
acc_t<T> gradient(const AvgPool2dProblem& p, const T* dy, int64_t h, int64_t w) {
  const PoolAxis row = row_axis(p), column = column_axis(p);
  const Cover rows = cover(row, h), columns = cover(column, w);
  acc_t<T> sum = 0;
  for (int64_t out = rows.begin; out < rows.end; ++out)
    for (int64_t q = columns.begin; q < columns.end; ++q)
      sum += to_acc(dy[out * p.Q + q]) / divisor_of<T>(window(row, out).count, window(column, q).count);
  return sum;
}

template <typename T>
void backward_nchw(const AvgPool2dProblem& p, const T* dy, T* dx, const Parallel& parallel) {
  const PoolAxis row = row_axis(p), column = column_axis(p);
  const bool neighbours = !p.adaptive_w && p.stride_w == 1;
  // Windows over `columns` columns, at most.
  const auto windows_over = [&](int64_t columns) {
    if (neighbours) return columns + p.S;
    const int64_t most = p.adaptive_w ? columns * ceil_div(p.Q, p.W) + 2 : (columns + p.S) / p.stride_w + 2;
    return min_of(most, p.Q);
  };
  int64_t segment = min_of(most_segment, p.W);
  while (segment > 1 && windows_over(segment) > most_columns) segment /= 2;
  const bool buffered = windows_over(segment) <= most_columns;
  const int64_t segments = ceil_div(p.W, segment), units = p.N * p.C * segments * p.H;
  const int64_t units_per_task = ceil_div(task_elements, segment);
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    Segment<T> columns;
    int64_t placed = -1, plane = -1;
    Cover done = {-1, -1};  // the rows whose gradients columns.dx has
    Walk walk(task * units_per_task, segments, p.H);
    for (int64_t unit = task * units_per_task; unit < min_of((task + 1) * units_per_task, units); ++unit, walk.next()) {
      const int64_t begin = walk.row * segment, end = min_of(begin + segment, p.W);
      const T* from = dy + walk.plane * p.P * p.Q;
      T* to = dx + (walk.plane * p.H + walk.column) * p.W + begin;
      if (!buffered) {  // an enormous window at every few columns
        for (int64_t w = begin; w < end; ++w) to[w - begin] = from_acc<T>(gradient(p, from, walk.column, w));
        continue;
      }
      const Cover rows = cover(row, walk.column);
      if (placed != walk.row) columns.place(column, begin, end);
      if (placed != walk.row || plane != walk.plane || rows.begin != done.begin || rows.end != done.end) {
        if (neighbours) {
          const int64_t origin = begin + p.pad_w - p.S + 1, before = columns.first - origin;
          for (int64_t i = 0; i < end - begin + p.S + slack; ++i) columns.gradients[i] = 0;
          add_gradients(row, from + columns.first, p.Q, rows, columns.counts, columns.outs, columns.gradients + before);
          add_neighbours(columns.gradients, p.S, end - begin, columns.dx);
        } else {
          add_gradients(row, from + columns.first, p.Q, rows, columns.counts, columns.outs, columns.gradients);
          columns.spread();
        }
      }
      placed = walk.row, plane = walk.plane, done = rows;
      int64_t w = 0;
      for (; w + lanes<T> <= end - begin; w += lanes<T>) store(to + w, load(columns.dx + w));
      if (w < end - begin) store_first(to + w, load(columns.dx + w), end - begin - w);
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
