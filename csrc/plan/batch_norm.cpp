// BatchNorm on a CPU. Either a task owns a channel (NCHW) or a block of channels (NHWC), and normalizes its values while
// they are still in its cache; or, where that leaves too few tasks or too much data a task, every channel is split in
// pieces, whose statistics meet in the workspace.
#include <algorithm>

#include "../plan.h"

namespace fastconv {
namespace {

constexpr int64_t block_channels = 64;       // cpu/batch_norm.cpp: channels of a task in NHWC
constexpr int64_t cached_bytes = 1 << 20;    // what a core keeps at hand between two passes
constexpr int64_t least_tasks = 16;
constexpr int64_t most_pieces = 64;
constexpr int64_t piece_elements = 1 << 14;  // below this a piece is not worth its merge

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BatchNormPlan plan_batch_norm(const BatchNormProblem& problem, const Target& target) {
  if (target.cuda) return plan_batch_norm_cuda(problem, target);
  BatchNormPlan plan;
  const int64_t count = problem.count(), bytes = element_bytes(problem.dtype);
  // N×C×1 is the same memory in both layouts, and so is N×1×L.
  const bool nhwc = problem.L == 1 || (problem.layout == Layout::NHWC && problem.C > 1);
  int64_t pieces = 1;
  if (nhwc) {
    const int64_t blocks = ceil_div(problem.C, block_channels);
    const bool cached = count * std::min(problem.C, block_channels) * bytes <= cached_bytes;
    if (!cached || blocks < least_tasks)
      pieces = std::min({ceil_div(count * problem.C, piece_elements), ceil_div(count, 64), most_pieces});
  } else if (problem.C < least_tasks) {
    pieces = std::min(ceil_div(count, piece_elements), ceil_div(most_pieces, std::max<int64_t>(problem.C, 1)));
  }
  plan.split = int(std::max<int64_t>(pieces, 1));
  plan.kernel = nhwc ? (plan.split > 1 ? "batch_norm_nhwc_split" : "batch_norm_nhwc")
                     : (plan.split > 1 ? "batch_norm_nchw_split" : "batch_norm_nchw");
  // Two float64 sums a channel and piece, and three coefficients a channel.
  if (plan.split > 1) plan.workspace_bytes = (2 * plan.split + 3) * problem.C * int64_t(sizeof(double));
  return plan;
}

}  // namespace fastconv
