// Which im2col convolutions multiply bfloat16 without converting it (conv2d_im2col_bfloat16.cpp), and the memory that
// this takes: one truth for the plan and for the kernels. In bytes.
//
// The same plan serves an instruction set without such a product, so block sizes are its own, or functions of the
// problem where those would be too large or too small.
#pragma once

#include <algorithm>

#include "conv2d_stem_blocks.h"

namespace fastconv::cpu {
namespace {

constexpr int pair_rows = 12;          // of a tile of C
constexpr int64_t pair_cols = 32;      // of a tile and of a panel: two registers of sums
constexpr int64_t spill = 32;          // a whole register of bfloat16 may be written from any element on
constexpr int64_t staged_pixels = 32;  // NHWC, wgrad: pixels whose patches are made at a time

// What a register of outputs reads at a tap: where in a plane, and which lanes of the result and of two registers
// there.
struct TapRead {
  int64_t offset;
  uint32_t lanes, low, high;
};

inline int64_t even(int64_t n) { return n + n % 2; }
inline int64_t lines_of(int64_t bytes) { return pieces_of(bytes, 64) * 64 + 64; }

// Depth and channels have to fill registers; of a few products each, conversion is a small part. dgrad of stems has
// a kernel of its own.
inline bool multiplies_bfloat16(const Conv2dProblem& p, Direction direction) {
  if (is_stem(p, direction) && direction == Direction::dgrad) return false;
  const int64_t produced = direction == Direction::wgrad ? p.filters_per_group() : produced_channels(p, direction);
  const int64_t contracted = direction == Direction::wgrad ? p.channels_per_group() : contracted_channels(p, direction);
  return p.dtype == DType::bfloat16 && produced >= 16 && contracted * p.R * p.S >= 16;
}

// Every patch is a pixel of the source, in order.
inline bool is_pointwise(const Axis& rows, const Axis& cols) {
  return rows.taps == 1 && cols.taps == 1 && rows.step == 1 && cols.step == 1 && rows.first == 0 && cols.first == 0 &&
         rows.outputs == rows.source && cols.outputs == cols.source;
}

// NCHW: the filters are rows of pairs. Where they lie, the depth is even; rows that are a multiple of 2 KiB apart would
// share their sets of the cache. A copy's rows are an odd number of lines.
inline bool reads_filters(const Conv2dProblem& p, Direction direction) {
  const int64_t depth = p.channels_per_group() * p.R * p.S;
  return direction == Direction::fprop && depth % 2 == 0 && depth % 1024 != 0;
}
inline int64_t filter_row(int64_t depth) { return (pieces_of(depth, 32) | 1) * 32; }
inline int64_t filter_row_limit(int64_t contracted) { return contracted + 63; }  // for each tap of a row

// fprop's and dgrad's copy of the filters, at the beginning of the workspace. Each phase of dgrad rounds its depth up.
inline int64_t filter_copy_bytes(const Conv2dProblem& p, Direction direction) {
  const int64_t produced = produced_channels(p, direction), contracted = contracted_channels(p, direction);
  const int64_t taps = p.R * p.S;
  if (p.layout == Layout::NHWC) return lines_of(p.groups * whole_panels(produced) * (contracted + 1) * taps * 2);
  if (direction == Direction::dgrad) return lines_of(p.groups * produced * filter_row_limit(contracted) * taps * 2);
  return reads_filters(p, direction) ? 0 : lines_of(p.K * filter_row(contracted * taps) * 2);
}

// One thread's scratch.
struct Bfloat16Scratch {
  int64_t a_row, a_pair, pairs, sources, reads, rows, b, c, end;
};

// fprop and dgrad. The plan of a stem is that of its kernels in float, which take less memory.
inline int64_t block_pixels(const Conv2dProblem& p, const Conv2dPlan& plan) {
  if (is_stem(p, plan.direction)) return std::clamp<int64_t>((1 << 14) / stem_depth(p) / 32, 1, 3) * 32;
  return along_pixels(p, plan.direction) ? plan.tile_n : plan.tile_m;
}
inline int64_t block_channels(const Conv2dProblem& p, const Conv2dPlan& plan) {
  if (is_stem(p, plan.direction)) return std::min<int64_t>(p.K, 96);
  return along_pixels(p, plan.direction) ? plan.tile_m : plan.tile_n;
}
inline int64_t block_depth(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return even(is_stem(p, plan.direction) ? std::min<int64_t>(stem_depth(p), 384) : plan.tile_k);
}
// Where the depth is more than one block, sums are kept in between.
inline int64_t block_sum_bytes(const Conv2dProblem& p, const Conv2dPlan& plan, int64_t pixels, int64_t channels) {
  const bool one = contracted_channels(p, plan.direction) * p.R * p.S <= block_depth(p, plan);
  return one ? 0 : lines_of(pixels * channels * 4);
}
// NHWC: rows of C are pixels, columns are channels.
inline Bfloat16Scratch bfloat16_gather_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  Bfloat16Scratch s{};
  const int64_t pixels = block_pixels(p, plan), channels = whole_panels(block_channels(p, plan));
  s.a_row = block_depth(p, plan) + spill;
  s.rows = lines_of((pixels + 1) * s.a_row * 2);   // A: patches
  s.c = s.rows + lines_of(pixels * channels * 2);  // rows: C in bfloat16
  s.end = s.c + block_sum_bytes(p, plan, pixels, channels);
  return s;
}
// NCHW: rows of C are channels, columns are pixels.
inline Bfloat16Scratch bfloat16_pixels_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  Bfloat16Scratch s{};
  const int64_t pixels = whole_panels(block_pixels(p, plan)), channels = whole_panels(block_channels(p, plan));
  s.reads = lines_of(pixels * block_depth(p, plan) * 2);  // panels of patches
  s.rows = s.reads + lines_of(p.R * p.S * sizeof(TapRead));
  s.c = s.rows + lines_of(channels * pixels * 2);  // rows: C in bfloat16
  s.end = s.c + block_sum_bytes(p, plan, pixels, channels);
  return s;
}

