// wgrad of grouped convolution, on staged rows:
//
//   dw[tap][channel][lane] = Σ_position dy[position][lane] · x[position + tap][channel]     db[lane] = Σ
//   dy[position][lane]
//
// where `channel` counts those of the lane's group. A task is a block of channels and a piece of the images; it passes
// over boxes of pixels, staged in L1, and keeps a few taps' sums at a time in registers. The pieces are added in order.
#pragma once

#include "conv2d_grouped_rows.h"

namespace fastconv::cpu {
namespace {

// sums[t·tap_step + c·channel_step] += Σ dy · x for Taps taps and Channels channels from `channel` on. dy: rows × cols
// positions, dy_row apart; in[row] + offset is what the first tap reads. Positions of x are in_step apart, from one
// output to the next and from tap to tap, so that its lanes are made once for all taps.
template <typename T, int Taps, int Channels, typename Lanes>
void add_products(const Lanes& lanes_of, const acc_t<T>* dy, int64_t dy_row, int64_t rows, int64_t cols,
                  const acc_t<T>* const* in, int64_t offset, int64_t in_step, int64_t channel, acc_t<T>* sums,
                  int64_t tap_step, int64_t channel_step) {
  constexpr int ways = Taps * Channels >= 8 ? 1 : 4;  // enough chains of additions to overlap
  vec_t<T> v[ways][Taps][Channels] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const acc_t<T>*d = dy + row * dy_row, *x = in[row] + offset;
    // The products of the outputs that read this position.
    const auto add = [&](int way, int64_t position, auto inside) {
      for (int c = 0; c < Channels; ++c) {
        const vec_t<T> value = lanes_of(x + position * in_step, channel + c);
        for (int t = 0; t < Taps; ++t)
          if (inside.value || (position >= t && position - t < cols))
            v[way][t][c] += value * load(d + (position - t) * lanes<T>);
      }
    };
    const std::false_type edge;
    const std::true_type inside;
    int64_t position = 0;
    for (; position < Taps - 1; ++position) add(0, position, edge);
    for (; position + ways <= cols; position += ways)
      for (int way = 0; way < ways; ++way) add(way, position + way, inside);
    for (; position < cols + Taps - 1; ++position) add(0, position, edge);
  }
  for (int t = 0; t < Taps; ++t) {
    for (int c = 0; c < Channels; ++c) {
      for (int way = 1; way < ways; ++way) v[0][t][c] += v[way][t][c];
      acc_t<T>* sum = sums + t * tap_step + (channel + c) * channel_step;
      store(sum, load(sum) + v[0][t][c]);
    }
  }
}

// partial[piece][block][element of a filter, or the bias][lane]
template <typename T, typename Lanes>
void wgrad_grouped(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, T* dw, T* db,
                   void* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int L = lanes<T>;
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), depth = cg * pr.R * pr.S;
  const Images<const T> x_images = images(x, pr.layout, pr.C, pr.H, pr.W);
  const Images<const T> dy_images = images(dy, pr.layout, pr.K, pr.P, pr.Q);
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  const ChannelBlocks blocks = channel_blocks(pr, Direction::wgrad, L, Lanes::several_groups);
  const GroupedScratch layout = grouped_scratch(pr, plan);
  const StagedCols staged = staged_cols(pr, Direction::wgrad, plan.tile_n);
  const StagedRows staged_row = staged_rows(pr, Direction::wgrad, plan.tile_m);
  const Lanes lanes_of(cg, kg);
  // Sums have the order of the filters' elements.
  const int64_t tap_step = (pr.layout == Layout::NCHW ? 1 : cg) * L;
  const int64_t channel_step = (pr.layout == Layout::NCHW ? pr.R * pr.S : 1) * L;
  const int64_t block_sums = (depth + 1) * L, piece_sums = blocks.count * block_sums;
  auto* partial = (E*)workspace;

