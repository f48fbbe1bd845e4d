// How a convolution is done on a CPU: the algorithm, then its blocks.
//
// Blocks are sized for a core with 32 KiB of L1 and 512 KiB of L2, and shrunk where the problem would otherwise give
// fewer than `enough_tasks` tasks. Nothing depends on the number of threads, so neither do the bits of the result.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "../cpu/conv2d_winograd_blocks.h"
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

bool fits_winograd(const Conv2dProblem& p) {
  return p.R == 3 && p.S == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
}

// Empty if the algorithm can do the problem.
std::string rejection(const Conv2dProblem& p, Algo algo) {
  if (algo == Algo::winograd && !fits_winograd(p)) {
    if (p.R != 3 || p.S != 3)
      return "winograd needs 3×3 filters, here " + std::to_string(p.R) + "×" + std::to_string(p.S);
    return "winograd needs stride 1 and dilation 1";
  }
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
  const bool along = along_pixels(p, plan.direction);
  const auto tasks = [&](int64_t pixels, int64_t channels) {
    const PixelBlock block = gather_block(p.N, rows, cols, pixels);
    const int64_t blocks = along ? pieces_of(p.N, block.n) * pieces_of(rows, block.i) * pieces_of(cols, block.j)
                                 : pieces_of(p.N * rows * cols, pixels);
    return blocks * pieces_of(produced, channels) * p.groups;
  };
  int64_t pixels = 224, channels = along && taps == 1 && contracted <= 288 ? 256 : 128;
  if (!along && taps > 1 && !patches_in_place(p, plan.direction))
    pixels = 112;  // they are packed: no more memory than in place
  if (tasks(pixels, channels) < enough_tasks) channels = 128;
  // Every task stages its pixels' patches anew for its channels, and reads the weights for its pixels: neither gets
  // small.
  if (tasks(pixels, channels) < enough_tasks) channels = 64;
  if (tasks(pixels, channels) < enough_tasks && rows * cols > 96) pixels = 112;
  if (tasks(pixels, channels) < enough_tasks / 2) channels = 32;
  const int64_t depth = along ? 288 : patches_in_place(p, plan.direction) ? 1152 : 288;
  plan.tile_k = int(std::max<int64_t>(1, std::min(contracted * taps, depth)));
  if (along) {
    plan.tile_m = int(balanced(produced, channels));
    plan.tile_n = int(pixels);
    if (!filters_in_place(p, plan.direction)) plan.workspace_bytes = aligned(p.w_elements() * sum_bytes(p));
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
  // Patches are staged or read anew for each block of filters, so that these are wide where patches are short.
  const bool along = along_pixels(p, plan.direction), half = p.dtype == DType::float16 || p.dtype == DType::bfloat16;
  // What has to be converted is packed: smaller blocks, so that it takes no more memory.
  const int64_t patch = half && !along ? 160 : 288, block = half && !along ? 112 : 256;
  const int64_t width =
      half && !along ? 64 : std::clamp<int64_t>(36864 / std::max<int64_t>(depth, 1) / 32 * 32, 128, 512);
  const int64_t tasks = pieces_of(depth, patch) * pieces_of(filters, width) * p.groups;
  const int64_t pixels = along ? pixel_block(p.N, p.P, p.Q, block).pixels() : balanced(p.N * p.P * p.Q, block);
  plan.tile_k = int(along ? block : pixels);
  if (along) {
    plan.tile_m = int(patch);
    plan.tile_n = int(std::min(width, whole_panels(filters)));
  } else {
    plan.tile_m = int(balanced(filters, width));
    plan.tile_n = int(std::min(patch, whole_panels(depth)));
  }
  plan.split = int(std::clamp<int64_t>(enough_tasks / std::max<int64_t>(tasks, 1), 1,
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

// A chunk of transformed tiles stays in L3, the products of a task in L2.
void plan_winograd(const Conv2dProblem& p, Conv2dPlan& plan) {
  Conv2dPlan fallback = plan;  // for results that are not finite
  plan_im2col(p, fallback);
  plan.kernel = pick(plan.direction, "conv2d_winograd_fprop", "conv2d_winograd_dgrad", "conv2d_winograd_wgrad");
  const bool wgrad = plan.direction == Direction::wgrad;
  const int64_t channels =
      wgrad ? p.channels_per_group() + p.filters_per_group() : contracted_channels(p, plan.direction);
  plan.tile_m = channels < 192 ? 48 : 64;
  plan.tile_n = 32;
  plan.tile_k = int(std::clamp<int64_t>(56 * 1024 / std::max<int64_t>(channels, 1), 64, 1024));
  if (!wgrad && make_tiles(p, plan.direction, 48).apart()) plan.tile_k = 48;
  const Tiles tiles = make_tiles(p, plan.direction, plan.tile_k);
  const int64_t blocks = pieces_of(produced_channels(p, plan.direction), plan.tile_n);
  if (!wgrad && !tiles.apart() && pieces_of(tiles.chunk_tiles(), plan.tile_m) * blocks < enough_tasks) plan.tile_m = 32;
  plan.workspace_bytes = std::max(fallback.workspace_bytes, aligned(winograd_memory(p, plan).end * sum_bytes(p)));
  plan.scratch_bytes = std::max(fallback.scratch_bytes, aligned(winograd_scratch(p, plan).end * sum_bytes(p)));
}

// Multiply-adds of the sum over what Winograd's tiles take of them. A value that is transformed, of x and of y or of
// the filters, costs as much as twenty or so; the products are blind to what lies outside of the image.
double winograd_saving(const Conv2dProblem& p, Direction direction) {
  constexpr double value_cost = 20, filter_cost = 25;
  const int64_t produced = produced_channels(p, direction), contracted = contracted_channels(p, direction);
  const Tiles tiles = make_tiles(p, direction, 1);
  const double count = double(p.N * p.groups) * double(tiles.rows * tiles.cols);
  const double products = count * double(contracted) * double(pieces_of(produced, 16) * 16);
  const double values = count * double(contracted + produced), filters = double(p.w_elements() / 9);
  const double cost = double(tile_products) * (products + value_cost * values + filter_cost * filters);
  return cost > 0 ? double(p.multiply_adds()) / cost : 0;
}

// wgrad's sums are read and written once for each chunk of tiles, which the count leaves out.
double enough_saving(Direction direction) { return direction == Direction::wgrad ? 1.8 : 1.2; }
constexpr int64_t enough_multiply_adds = 1 << 22, most_filter_bytes = 1 << 27;

int64_t winograd_filter_bytes(const Conv2dProblem& p) { return tile_products * (p.w_elements() / 9) * sum_bytes(p); }

bool winograd_wins(const Conv2dProblem& p, Direction direction) {
  return fits_winograd(p) && p.dtype != DType::float64 && p.multiply_adds() >= enough_multiply_adds &&
         winograd_filter_bytes(p) <= most_filter_bytes && winograd_saving(p, direction) >= enough_saving(direction);
}

// In the order of winograd_wins.
std::string why_not_winograd(const Conv2dProblem& p, const std::string& saving) {
  if (!fits_winograd(p)) return rejection(p, Algo::winograd);
  if (p.dtype == DType::float64)
    return "its rounding errors are larger than those of the sum: in float64 only if asked for";
  if (p.multiply_adds() < enough_multiply_adds) return "too little work to be worth three passes";
  if (winograd_filter_bytes(p) > most_filter_bytes)
    return "its filters would take " + std::to_string(winograd_filter_bytes(p) >> 20) + " MiB";
  return "transforms and all counted, it saves a factor of " + saving + " only";
}

void explain_winograd(const Conv2dProblem& p, Direction direction, bool taken, Reasons* reasons) {
  char saving[16];
  snprintf(saving, sizeof saving, "%.2f", winograd_saving(p, direction));
  reasons->push_back({Algo::winograd, taken,
                      taken ? std::string("36 products for 16 outputs, not 144: with its transforms, a factor of ") +
                                  saving + " less work"
                            : why_not_winograd(p, saving)});
}

// What is taken unasked. Reasons are put into words only if someone wants them.
Algo choose(const Conv2dProblem& p, Direction direction, Reasons* reasons) {
  const bool depthwise = p.groups == p.C && p.K == p.C, winograd = !depthwise && winograd_wins(p, direction);
  const Algo taken = depthwise ? Algo::depthwise : winograd ? Algo::winograd : Algo::im2col;
  if (!reasons) return taken;
  if (depthwise) {
    reasons->push_back(
        {Algo::depthwise, true, "groups = C = K: no reuse across channels, so memory traffic is all there is"});
    reasons->push_back({Algo::winograd, false, "with one filter a group nothing would pay for its transforms"});
    reasons->push_back({Algo::im2col, false, "a product with one filter a group would leave most of each vector idle"});
  } else {
    const std::string along = along_pixels(p, direction) ? "pixels" : "channels";
    explain_winograd(p, direction, winograd, reasons);
    reasons->push_back({Algo::im2col, !winograd,
                        winograd ? "multiplies each output's patch"
                                 : "patches times filters, blocked for the caches, vectors along the " + along});
    reasons->push_back({Algo::depthwise, false, rejection(p, Algo::depthwise)});
  }
  reasons->push_back({Algo::direct, false, "its loops reuse registers less"});
  return taken;
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
    case Algo::winograd: plan_winograd(problem, plan); break;
    default: plan_direct(problem, plan); break;
  }
  return plan;
}

}  // namespace fastconv
