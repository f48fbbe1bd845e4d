// BatchNorm on a CPU. In NCHW a task owns a channel, and normalizes its values while they are still in its cache. In
// NHWC, where a channel's values are strewn over all of x, and where there are too few channels to go round, the values
// are split in pieces whose statistics meet in the workspace.
#include <algorithm>

#include "../plan.h"

namespace fastconv {
namespace {

constexpr int64_t least_tasks = 16;
constexpr int64_t most_pieces = 64;
constexpr int64_t piece_elements = 1 << 14;  // below these a piece is not worth its merge
constexpr int64_t piece_rows = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BatchNormPlan plan_batch_norm(const BatchNormProblem& problem, const Target& target) {
  if (target.cuda) return plan_batch_norm_cuda(problem, target);
  BatchNormPlan plan;
  const int64_t count = problem.count(), C = std::max<int64_t>(problem.C, 1);
  // N×C×1 is the same memory in both layouts, and so is N×1×L.
  const bool nhwc = problem.L == 1 || (problem.layout == Layout::NHWC && problem.C > 1);
  int64_t pieces = 1;
  if (nhwc)
    pieces = std::min({ceil_div(count * C, piece_elements), ceil_div(count, piece_rows), most_pieces});
  else if (C < least_tasks)
    pieces = std::min(ceil_div(count, piece_elements), ceil_div(most_pieces, C));
  plan.split = int(std::max<int64_t>(pieces, 1));
  plan.kernel = nhwc ? "batch_norm_nhwc" : plan.split > 1 ? "batch_norm_nchw_split" : "batch_norm_nchw";
  // Two float64 sums a channel and piece, and three coefficients a channel.
  if (nhwc || plan.split > 1) plan.workspace_bytes = (2 * plan.split + 3) * problem.C * int64_t(sizeof(double));
  return plan;
}

}  // namespace fastconv
