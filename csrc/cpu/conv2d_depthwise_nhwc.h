// Depthwise convolution in NHWC, vectors along the channels; taps in the padding are left out.
#pragma once

#include <type_traits>

#include "conv2d_stage.h"
#include "isa.h"

namespace fastconv::cpu {
namespace {

// Weights, and wgrad's sums, lie by blocks of a vector of channels, [block][tap][lane]: those of one tap, for all
// channels, would fall into the same few lines of the cache where C is a large power of two.
template <typename T>
FASTCONV_INLINE int64_t block_offset(int64_t c, int64_t tap, int64_t taps) {
  return (c / lanes<T> * taps + tap) * lanes<T> + c % lanes<T>;
}
template <typename T>
void transpose_weights(const Conv2dProblem& pr, const T* w, acc_t<T>* weights) {
  const int64_t taps = pr.R * pr.S;
  for (int64_t c = 0; c < pr.C; c += lanes<T>)
    transpose(w + c * taps, taps, min_of<int64_t>(lanes<T>, pr.C - c), taps, weights + c * taps, lanes<T>);
}

// Calls visit(c, V) for V vectors of channels from c on, then visit_one(c) for each channel that fills no vector.
template <typename T, typename Visit, typename VisitOne>
FASTCONV_INLINE void for_channels(int64_t channels, const Visit& visit, const VisitOne& visit_one) {
  int64_t c = 0;
  for (; c + 2 * lanes<T> <= channels; c += 2 * lanes<T>) visit(c, std::integral_constant<int, 2>());
  for (; c + lanes<T> <= channels; c += lanes<T>) visit(c, std::integral_constant<int, 1>());
  for (; c < channels; ++c) visit_one(c);
}

// `Pixels` neighbouring outputs from (i, j) on, of every channel: out[c] = bias[c] + Σ filter[tap][c] · source[c].
// With one pixel, taps in the padding are left out; with more, the columns of all taps lie inside. ReLU if asked for.
template <typename T, int Pixels>
void window_pixels(const T* source, const Axis& rows, int64_t i, const Axis& cols, int64_t j, int64_t channels,
                   const acc_t<T>* weights, int64_t filter_rows, int64_t filter_width, const T* bias, bool with_relu,
                   T* out) {
  const int64_t in_step = cols.step * channels, out_step = cols.out_step * channels;
  const int64_t filter_taps = filter_rows * filter_width;
  const auto for_taps = [&](const auto& visit) {
    for (int64_t a = 0; a < rows.taps; ++a) {
      const int64_t row = i * rows.step + rows.first + a * rows.inc;
      if (row < 0 || row >= rows.source) continue;
      for (int64_t b = 0; b < cols.taps; ++b) {
        const int64_t col = j * cols.step + cols.first + b * cols.inc;
        if (Pixels == 1 && (col < 0 || col >= cols.source)) continue;
        const int64_t tap =
            (rows.filter_first + a * rows.filter_step) * filter_width + cols.filter_first + b * cols.filter_step;
        visit(source + (row * cols.source + col) * channels, tap);
      }
    }
  };
  for_channels<T>(
      channels,
      [&](int64_t c, auto vectors) {
        constexpr int V = decltype(vectors)::value;
        vec_t<T> sums[Pixels][V];
        for (int u = 0; u < V; ++u)
          for (int pixel = 0; pixel < Pixels; ++pixel)
            sums[pixel][u] = bias ? load(bias + c + u * lanes<T>) : vec_t<T>{};
        const acc_t<T>* first = weights + c * filter_taps;
        for_taps([&](const T* in, int64_t tap) {
          for (int u = 0; u < V; ++u) {
            const vec_t<T> w = load(first + (u * filter_taps + tap) * lanes<T>);
            for (int pixel = 0; pixel < Pixels; ++pixel)
              sums[pixel][u] += w * load(in + pixel * in_step + c + u * lanes<T>);
          }
        });
        for (int pixel = 0; pixel < Pixels; ++pixel)
          for (int u = 0; u < V; ++u)
            store(out + pixel * out_step + c + u * lanes<T>, with_relu ? relu(sums[pixel][u]) : sums[pixel][u]);
      },
      [&](int64_t c) {
        for (int pixel = 0; pixel < Pixels; ++pixel) {
          acc_t<T> sum = bias ? to_acc(bias[c]) : 0;
          for_taps([&](const T* in, int64_t tap) {
            sum += weights[block_offset<T>(c, tap, filter_taps)] * to_acc(in[pixel * in_step + c]);
          });
          out[pixel * out_step + c] = from_acc<T>(with_relu ? relu(sum) : sum);
        }
      });
}

// One row of outputs.
template <typename T>
void window_row_nhwc(const T* source, const Axis& rows, int64_t i, const Axis& cols, int64_t channels,
                     const acc_t<T>* weights, int64_t filter_rows, int64_t filter_width, const T* bias, bool with_relu,
                     T* out) {
  const int64_t last = cols.first + (cols.taps - 1) * cols.inc;  // column of the last tap of output 0
  const int64_t low = min_of(cols.first, last), high = max_of(cols.first, last);
  const int64_t begin = min_of(cols.outputs, low < 0 ? ceil_div(-low, cols.step) : 0);
  const int64_t end =
      max_of(begin, min_of(cols.outputs, high < cols.source ? (cols.source - 1 - high) / cols.step + 1 : 0));
  T* to = out + cols.out_first * channels;
  const int64_t out_step = cols.out_step * channels;
  int64_t j = 0;
  const auto one = [&] {
    window_pixels<T, 1>(source, rows, i, cols, j, channels, weights, filter_rows, filter_width, bias, with_relu,
                        to + j * out_step);
    ++j;
  };
  while (j < begin) one();
  for (; j + 4 <= end; j += 4)
    window_pixels<T, 4>(source, rows, i, cols, j, channels, weights, filter_rows, filter_width, bias, with_relu,
                        to + j * out_step);
  while (j < cols.outputs) one();
}

// A task is tile_m rows of an image: a row of the source that several of them read comes from memory once.
template <typename Row>
void for_rows(const Conv2dProblem& pr, const Conv2dPlan& plan, int64_t rows, const Parallel& parallel, const Row& row) {
  const int64_t blocks = ceil_div(rows, plan.tile_m);
  for_each_task(parallel, pr.N * blocks, [&](int, int64_t task) {
    const int64_t i0 = task % blocks * plan.tile_m;
    for (int64_t i = i0; i < min_of<int64_t>(rows, i0 + plan.tile_m); ++i) row(task / blocks, i);
  });
}

template <typename T>
void fprop_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                acc_t<T>* weights, const Parallel& parallel) {
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  transpose_weights(pr, w, weights);
  for_rows(pr, plan, pr.P, parallel, [&](int64_t n, int64_t p) {
    window_row_nhwc(x + n * pr.H * pr.W * pr.C, rows, p, cols, pr.C, weights, pr.R, pr.S, bias, pr.relu,
                    y + (n * pr.P + p) * pr.Q * pr.C);
  });
}

template <typename T>
void dgrad_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, acc_t<T>* weights,
                const Parallel& parallel) {
  transpose_weights(pr, w, weights);
  for_rows(pr, plan, pr.H, parallel, [&](int64_t n, int64_t h) {
    const Axis rows = dgrad_rows(pr, h % pr.stride_h);
    for (int64_t b = 0; b < min_of(pr.stride_w, pr.W); ++b)
      window_row_nhwc<T>(dy + n * pr.P * pr.Q * pr.C, rows, h / pr.stride_h, dgrad_cols(pr, b), pr.C, weights, pr.R,
                         pr.S, nullptr, false, dx + (n * pr.H + h) * pr.W * pr.C);
  });
}

