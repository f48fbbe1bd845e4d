// Max pooling, backward of the usual windows: 2×2 and 3×3, two apart.
//
// Let h' = h + pad_h. The elements of dx in an even row h' = 2i are covered by the windows of row i, as tap 0, and
// where windows overlap by those of row i − 1, as tap 2; in an odd row h' = 2i + 1 by row i alone, as tap 1. Columns
// likewise. So two rows of dx are made at a time out of window rows i and i − 1, and there is nothing to be found out
// for an element: where a window does not exist, one that took nothing stands for it.
#pragma once

#include "max_pool2d_vectors.h"
#include "past_caches.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t most_channels = 1024;  // NHWC: of a pixel at a time

bool is_stride_2(const MaxPool2dProblem& p) {
  return p.R == p.S && (p.R == 2 || p.R == 3) && p.stride_h == 2 && p.stride_w == 2 && p.dilation_h == 1 &&
         p.dilation_w == 1 && (p.layout == Layout::NHWC ? p.C >= vector_bytes / 4 : p.W <= segment_columns);
}

// Windows side by side: along a row in NCHW, of neighbouring channels in NHWC.
template <typename T>
struct SideBySide {
  vec_t<T> dy;
  mask_t<T> taps;
  // The gradients of those that took `tap`, and zeros.
  FASTCONV_INLINE vec_t<T> taken(int64_t tap) const { return taps == all_taps<T>(tap) ? dy : vec_t<T>{}; }
};

// NCHW: a row of Q windows, out of `available`. Those beyond it took nothing; a row that does not exist has none.
template <typename T>
struct WindowRow {
  const T* dy;
  const uint8_t* offsets;
  int64_t Q, available;
  FASTCONV_INLINE SideBySide<T> at(int64_t q) const {
    if (q + lanes<T> <= Q) return {load(dy + q), load_offsets<T>(offsets + q)};
    if (q >= Q) return {vec_t<T>{}, all_taps<T>(-1)};
    if (q + lanes<T> > available) return last(q);
    const mask_t<T> beyond = lane_numbers<T>() >= all_taps<T>(Q - q);
    return {load(dy + q), load_offsets<T>(offsets + q) + (beyond & all_taps<T>(256))};  // larger than any tap
  }
  __attribute__((noinline)) SideBySide<T> last(int64_t q) const {
    uint8_t taps[lanes<T>];
    for (int64_t i = 0; i < lanes<T>; ++i) taps[i] = q + i < Q ? offsets[q + i] : 255;
    return {load_first(dy + q, Q - q), load_offsets<T>(taps)};
  }
};

// NCHW: a row of W elements of dx, of which `room` can be written, out of tap r_here of `here` and, unless null, the
// last of `above`. Past the caches `room` is W, in whole lines. Columns 2j and 2j + 1 are the even and the odd column
// w' of window j or, with padding, the odd one of window j and the even one of window j + 1.
template <int taps, bool padded, typename T>
FASTCONV_INLINE void backward_row(T* dx, int64_t W, int64_t room, const WindowRow<T>& here, int64_t r_here,
                                  const WindowRow<T>* above, bool past_caches) {
  constexpr int64_t V = lanes<T>, r_above = taps - 1;
  constexpr std::make_integer_sequence<int, lanes<T>> all;
  struct Sums {
    vec_t<T> tap[taps];
  };
  const auto sums_at = [&](int64_t q) __attribute__((always_inline)) {
    Sums sums;
    const SideBySide<T> windows = here.at(q);
    for (int s = 0; s < taps; ++s) sums.tap[s] = windows.taken(r_here * taps + s);
    if (above) {
      const SideBySide<T> more = above->at(q);
      for (int s = 0; s < taps; ++s) sums.tap[s] += more.taken(r_above * taps + s);
    }
    return sums;
  };
  Sums sums = sums_at(0);
  vec_t<T> before{};
  for (int64_t j = 0; 2 * j < W; j += V) {
    Sums next;
    vec_t<T> even = sums.tap[0];
    if constexpr (padded) {
      next = sums_at(j + V);
      even = moved_left<T>(even, next.tap[0], all);
    }
    if constexpr (taps == 3) {
      even += padded ? sums.tap[2] : moved_right<T>(before, sums.tap[2], all);
      before = sums.tap[2];
    }
    const vec_t<T> first = padded ? sums.tap[1] : even, second = padded ? even : sums.tap[1];
    const int64_t count = room - 2 * j;
    if (count >= 2 * V) {
      store_to(dx + 2 * j, low_pairs(first, second), past_caches);
      store_to(dx + 2 * j + V, high_pairs(first, second), past_caches);
    } else if (past_caches) {
      store_to(dx + 2 * j, low_pairs(first, second), true);  // the one line that is left
    } else {
      store_first(dx + 2 * j, low_pairs(first, second), min_of(count, V));
      store_first(dx + 2 * j + V, high_pairs(first, second), max_of<int64_t>(count - V, 0));
    }
    if constexpr (!padded) next = 2 * (j + V) < W ? sums_at(j + V) : Sums{};
    sums = next;
  }
}

