// The block sizes of the im2col convolutions and the memory they take: one truth for the plan, which asks for the
// buffers, and for the kernels, which lay them out. Elements are of the type that sums are kept in.
#pragma once

#include "../plan.h"
#include "conv2d_axes.h"

namespace fastconv::cpu {
namespace {

// Widest panel of any instruction set (two AVX-512 registers of floats), so that a plan holds for all of them.
constexpr int64_t max_panel_cols = 32;
// Vectors may be stored this far past the end of a buffer, and read.
constexpr int64_t slack = 64;

inline int64_t pieces_of(int64_t total, int64_t size) { return (total + size - 1) / size; }
inline int64_t whole_panels(int64_t cols) { return pieces_of(cols, max_panel_cols) * max_panel_cols; }
// The size of nearly equal pieces no larger than `target`.
inline int64_t balanced(int64_t total, int64_t target) {
  return total <= target ? (total < 1 ? 1 : total) : pieces_of(total, pieces_of(total, target));
}

// A box of output positions: part of a row, or rows of an image, or whole images.
struct PixelBlock {
  int64_t n, i, j;
  int64_t pixels() const { return n * i * j; }
};
inline PixelBlock pixel_block(int64_t N, int64_t rows, int64_t cols, int64_t target) {
  if (cols >= target) return {1, 1, balanced(cols, target)};
  if (rows * cols >= target) return {1, balanced(rows, target / cols), cols};
  return {balanced(N, target / (rows * cols < 1 ? 1 : rows * cols)), rows, cols};
}

// The same for fprop and dgrad along pixels, with as many rows of an image as leave the fewest vectors partly idle.
inline PixelBlock gather_block(int64_t N, int64_t rows, int64_t cols, int64_t target) {
  if (rows * cols < 1) return {1, 1, 1};
  PixelBlock block = pixel_block(N, rows, cols, target);
  if (cols >= target || rows * cols < target) return block;
  const auto vectors = [&](int64_t i) { return rows / i * pieces_of(i * cols, 16) + pieces_of(rows % i * cols, 16); };
  block.i = target / cols;
  for (int64_t i = block.i - 1; 2 * i > target / cols; --i)
    if (vectors(i) < vectors(block.i)) block.i = i;
  return block;
}

// A piece of the contraction: channels × taps.
struct DepthBlock {
  int64_t channels, taps;
  int64_t depth() const { return channels * taps; }
};
inline DepthBlock depth_block(int64_t channels, int64_t taps, int64_t target) {
  if (taps >= target) return {1, balanced(taps, target)};
  return {balanced(channels, target / (taps < 1 ? 1 : taps)), taps < 1 ? 1 : taps};
}

// dx is computed in phases, (h mod stride_h, w mod stride_w), each with its own taps; fprop has one phase.
struct Phases {
  int64_t rows, cols;
  Axis largest_rows, largest_cols;  // no phase has more outputs or taps
};
inline Axis largest_phase(Axis axis, int64_t taps) {
  axis.taps = pieces_of(taps, axis.filter_step);
  return axis;
}
inline Phases phases_of(const Conv2dProblem& p, Direction direction) {
  if (direction != Direction::dgrad) return {1, 1, fprop_rows(p), fprop_cols(p)};
  return {p.stride_h < p.H ? p.stride_h : p.H, p.stride_w < p.W ? p.stride_w : p.W,
          largest_phase(dgrad_rows(p, 0), p.R), largest_phase(dgrad_cols(p, 0), p.S)};
}

// The taps of the phases before (a, b). Those of all phases are the filter's.
inline int64_t taps_before(const Conv2dProblem& p, int64_t a, int64_t b) {
  int64_t rows = 0, cols = 0;
  for (int64_t i = 0; i < a; ++i) rows += dgrad_rows(p, i).taps;
  for (int64_t j = 0; j < b; ++j) cols += dgrad_cols(p, j).taps;
  return rows * p.S + dgrad_rows(p, a).taps * cols;
}

// One staged plane of a block.
inline int64_t stage_elements(const Axis& rows, const Axis& cols, const PixelBlock& block) {
  return make_strips(rows, block.i).elements() * make_strips(cols, block.j).elements();
}

// What fprop and dgrad sum over, by direction: channels of x, or filters.
inline int64_t contracted_channels(const Conv2dProblem& p, Direction direction) {
  return direction == Direction::dgrad ? p.filters_per_group() : p.channels_per_group();
}
inline int64_t produced_channels(const Conv2dProblem& p, Direction direction) {
  return direction == Direction::dgrad ? p.channels_per_group() : p.filters_per_group();
}

// Whether the vectors of a product run along pixels rather than channels. NCHW: always. NHWC: where a group has too few
// channels to fill vectors, or patches consist of pieces too short to be copied by vectors.
inline bool along_pixels(const Conv2dProblem& p, Direction direction) {
  if (p.layout == Layout::NCHW) return true;
  const bool joined = p.groups == 1 && p.dilation_w == 1 && direction != Direction::dgrad;
  const int64_t piece = contracted_channels(p, direction) * (joined ? p.S : 1);
  return piece < 8 || produced_channels(p, direction) <= (direction == Direction::wgrad ? 16 : 24);
}

// fprop and dgrad along pixels multiply vectors of neighbouring pixels, none of which crosses the end of a line:
//   rows    a line is a row of the output; the taps of a row read one staged copy of it, each from another element on
//   images  rows are joined: each column of the filter has a staged copy of its own, without what the others read
//   block   images are joined as well, by copying pieces of theirs into a panel
enum class Lines { rows, images, block };

// The cheapest in vectors of 16, of which copying one costs as much as a few multiply-adds.
inline Lines choose_lines(const Axis& rows, const Axis& cols, const PixelBlock& block, int64_t produced) {
  constexpr int64_t vector = 16, copy_cost = 4;
  const int64_t taps = rows.taps * cols.taps, staged_rows = block.n * make_strips(rows, block.i).elements();
  const int64_t row = pieces_of(block.j, vector), image = pieces_of(block.i * block.j, vector);
  const int64_t by_rows = taps * produced * block.n * block.i * row +
                          copy_cost * staged_rows * pieces_of(make_strips(cols, block.j).elements(), vector);
  const int64_t shifted = copy_cost * staged_rows * cols.taps * row;
  const int64_t by_images = taps * produced * block.n * image + shifted;
  const int64_t by_block = taps * produced * pieces_of(block.pixels(), vector) + shifted +
                           (block.n > 1 ? copy_cost * taps * block.n * image : 0);
  if (taps > 1 && by_rows <= by_images && by_rows <= by_block) return Lines::rows;
  return by_images <= by_block ? Lines::images : Lines::block;
}
inline int64_t stage_elements(const Axis& rows, const Axis& cols, const PixelBlock& block, Lines lines) {
  if (lines == Lines::rows) return stage_elements(rows, cols, block);
  return make_strips(rows, block.i).elements() * cols.taps * block.j;
}

// Along pixels: whether the planes are read where they lie, not staged.
inline bool windows_in_place(const Conv2dProblem& p, Direction direction) {
  return (p.dtype == DType::float32 || p.dtype == DType::float64) && p.layout == Layout::NCHW && p.R * p.S == 1 &&
         p.pad_h == 0 && p.pad_w == 0 && (direction == Direction::dgrad || (p.stride_h == 1 && p.stride_w == 1));
}

// 1×1 filters in NCHW: whether a gradient is computed with rows and columns exchanged, vectors along the channels of x.
// What is transposed for that is little where it is used for many filters.
inline bool exchanges_operands(const Conv2dProblem& p, Direction direction) {
  if (direction == Direction::fprop || !windows_in_place(p, direction) || p.stride_h != 1 || p.stride_w != 1)
    return false;
  if (direction == Direction::wgrad) return p.filters_per_group() >= 256;
  return p.filters_per_group() >= 512 && p.channels_per_group() >= 64;
}

// fprop and dgrad along pixels: whether the filters are read where they lie, every tap being multiplied at once.
inline bool filters_in_place(const Conv2dProblem& p, Direction direction) {
  return (p.dtype == DType::float32 || p.dtype == DType::float64) && (p.layout == Layout::NCHW || p.R * p.S == 1) &&
         (direction == Direction::fprop || (p.stride_h == 1 && p.stride_w == 1) || p.R * p.S == 1);
}

// dgrad along pixels: two phases that lie in the same rows, in turn, are one task, which writes whole rows.
inline int64_t phases_at_once(const Conv2dProblem& p, Direction direction) {
  return direction == Direction::dgrad && p.layout == Layout::NCHW && p.stride_w == 2 && p.W > 1 ? 2 : 1;
}

// fprop and dgrad along channels: whether patches are read where they lie, in pieces of one pixel's channels.
inline bool patches_in_place(const Conv2dProblem& p, Direction direction) {
  return contracted_channels(p, direction) >= 16 && (p.dtype == DType::float32 || p.dtype == DType::float64);
}

// wgrad along pixels: whether the staged rows are joined, each column of the filter having its own copy.
inline bool joins_rows(int64_t cols) { return cols < 64; }
// wgrad along channels: whether patches are read where they lie, a panel of all pixels' channels at a time.
inline bool reads_pixels(const Conv2dProblem& p) {
  return p.channels_per_group() % 16 == 0 && (p.dtype == DType::float32 || p.dtype == DType::float64);
}

// One thread's scratch, as offsets in elements; where rows of A or B lie (int64, or pointers) comes first.
struct Scratch {
  int64_t rows, stage, a, b, c, end;
};

// fprop and dgrad. Along pixels, rows of C are channels and columns are pixels (tile_n = pixels); along channels, it is
// the other way round (tile_m = pixels).
inline Scratch gather_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const Phases phases = phases_of(p, plan.direction);
  const Axis &rows = phases.largest_rows, &cols = phases.largest_cols;
  Scratch s{};
  if (exchanges_operands(p, plan.direction)) {
    const PixelBlock block = gather_block(p.N, rows.outputs, cols.outputs, plan.tile_n);
    s.c = max_panel_cols * plan.tile_k + slack;
    s.end = s.c + block.pixels() * whole_panels(plan.tile_m) + slack;
  } else if (along_pixels(p, plan.direction)) {
    const PixelBlock block = gather_block(p.N, rows.outputs, cols.outputs, plan.tile_n);
    const DepthBlock depth = depth_block(contracted_channels(p, plan.direction), rows.taps * cols.taps, plan.tile_k);
    const Lines lines = choose_lines(rows, cols, block, produced_channels(p, plan.direction));
    const int64_t planes = windows_in_place(p, plan.direction) ? 0 : block.n * depth.channels;
    const int64_t line_count = lines == Lines::rows ? block.n * block.i : lines == Lines::images ? block.n : 1;
    const int64_t c_row = line_count * whole_panels(pieces_of(block.pixels(), line_count));
    s.stage = 2 * depth.depth() + slack;  // an int64 takes two floats
    s.b = s.stage + planes * stage_elements(rows, cols, block, lines) + slack;
    s.c = s.b + max_panel_cols * depth.depth() + slack;
    s.end = s.c + phases_at_once(p, plan.direction) * plan.tile_m * c_row + slack;
  } else {
    const int64_t contracted = contracted_channels(p, plan.direction);
    const bool in_place = patches_in_place(p, plan.direction);
    const int64_t pieces = in_place ? pieces_of(plan.tile_k, contracted < 1 ? 1 : contracted) : 1;
    s.rows = 2 * plan.tile_m * pieces + slack;  // an int64 takes two floats
    s.stage = s.rows + 2 * plan.tile_m + slack;
    s.a = s.stage + contracted + slack;
    s.b = s.a + (in_place ? 0 : plan.tile_m * (plan.tile_k + max_panel_cols)) + slack;
    s.c = s.b;
    s.end = s.c + plan.tile_m * whole_panels(plan.tile_n) + slack;
  }
  return s;
}

// wgrad. Along pixels, rows of C are patch elements (c, r, s) and columns are filters; along channels, rows are filters
// and columns are patch elements (r, s, c). tile_k = pixels.
inline Scratch wgrad_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  Scratch s{};
  if (exchanges_operands(p, plan.direction)) {
    const PixelBlock block = pixel_block(p.N, p.P, p.Q, plan.tile_k);
    s.rows = 2 * plan.tile_m * block.n;  // a pointer takes two floats
    s.stage = s.rows + 2 * plan.tile_m + slack;
    s.b = s.stage + plan.tile_m + slack;
    s.c = s.b + whole_panels(plan.tile_n) * block.pixels() + slack;
    s.end = s.c + plan.tile_m * whole_panels(plan.tile_n) + slack;
  } else if (along_pixels(p, plan.direction)) {
    const PixelBlock block = pixel_block(p.N, p.P, p.Q, plan.tile_k);
    const DepthBlock patch = depth_block(p.channels_per_group(), p.R * p.S, plan.tile_m);
    const Lines lines = joins_rows(block.j) ? Lines::images : Lines::rows;
    const int64_t line_count = joins_rows(block.j) ? block.n : block.n * block.i;
    s.rows = 2 * patch.depth() * line_count;  // a pointer takes two floats
    s.stage = s.rows + 2 * patch.depth() + slack;
    const int64_t planes = windows_in_place(p, plan.direction) ? 0 : block.n * patch.channels;
    s.b = s.stage + planes * stage_elements(fprop_rows(p), fprop_cols(p), block, lines) + slack;
    s.c = s.b + whole_panels(plan.tile_n) * block.pixels() + slack;
    s.end = s.c + (patch.depth() + 1) * whole_panels(plan.tile_n) + slack;
  } else {
    const bool in_place = reads_pixels(p);
    const int64_t taps = in_place ? pieces_of(plan.tile_n, p.channels_per_group()) + 1 : 0;
    s.stage = 2 * taps * plan.tile_k + slack;
    s.a = s.stage + p.channels_per_group() + slack;
    s.b = s.a + (in_place ? 0 : plan.tile_k * plan.tile_m) + slack;
    s.c = s.b + (in_place ? max_panel_cols : whole_panels(plan.tile_n)) * (plan.tile_k + 1) + slack;
    s.end = s.c + plan.tile_m * (whole_panels(plan.tile_n) + 1) + slack;
  }
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
