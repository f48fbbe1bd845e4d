// Max pooling in NCHW, forward of the usual windows: 2×2 and 3×3, two apart.
//
// Each row of x gives the best of every window's taps in it. Windows of three rows share the third with the windows
// below, whose first it is: what it gave is kept for them.
#pragma once

#include "max_pool2d_forward.h"

namespace fastconv::cpu {
namespace {

// The best of each window's taps in one row of x, their offset being the column in the window.
template <typename T>
struct RowBest {
  Best<T> best;
  vec_t<T> sum;  // of the taps: NaN if one of them is
};

// `columns` are those of the first taps, of which the ones over an edge of x are −∞.
template <int taps, typename T>
FASTCONV_INLINE RowBest<T> best_of_row(const T* first, bool over_edge, mask_t<T> columns, int64_t W) {
  RowBest<T> row;
  vec_t<T> loaded[taps];
  load_taps<taps>(first, loaded);
  for (int s = 0; s < taps; ++s) {
    vec_t<T> v = loaded[s];
    if (over_edge) {
      const mask_t<T> column = columns + all_taps<T>(s);
      v = (column >= 0) & (column < all_taps<T>(W)) ? v : broadcast<T>(-__builtin_inf());
    }
    if (s == 0) {
      row = {{v, over_edge ? mask_t<T>(columns < 0 ? -columns : mask_t<T>{}) : mask_t<T>{}}, v};
      continue;
    }
    const mask_t<T> take = v > row.best.value;
    row.best = {take ? v : row.best.value, take ? all_taps<T>(s) : row.best.offset};
    row.sum += v;
  }
  return row;
}
// Takes what is better in a later row, whose first tap has offset `first`.
template <typename T>
FASTCONV_INLINE Best<T> better(const Best<T>& best, const Best<T>& row, int64_t first) {
  const mask_t<T> take = row.value > best.value;
  return {take ? row.value : best.value, take ? row.offset + all_taps<T>(first) : best.offset};
}

// Windows with a NaN, all of their taps [row_begin, row_end) × taps.
template <int taps, typename T>
__attribute__((noinline)) Best<T> scan_with_nan(const T* first, int64_t row_begin, int64_t row_end, mask_t<T> columns,
                                                int64_t W) {
  const mask_t<T> start = all_taps<T>(row_begin * taps) - (columns < 0 ? columns : mask_t<T>{});
  return scan<T>(row_end - row_begin, taps, row_begin * taps, taps, start, [&](int64_t r, int64_t s) {
    const mask_t<T> column = columns + all_taps<T>(s);
    const vec_t<T> v = load_tap<2>(first + r * W, s, 2);
    return (column >= 0) & (column < all_taps<T>(W)) ? v : broadcast<T>(-__builtin_inf());
  });
}

// What a row of x gave: a NaN where there was one.
template <typename T>
struct KeptRow {
  static constexpr int64_t most = segment_columns / 2 + 1 + lanes<T>;
  alignas(64) acc_t<T> value[most];
  alignas(64) int64_t offset[most * sizeof(acc_t<T>) / 8];

