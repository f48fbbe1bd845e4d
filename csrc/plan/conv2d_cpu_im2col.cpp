// How a convolution is done as a matrix product on a CPU: its blocks.
#include <algorithm>

#include "../cpu/conv2d_bfloat16_blocks.h"
#include "../cpu/conv2d_stem_blocks.h"
#include "conv2d_cpu.h"

namespace fastconv::cpu {

namespace {

// fprop and dgrad: blocks of pixels × channels.
void plan_gather(const Conv2dProblem& p, Conv2dPlan& plan) {
  const Phases phases = phases_of(p, plan.direction);
  const int64_t rows = phases.largest_rows.outputs, cols = phases.largest_cols.outputs;
  const int64_t produced = produced_channels(p, plan.direction), contracted = contracted_channels(p, plan.direction);
  const int64_t taps = phases.largest_rows.taps * phases.largest_cols.taps;
  const bool along = along_pixels(p, plan.direction);
  const auto tasks = [&](int64_t pixels, int64_t channels) {
    const PixelBlock block = gather_block(p.N, rows, cols, pixels);
    const int64_t blocks = along ? pieces_of(p.N, block.n) * pieces_of(rows, block.i) * pieces_of(cols, block.j)
                                 : pieces_of(p.N * rows * cols, pixels);
    return blocks * pieces_of(produced, channels) * p.groups;
  };
  int64_t pixels = 224, fewer_pixels = 112, channels = along && taps == 1 && contracted <= 288 ? 256 : 128;
  const bool exchanged = exchanges_operands(p, plan.direction);
  int64_t depth = exchanged ? 128 : !along && patches_in_place(p, plan.direction) ? 1152 : 288;
  if (multiplies_bfloat16(p, plan.direction)) {  // half the bytes, and filters that are packed once
    pixels = 96;
    fewer_pixels = p.layout == Layout::NCHW ? 64 : 48;  // panels of pixels, or tiles
    channels = 256;
    depth = 384;
  } else if (along && phases_at_once(p, plan.direction) > 1) {
    pixels = fewer_pixels;  // of each phase
  } else if (!along && taps > 1 && !patches_in_place(p, plan.direction)) {
    pixels = fewer_pixels;  // they are packed: no more memory than in place
  }
  if (tasks(pixels, channels) < enough_tasks) channels = 128;
  // Every task stages its pixels' patches anew for its channels, and reads the weights for its pixels: neither gets
  // small.
  if (tasks(pixels, channels) < enough_tasks) channels = 64;
  if (tasks(pixels, channels) < enough_tasks && rows * cols > 96) pixels = fewer_pixels;
  if (tasks(pixels, channels) < enough_tasks / 2) channels = 32;
  plan.tile_k = int(std::max<int64_t>(1, std::min(contracted * taps, depth)));
  if (along) {
    plan.tile_m = int(exchanged ? std::min(channels, whole_panels(produced)) : balanced(produced, channels));
    plan.tile_n = int(pixels);
    if (!filters_in_place(p, plan.direction)) plan.workspace_bytes = aligned(p.w_elements() * sum_bytes(p));
  } else {
    plan.tile_m = int(balanced(p.N * rows * cols, pixels));
    if (multiplies_bfloat16(p, plan.direction)) plan.tile_m = int(pieces_of(plan.tile_m, pair_rows) * pair_rows);
    plan.tile_n = int(std::min(channels, whole_panels(produced)));
    plan.workspace_bytes = p.groups * whole_panels(produced) * contracted * p.R * p.S * sum_bytes(p);
  }
  plan.scratch_bytes = aligned(gather_scratch(p, plan).end * sum_bytes(p));
}

// wgrad: blocks of patch elements × filters, summed over blocks of pixels.
void plan_wgrad(const Conv2dProblem& p, Conv2dPlan& plan) {
  const int64_t taps = p.R * p.S, depth = p.channels_per_group() * taps, filters = p.filters_per_group();
  // Patches are staged or read anew for each block of filters, so that these are wide where patches are short.
  const bool along = along_pixels(p, plan.direction);
  int64_t patch = 288, block = along ? 256 : 272,
          width = std::clamp<int64_t>(36864 / std::max<int64_t>(depth, 1) / 32 * 32, 128, 512);
  // 16 bits are packed, in pairs or converted: smaller blocks, so that it takes no more memory.
  const bool pairs = multiplies_bfloat16(p, plan.direction);
  if (along && pairs) {
    patch = paired_elements;
  } else if (!along && element_bytes(p.dtype) < 4) {
    patch = 160;
    block = pairs ? 128 : 112;
    width = pairs ? 128 : 64;
  }
  const bool exchanged = exchanges_operands(p, plan.direction);
  if (exchanged) {
    patch = 64;
    width = pieces_of(depth, patch) * pieces_of(filters, 512) * p.groups < enough_tasks ? 256 : 512;
  }
  const int64_t tasks = pieces_of(depth, patch) * pieces_of(filters, width) * p.groups;
  const int64_t all = p.N * p.P * p.Q, wanted = enough_tasks / std::max<int64_t>(tasks, 1);
  int64_t pixels = along ? pixel_block(p.N, p.P, p.Q, block).pixels() : balanced(all, block);
  int64_t split = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(all / pixels, 1));
  if (!along && element_bytes(p.dtype) >= 4) {  // as many blocks in each piece
    split = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(pieces_of(all, block), 1));
    pixels = balanced(pieces_of(all, split), block);
  }
  plan.tile_k = int(along ? block : pixels);
  if (exchanged) {
    plan.tile_m = int(balanced(filters, width));
    plan.tile_n = int(std::min(patch, whole_panels(depth)));
  } else if (along) {
    plan.tile_m = int(patch);
    plan.tile_n = int(std::min(width, whole_panels(filters)));
  } else {
    plan.tile_m = int(balanced(filters, width));
    plan.tile_n = int(std::min(patch, whole_panels(depth)));
  }
  plan.split = int(split);
  if (plan.split > 1) plan.workspace_bytes = plan.split * (p.w_elements() + p.K) * sum_bytes(p);
  plan.scratch_bytes = aligned(wgrad_scratch(p, plan).end * sum_bytes(p));
}

