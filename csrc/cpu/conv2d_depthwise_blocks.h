// Which depthwise convolutions have kernels for 3×3 filters; their blocks in NCHW and the memory they take: one truth
// for the plan, which asks for the buffers, and for the kernel, which lays them out. Elements are of the type that sums
// are kept in.
#pragma once

#include "conv2d_blocks.h"

namespace fastconv::cpu {
namespace {

// The 3×3 filters that have a kernel of their own, on planes whose rows are short enough for a block to stay in L1.
constexpr int64_t max_plane_width = 1024;
inline bool depthwise_3x3(const Conv2dProblem& p) {
  const bool unit = p.stride_h == 1 && p.stride_w == 1 && p.pad_h <= 2 && p.pad_w <= 2;
  const bool halving = p.stride_h == 2 && p.stride_w == 2 && p.pad_h == 1 && p.pad_w == 1;
  return p.layout == Layout::NCHW && p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1 &&
         (unit || halving) && p.W <= max_plane_width;
}

// The same in NHWC: any padding, but for dgrad of stride 2.
inline bool depthwise_3x3_nhwc(const Conv2dProblem& p, Direction direction) {
  const bool halving = p.stride_h == 2 && p.stride_w == 2;
  return p.layout == Layout::NHWC && p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1 &&
         ((p.stride_h == 1 && p.stride_w == 1) ||
          (halving && (direction != Direction::dgrad || (p.pad_h == 1 && p.pad_w == 1))));
}

// The source of a direction and how its rows are staged: from column −pad on; with stride 2 (fprop, wgrad) the even
// columns first and the odd ones `half` behind them. dgrad reads dy a row at a time whatever the stride.
struct StagedPlane {
  int64_t rows, cols;  // of the source
  int64_t stride, pad_h, pad_w;
  int64_t half, pitch;
};
inline StagedPlane staged_plane(const Conv2dProblem& p, Direction direction) {
  const bool dgrad = direction == Direction::dgrad;
  StagedPlane s{dgrad ? p.P : p.H, dgrad ? p.Q : p.W, dgrad ? 1 : p.stride_h, p.pad_h, p.pad_w, 0, 0};
  if (dgrad) {
    s.pad_h = p.stride_h == 1 ? 2 - p.pad_h : 0;
    s.pad_w = p.stride_w == 1 ? 2 - p.pad_w : 0;
  }
  const int64_t outputs = dgrad ? pieces_of(p.W, p.stride_w) : p.Q;
  const int64_t read = (outputs - 1) * s.stride + 3, filled = s.pad_w + s.cols;
  const int64_t columns = read > filled ? read : filled;
  s.half = s.stride == 1 ? 0 : pieces_of(columns, 32) * 16;
  s.pitch = s.stride == 1 ? columns : 2 * s.half;
  return s;
}

// Rows of outputs a block: fprop and wgrad's of y; dgrad's of dx, or pairs of them with stride 2.
inline int64_t plane_outputs(const Conv2dProblem& p, Direction direction) {
  return direction == Direction::dgrad ? pieces_of(p.H, p.stride_h) : p.P;
}

// One thread's scratch, as offsets in elements: the block's staged rows; a row before its columns are split; and in
// wgrad the rows of dy.
struct PlaneScratch {
  int64_t stage, row, dy, end;
};
inline PlaneScratch plane_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const StagedPlane staged = staged_plane(p, plan.direction);
  PlaneScratch s{};
  s.row = s.stage + pieces_of(((plan.tile_m - 1) * staged.stride + 3) * staged.pitch + slack, 16) * 16;
  s.dy = s.row + 2 * staged.half + slack;
  s.end = s.dy + (plan.direction == Direction::wgrad ? plan.tile_m * pieces_of(p.Q, 16) * 16 : 0) + slack;
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
