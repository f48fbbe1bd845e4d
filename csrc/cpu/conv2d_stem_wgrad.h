// wgrad of a stem: C[t][filter] = Σ_pixel x[pixel's window][t] · dy[pixel][filter]     t = (r, s, c)
//
// The same product as fprop's with other sides in registers: vectors run along the filters, two of them wide, for some
// taps that are neighbours in a row of a window, and the sums stay in registers over a block of pixels. x is read where
// the stage has it; so is dy in NHWC, otherwise it is transposed, a panel of filters at a time. db is the sum of dy's
// panels.
#pragma once

#include "conv2d_stem_taps.h"
#include "conv2d_wgrad_out.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// sums += Σ dy over a block of pixels.
template <typename E>
void add_stem_dy(const StemSteps& pixels, const E* dy, E* sums) {
  vec_t<E> left = load(sums), right = load(sums + lanes<E>);
  for (int64_t i = 0; i < pixels.rows; ++i) {
    const E* at = dy + i * pixels.b_row;
    for (int64_t j = 0; j < pixels.cols; ++j, at += pixels.b_col) {
      left += load(at);
      right += load(at + lanes<E>);
    }
  }
  store(sums, left);
  store(sums + lanes<E>, right);
}

template <typename T>
void stem_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const T* dy, const T* x, const WgradOut<T>& out,
                char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int64_t cols = panel_cols<E>;
  const int64_t depth = stem_depth(p), row_taps = p.S * p.C, taps = p.R * p.S;
  const bool nhwc = p.layout == Layout::NHWC;
  const StemBlock block = stem_block(p, plan.tile_k);
  const StemWgradScratch layout = stem_wgrad_scratch(p, plan);
  const int64_t k_blocks = ceil_div(p.K, plan.tile_n);
  for_each_task(parallel, plan.split * k_blocks, [&](int worker, int64_t task) {
    const int64_t k_first = task % k_blocks * plan.tile_n, piece = task / k_blocks;
    const int64_t k_end = min_of<int64_t>(p.K, k_first + plan.tile_n);
    E* stage = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    E *packed = stage + layout.dy, *c = stage + layout.c, *bias_sums = stage + layout.bias_sums;
    fill_zero<T>(c, ceil_div(k_end - k_first, cols) * cols * depth);
    fill_zero<T>(bias_sums, ceil_div(k_end - k_first, cols) * cols);
    const int64_t end = (piece + 1) * p.N * p.P / plan.split;
    for (int64_t row = piece * p.N * p.P / plan.split, rows; row < end; row += rows) {
      const int64_t n = row / p.P, p0 = row % p.P;
      rows = min_of(block.rows, min_of(p.P - p0, end - row));
      const int64_t next_row = row + rows, next_p0 = next_row % p.P;
      const int64_t next_rows = min_of(block.rows, min_of(p.P - next_p0, end - next_row));
      StemAhead next = stem_ahead(p, dy, next_row / p.P, next_p0 * p.Q, next_rows * p.Q);
      if (next_rows == 0) next.rows = 0;
      for (int64_t q0 = 0; q0 < p.Q; q0 += block.cols) {
        const int64_t count = min_of(block.cols, p.Q - q0), stage_cols = (count - 1) * p.stride_w + p.S;
        const int64_t stage_row = stage_cols * p.C;
        stage_rows(p, x, n, p0 * p.stride_h - p.pad_h, (rows - 1) * p.stride_h + p.R, q0 * p.stride_w - p.pad_w,
                   stage_cols, stage);
        for (int64_t k0 = k_first; k0 < k_end; k0 += cols) {
          const int64_t width = min_of(cols, k_end - k0);
          StemSteps pixels{rows, count, p.stride_h * stage_row, p.stride_w * p.C, count * cols, cols};
          const E* panel = packed;
          const T* from = dy + (nhwc ? (row * p.Q + q0) * p.K + k0 : ((n * p.K + k0) * p.P + p0) * p.Q + q0);
          bool in_place = false;
          if constexpr (std::is_same_v<T, E>) {
            in_place = nhwc && width == cols;
            if (in_place) panel = from, pixels.b_row = p.Q * p.K, pixels.b_col = p.K;
          }
          if (!in_place) {
            for (int64_t i = 0; i < rows; ++i) {
              E* to = packed + i * count * cols;
              if (nhwc)
                for (int64_t q = 0; q < count; ++q) copy_strided(from + (i * p.Q + q) * p.K, 1, to + q * cols, width);
              else
                transpose(from + i * p.Q, p.P * p.Q, width, count, to, cols);
            }
          }
          add_stem_dy(pixels, panel, bias_sums + (k0 - k_first));
          for (int64_t r = 0; r < p.R; ++r)
            multiply_stem_taps(pixels, row_taps, stage + r * stage_row, panel, width,
                               c + (k0 - k_first) * depth + r * row_taps * cols, cols, true, next);
        }
      }
    }
    out.with_piece(piece, [&](auto* dw, auto* db) {
      for (int64_t k0 = k_first; k0 < k_end; k0 += cols) {
        const int64_t width = min_of(cols, k_end - k0);
        const E* panel = c + (k0 - k_first) * depth;
        if (nhwc)
          transpose(panel, cols, depth, width, dw + k0 * depth, depth);
        else
          for (int64_t ch = 0; ch < p.C; ++ch)
            transpose(panel + ch * cols, p.C * cols, taps, width, dw + k0 * depth + ch * taps, depth);
      }
      if (db) convert_row(bias_sums, k_end - k_first, db + k_first);
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
