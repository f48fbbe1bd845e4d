// Which convolutions the stem's kernels do, in what blocks, and the memory that these take: one truth for the plan and
// the kernels. Elements are of the type that sums are kept in.
#pragma once

#include "conv2d_blocks.h"

namespace fastconv::cpu {
namespace {

// So few channels that windows are rows of pixels, and filters enough to fill vectors. dgrad keeps the products of a
// row of dy.
inline bool is_stem(const Conv2dProblem& p, Direction direction) {
  if (direction == Direction::dgrad && p.R * p.S * p.C * p.Q > 1 << 17) return false;
  const bool compact = p.R * p.S > 1 && p.R <= 32 && p.S <= 32 && p.stride_h <= p.R && p.stride_w <= p.S;
  const bool dense = (p.dilation_h == 1 || p.R == 1) && (p.dilation_w == 1 || p.S == 1);
  return p.groups == 1 && p.C >= 1 && p.C <= 4 && p.K >= 16 && p.Q >= 8 && p.P >= 1 && compact && dense;
}

// A task's box of outputs, of one image, and what is staged of x for it: rows of pixels, their channels side by side.
struct StemBlock {
  int64_t rows, cols;
  int64_t stage_rows, stage_row;  // stage_row: elements
};
inline StemBlock stem_block(const Conv2dProblem& p, int64_t most_pixels) {
  StemBlock b{};
  const int64_t step = p.stride_w * p.C, most_cols = 4096 / step;
  b.cols = balanced(p.Q, most_cols < 16 ? 16 : most_cols);
  b.stage_row = (b.cols - 1) * step + p.S * p.C;
  int64_t rows = most_pixels / b.cols;
  const int64_t staged = (1 << 16) / (b.stage_row * p.stride_h), images = p.N * pieces_of(p.Q, b.cols);
  if (rows > staged) rows = staged;
  const int64_t wanted = pieces_of(16, images < 1 ? 1 : images);  // pieces of an image
  if (rows > p.P / wanted) rows = p.P / wanted;
  b.rows = balanced(p.P, rows < 1 ? 1 : rows);
  b.stage_rows = (b.rows - 1) * p.stride_h + p.R;
  return b;
}

inline int64_t stem_depth(const Conv2dProblem& p) { return p.R * p.S * p.C; }

// fprop's workspace: the filters, [panel][r][s][c][lane], and then the bias. Its scratch: the taps'
// offsets (int64), the stage, a row of sums.
inline int64_t stem_filter_elements(const Conv2dProblem& p) { return whole_panels(p.K) * (stem_depth(p) + 1); }

struct StemScratch {
  int64_t stage, sums, end;
};
inline StemScratch stem_fprop_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const auto line = [](int64_t elements) { return pieces_of(elements, 16) * 16; };
  const StemBlock b = stem_block(p, plan.tile_n);
  StemScratch s{};
  s.stage = line(2 * stem_depth(p));  // an int64 takes two floats
  s.sums = s.stage + line(b.stage_rows * b.stage_row + slack);
  s.end = s.sums + b.cols * max_panel_cols + slack;
  return s;
}

// dgrad: strips of rows of dx, a task each, whose sums are in scratch as [row][channel][phase][col / stride]; and how
// many rows of dy, and filters of them, are multiplied at once.
struct StemStrips {
  int64_t rows, count;        // of an image
  int64_t phases, phase_row;  // of a plane's row of sums
  int64_t dy_rows, depth;
  int64_t plane_row() const { return phases * phase_row; }
};
inline StemStrips stem_strips(const Conv2dProblem& p) {
  StemStrips s{};
  s.phases = p.stride_w;
  s.phase_row = p.Q + p.S;
  int64_t rows = (1 << 16) / (p.C * s.plane_row());
  const int64_t wanted = pieces_of(16, p.N < 1 ? 1 : p.N);
  if (rows > p.H / wanted) rows = p.H / wanted;
  s.rows = balanced(p.H, rows < 1 ? 1 : rows);
  s.count = pieces_of(p.H, s.rows);
  s.depth = balanced(p.K, 128);
  // Up to 448 pixels whose products take 384 KiB, so that their last panel is nearly full.
  const int64_t products = 96 * 1024 / stem_depth(p), most = products < 448 ? products : 448;
  double best = 0;
  for (int64_t count = 1; count == 1 || count * p.Q <= most; ++count) {
    const double full = double(count * p.Q) / double(whole_panels(count * p.Q));
    if (full >= best) best = full, s.dy_rows = count;
  }
  return s;
}

struct StemDgradScratch {
  int64_t b, c, end;
};
inline StemDgradScratch stem_dgrad_scratch(const Conv2dProblem& p) {
  const StemStrips strips = stem_strips(p);
  const int64_t pixels = whole_panels(strips.dy_rows * p.Q);
  StemDgradScratch s{};
  s.b = pieces_of(strips.rows * p.C * strips.plane_row() + slack, 16) * 16;
  s.c = s.b + pixels * strips.depth;
  s.end = s.c + stem_depth(p) * pixels + slack;
  return s;
}

// wgrad's: the stage, a panel of dy, the sums of tile_n filters.
struct StemWgradScratch {
  int64_t dy, c, bias_sums, end;
};
inline StemWgradScratch stem_wgrad_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const StemBlock b = stem_block(p, plan.tile_k);
  StemWgradScratch s{};
  s.dy = pieces_of(b.stage_rows * b.stage_row + slack, 16) * 16;
  s.c = s.dy + b.rows * b.cols * max_panel_cols;
  s.bias_sums = s.c + whole_panels(plan.tile_n) * stem_depth(p);
  s.end = s.bias_sums + whole_panels(plan.tile_n) + slack;
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
