// How a grouped convolution is cut into pieces, and the memory it takes: one truth for the plan, which asks for the
// buffers, and for the kernels, which lay them out. Elements are of the type that sums are kept in.
#pragma once

#include "conv2d_blocks.h"

namespace fastconv::cpu {
namespace {

// Most lanes of any instruction set (an AVX-512 register of floats), so that a plan holds for all of them.
constexpr int64_t max_lanes = 16;

// A vector holds the produced channels of `groups` whole groups, or one of the `parts` of a group's.
struct ChannelBlocks {
  int64_t groups, parts, count;
};
inline ChannelBlocks channel_blocks(const Conv2dProblem& p, Direction direction, int64_t lanes, bool several_groups) {
  const int64_t contracted = contracted_channels(p, direction), produced = produced_channels(p, direction);
  const int64_t most = contracted > produced ? contracted : produced;
  const int64_t together = several_groups && most > 0 && most <= lanes ? lanes / most : 1;
  const int64_t parts = pieces_of(together * produced, lanes);
  return {together, parts, pieces_of(p.groups, together) * parts};
}
// Lanes of all blocks, on the instruction set where they are most.
inline int64_t most_block_lanes(const Conv2dProblem& p, Direction direction) {
  int64_t most = 0;
  for (int64_t lanes = 2; lanes <= max_lanes; lanes *= 2)
    for (bool several_groups : {false, true}) {
      const int64_t all = channel_blocks(p, direction, lanes, several_groups).count * lanes;
      most = most < all ? all : most;
    }
  return most;
}

inline Axis row_axis(const Conv2dProblem& p, Direction direction, int64_t phase) {
  return direction == Direction::dgrad ? dgrad_rows(p, phase) : fprop_rows(p);
}
inline Axis col_axis(const Conv2dProblem& p, Direction direction, int64_t phase) {
  return direction == Direction::dgrad ? dgrad_cols(p, phase) : fprop_cols(p);
}

// What is staged of a row, for the outputs j0 … j0 + outputs − 1 of every phase: the columns from j0·step + low on, as
// they are, or, where taps lie too far apart for that, each filter column's own columns.
struct StagedCols {
  bool whole;
  int64_t low, positions;
  int64_t outputs;   // most of a block
  int64_t out_step;  // positions from one output to the next

  // Position that tap `tap` of the block's first output in a phase reads, and positions from one tap to the next.
  int64_t first(const Axis& axis) const { return whole ? axis.first - low : axis.filter_first * outputs; }
  int64_t tap_step(const Axis& axis) const { return whole ? axis.inc : axis.filter_step * outputs; }
};
inline StagedCols staged_cols(const Conv2dProblem& p, Direction direction, int64_t outputs) {
  const int64_t phases = phases_of(p, direction).cols;
  int64_t low = INT64_MAX, high = INT64_MIN;
  for (int64_t phase = 0; phase < phases; ++phase) {
    const Axis axis = col_axis(p, direction, phase);
    if (axis.taps == 0) continue;
    const int64_t last = axis.first + (axis.taps - 1) * axis.inc;
    const int64_t least = last < axis.first ? last : axis.first, most = last < axis.first ? axis.first : last;
    low = least < low ? least : low;
    high = most > high ? most : high;
  }
  const int64_t step = direction == Direction::dgrad ? 1 : p.stride_w;
  const int64_t apart = p.S * outputs;
  if (low > high || step > 2 * p.S || high - low + (outputs - 1) * step >= 2 * apart + 2 * step)
    return {false, 0, apart, outputs, 1};
  return {true, low, high - low + (outputs - 1) * step + 1, outputs, step};
}

// Staged rows are kept in slots: row h in slot h mod slots, or, where dilation leaves too many rows between those that
// are read together, one slot for each pair of output row and tap.
struct StagedRows {
  bool ring;
  int64_t slots, outputs;
  int64_t slot(int64_t row, int64_t output, int64_t r) const { return ring ? row % slots : r * outputs + output; }
};
inline StagedRows staged_rows(const Conv2dProblem& p, Direction direction, int64_t outputs) {
  const int64_t reach = p.R == 1 ? 0 : (p.R - 1) * p.dilation_h;
  const int64_t apart = p.R * outputs;
  if (direction == Direction::dgrad) {  // one output at a time
    const int64_t span = reach / p.stride_h + 1;
    return {span <= 4 * apart, span <= 4 * apart ? span : apart, outputs};
  }
  const bool ring = p.stride_h <= 4 * apart && reach + (outputs - 1) * p.stride_h < 4 * apart;
  return {ring, ring ? reach + (outputs - 1) * p.stride_h + 1 : apart, outputs};
}

// Elements of a staged position: the contracted channels of a block.
inline int64_t position_elements(const Conv2dProblem& p, Direction direction) {
  const int64_t whole = pieces_of(contracted_channels(p, direction), max_lanes) * max_lanes;
  return whole < max_lanes ? max_lanes : whole;
}

// One thread's scratch, as offsets in elements, whole cache lines each. fprop, dgrad: tile_m rows of tile_n outputs of
// each column phase, one at a time; `taps` are two pointers each, `rows` is the row that is put out and `weights` those
// of a block. wgrad: `taps` are pointers to the rows that a tap reads, `rows` those of dy.
struct GroupedScratch {
  int64_t held, taps, stage, rows, weights, end;
};
inline GroupedScratch grouped_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const bool wgrad = plan.direction == Direction::wgrad;
  const int64_t slots = staged_rows(p, plan.direction, wgrad ? plan.tile_m : 1).slots;
  const int64_t positions = staged_cols(p, plan.direction, plan.tile_n).positions;
  const auto whole = [](int64_t elements) { return pieces_of(elements, max_lanes) * max_lanes; };
  GroupedScratch s{};
  s.taps = s.held + whole(2 * slots);  // an int64 or a pointer takes two floats
  s.stage = s.taps + whole(wgrad ? 2 * plan.tile_m : 4 * p.R * p.S);
  s.rows = s.stage + slots * positions * position_elements(p, plan.direction);
  s.weights = s.rows + (wgrad ? plan.tile_m : phases_of(p, plan.direction).cols) * plan.tile_n * max_lanes + max_lanes;
  s.end = s.weights + (wgrad ? 0 : p.R * p.S * contracted_channels(p, plan.direction) * max_lanes);
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