  FASTCONV_INLINE Best<T> at(int64_t q) const {
    Best<T> best;
    best.value = load(value + q);
    memcpy(&best.offset, (const char*)offset + q * int64_t(sizeof(acc_t<T>)), sizeof best.offset);
    return best;
  }
  FASTCONV_INLINE void keep(int64_t q, const Best<T>& best) {
    store(value + q, best.value);
    memcpy((char*)offset + q * int64_t(sizeof(acc_t<T>)), &best.offset, sizeof best.offset);
  }
  FASTCONV_INLINE void keep(int64_t q, const RowBest<T>& row) {
    keep(q, Best<T>{row.sum == row.sum ? row.best.value : row.sum, row.best.offset});
  }
};

// The first of three rows; where it is above x, −∞ and the offset of the first tap inside x.
template <int taps, typename T>
void keep_row(KeptRow<T>& kept, const T* first, int64_t row_begin, int64_t W, int64_t Q, int64_t pad_w) {
  for (int64_t q = 0; q < Q; q += lanes<T>) {
    const mask_t<T> columns = columns_from<2, T>(2 * q - pad_w);
    const mask_t<T> start = all_taps<T>(taps) - (columns < 0 ? columns : mask_t<T>{});
    if (row_begin == 0)
      kept.keep(q, best_of_row<taps>(first + 2 * q, true, columns, W));
    else
      kept.keep(q, Best<T>{broadcast<T>(-__builtin_inf()), start});
  }
}

// `lanes` windows from q on, whose rows [row_begin, row_end) are inside x.
template <int taps, typename T>
FASTCONV_INLINE Best<T> best_of_windows(KeptRow<T>& kept, int64_t q, const T* first, int64_t row_begin, int64_t row_end,
                                        bool over_edge, int64_t W, int64_t pad_w) {
  const mask_t<T> columns = over_edge ? columns_from<2, T>(2 * q - pad_w) : mask_t<T>{};
  const auto row = [&](int64_t r) __attribute__((always_inline)) {
    return best_of_row<taps>(first + r * W, over_edge, columns, W);
  };
  Best<T> best;
  vec_t<T> sum, last_sum{};
  int64_t next = row_begin + 1;
  if (taps == 3) {
    best = kept.at(q);
    sum = best.value;
    next = 1;
  } else {
    const RowBest<T> r0 = row(row_begin);
    best = {r0.best.value, r0.best.offset + all_taps<T>(row_begin * taps)};
    sum = r0.sum;
  }
  if (next == 1 && row_end > 1) {
    const RowBest<T> r1 = row(1);
    best = better(best, r1.best, taps);
    sum += r1.sum;
  }
  if (taps == 3 && row_end > 2) {
    const RowBest<T> r2 = row(2);
    best = better(best, r2.best, 2 * taps);
    kept.keep(q, r2.best);
    last_sum = r2.sum;
    sum += last_sum;
  }
  if (__builtin_expect(!has_nan<T>(sum), true)) return best;
  if (taps == 3) kept.keep(q, RowBest<T>{kept.at(q), last_sum});
  return scan_with_nan<taps>(first + row_begin * W, row_begin, row_end, columns_from<2, T>(2 * q - pad_w), W);
}

bool has_forward_stride_2(const MaxPool2dProblem& p) {
  return p.layout == Layout::NCHW && p.R == p.S && (p.R == 2 || p.R == 3) && p.stride_h == 2 && p.stride_w == 2 &&
         p.dilation_h == 1 && p.dilation_w == 1 && p.W <= segment_columns;
}

// Rows of windows that have all of their rows inside x. Those in [inner_begin, inner_end) have every column inside x
// too. What follows a row's last window in x, y and offsets is read and written, up to a whole vector.
template <int taps, typename T, typename Offset>
__attribute__((noinline)) void forward_whole_rows(KeptRow<T>& kept, int64_t rows, const T* first, int64_t W, int64_t Q,
                                                  int64_t pad_w, int64_t inner_begin, int64_t inner_end, T* y,
                                                  Offset* offsets) {
  for (; rows > 0; --rows, first += 2 * W, y += Q) {
    const auto vectors = [&](int64_t q, int64_t q_end, bool over_edge) __attribute__((always_inline)) {
      for (; q < q_end; q += lanes<T>) {
        const T* const from = first + 2 * q;
        for (int64_t k = 0; k < 4 * lanes<T>; k += 64 / int64_t(sizeof(T)))  // what nothing reads again
          __builtin_prefetch(from + 2 * q + prefetch_bytes / int64_t(sizeof(T)) + k, 0, 0);
        const Best<T> best = best_of_windows<taps>(kept, q, from, 0, taps, over_edge, W, pad_w);
        store(y + q, in_order(best.value));
        if constexpr (is_kept<Offset>) store_offsets<T>(offsets + q, in_order(best.offset));
      }
    };
    if (inner_begin > 0) vectors(0, inner_begin, true);
    vectors(inner_begin, inner_end, false);
    if (inner_end < Q) vectors(inner_end, Q, true);
    if constexpr (is_kept<Offset>) offsets += Q;
  }
}

// One row of windows, whose rows [row_begin, row_end) are inside x. Writes nothing after it.
template <int taps, typename T, typename Offset>
__attribute__((noinline)) void forward_any_row(KeptRow<T>& kept, int64_t row_begin, int64_t row_end, const T* first,
                                               int64_t W, int64_t Q, int64_t pad_w, T* y, Offset* offsets) {
  for (int64_t q = 0; q < Q; q += lanes<T>) {
    const Best<T> best = best_of_windows<taps>(kept, q, first + 2 * q, row_begin, row_end, true, W, pad_w);
    const int64_t count = min_of<int64_t>(Q - q, lanes<T>);
    store_first(y + q, in_order(best.value), count);
    if constexpr (is_kept<Offset>) store_first_offsets<T>(offsets + q, in_order(best.offset), count);
  }
}

template <int taps, typename T, typename Offset>
void forward_nchw_stride_2(const MaxPool2dProblem& problem, const T* x, T* y, Offset* offsets,
                           const Parallel& parallel) {
  const int64_t units = problem.N * problem.C * problem.P, units_per_task = ceil_div(task_elements, problem.Q);
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    constexpr int64_t V = lanes<T>;
    const int64_t H = problem.H, W = problem.W, P = problem.P, Q = problem.Q, pad_h = problem.pad_h;
    const int64_t pad_w = problem.pad_w, x_elements = problem.x_elements();
    const int64_t begin = task * units_per_task, end = min_of(begin + units_per_task, units);
    // Vectors from inner_begin to inner_end have every column inside x.
    const int64_t inside = W + pad_w < taps ? 0 : (W + pad_w - taps) / 2 + 1;
    const int64_t inner_begin = min_of(pad_w > 0 ? V : 0, Q);
    const int64_t inner_end = max_of(inside >= Q ? Q : inside / V * V, inner_begin);
    const int64_t row_written = ceil_div(Q, V) * V;                  // by whole rows: elements from the first window on
    const int64_t row_read = 2 * row_written + (taps == 3 ? 2 : 0);  // elements from the first column on
    KeptRow<T> kept;
    int64_t kept_unit = -1;  // for which it is
    for (int64_t unit = begin, rows; unit < end; unit += rows) {
      const int64_t plane = unit / P * H * W, p = unit % P, h = 2 * p - pad_h, row_begin = max_of<int64_t>(-h, 0);
      const int64_t row_end = min_of(H - h, int64_t(taps)), room = (end - unit) * Q;
      const int64_t corner = plane + h * W - pad_w;  // of window 0
      const int64_t x_room = x_elements - (corner + (row_end - 1) * W + row_read);
      const T* const first = x + corner;
      T* const y_row = y + unit * Q;
      Offset* const offsets_row = is_kept<Offset> ? offsets + unit * Q : nullptr;
      rows = 1;
      if (corner + row_begin * W < 0 || x_room < 0) {  // would read beyond x
        for (int64_t q = 0; q < Q; ++q) forward_window(problem, x + plane, 1, p, q, y_row, offsets_row, q);
        continue;
      }
      if (taps == 3 && (p == 0 || unit != kept_unit)) keep_row<taps>(kept, first, row_begin, W, Q, pad_w);
      if (row_end - row_begin == taps && room >= row_written) {
        rows = min_of(min_of(P - p, (H - taps - h) / 2 + 1), min_of((room - row_written) / Q, x_room / (2 * W)) + 1);
        forward_whole_rows<taps>(kept, rows, first, W, Q, pad_w, inner_begin, inner_end, y_row, offsets_row);
      } else {
        forward_any_row<taps>(kept, row_begin, row_end, first, W, Q, pad_w, y_row, offsets_row);
      }
      kept_unit = row_end == taps ? unit + rows : -1;
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
