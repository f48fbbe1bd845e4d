// Max pooling, backward of the usual windows: 2×2 and 3×3, two apart.
//
// Let h' = h + pad_h. The elements of dx in an even row h' = 2i are covered by the windows of row i, as tap 0, and
// where windows overlap by those of row i − 1, as tap 2; in an odd row h' = 2i + 1 by row i alone, as tap 1. Columns
// likewise. So two rows of dx are made at a time out of window rows i and i − 1, and there is nothing to be found out
// for an element: where a window does not exist, one that took nothing stands for it.
#pragma once

#include <type_traits>

#include "max_pool2d_vectors.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t most_columns = 2048;   // NCHW: of a row of dx
constexpr int64_t most_channels = 1024;  // NHWC: of a pixel at a time

bool is_stride_2(const MaxPool2dProblem& p) {
  return p.R == p.S && (p.R == 2 || p.R == 3) && p.stride_h == 2 && p.stride_w == 2 && p.dilation_h == 1 &&
         p.dilation_w == 1 && (p.layout == Layout::NHWC ? p.C >= vector_bytes / 4 : p.W <= most_columns);
}

// The gradients of those windows that took `tap`, and zeros.
template <typename T>
FASTCONV_INLINE vec_t<T> taken(vec_t<T> dy, mask_t<T> taps, int64_t tap) {
  return taps == all_taps<T>(tap) ? dy : vec_t<T>{};
}

// NCHW: window q of a row is at [front + q]; those around them took nothing.
template <typename T>
struct WindowRow {
  using Tap = std::conditional_t<sizeof(acc_t<T>) == 4, int32_t, int64_t>;
  static constexpr int64_t front = lanes<T>, size = most_columns / 2 + 4 * lanes<T>;
  alignas(vector_bytes) acc_t<T> dy[size] = {};
  alignas(vector_bytes) Tap taps[size];

  WindowRow() {
    for (int64_t i = 0; i < front; ++i) taps[i] = -1;
  }
  // The row that `from` and `offsets` begin with, out of `available` windows. If there is none, Q is 0.
  void bring(const T* from, const uint8_t* offsets, int64_t Q, int64_t available) {
    int64_t q = 0;
    for (; q < Q && q + lanes<T> <= available; q += lanes<T>) {
      store(dy + front + q, load(from + q));
      put(q, load_offsets<T>(offsets + q));
    }
    for (; q < Q; ++q) {
      dy[front + q] = to_acc(from[q]);
      taps[front + q] = offsets[q];
    }
  }
  // From window q on there are none.
  void end(int64_t q, int64_t until) {
    for (; q < until; q += lanes<T>) put(q, all_taps<T>(-1));
  }
  FASTCONV_INLINE void put(int64_t q, mask_t<T> v) { memcpy(taps + front + q, &v, sizeof v); }
  FASTCONV_INLINE vec_t<T> taken(int64_t q, int64_t tap) const {
    mask_t<T> v;
    memcpy(&v, taps + front + q, sizeof v);
    return cpu::taken<T>(load(dy + front + q), v, tap);
  }
};

// Stores a[0], b[0], a[1], b[1] …, `count` of them at most.
template <typename T>
FASTCONV_INLINE void store_pairs(T* dx, vec_t<T> a, vec_t<T> b, int64_t count) {
  constexpr int64_t V = lanes<T>;
  if (count >= 2 * V) {
    store(dx, low_pairs(a, b));
    store(dx + V, high_pairs(a, b));
  } else {
    store_first(dx, low_pairs(a, b), min_of(count, V));
    if (count > V) store_first(dx + V, high_pairs(a, b), count - V);
  }
}

