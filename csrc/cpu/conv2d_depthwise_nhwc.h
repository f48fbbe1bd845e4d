// Depthwise convolution in NHWC, vectors along the channels; taps in the padding are left out.
#pragma once

#include <type_traits>

#include "conv2d_stage.h"
#include "isa.h"

namespace fastconv::cpu {
namespace {

// weights[r][s][c], so that a tap's weights are contiguous along the channels.
template <typename T>
void transpose_weights(const Conv2dProblem& pr, const T* w, acc_t<T>* weights) {
  for (int64_t c = 0; c < pr.C; ++c)
    for (int64_t t = 0; t < pr.R * pr.S; ++t) weights[t * pr.C + c] = to_acc(w[c * pr.R * pr.S + t]);
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
                   const acc_t<T>* weights, int64_t filter_width, const T* bias, bool with_relu, T* out) {
  const int64_t in_step = cols.step * channels, out_step = cols.out_step * channels;
  const auto for_taps = [&](const auto& visit) {
    for (int64_t a = 0; a < rows.taps; ++a) {
      const int64_t row = i * rows.step + rows.first + a * rows.inc;
      if (row < 0 || row >= rows.source) continue;
      for (int64_t b = 0; b < cols.taps; ++b) {
        const int64_t col = j * cols.step + cols.first + b * cols.inc;
        if (Pixels == 1 && (col < 0 || col >= cols.source)) continue;
        const int64_t tap =
            (rows.filter_first + a * rows.filter_step) * filter_width + cols.filter_first + b * cols.filter_step;
        visit(source + (row * cols.source + col) * channels, weights + tap * channels);
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
        for_taps([&](const T* in, const acc_t<T>* weight) {
          for (int u = 0; u < V; ++u) {
            const vec_t<T> w = load(weight + c + u * lanes<T>);
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
          for_taps([&](const T* in, const acc_t<T>* weight) { sum += weight[c] * to_acc(in[pixel * in_step + c]); });
          out[pixel * out_step + c] = from_acc<T>(with_relu ? relu(sum) : sum);
        }
      });
}

// One row of outputs.
template <typename T>
void window_row_nhwc(const T* source, const Axis& rows, int64_t i, const Axis& cols, int64_t channels,
                     const acc_t<T>* weights, int64_t filter_width, const T* bias, bool with_relu, T* out) {
  const int64_t last = cols.first + (cols.taps - 1) * cols.inc;  // column of the last tap of output 0
  const int64_t low = min_of(cols.first, last), high = max_of(cols.first, last);
  const int64_t begin = min_of(cols.outputs, low < 0 ? ceil_div(-low, cols.step) : 0);
  const int64_t end =
      max_of(begin, min_of(cols.outputs, high < cols.source ? (cols.source - 1 - high) / cols.step + 1 : 0));
  T* to = out + cols.out_first * channels;
  const int64_t out_step = cols.out_step * channels;
  int64_t j = 0;
  const auto one = [&] {
    window_pixels<T, 1>(source, rows, i, cols, j, channels, weights, filter_width, bias, with_relu, to + j * out_step);
    ++j;
  };
  while (j < begin) one();
  for (; j + 4 <= end; j += 4)
    window_pixels<T, 4>(source, rows, i, cols, j, channels, weights, filter_width, bias, with_relu, to + j * out_step);
  while (j < cols.outputs) one();
}

template <typename T>
void fprop_nhwc(const Conv2dProblem& pr, const T* x, const T* w, const T* bias, T* y, acc_t<T>* weights,
                const Parallel& parallel) {
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  transpose_weights(pr, w, weights);
  for_each_task(parallel, pr.N * pr.P, [&](int, int64_t task) {
    window_row_nhwc(x + task / pr.P * pr.H * pr.W * pr.C, rows, task % pr.P, cols, pr.C, weights, pr.S, bias, pr.relu,
                    y + task * pr.Q * pr.C);
  });
}

template <typename T>
void dgrad_nhwc(const Conv2dProblem& pr, const T* dy, const T* w, T* dx, acc_t<T>* weights, const Parallel& parallel) {
  transpose_weights(pr, w, weights);
  for_each_task(parallel, pr.N * pr.H, [&](int, int64_t task) {
    const int64_t n = task / pr.H, h = task % pr.H;
    const Axis rows = dgrad_rows(pr, h % pr.stride_h);
    for (int64_t b = 0; b < min_of(pr.stride_w, pr.W); ++b)
      window_row_nhwc<T>(dy + n * pr.P * pr.Q * pr.C, rows, h / pr.stride_h, dgrad_cols(pr, b), pr.C, weights, pr.S,
                         nullptr, false, dx + task * pr.W * pr.C);
  });
}

// partial[piece][tap][c], the last of which is the bias: a piece is a share of the rows (n, p).
template <typename T>
void wgrad_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
                const Parallel& parallel) {
  const int64_t taps = pr.R * pr.S, all_rows = pr.N * pr.P;
  for_each_task(parallel, plan.split, [&](int, int64_t piece) {
    acc_t<T>* sums = partial + piece * (taps + 1) * pr.C;
    fill_zero<T>(sums, (taps + 1) * pr.C);
    for (int64_t row = piece * all_rows / plan.split; row < (piece + 1) * all_rows / plan.split; ++row) {
      const T* dy_row = dy + row * pr.Q * pr.C;
      // sum[c] += Σ_q dy[q][c] · in[q][c]; without `in`, Σ_q dy[q][c]
      const auto add_row = [&](acc_t<T>* sum, int64_t begin, int64_t end, const T* in, int64_t in_step) {
        for_channels<T>(
            pr.C,
            [&](int64_t c, auto vectors) {
              constexpr int V = decltype(vectors)::value;
              vec_t<T> v[V];
              for (int u = 0; u < V; ++u) v[u] = load(sum + c + u * lanes<T>);
              for (int64_t q = begin; q < end; ++q) {
                for (int u = 0; u < V; ++u) {
                  const vec_t<T> d = load(dy_row + q * pr.C + c + u * lanes<T>);
                  v[u] += in ? d * load(in + (q - begin) * in_step + c + u * lanes<T>) : d;
                }
              }
              for (int u = 0; u < V; ++u) store(sum + c + u * lanes<T>, v[u]);
            },
            [&](int64_t c) {
              for (int64_t q = begin; q < end; ++q) {
                const acc_t<T> d = to_acc(dy_row[q * pr.C + c]);
                sum[c] += in ? d * to_acc(in[(q - begin) * in_step + c]) : d;
              }
            });
      };
      for (int64_t r = 0; r < pr.R; ++r) {
        const int64_t h = row % pr.P * pr.stride_h + r * pr.dilation_h - pr.pad_h;
        if (h < 0 || h >= pr.H) continue;
        for (int64_t s = 0; s < pr.S; ++s) {
          const int64_t offset = s * pr.dilation_w - pr.pad_w;
          const int64_t begin = offset < 0 ? ceil_div(-offset, pr.stride_w) : 0;
          const int64_t end = min_of(pr.Q, offset < pr.W ? (pr.W - 1 - offset) / pr.stride_w + 1 : 0);
          if (begin >= end) continue;
          add_row(sums + (r * pr.S + s) * pr.C, begin, end,
                  x + ((row / pr.P * pr.H + h) * pr.W + begin * pr.stride_w + offset) * pr.C, pr.stride_w * pr.C);
        }
      }
      add_row(sums + taps * pr.C, 0, pr.Q, nullptr, 0);
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
