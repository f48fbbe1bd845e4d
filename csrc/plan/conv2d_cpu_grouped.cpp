// How a convolution with few channels a group is done on a CPU: its blocks.
#include <algorithm>

#include "../cpu/conv2d_grouped_blocks.h"
#include "conv2d_cpu.h"

namespace fastconv::cpu {

// Blocks of channels × rows, which are staged in L1.
void plan_grouped(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_grouped_fprop", "conv2d_grouped_dgrad", "conv2d_grouped_wgrad");
  const int64_t block_lanes = most_block_lanes(p, plan.direction);
  const int64_t blocks = std::max<int64_t>(pieces_of(block_lanes, max_lanes), 1);
  const int64_t vectors = position_elements(p, plan.direction) / max_lanes;  // at a column
  const int64_t weights = block_lanes * p.R * p.S * contracted_channels(p, plan.direction);
  if (plan.direction == Direction::wgrad) {
    const int64_t positions = std::max<int64_t>(256 / vectors, 1);
    plan.tile_n = int(balanced(p.Q, std::min<int64_t>(positions, 32)));
    plan.tile_m = int(balanced(p.P, std::max<int64_t>(positions / plan.tile_n, 1)));
    const int64_t boxes = p.N * pieces_of(p.P, plan.tile_m) * pieces_of(p.Q, plan.tile_n);
    plan.split = int(std::clamp<int64_t>(pieces_of(enough_tasks, blocks), 1, std::max<int64_t>(boxes, 1)));
    plan.workspace_bytes = plan.split * (weights + block_lanes) * sum_bytes(p);
  } else {
    const Phases phases = phases_of(p, plan.direction);
    const int64_t rows = plan.direction == Direction::dgrad ? p.H : p.P, cols = phases.largest_cols.outputs;
    plan.tile_n = int(balanced(cols, std::max<int64_t>(128 / vectors / p.stride_w, 16)));
    const int64_t tasks = std::max<int64_t>(p.N * blocks * pieces_of(cols, plan.tile_n), 1);
    plan.tile_m = int(balanced(rows, std::max<int64_t>(pieces_of(rows, pieces_of(enough_tasks, tasks)), 4)));
    const int64_t boxes = std::max<int64_t>(p.N * pieces_of(rows, plan.tile_m) * pieces_of(cols, plan.tile_n), 1);
    // Boxes of a task, which packs its weights anew.
    plan.tile_k = int(pieces_of(boxes, std::clamp<int64_t>(4 * enough_tasks / blocks, 1, boxes)));
    plan.workspace_bytes = (phases.rows + phases.cols) * int64_t(sizeof(Axis));
  }
  plan.scratch_bytes = aligned(grouped_scratch(p, plan).end * sum_bytes(p));
}

}  // namespace fastconv::cpu
