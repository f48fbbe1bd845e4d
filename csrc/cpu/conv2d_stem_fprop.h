// fprop of a stem: y[pixel][filter] = bias[filter] + Σ_t x[pixel's window][t] · filters[t][filter]     t = (r, s, c)
//
// Vectors run along the filters, two of them wide, for some neighbouring pixels of a row: the sums stay in registers
// over all taps, windows are read where the stage has them, and y is written once, with bias and ReLU. NCHW takes a row
// of sums by way of scratch, which is transposed.
#pragma once

#include "conv2d_stem_stage.h"
#include "conv2d_wgrad_out.h"
#include "gemm.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// Sums of so many pixels fill the registers.
constexpr int stem_pixels = vector_bytes == 64 ? 14 : 6;

// A row of pixels of one panel of filters.
template <typename E>
struct StemRow {
  const E* x;  // the first pixel's window, and the step to the next pixel's
  int64_t step;
  const int64_t* offsets;  // of the taps in a window
  int64_t depth;
  const E *filters, *bias;
  E* out;
  int64_t out_pitch, count;  // filters to be written
  bool relu;
};

template <typename E, int Pixels, int Vectors>
void stem_tile(const StemRow<E>& row, int64_t pixel) {
  vec_t<E> sums[Pixels][Vectors];
  FASTCONV_UNROLL
  for (int i = 0; i < Pixels; ++i)
    for (int v = 0; v < Vectors; ++v) sums[i][v] = load(row.bias + v * lanes<E>);
  const E *x = row.x + pixel * row.step, *filters = row.filters;
  const int64_t step = row.step;
  for (int64_t t = 0; t < row.depth; ++t, filters += panel_cols<E>) {
    const E* from[(Pixels + 2) / 3];  // three pixels share an address register
    from[0] = x + row.offsets[t];
    for (int i = 1; i < (Pixels + 2) / 3; ++i) from[i] = from[i - 1] + 3 * step;
    vec_t<E> w[Vectors];
    for (int v = 0; v < Vectors; ++v) w[v] = load(filters + v * lanes<E>);
    FASTCONV_UNROLL
    for (int i = 0; i < Pixels; ++i) {
      const vec_t<E> value = broadcast<E>(from[i / 3][i % 3 * step]);
      for (int v = 0; v < Vectors; ++v) sums[i][v] += value * w[v];
    }
  }
  if (row.relu) {
    FASTCONV_UNROLL
    for (int i = 0; i < Pixels; ++i)
      for (int v = 0; v < Vectors; ++v) sums[i][v] = relu(sums[i][v]);
  }
  E* out = row.out + pixel * row.out_pitch;
  constexpr int last = Vectors - 1;
  if (row.count == Vectors * lanes<E>) {
    FASTCONV_UNROLL
    for (int i = 0; i < Pixels; ++i, out += row.out_pitch)
      for (int v = 0; v < Vectors; ++v) store(out + v * lanes<E>, sums[i][v]);
  } else {
    FASTCONV_UNROLL
    for (int i = 0; i < Pixels; ++i, out += row.out_pitch) {
      if (Vectors == 2) store(out, sums[i][0]);
      store_first(out + last * lanes<E>, sums[i][last], row.count - last * lanes<E>);
    }
  }
}

// ahead(first, end): the pixels of the next tile.
template <int Vectors, typename E, typename Ahead, int... I>
void stem_row(const StemRow<E>& row, int64_t pixels, const Ahead& ahead, std::integer_sequence<int, I...>) {
  static constexpr void (*tiles[])(const StemRow<E>&, int64_t) = {stem_tile<E, I + 1, Vectors>...};
  const int64_t count = ceil_div(pixels, stem_pixels);
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t first = tile * pixels / count, end = (tile + 1) * pixels / count;
    ahead(first, end);
    tiles[end - first - 1](row, first);
  }
}

// panel[t][lane] = w[lane][t] for `width` filters from w on; zeros in the other lanes.
template <typename T>
void pack_stem_filters(const Conv2dProblem& p, const T* w, int64_t width, acc_t<T>* panel) {
  constexpr int64_t cols = panel_cols<acc_t<T>>;
  const int64_t depth = stem_depth(p), taps = p.R * p.S;
  if (width < cols) fill_zero<T>(panel, depth * cols);
  if (p.layout == Layout::NHWC) return transpose(w, depth, width, depth, panel, cols);
  for (int64_t c = 0; c < p.C; ++c) transpose(w + c * taps, depth, width, taps, panel + c * cols, p.C * cols);
}

