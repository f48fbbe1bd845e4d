// Which im2col convolutions multiply bfloat16 without converting it (conv2d_im2col_bfloat16.cpp), and the memory that
// this takes: one truth for the plan and for the kernels. In bytes.
//
// The block sizes are the plan's own, so the same plan serves an instruction set without such a product.
#pragma once

#include <algorithm>

#include "conv2d_stem_blocks.h"

namespace fastconv::cpu {
namespace {

constexpr int pair_rows = 12;          // of a tile of C
constexpr int64_t pair_cols = 32;      // of a tile and of a panel: two registers of sums
constexpr int64_t spill = 32;          // a whole register of bfloat16 may be written from any element on
constexpr int64_t staged_pixels = 32;  // wgrad: pixels whose patches are made at a time

inline int64_t even(int64_t n) { return n + n % 2; }
inline int64_t lines_of(int64_t bytes) { return pieces_of(bytes, 64) * 64 + 64; }

// Depth and channels have to fill registers; of a few products each, conversion is a small part. Stems have kernels of
// their own.
inline bool multiplies_bfloat16(const Conv2dProblem& p, Direction direction) {
  if (is_stem(p, direction)) return false;
  const int64_t produced = direction == Direction::wgrad ? p.filters_per_group() : produced_channels(p, direction);
  const int64_t contracted = direction == Direction::wgrad ? p.channels_per_group() : contracted_channels(p, direction);
  return p.dtype == DType::bfloat16 && produced >= 16 && contracted * p.R * p.S >= 16;
}

// Every patch is a pixel of the source, in order.
inline bool is_pointwise(const Axis& rows, const Axis& cols) {
  return rows.taps == 1 && cols.taps == 1 && rows.step == 1 && cols.step == 1 && rows.first == 0 && cols.first == 0 &&
         rows.outputs == rows.source && cols.outputs == cols.source;
}
inline bool is_pointwise(const Conv2dProblem& p, Direction direction) {
  const Phases phases = phases_of(p, direction);
  return phases.rows * phases.cols == 1 && is_pointwise(phases.largest_rows, phases.largest_cols);
}

// Offsets into the workspace. NCHW: copies in NHWC of the filters and of what patches are made of, but for patches that
// are single pixels. `panels`: the packed filters of fprop and dgrad.
struct Bfloat16Memory {
  int64_t filters, source, panels, end;
};
inline Bfloat16Memory bfloat16_memory(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const bool wgrad = plan.direction == Direction::wgrad, nchw = p.layout == Layout::NCHW;
  const int64_t source = plan.direction == Direction::dgrad ? p.y_elements() : p.x_elements();
  Bfloat16Memory m{};
  m.filters = wgrad && plan.split > 1 ? lines_of(plan.split * (p.w_elements() + p.K) * 4) : 0;  // behind the pieces
  m.source = m.filters + (nchw && !wgrad && p.R * p.S > 1 ? lines_of(p.w_elements() * 2) : 0);
  m.panels = m.source + (nchw && !is_pointwise(p, plan.direction) ? lines_of(source * 2) : 0);
  // Every phase of dgrad with an odd depth takes a row more.
  const int64_t depth = (contracted_channels(p, plan.direction) + 1) * p.R * p.S;
  m.end = m.panels + (wgrad ? 0 : lines_of(p.groups * whole_panels(produced_channels(p, plan.direction)) * depth * 2));
  return m;
}

// One thread's scratch.
struct Bfloat16Scratch {
  int64_t a_row, pairs, rows, columns, b, c, end;
};
// fprop and dgrad: rows of C are pixels, columns are channels.
inline int64_t block_pixels(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return along_pixels(p, plan.direction) ? plan.tile_n : plan.tile_m;
}
inline int64_t block_channels(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return along_pixels(p, plan.direction) ? plan.tile_m : plan.tile_n;
}
inline Bfloat16Scratch bfloat16_gather_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  Bfloat16Scratch s{};
  const int64_t pixels = block_pixels(p, plan), channels = whole_panels(block_channels(p, plan));
  s.a_row = even(plan.tile_k) + spill;
  s.rows = lines_of((pixels + 1) * s.a_row * 2);                 // A: patches
  s.columns = s.rows + lines_of(pixels * channels * 2);          // rows: C in bfloat16
  s.c = s.columns + lines_of(pair_cols * (pixels + spill) * 2);  // columns: some of them, for NCHW
  s.end = s.c + lines_of(pixels * channels * 4);
  return s;
}

// wgrad: rows of C are filters, columns are patch elements (r, s, c) of some channels, summed over tile_k pixels.
inline int64_t block_filters(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return along_pixels(p, plan.direction) ? plan.tile_n : plan.tile_m;
}
// Channels that fill registers, or all of them and whole rows of the filter: then pieces of patches are long.
inline DepthBlock block_patch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const int64_t target = along_pixels(p, plan.direction) ? plan.tile_m : plan.tile_n, taps = p.R * p.S;
  const int64_t channels = p.channels_per_group();
  if (channels >= pair_cols) {
    const int64_t most = std::max(pair_cols, target / taps);
    const int64_t block = std::min(channels, pieces_of(balanced(channels, most), pair_cols) * pair_cols);
    return {block, balanced(taps, std::max<int64_t>(1, target / block))};
  }
  const int64_t most = std::max<int64_t>(1, target / std::max<int64_t>(1, channels));
  return {channels, most < p.S ? most : std::min(taps, balanced(p.R, most / p.S) * p.S)};
}
inline Bfloat16Scratch bfloat16_wgrad_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  Bfloat16Scratch s{};
  const int64_t depth = whole_panels(block_patch(p, plan).depth()), filters = whole_panels(block_filters(p, plan));
  const int64_t pixels = even(plan.tile_k);
  s.pairs = (pixels + pieces_of(pixels, std::max<int64_t>(p.P * p.Q, 1)) + 1) / 2;  // NCHW: no pair of two images
  s.a_row = depth + spill;
  s.rows = lines_of((filters + 1) * (2 * s.pairs + spill) * 2);  // A: dy
  s.b = s.rows + lines_of((staged_pixels + 1) * s.a_row * 2);    // rows: patches
  s.c = s.b + lines_of(depth * s.pairs * 4);
  s.end = s.c + lines_of(filters * (depth + 1) * 4);
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
