// How a convolution is done on a CPU: the algorithm, then its blocks.
//
// Blocks are sized for a core with 32 KiB of L1 and 512 KiB of L2, and shrunk where the problem would otherwise give
// fewer than `enough_tasks` tasks. Nothing depends on the number of threads, so neither do the bits of the result.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "../cpu/conv2d_bfloat16_blocks.h"
#include "../cpu/conv2d_depthwise_blocks.h"
#include "../cpu/conv2d_grouped_blocks.h"
#include "../cpu/conv2d_stem_blocks.h"
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
  return p.R == p.S && (p.R == 3 || p.R == 5) && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
         p.dilation_w == 1;
}

// Empty if the algorithm can do the problem.
std::string rejection(const Conv2dProblem& p, Algo algo) {
  if (algo == Algo::winograd && !fits_winograd(p)) {
    if (p.R != p.S || (p.R != 3 && p.R != 5))
      return "winograd needs 3×3 or 5×5 filters, here " + std::to_string(p.R) + "×" + std::to_string(p.S);
    return "winograd needs stride 1 and dilation 1";
  }
  if (algo == Algo::grouped && p.groups == 1) return "grouped needs more than one group";
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

void plan_depthwise(const Conv2dProblem& p, Conv2dPlan& plan) {
  if (depthwise_3x3(p)) return plan_depthwise_3x3(p, plan);
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
    plan.workspace_bytes = aligned(weights * sum_bytes(p)) + (phases.rows + phases.cols) * int64_t(sizeof(Axis));
  }
  plan.scratch_bytes = aligned(grouped_scratch(p, plan).end * sum_bytes(p));
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
  int64_t pixels = 224, fewer_pixels = 112, channels = along && taps == 1 && contracted <= 288 ? 256 : 128;
  int64_t depth = !along && patches_in_place(p, plan.direction) ? 1152 : 288;
  if (multiplies_bfloat16(p, plan.direction)) {  // half the bytes, and filters that are packed once
    pixels = 96;
    fewer_pixels = 48;
    channels = 256;
    depth = 384;
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
    plan.tile_m = int(balanced(produced, channels));
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
  int64_t patch = 288, block = 256,
          width = std::clamp<int64_t>(36864 / std::max<int64_t>(depth, 1) / 32 * 32, 128, 512);
  // 16 bits are packed, in pairs or converted: smaller blocks, so that it takes no more memory.
  if (element_bytes(p.dtype) < 4 && !along) {
    const bool pairs = multiplies_bfloat16(p, plan.direction);
    patch = pairs ? 192 : 160;
    block = pairs ? 128 : 112;
    width = pairs ? 128 : 64;
  }
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

void plan_im2col(const Conv2dProblem& p, Conv2dPlan& plan) {
  if (is_stem(p, plan.direction)) return plan_stem(p, plan);
  plan.kernel = pick(plan.direction, "conv2d_im2col_fprop", "conv2d_im2col_dgrad", "conv2d_im2col_wgrad");
  if (plan.direction == Direction::wgrad)
    plan_wgrad(p, plan);
  else
    plan_gather(p, plan);
  if (!multiplies_bfloat16(p, plan.direction)) return;
  const int64_t scratch =
      plan.direction == Direction::wgrad ? bfloat16_wgrad_scratch(p, plan).end : bfloat16_gather_scratch(p, plan).end;
  plan.scratch_bytes = std::max(plan.scratch_bytes, aligned(scratch));
  plan.workspace_bytes = std::max(plan.workspace_bytes, bfloat16_memory(p, plan).end);
}

// The products of a task stay in L2, with what they are made of where the filters are transformed in passing; chunks of
// transformed tiles stay in L3. wgrad takes more of them, up to 28 MiB, where that saves it to keep sums, which would
// take as much.
void plan_winograd(const Conv2dProblem& p, Conv2dPlan& plan) {
  Conv2dPlan fallback = plan;  // for results that are not finite
  plan_im2col(p, fallback);
  plan.kernel = pick(plan.direction, "conv2d_winograd_fprop", "conv2d_winograd_dgrad", "conv2d_winograd_wgrad");
  plan.tile_n = 32;
  const auto tiles_of = [](int64_t elements, int64_t channels) {
    return int(std::clamp<int64_t>(elements / tile_products / std::max<int64_t>(channels, 1), 64, 1024));
  };
  if (plan.direction == Direction::wgrad) {
    plan.tile_m = 32;
    const int64_t channels = p.channels_per_group() + p.filters_per_group();
    const int64_t sums = tile_products * p.channels_per_group() * p.filters_per_group();
    plan.tile_k = tiles_of(std::clamp<int64_t>(sums, 1 << 22, 7 << 20), channels);
    if (wgrad_tasks(p, plan, make_tiles(p, plan.direction, plan.tile_k)).kept)
      plan.tile_k = tiles_of(std::clamp<int64_t>(2 * sums, 5 << 18, 1 << 22), channels);
  } else {
    const int64_t contracted = contracted_channels(p, plan.direction);
    plan.tile_m = contracted < 192 ? 48 : 64;
    plan.tile_k = 48;
    if (gather_form(p, make_tiles(p, plan.direction, 48), plan.direction) != GatherForm::apart)
      plan.tile_k = tiles_of(1 << 21, contracted);
    const Tiles tiles = make_tiles(p, plan.direction, plan.tile_k);
    const int64_t blocks = pieces_of(produced_channels(p, plan.direction), plan.tile_n);
    if (gather_form(p, tiles, plan.direction) == GatherForm::chunks &&
        pieces_of(tiles.chunk_tiles(), plan.tile_m) * blocks < enough_tasks)
      plan.tile_m = 32;
  }
  plan.workspace_bytes = std::max(fallback.workspace_bytes, aligned(winograd_memory(p, plan).end * sum_bytes(p)));
  plan.scratch_bytes = std::max(fallback.scratch_bytes, aligned(winograd_scratch(p, plan).end * sum_bytes(p)));
}

// Multiply-adds of the sum over what Winograd's tiles take of them. A value that is transformed, of x and of y or of
// the filters, costs as much as so many products, which are blind to what lies outside of the image.
double winograd_saving(const Conv2dProblem& p, Direction direction) {
  const bool wgrad = direction == Direction::wgrad;
  const double value_cost = wgrad ? 30 : 14, filter_cost = wgrad ? 18 : 5;
  const int64_t pieces = wgrad ? wgrad_pieces(p) : 1;
  const int64_t produced = produced_channels(p, direction), contracted = pieces * contracted_channels(p, direction);
  const Tiles tiles = make_tiles(p, direction, 1);
  const double count = double(p.N * p.groups) * double(tiles.rows * tiles.cols);
  const double products = count * double(contracted) * double(pieces_of(produced, 16) * 16);
  const double values = count * double(contracted + produced);
  const double filters = double(pieces) * double(p.w_elements() / (p.R * p.S));
  const double cost = double(tile_products) * (products + value_cost * values + filter_cost * filters);
  return cost > 0 ? double(p.multiply_adds()) / cost : 0;
}

// wgrad also writes and reads its sums.
double enough_saving(Direction direction) { return direction == Direction::wgrad ? 1.25 : 1.05; }
constexpr int64_t enough_multiply_adds = 1 << 22, most_sum_bytes = 1 << 27;

// wgrad's, in the worst case
int64_t winograd_sum_bytes(const Conv2dProblem& p, Direction direction) {
  if (direction != Direction::wgrad) return 0;
  return tile_products * p.channels_per_group() * p.filters_per_group() * sum_bytes(p);
}

bool winograd_wins(const Conv2dProblem& p, Direction direction) {
  return fits_winograd(p) && p.dtype != DType::float64 && !multiplies_bfloat16(p, direction) &&
         p.multiply_adds() >= enough_multiply_adds && winograd_sum_bytes(p, direction) <= most_sum_bytes &&
         winograd_saving(p, direction) >= enough_saving(direction);
}

// In the order of winograd_wins.
std::string why_not_winograd(const Conv2dProblem& p, Direction direction, const std::string& saving) {
  if (!fits_winograd(p)) return rejection(p, Algo::winograd);
  if (p.dtype == DType::float64)
    return "its rounding errors are larger than those of the sum: in float64 only if asked for";
  if (multiplies_bfloat16(p, direction))
    return "its transforms are computed in float, where a product takes twice as long as in bfloat16";
  if (p.multiply_adds() < enough_multiply_adds) return "too little work to be worth three passes";
  if (winograd_sum_bytes(p, direction) > most_sum_bytes)
    return "its sums would take " + std::to_string(winograd_sum_bytes(p, direction) >> 20) + " MiB";
  return "transforms and all counted, it saves a factor of " + saving + " only";
}

void explain_winograd(const Conv2dProblem& p, Direction direction, bool taken, Reasons* reasons) {
  char saving[16] = "";
  if (fits_winograd(p)) snprintf(saving, sizeof saving, "%.2f", winograd_saving(p, direction));
  reasons->push_back({Algo::winograd, taken,
                      taken ? "36 products for " +
                                  (p.R == 3 ? std::string("16 outputs, not 144") : "4 outputs, not 100") +
                                  ": with its transforms, a factor of " + saving + " less work"
                            : why_not_winograd(p, direction, saving)});
}

// Groups that a matrix product would leave registers idle for.
constexpr int64_t few_channels = 32;
bool few_a_group(const Conv2dProblem& p) {
  return p.groups > 1 && p.channels_per_group() <= few_channels && p.filters_per_group() <= few_channels;
}

std::string why_not_grouped(const Conv2dProblem& p) {
  if (p.groups == 1) return rejection(p, Algo::grouped);
  return "for groups of at most " + std::to_string(few_channels) +
         " channels and filters; with more, a product is faster";
}

// What is taken unasked. Reasons are put into words only if someone wants them.
Algo choose(const Conv2dProblem& p, Direction direction, Reasons* reasons) {
  const bool depthwise = p.groups == p.C && p.K == p.C, grouped = !depthwise && few_a_group(p);
  const bool winograd = !depthwise && !grouped && winograd_wins(p, direction);
  const Algo taken = depthwise ? Algo::depthwise : grouped ? Algo::grouped : winograd ? Algo::winograd : Algo::im2col;
  if (!reasons) return taken;
  if (depthwise) {
    reasons->push_back(
        {Algo::depthwise, true, "groups = C = K: no reuse across channels, so memory traffic is all there is"});
    reasons->push_back({Algo::grouped, false, "depthwise is the same without a sum over channels"});
    reasons->push_back({Algo::winograd, false, "with one filter a group nothing would pay for its transforms"});
    reasons->push_back({Algo::im2col, false, "a product with one filter a group would leave most of each vector idle"});
  } else if (grouped) {
    reasons->push_back(
        {Algo::grouped, true, "few channels a group: sums over taps and channels, vectors along the channels"});
    reasons->push_back({Algo::winograd, false, "with so few filters a group nothing would pay for its transforms"});
    reasons->push_back({Algo::im2col, false, "products with so few rows or columns would leave registers idle"});
    reasons->push_back({Algo::depthwise, false, rejection(p, Algo::depthwise)});
  } else {
    const std::string along = along_pixels(p, direction) ? "pixels" : "channels";
    const char* stem = direction == Direction::dgrad
                           ? "few channels: every pixel of dy times every tap, added up in the rows of dx"
                           : "few channels: windows are read in place, vectors along the filters";
    explain_winograd(p, direction, winograd, reasons);
    reasons->push_back({Algo::im2col, !winograd,
                        winograd ? "multiplies each output's patch"
                        : is_stem(p, direction)
                            ? stem
                            : "patches times filters, blocked for the caches, vectors along the " + along});
    reasons->push_back({Algo::grouped, false, why_not_grouped(p)});
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
    case Algo::grouped: plan_grouped(problem, plan); break;
    case Algo::winograd: plan_winograd(problem, plan); break;
    default: plan_direct(problem, plan); break;
  }
  return plan;
}

}  // namespace fastconv