template <typename T>
void stem_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                acc_t<T>* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int64_t cols = panel_cols<E>;
  const int64_t depth = stem_depth(p), panels = ceil_div(p.K, cols);
  E *filters = workspace, *biases = filters + panels * depth * cols;
  for_each_task(parallel, panels, [&](int, int64_t panel) {
    const int64_t k0 = panel * cols, width = min_of(cols, p.K - k0);
    pack_stem_filters(p, w + k0 * depth, width, filters + k0 * depth);
    fill_zero<T>(biases + k0, cols);
    if (bias) copy_strided(bias + k0, 1, biases + k0, width);
  });

  const StemBlock block = stem_block(p, plan.tile_n);
  const StemScratch layout = stem_fprop_scratch(p, plan);
  const int64_t row_blocks = ceil_div(p.P, block.rows), col_blocks = ceil_div(p.Q, block.cols);
  for_each_task(parallel, p.N * row_blocks * col_blocks, [&](int worker, int64_t task) {
    const int64_t q0 = task % col_blocks * block.cols, p0 = task / col_blocks % row_blocks * block.rows;
    const int64_t n = task / col_blocks / row_blocks;
    const int64_t q_count = min_of(block.cols, p.Q - q0), p_count = min_of(block.rows, p.P - p0);
    auto* offsets = reinterpret_cast<int64_t*>(scratch + worker * plan.scratch_bytes);
    E *memory = reinterpret_cast<E*>(offsets), *stage = memory + layout.stage, *sums = memory + layout.sums;
    const int64_t stage_cols = (q_count - 1) * p.stride_w + p.S, stage_row = stage_cols * p.C;
    for (int64_t t = 0; t < depth; ++t) offsets[t] = t / (p.S * p.C) * stage_row + t % (p.S * p.C);
    stage_rows(p, x, n, p0 * p.stride_h - p.pad_h, (p_count - 1) * p.stride_h + p.R, q0 * p.stride_w - p.pad_w,
               stage_cols, stage);
    StemRow<E> row{stage, p.stride_w * p.C, offsets, depth, filters, biases, sums, cols, cols, p.relu};
    const int64_t pitch = p.layout == Layout::NHWC ? p.K : 1, plane = p.layout == Layout::NHWC ? 1 : p.P * p.Q;
    for (int64_t i = 0; i < p_count; ++i) {
      row.x = stage + i * p.stride_h * stage_row;
      for (int64_t k0 = 0; k0 < p.K; k0 += cols) {
        const int64_t width = min_of(cols, p.K - k0);
        row.filters = filters + k0 * depth;
        row.bias = biases + k0;
        row.count = width;
        T* out = y + n * p.K * p.P * p.Q + ((p0 + i) * p.Q + q0) * pitch + k0 * plane;
        if constexpr (std::is_same_v<T, E>) {
          if (pitch > 1) row.out = out, row.out_pitch = pitch;
        }
        // The lines of y are on their way while the sums that go there are made.
        constexpr int64_t line = 64 / sizeof(T);
        const auto ahead = [&](int64_t first, int64_t end) __attribute__((always_inline)) {
          if (pitch > 1) {
            for (int64_t q = first; q < end; ++q)
              for (int64_t k = 0; k < width; k += line) __builtin_prefetch(out + q * pitch + k, 1);
          } else {
            for (int64_t k = 0; k < width; ++k) __builtin_prefetch(out + k * plane + end - 1, 1);
          }
        };
        constexpr auto sizes = std::make_integer_sequence<int, stem_pixels>();
        if (width > lanes<E>)
          stem_row<2>(row, q_count, ahead, sizes);
        else
          stem_row<1>(row, q_count, ahead, sizes);
        if (pitch == 1)
          transpose(sums, cols, q_count, width, out, plane);
        else if (!std::is_same_v<T, E>)
          for (int64_t q = 0; q < q_count; ++q) convert_row(sums + q * cols, width, out + q * pitch);
      }
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
