// The plan of implicit GEMM on CUDA cores: which tile, how many splits, by a model of the time.
#include "conv2d_implicit_gemm.h"

#include <limits>

#include "h200.h"

namespace fastconv::cuda {
namespace {

constexpr int64_t most_sums_bytes = int64_t{64} << 20;  // of the partial sums of a split contraction
constexpr int64_t fewest_in_split = 64;

struct Tile {
  int size;
  double reach;
  int64_t to_fill;  // blocks that fill an SM
};
constexpr Tile implicit_tiles[] = {{128, 0.70, 1}, {64, 0.50, 4}};
constexpr Tile gemm_tiles[] = {{128, 0.80, 1}, {64, 0.60, 4}};  // of im2col, whose operands lie in order

double product_us(const ImplicitGemmProduct& g, const Tile& tile, int split, DType dtype, int num_sms) {
  const int64_t blocks = pieces(g.m, tile.size) * pieces(g.n, tile.size) * g.groups * g.phases * split;
  const int64_t on_one_sm = std::max(pieces(blocks, std::max(num_sms, 1)), tile.to_fill);
  const double depth = double(round_up(pieces(g.k, split), implicit_gemm_depth));
  return double(on_one_sm) * tile.size * tile.size * depth / (h200::multiply_adds_per_us(dtype) * tile.reach);
}

double tensors_us(const Conv2dProblem& p) {
  return double((p.x_elements() + p.w_elements() + p.y_elements()) * element_bytes(p.dtype)) / h200::copy_bytes_per_us;
}

}  // namespace

ImplicitGemmProduct implicit_gemm_product(const Conv2dProblem& p, Direction direction) {
  const int64_t channels = p.channels_per_group(), filters = p.filters_per_group();
  const int64_t rows = std::clamp<int64_t>(p.H, 1, p.stride_h), columns = std::clamp<int64_t>(p.W, 1, p.stride_w);
  switch (direction) {
    case Direction::fprop: return {p.N * p.P * p.Q, filters, channels * p.R * p.S, p.groups, 1};
    case Direction::dgrad:
      return {p.N * pieces(p.H, rows) * pieces(p.W, columns), channels,
              filters * pieces(p.R, p.stride_h / std::gcd(p.stride_h, p.dilation_h)) *
                  pieces(p.S, p.stride_w / std::gcd(p.stride_w, p.dilation_w)),
              p.groups, rows * columns};
    default: return {channels * p.R * p.S, filters, p.N * p.P * p.Q, p.groups, 1};
  }
}

ImplicitGemmWorkspace implicit_gemm_workspace(const Conv2dProblem& p, Direction direction, int split) {
  if (split == 1) return {0, 0};
  const ImplicitGemmProduct g = implicit_gemm_product(p, direction);
  const int64_t bytes = split * accumulator_bytes(p.dtype);
  return {round_up(bytes * g.groups * g.m * round_up(g.n, 4), 256),
          direction == Direction::wgrad ? round_up(bytes * p.K, 256) : 0};
}

void plan_implicit_gemm(const Conv2dProblem& p, const Target& target, Conv2dPlan* plan) {
  constexpr int splits[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128};
  const ImplicitGemmProduct g = implicit_gemm_product(p, plan->direction);
  const bool wgrad = plan->direction == Direction::wgrad;
  double best = std::numeric_limits<double>::infinity();
  for (const Tile& tile : implicit_tiles) {
    if (tile.size == 128 && p.dtype == DType::float64) continue;  // its sums would take all registers
    for (int split : splits) {
      const ImplicitGemmWorkspace workspace = implicit_gemm_workspace(p, plan->direction, split);
      // The partial sums of several phases would lie in a strided order that ordered_sum.cuh does not know.
      if (split > 1 && (g.phases > 1 || pieces(g.k, split) < fewest_in_split || workspace.sums_bytes > most_sums_bytes))
        break;
      const int launches = split == 1 ? 1 : wgrad ? 3 : 2;
      const double us = std::max(product_us(g, tile, split, p.dtype, target.num_sms), tensors_us(p)) +
                        2 * double(workspace.sums_bytes) / h200::copy_bytes_per_us + launches * h200::launch_us;
      if (us > 0.95 * best) continue;  // a little more speed is not worth more splits
      best = us;
      plan->tile_m = plan->tile_n = tile.size;
      plan->split = split;
      plan->workspace_bytes = workspace.sums_bytes + workspace.bias_sums_bytes;
    }
  }
  plan->tile_k = implicit_gemm_depth;
  plan->kernel = "conv2d_implicit_gemm_kernel";
  plan->predicted_us = best;
}

double im2col_time_us(const Conv2dProblem& p, const Target& target, const Conv2dPlan& plan) {
  const Im2colChunks chunks = im2col_chunks(p, plan.direction, plan.split);
  const int64_t taps = p.channels_per_group() * p.R * p.S, filters = p.filters_per_group();
  ImplicitGemmProduct g = {chunks.pixels, filters, taps, p.groups, 1};
  if (plan.direction == Direction::dgrad) g = {chunks.pixels, taps, filters, p.groups, 1};
  if (plan.direction == Direction::wgrad) g = {taps, filters, chunks.pixels, p.groups, 1};
  const double product = product_us(g, gemm_tiles[plan.tile_m == 128 ? 0 : 1], plan.split, p.dtype, target.num_sms);
  const double passes =
      2 * double((chunks.identity ? 0 : chunks.matrix_bytes) + chunks.sums_bytes) / h200::copy_bytes_per_us;
  const int launches = (chunks.identity ? 1 : 2) + (chunks.sums_bytes > 0);
  const int64_t count = pieces(std::max<int64_t>(p.N * p.P * p.Q, 1), std::max<int64_t>(chunks.pixels, 1));
  return std::max(double(count) * product, tensors_us(p)) + double(count) * (passes + launches * h200::launch_us);
}

}  // namespace fastconv::cuda