void plan_stem(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_stem_fprop", "conv2d_stem_dgrad", "conv2d_stem_wgrad");
  if (plan.direction == Direction::dgrad) {
    const StemStrips strips = stem_strips(p);
    plan.tile_m = int(stem_depth(p));
    plan.tile_n = int(strips.dy_rows * p.Q);
    plan.tile_k = int(strips.depth);
    plan.workspace_bytes = p.w_elements() * sum_bytes(p);
    plan.scratch_bytes = aligned(stem_dgrad_scratch(p).end * sum_bytes(p));
    return;
  }
  if (plan.direction == Direction::wgrad) {
    plan.tile_m = int(stem_depth(p));
    plan.tile_n = int(p.K <= 128 ? p.K : whole_panels(balanced(p.K, 128)));
    plan.tile_k = 1024;
    const int64_t k_blocks = pieces_of(p.K, plan.tile_n);
    plan.split = int(std::clamp<int64_t>(enough_tasks / k_blocks, 1, std::max<int64_t>(p.N * p.P, 1)));
    if (plan.split > 1) plan.workspace_bytes = plan.split * (p.w_elements() + p.K) * sum_bytes(p);
    plan.scratch_bytes = aligned(stem_wgrad_scratch(p, plan).end * sum_bytes(p));
    return;
  }
  plan.tile_m = int(p.K);
  plan.tile_n = 1024;  // pixels a task
  plan.tile_k = int(stem_depth(p));
  plan.workspace_bytes = stem_filter_elements(p) * sum_bytes(p);
  plan.scratch_bytes = aligned(stem_fprop_scratch(p, plan).end * sum_bytes(p));
}

}  // namespace

void plan_im2col(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_im2col_fprop", "conv2d_im2col_dgrad", "conv2d_im2col_wgrad");
  if (is_stem(p, plan.direction))
    plan_stem(p, plan);
  else if (plan.direction == Direction::wgrad)
    plan_wgrad(p, plan);
  else
    plan_gather(p, plan);
  if (!multiplies_bfloat16(p, plan.direction)) return;
  plan.scratch_bytes = std::max(plan.scratch_bytes, aligned(bfloat16_scratch_bytes(p, plan)));
  if (plan.direction != Direction::wgrad)
    plan.workspace_bytes = std::max(plan.workspace_bytes, filter_copy_bytes(p, plan.direction));
}

}  // namespace fastconv::cpu