  const int64_t row_boxes = ceil_div(pr.P, plan.tile_m), col_boxes = ceil_div(pr.Q, plan.tile_n);
  const int64_t boxes = pr.N * col_boxes * row_boxes;
  const auto block_at = [&](int64_t index) { return channel_block(blocks, pr.groups, cg, kg, L, index); };
  for_each_task(parallel, plan.split * blocks.count, [&](int worker, int64_t task) {
    const int64_t index = task % blocks.count, piece = task / blocks.count;
    const ChannelBlock block = block_at(index);
    E *sums = partial + task * block_sums, *bias_sums = sums + depth * L;
    fill_zero<T>(sums, block_sums);
    auto* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    auto** in = reinterpret_cast<const E**>(memory + layout.taps);
    const int64_t pitch = ceil_div(block.in_count, L) * L;
    RowStage<T, Lanes> stage{pr,
                             Direction::wgrad,
                             x_images,
                             pr.H,
                             pr.W,
                             staged,
                             staged_row,
                             pitch,
                             reinterpret_cast<int64_t*>(memory + layout.held),
                             memory + layout.stage};
    E* dy_rows = memory + layout.rows;
    const int64_t begin = piece * boxes / plan.split, end = (piece + 1) * boxes / plan.split;
    for (int64_t box = begin; box < end; ++box) {
      const int64_t i0 = box % row_boxes * plan.tile_m, j0 = box / row_boxes % col_boxes * plan.tile_n;
      const int64_t n = box / row_boxes / col_boxes;
      const int64_t i_count = min_of<int64_t>(plan.tile_m, pr.P - i0),
                    j_count = min_of<int64_t>(plan.tile_n, pr.Q - j0);
      if (box == begin || i0 == 0 || !staged_row.ring) stage.begin(n, block.in, block.in_count, j0 * pr.stride_w);
      vec_t<T> bias_sum[4] = {};
      for (int64_t i = 0; i < i_count; ++i) {
        E* to = dy_rows + i * j_count * L;
        stage_strip(dy_images, dy_images.at(n, block.out, i0 + i, 0), pr.Q, block.out_count, j0, 1, j_count, to, L);
        for (int64_t j = 0; j < j_count; ++j) bias_sum[j % 4] += load(to + j * L);
      }
      store(bias_sums, load(bias_sums) + ((bias_sum[0] + bias_sum[1]) + (bias_sum[2] + bias_sum[3])));
      for (int64_t r = 0; r < pr.R; ++r) {
        // The outputs of the box whose tap r lies inside.
        const int64_t top = i0 * rows.step + rows.first + r * rows.inc;
        const int64_t i_begin = min_of(i_count, top < 0 ? ceil_div(-top, rows.step) : 0);
        const int64_t i_end = min_of(i_count, top < pr.H ? (pr.H - 1 - top) / rows.step + 1 : 0);
        if (i_begin >= i_end) continue;
        for (int64_t i = i_begin; i < i_end; ++i) in[i - i_begin] = stage.at(top + i * rows.step, i, r);
        const auto add = [&](auto taps, auto channels, int64_t s, int64_t channel) {
          add_products<T, taps.value, channels.value>(
              lanes_of, dy_rows + i_begin * j_count * L, j_count * L, i_end - i_begin, j_count, in,
              (staged.first(cols) + s * staged.tap_step(cols)) * pitch, staged.out_step * pitch, channel,
              sums + (r * pr.S + s) * tap_step, tap_step, channel_step);
        };
        std::integral_constant<int, 1> one;
        std::integral_constant<int, 3> three;
        std::integral_constant<int, 4> four;
        std::integral_constant<int, lanes<float> == 16 ? 8 : 4> most;  // as registers allow
        for (int64_t s = 0; s < pr.S;) {
          const bool triple = s + 3 <= pr.S && staged.tap_step(cols) == staged.out_step;
          int64_t channel = 0;
          for (; triple && channel + most.value <= cg; channel += most.value) add(three, most, s, channel);
          for (; channel + 4 <= cg; channel += 4) triple ? add(three, four, s, channel) : add(one, four, s, channel);
          for (; channel < cg; ++channel) triple ? add(three, one, s, channel) : add(one, one, s, channel);
          s += triple ? 3 : 1;
        }
      }
    }
  });
  for_each_task(parallel, blocks.count, [&](int, int64_t index) {
    E* sums = partial + index * block_sums;
    for (int64_t piece = 1; piece < plan.split; ++piece)
      for (int64_t i = 0; i < block_sums; i += L) store(sums + i, load(sums + i) + load(sums + piece * piece_sums + i));
    const ChannelBlock block = block_at(index);
    transpose(sums, L, depth, block.out_count, dw + block.out * depth, depth);
    if (db) store_first(db + block.out, load(sums + depth * L), block.out_count);
  });
}

}  // namespace
}  // namespace fastconv::cpu
