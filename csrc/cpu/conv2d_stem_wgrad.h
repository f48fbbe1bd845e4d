// wgrad of a stem: C[t][filter] = Σ_pixel x[pixel's window][t] · dy[pixel][filter]     t = (r, s, c)
//
// The same product as fprop's with other sides in registers: vectors run along the filters, two of them wide, for some
// taps that are neighbours in a row of a window, and the sums stay in registers over a block of pixels. x is read where
// the stage has it; so is dy in NHWC, otherwise it is transposed, a panel of filters at a time. db is the sum of dy's
// panels.
#pragma once

#include "conv2d_stem_stage.h"
#include "conv2d_wgrad_out.h"
#include "gemm.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// Sums of so many taps fill the registers.
constexpr int stem_taps = vector_bytes == 64 ? 14 : 6;

// A block of pixels, and where they are in the stage and in a panel of dy: pitches of rows and of pixels.
struct StemPixels {
  int64_t rows, cols;
  int64_t x_row, x_col, dy_row, dy_col;
};

template <typename E, int Taps, int Vectors>
void stem_taps_tile(const StemPixels& pixels, const E* x, const E* dy, E* c) {
  vec_t<E> sums[Taps][Vectors];
  FASTCONV_UNROLL
  for (int t = 0; t < Taps; ++t)
    for (int v = 0; v < Vectors; ++v) sums[t][v] = load(c + t * panel_cols<E> + v * lanes<E>);
  for (int64_t i = 0; i < pixels.rows; ++i) {
    const E *x_at = x + i * pixels.x_row, *dy_at = dy + i * pixels.dy_row;
    for (int64_t j = 0; j < pixels.cols; ++j, x_at += pixels.x_col, dy_at += pixels.dy_col) {
      vec_t<E> d[Vectors];
      for (int v = 0; v < Vectors; ++v) d[v] = load(dy_at + v * lanes<E>);
      FASTCONV_UNROLL
      for (int t = 0; t < Taps; ++t) {
        const vec_t<E> value = broadcast<E>(x_at[t]);
        for (int v = 0; v < Vectors; ++v) sums[t][v] += value * d[v];
      }
    }
  }
  FASTCONV_UNROLL
  for (int t = 0; t < Taps; ++t)
    for (int v = 0; v < Vectors; ++v) store(c + t * panel_cols<E> + v * lanes<E>, sums[t][v]);
}

// A row of `count` taps.
template <int Vectors, typename E, int... I>
void stem_taps_row(const StemPixels& pixels, int64_t count, const E* x, const E* dy, E* c,
                   std::integer_sequence<int, I...>) {
  static constexpr void (*tiles[])(const StemPixels&, const E*, const E*, E*) = {stem_taps_tile<E, I + 1, Vectors>...};
  const int64_t pieces = ceil_div(count, stem_taps);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = piece * count / pieces, end = (piece + 1) * count / pieces;
    tiles[end - first - 1](pixels, x + first, dy, c + first * panel_cols<E>);
  }
}

// sums += Σ dy over a block of pixels.
template <typename E>
void add_stem_dy(const StemPixels& pixels, const E* dy, E* sums) {
  vec_t<E> left = load(sums), right = load(sums + lanes<E>);
  for (int64_t i = 0; i < pixels.rows; ++i) {
    const E* at = dy + i * pixels.dy_row;
    for (int64_t j = 0; j < pixels.cols; ++j, at += pixels.dy_col) {
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
      for (int64_t q0 = 0; q0 < p.Q; q0 += block.cols) {
        const int64_t count = min_of(block.cols, p.Q - q0), stage_cols = (count - 1) * p.stride_w + p.S;
        const int64_t stage_row = stage_cols * p.C;
        stage_rows(p, x, n, p0 * p.stride_h - p.pad_h, (rows - 1) * p.stride_h + p.R, q0 * p.stride_w - p.pad_w,
                   stage_cols, stage);
        for (int64_t k0 = k_first; k0 < k_end; k0 += cols) {
          const int64_t width = min_of(cols, k_end - k0);
          StemPixels pixels{rows, count, p.stride_h * stage_row, p.stride_w * p.C, count * cols, cols};
          const E* panel = packed;
          const T* from = dy + (nhwc ? (row * p.Q + q0) * p.K + k0 : ((n * p.K + k0) * p.P + p0) * p.Q + q0);
          bool in_place = false;
          if constexpr (std::is_same_v<T, E>) {
            in_place = nhwc && width == cols;
            if (in_place) panel = from, pixels.dy_row = p.Q * p.K, pixels.dy_col = p.K;
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
          for (int64_t r = 0; r < p.R; ++r) {
            E* to = c + (k0 - k_first) * depth + r * row_taps * cols;
            constexpr auto sizes = std::make_integer_sequence<int, stem_taps>();
            if (width > lanes<E>)
              stem_taps_row<2>(pixels, row_taps, stage + r * stage_row, panel, to, sizes);
            else
              stem_taps_row<1>(pixels, row_taps, stage + r * stage_row, panel, to, sizes);
          }
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
