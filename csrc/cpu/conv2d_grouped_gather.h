// fprop and dgrad of grouped convolution, on staged rows:
//
//   out[position][lane] = bias[lane] + Σ_{tap, channel} weights[tap][channel][lane] · source[position + tap][channel]
//
// where `channel` counts those of the lane's group; a staged element and its weight may hold two of them. A task packs
// the weights of a block of channels and passes over some boxes of rows with them: each row of the source is staged
// once in a box, when the first output row reads it. dgrad writes its column phases between each other.
#pragma once

#include "conv2d_grouped_rows.h"
#include "for_constants.h"

namespace fastconv::cpu {
namespace {

// Taps of a row of outputs at neighbouring positions: what the first of them reads, and its weights.
template <typename E>
struct RowTaps {
  const E *in, *weights;
};

// What a row of outputs sums: `count` runs of taps, whose weights are weight_step apart and those of their elements
// element_step; positions are in_step apart, from one output to the next and within a run. Where the first or the last
// of a row of runs lies outside of the image, it is left out.
template <typename E>
struct RowSum {
  const RowTaps<E>* runs;
  int64_t count, weight_step, elements, element_step, in_step;
  bool runs_of_three, first_outside, last_outside;
};

// Where it goes: `count` outputs, `step` elements apart, of which the first `channels` lanes are stored.
template <typename T, typename Out>
struct RowOut {
  Out* data;
  int64_t count, step, channels;
  vec_t<T> start;
  bool with_relu;
};

// Pixels neighbouring outputs, from output `at` on: the lanes of a position are made once for all taps of a run.
template <typename T, int Pixels, int Taps, typename Lanes, typename Out>
FASTCONV_INLINE void row_tile(const Lanes& lanes_of, const RowSum<acc_t<T>>& sum, int64_t at,
                              const RowOut<T, Out>& to) {
  vec_t<T> sums[Pixels];
  for (int i = 0; i < Pixels; ++i) sums[i] = to.start;
  const bool without_first = sum.first_outside && at == 0;
  const bool without_last = sum.last_outside && at + Pixels == to.count;
  for (int64_t run = 0; run < sum.count; ++run) {
    const acc_t<T>* in = sum.runs[run].in + at * sum.in_step;
    const acc_t<T>* weights = sum.runs[run].weights;
    for (int64_t element = 0; element < sum.elements; ++element, weights += sum.element_step) {
      vec_t<T> weight[Taps];
      for (int tap = 0; tap < Taps; ++tap) weight[tap] = load(weights + tap * sum.weight_step);
      for_constants<Pixels + Taps - 1>([&](auto position) {
        if (position == 0 ? without_first : position == Pixels + Taps - 2 && without_last) return;
        const vec_t<T> v = lanes_of(in + position * sum.in_step, element);
        for_constants<Taps>([&](auto tap) {
          if constexpr (position >= tap && position - tap < Pixels) {
            vec_t<T>& total = sums[position - tap];
            total = Lanes::add_product(total, weight[tap], v);
          }
        });
      });
    }
  }
  if (to.with_relu)
    for (int i = 0; i < Pixels; ++i) sums[i] = relu(sums[i]);
  Out* out = to.data + at * to.step;
  if (to.channels == lanes<T>)
    for (int i = 0; i < Pixels; ++i) store(out + i * to.step, sums[i]);
  else
    for (int i = 0; i < Pixels; ++i) store_first(out + i * to.step, sums[i], to.channels);
}

template <typename T, int Taps, typename Lanes, typename Out>
void gather_row(const Lanes& lanes_of, const RowSum<acc_t<T>>& sum, const RowOut<T, Out>& to) {
  constexpr int64_t most = 8, wide = lanes<float> == 16 ? 14 : most;  // as registers allow
  int64_t j = 0;
  for (; j + wide <= to.count; j += wide) row_tile<T, wide, Taps>(lanes_of, sum, j, to);
  const int64_t rest = to.count - j, width = rest > 0 ? ceil_div(rest, ceil_div(rest, most)) : 1;
  for (; j < to.count; j += width) {
    const auto tile = [&](auto pixels) { row_tile<T, pixels.value, Taps>(lanes_of, sum, j, to); };
    switch (min_of(width, to.count - j)) {
      case 1: tile(std::integral_constant<int, 1>()); break;
      case 2: tile(std::integral_constant<int, 2>()); break;
      case 3: tile(std::integral_constant<int, 3>()); break;
      case 4: tile(std::integral_constant<int, 4>()); break;
      case 5: tile(std::integral_constant<int, 5>()); break;
      case 6: tile(std::integral_constant<int, 6>()); break;
      case 7: tile(std::integral_constant<int, 7>()); break;
      case 8: tile(std::integral_constant<int, 8>()); break;
    }
  }
}

// fprop's keep the order of the filters, (c, r, s) in NCHW; dgrad's are those of the produced channels, (r, s, k).
template <typename T>
BlockWeights<acc_t<T>> block_weights(const Conv2dProblem& pr, Direction direction, acc_t<T>* data) {
  if (direction == Direction::fprop && pr.layout == Layout::NCHW) return {data, lanes<T>, pr.R * pr.S * lanes<T>};
  return {data, contracted_channels(pr, direction) * lanes<T>, lanes<T>};
}

template <typename T>
void pack_block(const Conv2dProblem& pr, Direction direction, const ChannelBlock& block, const T* w, acc_t<T>* out) {
  const int64_t taps = pr.R * pr.S, contracted = contracted_channels(pr, direction), depth = contracted * taps;
  if (direction == Direction::fprop) {
    transpose(w + block.out * depth, depth, block.out_count, depth, out, lanes<T>);
    return;
  }
  const Filters<T> f = filters(w, pr, direction);
  const int64_t produced = produced_channels(pr, direction), pitch = contracted * lanes<T>;
  int64_t count;  // lanes of a group
  for (int64_t lane = 0; lane < block.out_count; lane += count) {
    const int64_t channel = block.out + lane, m = channel % produced;
    count = min_of(produced - m, block.out_count - lane);
    for (int64_t k = 0; k < contracted; ++k) {
      const T* from = f.data + channel / produced * f.group + m * f.m + k * f.channel;
      acc_t<T>* to = out + k * lanes<T> + lane;
      if (f.m == 1)
        for (int64_t tap = 0; tap < taps; ++tap)
          store_first(to + tap * pitch, load_first(from + tap * f.s, count), count);
      else
        transpose(from, taps, count, taps, to, pitch);
    }
  }
}

// What `count` outputs of a column phase sum, from output j0 on, in a row whose first tap reads row `top`.
template <typename T, typename Elements>
RowSum<acc_t<T>> row_sum(RowStage<T, Elements>& stage, const Axis& rows, int64_t top, const Axis& cols, int64_t j0,
                         int64_t count, const BlockWeights<acc_t<T>>& weights, RowTaps<acc_t<T>>* taps) {
  // Taps of a filter row at neighbouring positions, in the order of these, make up one run of three.
  const int64_t in_step = stage.cols.out_step * stage.pitch, tap_pitch = stage.cols.tap_step(cols) * stage.pitch;
  const int64_t filter_step = cols.filter_step * weights.tap_step;
  const bool runs = cols.taps == 3 && (tap_pitch == in_step || tap_pitch == -in_step);
  const int64_t lowest = runs && tap_pitch < 0 ? 2 : 0;  // tap of a run
  const int64_t lowest_col = j0 * cols.step + cols.first + lowest * cols.inc;
  RowSum<acc_t<T>> sum{taps,
                       0,
                       tap_pitch < 0 ? -filter_step : filter_step,
                       contracted_channels(stage.problem, stage.direction) / Elements::channels,
                       weights.channel_step,
                       in_step,
                       runs,
                       runs && lowest_col < 0,
                       runs && lowest_col + (count + 1) * cols.step >= cols.source};
  for (int64_t a = 0; a < rows.taps && cols.taps > 0; ++a) {
    const int64_t row = top + a * rows.inc, r = rows.filter_first + a * rows.filter_step;
    if (row < 0 || row >= rows.source) continue;
    const acc_t<T>* in = stage.at(row, 0, r) + stage.cols.first(cols) * stage.pitch;
    const acc_t<T>* filter = weights.data + (r * stage.problem.S + cols.filter_first) * weights.tap_step;
    for (int64_t b = lowest; b < (runs ? lowest + 1 : cols.taps); ++b)
      taps[sum.count++] = {in + b * tap_pitch, filter + b * filter_step};
  }
  return sum;
}

template <typename T, typename Lanes>
void gather_grouped(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* source, const T* w, const T* bias, T* out,
                    void* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const Direction direction = plan.direction;
  const bool dgrad = direction == Direction::dgrad;
  const int64_t contracted = contracted_channels(pr, direction), produced = produced_channels(pr, direction);
  const Images<const T> in_images =
      dgrad ? images(source, pr.layout, pr.K, pr.P, pr.Q) : images(source, pr.layout, pr.C, pr.H, pr.W);
  const Images<T> out_images =
      dgrad ? images(out, pr.layout, pr.C, pr.H, pr.W) : images(out, pr.layout, pr.K, pr.P, pr.Q);
  const int64_t out_rows = dgrad ? pr.H : pr.P, out_cols = dgrad ? pr.W : pr.Q;
  const Phases phases = phases_of(pr, direction);
  const int64_t step = dgrad ? 1 : pr.stride_w, col_outputs = phases.largest_cols.outputs;
  const ChannelBlocks blocks = channel_blocks(pr, direction, lanes<T>, Lanes::several_groups);
  const GroupedScratch layout = grouped_scratch(pr, plan);
  const StagedCols staged = staged_cols(pr, direction, plan.tile_n);
  const StagedRows staged_row = staged_rows(pr, direction, 1);
  const Lanes lanes_of(contracted, produced);

  auto* row_axes = static_cast<Axis*>(workspace);
  Axis* col_axes = row_axes + phases.rows;
  for (int64_t phase = 0; phase < phases.rows; ++phase) row_axes[phase] = row_axis(pr, direction, phase);
  for (int64_t phase = 0; phase < phases.cols; ++phase) col_axes[phase] = col_axis(pr, direction, phase);

  const int64_t row_boxes = ceil_div(out_rows, plan.tile_m), col_boxes = ceil_div(col_outputs, plan.tile_n);
  const int64_t boxes = pr.N * row_boxes * col_boxes, pieces = ceil_div(boxes, plan.tile_k);
  for_each_task(parallel, blocks.count * pieces, [&](int worker, int64_t task) {
    const ChannelBlock block = channel_block(blocks, pr.groups, contracted, produced, lanes<T>, task / pieces);
    auto* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    const BlockWeights<E> weights = block_weights<T>(pr, direction, memory + layout.weights);
    pack_block(pr, direction, block, w, weights.data);
    Lanes::pack(weights, pr.R * pr.S, contracted);
    auto* taps = reinterpret_cast<RowTaps<E>*>(memory + layout.taps);
    const int64_t pitch = ceil_div(block.in_count / Lanes::channels, lanes<T>) * lanes<T>;
    RowStage<T, Lanes> stage{pr,
                             direction,
                             in_images,
                             dgrad ? pr.P : pr.H,
                             dgrad ? pr.Q : pr.W,
                             staged,
                             staged_row,
                             pitch,
                             reinterpret_cast<int64_t*>(memory + layout.held),
                             memory + layout.stage};
    const vec_t<T> start = bias ? load_first(bias + block.out, block.out_count) : vec_t<T>{};
    const int64_t begin = task % pieces * plan.tile_k, end = min_of(boxes, begin + plan.tile_k);
    for (int64_t box = begin; box < end; ++box) {
      const int64_t j0 = box % col_boxes * plan.tile_n, i0 = box / col_boxes % row_boxes * plan.tile_m;
      const int64_t n = box / col_boxes / row_boxes;
      stage.begin(n, block.in, block.in_count, j0 * step);
      const int64_t first_col = j0 * (dgrad ? pr.stride_w : 1);
      const int64_t i1 = min_of<int64_t>(out_rows, i0 + plan.tile_m);
      for (int64_t i = i0; i < i1; ++i) {
        // Row i is output number i / phases of its phase; there is one phase only in fprop.
        const Axis& rows = row_axes[phases.rows == 1 ? 0 : i % pr.stride_h];
        const int64_t top = (phases.rows == 1 ? i : i / pr.stride_h) * rows.step + rows.first;
        int64_t end_col = first_col;
        if (i + 1 < i1)
          prefetch_strip(out_images, out_images.at(n, block.out, i + 1, first_col), INT64_MAX, block.out_count, 0,
                         min_of(out_cols - first_col, plan.tile_n * phases.cols));
        for (int64_t phase = 0; phase < phases.cols; ++phase) {
          const Axis& cols = col_axes[phase];
          const int64_t count = min_of<int64_t>(plan.tile_n, cols.outputs - j0);
          if (count <= 0) break;
          const RowSum<E> sum = row_sum(stage, rows, top, cols, j0, count, weights, taps);
          const auto gather = [&](const auto& to) {
            if (sum.runs_of_three)
              gather_row<T, 3>(lanes_of, sum, to);
            else
              gather_row<T, 1>(lanes_of, sum, to);
          };
          const int64_t col = cols.out_first + j0 * cols.out_step;  // of the first output
          end_col = max_of(end_col, col + (count - 1) * cols.out_step + 1);
          if (out_images.channel == 1)
            gather(RowOut<T, T>{out_images.at(n, block.out, i, col), count, cols.out_step * out_images.col,
                                block.out_count, start, pr.relu});
          else
            gather(RowOut<T, E>{memory + layout.rows + (col - first_col) * lanes<T>, count, cols.out_step * lanes<T>,
                                lanes<T>, start, pr.relu});
        }
        if (out_images.channel != 1)
          transpose(memory + layout.rows, lanes<T>, end_col - first_col, block.out_count,
                    out_images.at(n, block.out, i, first_col), out_images.channel);
      }
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
