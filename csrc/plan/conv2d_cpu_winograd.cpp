// When Winograd's method is taken on a CPU, and its blocks.
#include <algorithm>
#include <cstdio>

#include "../cpu/conv2d_bfloat16_blocks.h"
#include "../cpu/conv2d_winograd_blocks.h"
#include "conv2d_cpu.h"

namespace fastconv::cpu {
namespace {

bool fits_winograd(const Conv2dProblem& p) {
  return p.R == p.S && (p.R == 3 || p.R == 5) && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
         p.dilation_w == 1;
}

}  // namespace

std::string winograd_rejection(const Conv2dProblem& p) {
  if (fits_winograd(p)) return "";
  if (p.R != p.S || (p.R != 3 && p.R != 5))
    return "winograd needs 3×3 or 5×5 filters, here " + std::to_string(p.R) + "×" + std::to_string(p.S);
  return "winograd needs stride 1 and dilation 1";
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

namespace {

// Multiply-adds of the sum over what Winograd's tiles take of them. A value that is transformed, of x and of y or of
// the filters, costs as much as so many products, which are blind to what lies outside of the image.
double winograd_saving(const Conv2dProblem& p, Direction direction) {
  const bool wgrad = direction == Direction::wgrad;
  const double value_cost = wgrad ? 30 : 14, filter_cost = wgrad ? 18 : 5;
  const int64_t pieces = wgrad ? wgrad_pieces(p) : 1;
  const int64_t produced = produced_channels(p, direction), contracted = pieces * contracted_channels(p, direction);
  const Tiles tiles = make_tiles(p, direction, 1);
  const auto points = [](int64_t count, int64_t last) {
    return count < 1 ? 0.0 : double((count - 1) * tile_in + last);
  };
  const double count = double(p.N * p.groups) * points(tiles.rows, tiles.last_row) * points(tiles.cols, tiles.last_col);
  const double products = count * double(contracted) * double(pieces_of(produced, 16) * 16);
  const double values = count * double(contracted + produced);
  const double filters = double(tile_products * pieces) * double(p.w_elements() / (p.R * p.S));
  const double cost = products + value_cost * values + filter_cost * filters;
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

}  // namespace

bool winograd_wins(const Conv2dProblem& p, Direction direction) {
  return fits_winograd(p) && p.dtype != DType::float64 && !multiplies_bfloat16(p, direction) &&
         p.multiply_adds() >= enough_multiply_adds && winograd_sum_bytes(p, direction) <= most_sum_bytes &&
         winograd_saving(p, direction) >= enough_saving(direction);
}

namespace {

// In the order of winograd_wins.
std::string why_not_winograd(const Conv2dProblem& p, Direction direction, const std::string& saving) {
  if (!fits_winograd(p)) return winograd_rejection(p);
  if (p.dtype == DType::float64)
    return "its rounding errors are larger than those of the sum: in float64 only if asked for";
  if (multiplies_bfloat16(p, direction))
    return "its transforms are computed in float, where a product takes twice as long as in bfloat16";
  if (p.multiply_adds() < enough_multiply_adds) return "too little work to be worth three passes";
  if (winograd_sum_bytes(p, direction) > most_sum_bytes)
    return "its sums would take " + std::to_string(winograd_sum_bytes(p, direction) >> 20) + " MiB";
  return "transforms and all counted, it saves a factor of " + saving + " only";
}

}  // namespace

void explain_winograd(const Conv2dProblem& p, Direction direction, bool taken, Reasons* reasons) {
  char saving[16] = "";
  if (fits_winograd(p)) snprintf(saving, sizeof saving, "%.2f", winograd_saving(p, direction));
  reasons->push_back({Algo::winograd, taken,
                      taken ? "36 products for " +
                                  (p.R == 3 ? std::string("16 outputs, not 144") : "4 outputs, not 100") +
                                  ": with its transforms, a factor of " + saving + " less work"
                            : why_not_winograd(p, direction, saving)});
}

}  // namespace fastconv::cpu