// wgrad: filters × patch elements, summed over pixels. The plan of NCHW and of stems is for the kernels in float.
constexpr int64_t paired_elements = 192;
inline bool plans_for_float(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return p.layout == Layout::NCHW || is_stem(p, plan.direction);
}
inline int64_t block_filters(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const int64_t most = is_stem(p, plan.direction) ? 128 : 256;
  if (plans_for_float(p, plan)) return std::min(most, whole_panels(p.filters_per_group()));
  return along_pixels(p, plan.direction) ? plan.tile_n : plan.tile_m;
}
inline int64_t block_elements(const Conv2dProblem& p, const Conv2dPlan& plan) {
  if (plans_for_float(p, plan)) return paired_elements;
  return along_pixels(p, plan.direction) ? plan.tile_m : plan.tile_n;
}
inline int64_t summed_pixels(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return plans_for_float(p, plan) ? 128 : even(plan.tile_k);
}
// NHWC: rows of C are filters, columns are patch elements (r, s, c) of some channels.
// Channels that fill registers, or all of them and whole rows of the filter: then pieces of patches are long.
inline DepthBlock block_patch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const int64_t target = block_elements(p, plan), taps = p.R * p.S;
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
  const int64_t pixels = summed_pixels(p, plan);
  s.pairs = pixels / 2;
  s.a_pair = 2 * filters + spill;  // not a power of two
  s.a_row = depth + spill;
  s.sources = lines_of(s.pairs * s.a_pair * 2);                // A: dy
  s.rows = s.sources + lines_of(2 * s.pairs * 8);              // sources: pixels' places, of 64 bits each
  s.b = s.rows + lines_of((staged_pixels + 1) * s.a_row * 2);  // rows: patches
  s.c = s.b + lines_of(depth * s.pairs * 4);
  s.end = s.c + lines_of(filters * (depth + 1) * 4);
  return s;
}
// NCHW: rows of C are patch elements (c, r, s) and one of ones, columns are filters. No pair is of two images.
inline Bfloat16Scratch bfloat16_pixels_wgrad_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  Bfloat16Scratch s{};
  const int64_t depth = depth_block(p.channels_per_group(), p.R * p.S, block_elements(p, plan)).depth();
  const int64_t filters = whole_panels(block_filters(p, plan)), pixels = summed_pixels(p, plan);
  s.pairs = (pixels + pieces_of(pixels, std::max<int64_t>(p.P * p.Q, 1)) + 1) / 2;
  s.a_row = 2 * s.pairs + spill;
  s.reads = lines_of((depth + 1) * s.a_row * 2);  // A: patches
  s.b = s.reads + lines_of(p.R * p.S * sizeof(TapRead));
  s.c = s.b + lines_of(filters * s.pairs * 4);  // B: dy
  s.end = s.c + lines_of((depth + 1) * filters * 4);
  return s;
}
inline int64_t bfloat16_scratch_bytes(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const bool wgrad = plan.direction == Direction::wgrad;
  if (p.layout == Layout::NCHW)
    return wgrad ? bfloat16_pixels_wgrad_scratch(p, plan).end : bfloat16_pixels_scratch(p, plan).end;
  return wgrad ? bfloat16_wgrad_scratch(p, plan).end : bfloat16_gather_scratch(p, plan).end;
}

}  // namespace
}  // namespace fastconv::cpu
