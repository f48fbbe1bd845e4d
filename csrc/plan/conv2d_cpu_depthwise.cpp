// How a depthwise convolution is done on a CPU: its blocks.
#include <algorithm>

#include "../cpu/conv2d_depthwise_blocks.h"
#include "conv2d_cpu.h"

namespace fastconv::cpu {

namespace {

// Planes, or blocks of their rows of about 16 KiB, which stay in L1.
void plan_depthwise_3x3(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel =
      pick(plan.direction, "conv2d_depthwise_3x3_fprop", "conv2d_depthwise_3x3_dgrad", "conv2d_depthwise_3x3_wgrad");
  const StagedPlane staged = staged_plane(p, plan.direction);
  const int64_t planes = std::max<int64_t>(p.N * p.C, 1), rows = plane_outputs(p, plan.direction);
  const int64_t row = staged.stride * staged.pitch;
  plan.tile_n = int(plan.direction == Direction::dgrad ? p.W : p.Q);
  plan.tile_m = int(balanced(rows, std::max<int64_t>(4096 / row, 1)));
  if (plan.direction == Direction::wgrad) {
    plan.split = int(std::clamp<int64_t>(enough_tasks / std::max<int64_t>(p.C, 1), 1, std::max<int64_t>(p.N, 1)));
    plan.workspace_bytes = plan.split * 10 * p.C * sum_bytes(p);
  } else {
    if (planes * pieces_of(rows, plan.tile_m) < enough_tasks)
      plan.tile_m = int(balanced(rows, std::max({rows * planes / enough_tasks, 512 / row, int64_t(4)})));
    plan.tile_k = planes < enough_tasks ? 0 : int(pieces_of(planes, 256));  // planes a task; 0: a part of one
  }
  plan.scratch_bytes = aligned(plane_scratch(p, plan).end * sum_bytes(p));
}

// Rows and channels. Pairs of rows share what they read.
void plan_depthwise_3x3_nhwc(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel =
      pick(plan.direction, "conv2d_depthwise_3x3_fprop", "conv2d_depthwise_3x3_dgrad", "conv2d_depthwise_3x3_wgrad");
  const int64_t channels = pieces_of(p.C, 16) * 16;  // whole vectors
  if (plan.direction == Direction::wgrad) {
    plan.tile_n = int(balanced(channels / 16, 4) * 16);
    plan.split = int(
        std::clamp<int64_t>(pieces_of(enough_tasks, pieces_of(p.C, plan.tile_n)), 1, std::max<int64_t>(p.N * p.P, 1)));
    plan.workspace_bytes = plan.split * 10 * channels * sum_bytes(p);
    return;
  }
  const bool dgrad = plan.direction == Direction::dgrad;
  const int64_t rows = dgrad ? p.H : p.P, row = std::max<int64_t>((dgrad ? p.W : p.Q) * p.C, 1);
  const int64_t least = std::max<int64_t>(pieces_of(2048, row), 1);
  plan.tile_m = 2 * int(std::clamp<int64_t>(p.N * rows / (4 * enough_tasks), least, std::max<int64_t>(least, 8)));
  const int64_t parts = pieces_of(enough_tasks, std::max<int64_t>(p.N * pieces_of(rows, plan.tile_m), 1));
  plan.tile_n = int(std::clamp<int64_t>(pieces_of(channels / 16, parts), 4, 1 << 26) * 16);
  plan.workspace_bytes = 9 * channels * sum_bytes(p);
}

}  // namespace

void plan_depthwise(const Conv2dProblem& p, Conv2dPlan& plan) {
  if (depthwise_3x3(p)) return plan_depthwise_3x3(p, plan);
  if (depthwise_3x3_nhwc(p, plan.direction)) return plan_depthwise_3x3_nhwc(p, plan);
  plan.kernel = pick(plan.direction, "conv2d_depthwise_fprop", "conv2d_depthwise_dgrad", "conv2d_depthwise_wgrad");
  const int64_t taps = p.R * p.S, channels = pieces_of(p.C, 16) * 16;  // whole vectors
  if (p.layout == Layout::NHWC) {
    if (plan.direction != Direction::wgrad) {
      const int64_t rows = plan.direction == Direction::dgrad ? p.H : p.P;
      plan.tile_m = int(balanced(rows, std::clamp<int64_t>(p.N * rows / (2 * enough_tasks), 1, 8)));
      plan.workspace_bytes = taps * channels * sum_bytes(p);
    } else {
      plan.split = int(std::clamp<int64_t>(p.N * p.P, 1, enough_tasks));
      plan.workspace_bytes = plan.split * (taps + 1) * channels * sum_bytes(p);
    }
    return;
  }
  // A block of a plane of about 16 KiB: it stays in L1 while the taps pass over it.
  const Phases phases = phases_of(p, plan.direction);
  const int64_t rows = phases.largest_rows.outputs, cols = phases.largest_cols.outputs;
  plan.tile_n = int(balanced(cols, 512));
  plan.tile_m = int(balanced(rows, std::max<int64_t>(1, 4096 / plan.tile_n)));
  const PixelBlock block{1, plan.tile_m, plan.tile_n};
  int64_t elements = stage_elements(phases.largest_rows, phases.largest_cols, block) + 4 * slack;
  if (plan.direction == Direction::wgrad) {
    elements += plan.tile_m * (plan.tile_n + slack);
    plan.split = int(std::clamp<int64_t>(enough_tasks / std::max<int64_t>(p.C, 1), 1, std::max<int64_t>(p.N, 1)));
    plan.workspace_bytes = plan.split * (taps + 1) * p.C * sum_bytes(p);
  } else {
    elements += taps * 3;  // offsets (int64) and weights
  }
  plan.scratch_bytes = aligned(elements * sum_bytes(p));
}

}  // namespace fastconv::cpu