// One tap of a row of dy: output q reads in[q·in_step], for q = begin … end − 1 that lies inside.
template <typename T>
struct TapRow {
  const T* in;
  int64_t begin, end, tap;
};

// sums[tap][c] += Σ_q dy[q][c] · in[q][c] for Taps taps, so many sums at a time that they overlap; dy is read once for
// all. `count` taps, or sums, lie in a block.
template <typename T, int Taps>
void add_tap_rows(const TapRow<T>* taps, const T* dy, int64_t channels, int64_t in_step, acc_t<T>* sums,
                  int64_t count) {
  int64_t begin = taps[0].begin, end = taps[0].end;
  for (int t = 1; t < Taps; ++t) {
    begin = max_of(begin, taps[t].begin);
    end = min_of(end, taps[t].end);
  }
  end = max_of(begin, end);
  int64_t c = 0;
  for (; c + lanes<T> <= channels; c += lanes<T>) {
    vec_t<T> v[Taps];
    for (int t = 0; t < Taps; ++t) {
      v[t] = load(sums + block_offset<T>(c, taps[t].tap, count));
      const auto add = [&](int64_t first, int64_t last) {
        for (int64_t q = first; q < last; ++q) v[t] += load(dy + q * channels + c) * load(taps[t].in + q * in_step + c);
      };
      add(taps[t].begin, min_of(begin, taps[t].end));
      add(max_of(end, taps[t].begin), taps[t].end);
    }
    for (int64_t q = begin; q < end; ++q) {
      const vec_t<T> d = load(dy + q * channels + c);
      for (int t = 0; t < Taps; ++t) v[t] += d * load(taps[t].in + q * in_step + c);
    }
    for (int t = 0; t < Taps; ++t) store(sums + block_offset<T>(c, taps[t].tap, count), v[t]);
  }
  for (; c < channels; ++c)
    for (int t = 0; t < Taps; ++t)
      for (int64_t q = taps[t].begin; q < taps[t].end; ++q)
        sums[block_offset<T>(c, taps[t].tap, count)] +=
            to_acc(dy[q * channels + c]) * to_acc(taps[t].in[q * in_step + c]);
}

