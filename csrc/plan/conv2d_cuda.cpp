// How a convolution is done on a GPU.
//
// depthwise where every group has one channel and few filters; a matrix product where the filters of a group fill
// enough of its tile, on tensor cores (mma, planned in conv2d_mma.cpp) or else by im2col; else direct, which can do
// everything. What is measured in multiply-adds below is a model of the time on one multiprocessor (SM), whose figures
// are rounded from those of an H100; only their ratios matter.
#include "conv2d_cuda.h"

#include <limits>
#include <stdexcept>

#include "conv2d_implicit_gemm.h"
#include "conv2d_mma.h"

namespace fastconv {
namespace {

using namespace cuda;

constexpr int64_t most_sums_bytes = int64_t{64} << 20;   // of the partial sums of a split contraction
constexpr int64_t most_copies_bytes = int64_t{2} << 30;  // of x, w and y in NHWC, of a problem in NCHW

struct Product {
  int64_t m, n, k, groups;
  bool may_split;
  bool sums_apart;  // goes through partial sums even if it is not split
};

// C[m][n] = Σ_k … of one chunk (conv2d_im2col.cu).
Product product_of(const Conv2dProblem& p, Direction direction) {
  const Im2colChunks chunks = im2col_chunks(p, direction, 1);
  const int64_t taps = p.channels_per_group() * p.R * p.S, filters = p.filters_per_group();
  switch (direction) {
    case Direction::fprop: return {filters, chunks.pixels, taps, p.groups, true, false};
    case Direction::dgrad: return {taps, chunks.pixels, filters, p.groups, chunks.identity, false};
    default: return {filters, taps, chunks.pixels, p.groups, true, true};
  }
}

struct Tile {
  int size;
  double speed;     // of a full SM
  int64_t to_fill;  // blocks that fill an SM
};

// A kernel's tiles, of which a small one wastes less at the edges and gives more blocks, and a large one reads less
// from the L2 cache; and what else takes time, in multiply-adds.
struct ProductModel {
  Tile large, small;
  int step;            // of the contraction
  int64_t fewest;      // of the contraction in a split
  double byte_cost;    // a byte to or from memory
  double launch_cost;  // one more launch
};
constexpr ProductModel gemm_model = {{128, 1.0, 1}, {64, 0.75, 4}, 8, 64, 6, 640e3};

// The tile and the number of splits that the model finds fastest.
void choose_tile(const Product& g, const ProductModel& model, const Target& target, DType dtype, Conv2dPlan* plan) {
  constexpr int splits[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128};
  const int64_t sms = std::max(target.num_sms, 1);
  double best = std::numeric_limits<double>::infinity();
  for (const Tile& tile : {model.large, model.small}) {
    if (tile.size == 128 && dtype == DType::float64) continue;  // does not exist, see gemm.cuh
    for (int split : splits) {
      const int64_t depth = round_up(pieces(g.k, split), model.step), sums = split * g.groups * g.m * round_up(g.n, 4);
      if (split > 1 && (!g.may_split || depth < model.fewest || sums * accumulator_bytes(dtype) > most_sums_bytes))
        break;
      const int64_t blocks = pieces(g.m, tile.size) * pieces(g.n, tile.size) * g.groups * split;
      const int64_t on_one_sm = std::max(pieces(blocks, sms), tile.to_fill);
      double cost = double(on_one_sm) * tile.size * tile.size * double(depth) / tile.speed;
      if (split > 1 || g.sums_apart)
        cost += double(2 * sums * accumulator_bytes(dtype)) / double(sms) * model.byte_cost;
      if (split > 1 && !g.sums_apart) cost += model.launch_cost;
      if (cost > 0.95 * best) continue;  // a little more speed is not worth more splits
      best = cost;
      plan->tile_m = plan->tile_n = tile.size;
      plan->split = split;
    }
  }
  plan->tile_k = model.step;
}

// Pieces that make `blocks` about as many as `wanted`, but no more than there is work for or memory.
int choose_split(const Conv2dProblem& p, int64_t blocks, int64_t wanted, int64_t work) {
  const int64_t most = std::min(work, most_sums_bytes / std::max<int64_t>(split_wgrad_bytes(p, 1), 1));
  return int(std::clamp<int64_t>(pieces(wanted, std::max<int64_t>(blocks, 1)), 1, std::max<int64_t>(most, 1)));
}

void plan_direct(const Conv2dProblem& p, const Target& target, Conv2dPlan* plan) {
  const DirectTile tile = direct_tile(p, plan->direction);
  plan->tile_m = tile.filters;
  plan->tile_n = tile.pixels();
  plan->tile_k = tile.channels;
  plan->kernel = "conv2d_direct_kernel";
  if (plan->direction != Direction::wgrad) return;
  plan->kernel = "conv2d_direct_wgrad_kernel";
  // Two blocks fit on an SM; twice as many even out what they take.
  plan->split = choose_split(p, direct_wgrad_blocks(p, tile), 4 * int64_t(target.num_sms),
                             pieces(p.N, tile.images) * tile.h.tiles * tile.w.tiles);
  plan->workspace_bytes = split_wgrad_bytes(p, plan->split);
}

void plan_im2col(const Conv2dProblem& p, const Target& target, Conv2dPlan* plan) {
  choose_tile(product_of(p, plan->direction), gemm_model, target, p.dtype, plan);
  plan->workspace_bytes = im2col_chunks(p, plan->direction, plan->split).workspace_bytes();
  plan->kernel = "gemm_kernel";
  plan->predicted_us = im2col_time_us(p, target, *plan);
}

void plan_depthwise(const Conv2dProblem& p, const Target& target, Conv2dPlan* plan) {
  plan->kernel = "conv2d_depthwise_kernel";
  if (plan->direction != Direction::wgrad) return;
  plan->kernel = "conv2d_depthwise_wgrad_kernel";
  // Four blocks fit on an SM, and a thread should have eight pixels or more.
  const int64_t pixels_at_once = depthwise_threads / depthwise_channel_lanes(p);
  plan->split =
      choose_split(p, depthwise_wgrad_blocks(p), 8 * int64_t(target.num_sms), p.N * p.P * p.Q / (8 * pixels_at_once));
  plan->workspace_bytes = split_wgrad_bytes(p, plan->split);
}

std::string text(const char* what, int64_t value) { return std::string(what) + " = " + std::to_string(value); }

bool counts_pixels_in_32_bits(const Conv2dProblem& p) {
  return counts_in_32_bits(p) && p.N * std::max(p.P * p.Q, p.H * p.W) <= int64_t{1} << 30;
}

// The rung that computes a direction for which an algorithm has no kernel.
Algo nearest(Algo algo, Direction direction, const Target& target) {
  if (direction == Direction::fprop) return algo;
  switch (algo) {
    case Algo::direct_naive: return Algo::direct;
    case Algo::implicit_gemm_tile:
    case Algo::implicit_gemm_registers:
    case Algo::implicit_gemm_vectors: return target.sm < 80 ? Algo::im2col : Algo::implicit_gemm;
    default: return algo;
  }
}

// Why an algorithm cannot do a problem; empty if it can.
std::string obstacle(const Conv2dProblem& p, const Target& target, Algo algo) {
  if (algo == Algo::mma) {
    if (target.sm < 80) return "needs compute capability 8.0 or newer, and this is " + text("sm", target.sm);
    if (counts_pixels_in_32_bits(p) && p.R * p.S * (p.C + p.K) <= int64_t{1} << 27) return "";
    return "counts taps and the pixels of all images in 32 bits, which are too few here";
  }
  if (algo >= Algo::implicit_gemm_tile && algo <= Algo::implicit_gemm) {
    if (element_bytes(p.dtype) < 4) return std::string("multiplies float32 and float64, and this is ") + name(p.dtype);
    if (algo == Algo::implicit_gemm && target.sm < 80)
      return "copies by cp.async, which needs compute capability 8.0 or newer, and this is " + text("sm", target.sm);
    if (!counts_pixels_in_32_bits(p)) return "counts the pixels of all images in 32 bits, which are too few here";
  }
  if (algo == Algo::depthwise && p.channels_per_group() != 1)
    return text("needs one channel a group, and C/groups", p.channels_per_group());
  if ((algo == Algo::depthwise || algo == Algo::im2col) && !counts_in_32_bits(p))
    return "counts pixels, channels and taps in 32 bits, which are too few here";
  return "";
}

constexpr int64_t most_depthwise_filters = 4, fewest_product_filters = 32, fewest_mma_filters = 8;

// Why tensor cores are not taken unasked for a problem that they can do; empty if they are.
std::string mma_misfit(const Conv2dProblem& p, Direction direction, const Target& target) {
  if (p.dtype == DType::float32 && !p.allow_tf32)
    return "float32 is three products of tf32 each: not taken until hardware has shown its accuracy";
  if (p.dtype == DType::float64 && target.sm != 80 && target.sm != 90 && target.sm != 100)
    return "float64 is slow on the tensor cores of " + text("sm", target.sm);
  if (p.filters_per_group() < (p.dtype == DType::float64 ? fewest_product_filters : fewest_mma_filters))
    return text("the product would waste most of the narrowest tile, as K/groups", p.filters_per_group());
  const int64_t copies = mma_workspace(p, direction, 1).end;
  return copies <= most_copies_bytes ? "" : text("copies to NHWC would take too much memory, bytes", copies);
}

// Why implicit GEMM is not taken unasked for a problem that it can do; empty if it is.
std::string implicit_gemm_misfit(const Conv2dProblem& p, Direction direction, const Target& target) {
  if (!obstacle(p, target, Algo::implicit_gemm).empty()) return "";
  if (p.filters_per_group() < fewest_product_filters)
    return text("the product would waste most of its tile, as K/groups", p.filters_per_group());
  if (is_identity(p)) return "x is its own matrix of windows, so that im2col has none to make";
  Conv2dPlan im2col, implicit_gemm;
  im2col.direction = implicit_gemm.direction = direction;
  plan_im2col(p, target, &im2col);
  plan_implicit_gemm(p, target, &implicit_gemm);
  if (implicit_gemm.predicted_us <= im2col.predicted_us) return "";
  return text("looking windows up is slower than copying them, by the model in µs",
              int64_t(implicit_gemm.predicted_us)) +
         text(" against", int64_t(im2col.predicted_us));
}

}  // namespace

Conv2dPlan plan_conv2d_cuda(const Conv2dProblem& problem, Direction direction, const Target& target,
                            std::optional<Algo> algo, Reasons* reasons) {
  const Conv2dProblem p = normalized(problem);
  const auto say = [&](Algo about, bool taken, const std::string& why) {
    if (reasons) reasons->push_back({about, taken, why});
  };
  Conv2dPlan plan;
  plan.direction = direction;

  const int64_t filters = p.filters_per_group();
  if (algo) {
    if (const std::string why = obstacle(p, target, *algo); !why.empty())
      throw std::invalid_argument(std::string("algo '") + name(*algo) + "' cannot do this convolution: it " + why);
    plan.algo = nearest(*algo, direction, target);
    if (plan.algo != *algo) {
      say(*algo, false, std::string("asked for, but has no kernel for ") + name(direction));
      say(plan.algo, true, std::string("the nearest to ") + name(*algo));
    } else {
      say(*algo, true, "asked for");
    }
  } else {
    say(Algo::direct_naive, false, "never chosen: every output reads its whole window from memory");
    bool found = false;
    const auto consider = [&](Algo candidate, bool good, const std::string& why_good, const std::string& why_not) {
      const std::string why = obstacle(p, target, candidate);
      if (found || !why.empty() || !good) {
        say(candidate, false, found ? std::string(name(plan.algo)) + " comes first" : why.empty() ? why_not : why);
        return;
      }
      plan.algo = candidate;
      found = true;
      say(candidate, true, why_good);
    };
    consider(Algo::depthwise, filters <= most_depthwise_filters, "one channel a group: limited by memory",
             text("reads an input again for each of its filters, and K/groups", filters));
    const std::string misfit = target.sm < 80 ? "" : mma_misfit(p, direction, target);
    consider(Algo::mma, misfit.empty(),
             text("a matrix product on tensor cores, K/groups", filters) +
                 text(" filters by C/groups·R·S", p.channels_per_group() * p.R * p.S) + " taps",
             misfit);
    for (Algo rung : {Algo::implicit_gemm_tile, Algo::implicit_gemm_registers, Algo::implicit_gemm_vectors})
      say(rung, false, "never chosen: a rung on the way to implicit_gemm");
    const std::string slower = found ? "" : implicit_gemm_misfit(p, direction, target);
    consider(Algo::implicit_gemm, slower.empty(),
             "im2col's product without its matrix of windows, and by the model not slower", slower);
    consider(Algo::im2col, filters >= fewest_product_filters,
             text("a matrix product, K/groups", filters) +
                 text(" filters by C/groups·R·S", p.channels_per_group() * p.R * p.S) + " taps",
             text("the product would waste most of its tile, as K/groups", filters));
    consider(Algo::direct, true, "reads the patch of the input that a tile of outputs shares once", "");
  }

  switch (plan.algo) {
    case Algo::direct_naive: plan.kernel = "conv2d_direct_naive_kernel"; break;
    case Algo::direct: plan_direct(p, target, &plan); break;
    case Algo::im2col: plan_im2col(p, target, &plan); break;
    case Algo::implicit_gemm_tile: plan.kernel = "conv2d_implicit_gemm_tile_kernel"; break;
    case Algo::implicit_gemm_registers: plan.kernel = "conv2d_implicit_gemm_registers_kernel"; break;
    case Algo::implicit_gemm_vectors: plan.kernel = "conv2d_implicit_gemm_vectors_kernel"; break;
    case Algo::implicit_gemm: plan_implicit_gemm(p, target, &plan); break;
    case Algo::depthwise: plan_depthwise(p, target, &plan); break;
    case Algo::mma: plan_mma(p, target, &plan, reasons); break;
    case Algo::winograd:
    case Algo::grouped: break;  // have no CUDA kernel, so parse_algo refuses them
  }
  if (target.sm != 90) plan.predicted_us = 0;  // the models are of an H200
  return plan;
}

}  // namespace fastconv