// Columns 2j and 2j + 1 of dx: w' is even, then odd, and with padding odd, then even.
template <int taps, bool padded, typename T>
void backward_nchw_stride_2(const MaxPool2dProblem& problem, const T* dy, const uint8_t* offsets, T* dx,
                            const Parallel& parallel) {
  const int64_t pairs = (problem.H + problem.pad_h + 1) / 2, units = problem.N * problem.C * pairs;
  const int64_t units_per_task = ceil_div(task_elements, 2 * problem.W);
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const int64_t J = (p.W + 1) / 2;
    WindowRow<T> rows[2];
    T absent[most_columns];  // a row that dx does not have
    const auto bring = [&](const Walk& at, int64_t row) {
      const int64_t first = (at.plane * p.P + row) * p.Q, Q = row >= 0 && row < p.P ? p.Q : 0;
      rows[row & 1].bring(dy + first, offsets + first, Q, p.y_elements() - first);
      rows[row & 1].end(Q, J + 1);
    };
    const int64_t begin = task * units_per_task, end = min_of(begin + units_per_task, units);
    Walk walk(begin, 1, pairs);
    for (int64_t unit = begin; unit < end; ++unit, walk.next()) {
      const int64_t i = walk.column, h = 2 * i - p.pad_h;
      if (taps == 3 && (unit == begin || i == 0)) bring(walk, i - 1);
      bring(walk, i);
      const WindowRow<T>&here = rows[i & 1], &above = rows[(i - 1) & 1];
      T* plane = dx + walk.plane * p.H * p.W;
      T* even = h >= 0 ? plane + h * p.W : absent;
      T* odd = h + 1 < p.H ? plane + (h + 1) * p.W : absent;
      for (int64_t j = 0;; j += lanes<T>) {
        if (j + lanes<T> > J && J >= lanes<T>) j = J - lanes<T>;  // once more some of those before
        const auto even_columns = [&](const WindowRow<T>& row, int64_t r) __attribute__((always_inline)) {
          const vec_t<T> sum = row.taken(padded ? j + 1 : j, r * taps);
          return taps == 3 ? sum + row.taken(padded ? j : j - 1, r * taps + 2) : sum;
        };
        const auto odd_columns = [&](const WindowRow<T>& row, int64_t r)
                                     __attribute__((always_inline)) { return row.taken(j, r * taps + 1); };
        const auto put = [&](T* to, vec_t<T> in_even, vec_t<T> in_odd) __attribute__((always_inline)) {
          store_pairs(to + 2 * j, padded ? in_odd : in_even, padded ? in_even : in_odd, p.W - 2 * j);
        };
        vec_t<T> in_even = even_columns(here, 0), in_odd = odd_columns(here, 0);
        if (taps == 3) in_even += even_columns(above, 2), in_odd += odd_columns(above, 2);
        put(even, in_even, in_odd);
        put(odd, even_columns(here, 1), odd_columns(here, 1));
        if (j + lanes<T> >= J) break;
      }
    }
  });
}

// NHWC: a window's channels, or those of one that took nothing.
template <typename T>
struct Window {
  const T* dy;
  const uint8_t* offsets;
};
struct Nothing {
  uint8_t offsets[most_channels];
  Nothing() { memset(offsets, 0xff, sizeof offsets); }
};

// Four pixels of dx at a time, w' = 2j and 2j + 1 of two rows.
template <int taps, typename T>
void backward_nhwc_stride_2(const MaxPool2dProblem& problem, const T* dy, const uint8_t* offsets, T* dx,
                            const Parallel& parallel) {
  const int64_t pairs = (problem.H + problem.pad_h + 1) / 2, units = problem.N * pairs;
  const int64_t units_per_task = ceil_div(task_elements, 2 * problem.W * problem.C);
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const int64_t C = p.C, end = min_of((task + 1) * units_per_task, units);
    const Nothing nothing;
    T absent[most_channels];  // a pixel that dx does not have
    Walk walk(task * units_per_task, 1, pairs);
    for (int64_t unit = task * units_per_task; unit < end; ++unit, walk.next()) {
      const int64_t i = walk.column, h = 2 * i - p.pad_h;
      for (int64_t j = 0; 2 * j - p.pad_w < p.W; ++j)
        for (int64_t block = 0; block < C; block += most_channels) {
          const int64_t n = max_of<int64_t>(min_of(C - block, most_channels), lanes<T>);
          const int64_t first = min_of(block, C - n), w = 2 * j - p.pad_w;
          const auto window = [&](int64_t row, int64_t column) -> Window<T> {
            if (row < 0 || row >= p.P || column < 0 || column >= p.Q) return {dy, nothing.offsets};
            const int64_t at = ((walk.plane * p.P + row) * p.Q + column) * C + first;
            return {dy + at, offsets + at};
          };
          const auto pixel = [&](int64_t row, int64_t column) {
            const bool inside = row >= 0 && row < p.H && column >= 0 && column < p.W;
            return inside ? dx + ((walk.plane * p.H + row) * p.W + column) * C + first : absent;
          };
          const Window<T> here = window(i, j), left = window(i, j - 1), above = window(i - 1, j),
                          corner = window(i - 1, j - 1);
          T *even_even = pixel(h, w), *even_odd = pixel(h, w + 1), *odd_even = pixel(h + 1, w),
            *odd_odd = pixel(h + 1, w + 1);
          for (int64_t c = 0; c < n; c += lanes<T>) {
            if (c + lanes<T> > n) c = n - lanes<T>;  // once more some of those before
            const auto of = [&](const Window<T>& from) __attribute__((always_inline)) {
              const vec_t<T> g = load(from.dy + c);
              const mask_t<T> took = load_offsets<T>(from.offsets + c);
              return [=](int64_t r, int64_t s)
                         __attribute__((always_inline)) { return taken<T>(g, took, r * taps + s); };
            };
            const auto from_here = of(here);
            if constexpr (taps == 2) {
              store(even_even + c, from_here(0, 0));
              store(even_odd + c, from_here(0, 1));
              store(odd_even + c, from_here(1, 0));
              store(odd_odd + c, from_here(1, 1));
            } else {
              const auto from_left = of(left), from_above = of(above), from_corner = of(corner);
              store(even_even + c, (from_here(0, 0) + from_left(0, 2)) + (from_above(2, 0) + from_corner(2, 2)));
              store(even_odd + c, from_here(0, 1) + from_above(2, 1));
              store(odd_even + c, from_here(1, 0) + from_left(1, 2));
              store(odd_odd + c, from_here(1, 1));
            }
          }
        }
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