// Whether dx is written past the caches: if they do not hold all of the call, and its rows are whole lines.
template <typename T>
bool goes_past_caches(const MaxPool2dProblem& p, const T* dx) {
  const int64_t size = sizeof(T), bytes = (p.x_elements() + p.y_elements()) * size + p.y_elements();
  return bytes > cache_bytes && p.W * size % 64 == 0 && reinterpret_cast<uintptr_t>(dx) % 64 == 0;
}

template <int taps, bool padded, typename T>
void backward_nchw_stride_2(const MaxPool2dProblem& problem, const T* dy, const uint8_t* offsets, T* dx,
                            const Parallel& parallel) {
  const int64_t pairs = (problem.H + problem.pad_h + 1) / 2, units = problem.N * problem.C * pairs;
  const int64_t units_per_task = ceil_div(task_elements, 2 * problem.W);
  const bool past_caches = goes_past_caches(problem, dx);
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const MaxPool2dProblem p = problem;  // a copy of its own, which no store can alias
    const auto row_of = [&](int64_t plane, int64_t row) -> WindowRow<T> {
      const int64_t first = (plane * p.P + row) * p.Q;
      if (row < 0 || row >= p.P) return {dy, offsets, 0, 0};
      return {dy + first, offsets + first, p.Q, p.y_elements() - first};
    };
    const auto first_row = [&](int64_t unit) {  // of dx
      return unit / pairs * p.H + max_of<int64_t>(2 * (unit % pairs) - p.pad_h, 0);
    };
    const int64_t begin = task * units_per_task, end = min_of(begin + units_per_task, units);
    T* to = dx + first_row(begin) * p.W;
    T* const to_end = dx + first_row(end) * p.W;
    Walk walk(begin, 1, pairs);
    for (int64_t unit = begin; unit < end; ++unit, walk.next()) {
      const int64_t i = walk.column, h = 2 * i - p.pad_h;
      const WindowRow<T> here = row_of(walk.plane, i);
      // One row after the other: the last vector hangs over into the next.
      if (h >= 0) {
        const WindowRow<T> above = row_of(walk.plane, i - 1);
        backward_row<taps, padded>(to, p.W, past_caches ? p.W : to_end - to, here, 0, taps == 3 ? &above : nullptr,
                                   past_caches);
        to += p.W;
      }
      if (h + 1 < p.H) {
        backward_row<taps, padded, T>(to, p.W, past_caches ? p.W : to_end - to, here, 1, nullptr, past_caches);
        to += p.W;
      }
    }
    end_stores(past_caches);
  });
}

// Where a window of NHWC has its channels; one that does not exist took nothing.
template <typename T>
struct Channels {
  const T* dy;
  const uint8_t* offsets;
  FASTCONV_INLINE SideBySide<T> at(int64_t c) const { return {load(dy + c), load_offsets<T>(offsets + c)}; }
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
    uint8_t nothing[most_channels];
    memset(nothing, 0xff, sizeof nothing);
    T absent[most_channels];  // a pixel that dx does not have
    Walk walk(task * units_per_task, 1, pairs);
    for (int64_t unit = task * units_per_task; unit < end; ++unit, walk.next()) {
      const int64_t i = walk.column, h = 2 * i - p.pad_h;
      for (int64_t j = 0; 2 * j - p.pad_w < p.W; ++j)
        for (int64_t block = 0; block < C; block += most_channels) {
          const int64_t n = max_of<int64_t>(min_of(C - block, most_channels), lanes<T>);
          const int64_t first = min_of(block, C - n), w = 2 * j - p.pad_w;
          const auto window = [&](int64_t row, int64_t column) -> Channels<T> {
            if (row < 0 || row >= p.P || column < 0 || column >= p.Q) return {dy, nothing};
            const int64_t at = ((walk.plane * p.P + row) * p.Q + column) * C + first;
            return {dy + at, offsets + at};
          };
          const auto pixel = [&](int64_t row, int64_t column) {
            const bool inside = row >= 0 && row < p.H && column >= 0 && column < p.W;
            return inside ? dx + ((walk.plane * p.H + row) * p.W + column) * C + first : absent;
          };
          const Channels<T> here = window(i, j), left = window(i, j - 1);
          const Channels<T> above = window(i - 1, j), above_left = window(i - 1, j - 1);
          T *even_even = pixel(h, w), *even_odd = pixel(h, w + 1);  // the row's parity, then the column's
          T *odd_even = pixel(h + 1, w), *odd_odd = pixel(h + 1, w + 1);
          for (int64_t c = 0; c < n; c += lanes<T>) {
            if (c + lanes<T> > n) c = n - lanes<T>;  // once more some of those before
            const SideBySide<T> a = here.at(c);
            if constexpr (taps == 2) {
              store(even_even + c, a.taken(0));
              store(even_odd + c, a.taken(1));
              store(odd_even + c, a.taken(2));
              store(odd_odd + c, a.taken(3));
            } else {
              const SideBySide<T> b = left.at(c), d = above.at(c), e = above_left.at(c);
              store(even_even + c, (a.taken(0) + b.taken(2)) + (d.taken(6) + e.taken(8)));
              store(even_odd + c, a.taken(1) + d.taken(7));
              store(odd_even + c, a.taken(3) + b.taken(5));
              store(odd_odd + c, a.taken(4));
            }
          }
        }
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