// The bias, sums[count − 1][c] += Σ_q dy[q][c].
template <typename T>
void add_pixels(const T* dy, int64_t pixels, int64_t channels, acc_t<T>* sums, int64_t count) {
  int64_t c = 0;
  for (; c + lanes<T> <= channels; c += lanes<T>) {
    acc_t<T>* sum = sums + block_offset<T>(c, count - 1, count);
    vec_t<T> v = load(sum);
    for (int64_t q = 0; q < pixels; ++q) v += load(dy + q * channels + c);
    store(sum, v);
  }
  for (; c < channels; ++c)
    for (int64_t q = 0; q < pixels; ++q) sums[block_offset<T>(c, count - 1, count)] += to_acc(dy[q * channels + c]);
}

// partial[piece][block][tap][lane], the last tap of which is the bias: a piece is a share of the rows (n, p).
template <typename T>
void wgrad_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
                const Parallel& parallel) {
  const int64_t all_taps = pr.R * pr.S, all_rows = pr.N * pr.P, count_of_block = all_taps + 1;
  const int64_t piece_elements = ceil_div(pr.C, lanes<T>) * lanes<T> * count_of_block;
  for_each_task(parallel, plan.split, [&](int, int64_t piece) {
    acc_t<T>* sums = partial + piece * piece_elements;
    fill_zero<T>(sums, piece_elements);
    for (int64_t row = piece * all_rows / plan.split; row < (piece + 1) * all_rows / plan.split; ++row) {
      const T* dy_row = dy + row * pr.Q * pr.C;
      const int64_t top = row % pr.P * pr.stride_h - pr.pad_h, reach = (pr.R - 1) * pr.dilation_h;
      // Rows are read by channels, a line of each pixel at a time, which the machine does not foresee.
      prefetch_lines<false>(dy_row + pr.Q * pr.C, pr.Q * pr.C);
      for (int64_t h = top + reach + 1; h < min_of(pr.H, top + reach + 1 + min_of<int64_t>(pr.stride_h, 2)); ++h)
        prefetch_lines<false>(x + (row / pr.P * pr.H + h) * pr.W * pr.C, pr.W * pr.C);
      constexpr int most = 9;
      TapRow<T> taps[most];
      int count = 0;
      const auto flush = [&] {
        int t = 0;
        if (count == most)
          add_tap_rows<T, most>(taps, dy_row, pr.C, pr.stride_w * pr.C, sums, count_of_block), t = most;
        for (; t + 3 <= count; t += 3)
          add_tap_rows<T, 3>(taps + t, dy_row, pr.C, pr.stride_w * pr.C, sums, count_of_block);
        for (; t < count; ++t) add_tap_rows<T, 1>(taps + t, dy_row, pr.C, pr.stride_w * pr.C, sums, count_of_block);
        count = 0;
      };
      for (int64_t r = 0; r < pr.R; ++r) {
        const int64_t h = top + r * pr.dilation_h;
        if (h < 0 || h >= pr.H) continue;
        for (int64_t s = 0; s < pr.S; ++s) {
          const int64_t offset = s * pr.dilation_w - pr.pad_w;
          const int64_t begin = offset < 0 ? ceil_div(-offset, pr.stride_w) : 0;
          const int64_t end = min_of(pr.Q, offset < pr.W ? (pr.W - 1 - offset) / pr.stride_w + 1 : 0);
          if (begin >= end) continue;
          taps[count++] = {x + ((row / pr.P * pr.H + h) * pr.W + offset) * pr.C, begin, end, r * pr.S + s};
          if (count == most) flush();
        }
      }
      flush();
      add_pixels(dy_row, pr.Q, pr.C, sums, count_of_block);
    }
  });
}

// dw and db from the pieces, added in order.
template <typename T>
void reduce_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, acc_t<T>* partial, T* dw, T* db,
                 const Parallel& parallel) {
  const int64_t taps = pr.R * pr.S, block = (taps + 1) * lanes<T>, blocks = ceil_div(pr.C, lanes<T>);
  for_each_task(parallel, blocks, [&](int, int64_t task) {
    acc_t<T>* sums = partial + task * block;
    for (int64_t piece = 1; piece < plan.split; ++piece)
      for (int64_t i = 0; i < block; i += lanes<T>)
        store(sums + i, load(sums + i) + load(sums + piece * blocks * block + i));
    const int64_t c = task * lanes<T>, count = min_of<int64_t>(lanes<T>, pr.C - c);
    transpose(sums, lanes<T>, taps, count, dw + c * taps, taps);
    if (db) store_first(db + c, load(sums + taps * lanes<T>), count);
  });
}

}  // namespace
}  // namespace fastconv::cpu
