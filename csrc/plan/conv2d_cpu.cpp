// How a convolution is done on a CPU: the algorithm, then its blocks.
//
// Blocks are sized for a core with 32 KiB of L1 and 512 KiB of L2, and shrunk where the problem would otherwise give
// fewer than `enough_tasks` tasks. Nothing depends on the number of threads, so neither do the bits of the result.
#include <algorithm>
#include <stdexcept>

#include "../cpu/conv2d_blocks.h"
#include "../plan.h"

namespace fastconv {
namespace {

using namespace cpu;

constexpr int64_t enough_tasks = 16;

int64_t sum_bytes(const Conv2dProblem& p) { return p.dtype == DType::float64 ? 8 : 4; }
int64_t aligned(int64_t bytes) { return pieces_of(bytes, 64) * 64; }
const char* pick(Direction d, const char* fprop, const char* dgrad, const char* wgrad) {
  return d == Direction::fprop ? fprop : d == Direction::dgrad ? dgrad : wgrad;
}

// Empty if the algorithm can do the problem.
std::string rejection(const Conv2dProblem& p, Algo algo) {
  if (algo != Algo::depthwise) return "";
  if (p.groups != p.C)
    return "depthwise needs groups = C, here groups = " + std::to_string(p.groups) + " and C = " + std::to_string(p.C);
  if (p.K != p.C)
    return "depthwise needs one filter a channel, here K = " + std::to_string(p.K) + " and C = " + std::to_string(p.C);
  return "";
}

void plan_direct(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_direct_fprop", "conv2d_direct_dgrad", "conv2d_direct_wgrad");
  // One row of sums; NHWC and wgrad keep theirs in registers.
  if (p.layout == Layout::NCHW && plan.direction != Direction::wgrad)
    plan.scratch_bytes = aligned((plan.direction == Direction::fprop ? p.Q : p.W) * sum_bytes(p));
}

void plan_depthwise(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_depthwise_fprop", "conv2d_depthwise_dgrad", "conv2d_depthwise_wgrad");
  const int64_t taps = p.R * p.S;
  if (p.layout == Layout::NHWC) {
    if (plan.direction != Direction::wgrad) {
      plan.workspace_bytes = taps * p.C * sum_bytes(p);
    } else {
      plan.split = int(std::clamp<int64_t>(p.N * p.P, 1, enough_tasks));
      plan.workspace_bytes = plan.split * (taps + 1) * p.C * sum_bytes(p);
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

// fprop and dgrad: blocks of pixels × channels.
void plan_gather(const Conv2dProblem& p, Conv2dPlan& plan) {
  const Phases phases = phases_of(p, plan.direction);
  const int64_t rows = phases.largest_rows.outputs, cols = phases.largest_cols.outputs;
  const int64_t produced = produced_channels(p, plan.direction), contracted = contracted_channels(p, plan.direction);
  const int64_t taps = phases.largest_rows.taps * phases.largest_cols.taps;
  const auto tasks = [&](int64_t pixels, int64_t channels) {
    return pieces_of(p.N * rows * cols, pixels) * pieces_of(produced, channels) * p.groups;
  };
  int64_t pixels = 224, channels = 128;
  // Every task packs its pixels' patches anew for its channels, and the weights for its pixels: neither gets small.
  if (tasks(pixels, channels) < enough_tasks) channels = 64;
  if (tasks(pixels, channels) < enough_tasks && rows * cols > 96) pixels = 112;
  if (tasks(pixels, channels) < enough_tasks) channels = 32;
  plan.tile_k = int(std::max<int64_t>(1, std::min<int64_t>(contracted * taps, 288)));
  if (along_pixels(p, plan.direction)) {
    plan.tile_m = int(balanced(produced, channels));
    plan.tile_n = int(pixels);
  } else {
    plan.tile_m = int(balanced(p.N * rows * cols, pixels));
    plan.tile_n = int(std::min(channels, whole_panels(produced)));
    plan.workspace_bytes = p.groups * whole_panels(produced) * contracted * p.R * p.S * sum_bytes(p);
  }
  plan.scratch_bytes = aligned(gather_scratch(p, plan).end * sum_bytes(p));
}

// wgrad: blocks of patch elements × filters, summed over blocks of pixels.
void plan_wgrad(const Conv2dProblem& p, Conv2dPlan& plan) {
  const int64_t taps = p.R * p.S, depth = p.channels_per_group() * taps, filters = p.filters_per_group();
  int64_t patch = 288, width = 128;
  const auto tasks = [&] { return pieces_of(depth, patch) * pieces_of(filters, width) * p.groups; };
  if (tasks() < enough_tasks) width = 64;
  const bool along = along_pixels(p, plan.direction);
  const int64_t pixels = along ? pixel_block(p.N, p.P, p.Q, 256).pixels() : balanced(p.N * p.P * p.Q, 256);
  plan.tile_k = along ? 256 : int(pixels);
  if (along) {
    plan.tile_m = int(patch);
    plan.tile_n = int(std::min(width, whole_panels(filters)));
  } else {
    plan.tile_m = int(balanced(filters, width));
    plan.tile_n = int(std::min(patch, whole_panels(depth)));
  }
  plan.split = int(std::clamp<int64_t>(enough_tasks / std::max<int64_t>(tasks(), 1), 1,
                                       std::max<int64_t>(p.N * p.P * p.Q / pixels, 1)));
  if (plan.split > 1) plan.workspace_bytes = plan.split * (p.w_elements() + p.K) * sum_bytes(p);
  plan.scratch_bytes = aligned(wgrad_scratch(p, plan).end * sum_bytes(p));
}

void plan_im2col(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_im2col_fprop", "conv2d_im2col_dgrad", "conv2d_im2col_wgrad");
  if (plan.direction == Direction::wgrad)
    plan_wgrad(p, plan);
  else
    plan_gather(p, plan);
}

// What is taken unasked. Reasons are put into words only if someone wants them.
Algo choose(const Conv2dProblem& p, Direction direction, Reasons* reasons) {
  const bool depthwise = p.groups == p.C && p.K == p.C;
  if (!reasons) return depthwise ? Algo::depthwise : Algo::im2col;
  if (depthwise) {
    reasons->push_back(
        {Algo::depthwise, true, "groups = C = K: no reuse across channels, so memory traffic is all there is"});
    reasons->push_back({Algo::im2col, false, "a product with one filter a group would leave most of each vector idle"});
  } else {
    const char* along = along_pixels(p, direction) ? "pixels" : "channels";
    reasons->push_back(
        {Algo::im2col, true, std::string("patches times filters, blocked for the caches, vectors along the ") + along});
    reasons->push_back({Algo::depthwise, false, rejection(p, Algo::depthwise)});
  }
  reasons->push_back({Algo::direct, false, "its loops reuse registers less"});
  return depthwise ? Algo::depthwise : Algo::im2col;
}

// What was asked for, or its nearest rung on a CPU.
Algo check_asked(const Conv2dProblem& p, Algo asked, Reasons* reasons) {
  const Algo taken = asked == Algo::direct_naive ? Algo::direct : asked;
  const std::string why_not = rejection(p, taken);
  if (!why_not.empty()) throw std::invalid_argument("algo='" + std::string(name(asked)) + "': " + why_not);
  if (reasons)
    reasons->push_back(
        {taken, true, taken == asked ? "asked for" : "asked for direct_naive; direct is its nearest rung on a CPU"});
  return taken;
}

}  // namespace

Conv2dPlan plan_conv2d_cpu(const Conv2dProblem& problem, Direction direction, std::optional<Algo> algo,
                           Reasons* reasons) {
  Conv2dPlan plan;
  plan.direction = direction;
  plan.algo = algo ? check_asked(problem, *algo, reasons) : choose(problem, direction, reasons);
  switch (plan.algo) {
    case Algo::im2col: plan_im2col(problem, plan); break;
    case Algo::depthwise: plan_depthwise(problem, plan); break;
    default: plan_direct(problem, plan); break;
  }
  return plan;
}

}  // namespace fastconv
