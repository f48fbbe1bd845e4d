// Average pooling needs no workspace: each output, and each element of dx, is computed by one thread, or on CUDA, where
// windows are large and so outputs are few, by several threads of one block.
#include "../plan.h"

namespace fastconv {
namespace {

constexpr int64_t least_shared_taps = 32;  // of a window that is worth several threads
constexpr int64_t least_shared_row = 16;   // NCHW: neighbouring threads take neighbouring columns
constexpr int64_t least_block_taps = 1024;
constexpr int warp_threads = 32, block_threads = 256;

}  // namespace

AvgPool2dPlan plan_avg_pool2d(const AvgPool2dProblem& problem, const Target& target) {
  AvgPool2dPlan plan;
  // With one channel the two layouts are the same, and rows make longer vectors.
  const bool nhwc = problem.layout == Layout::NHWC && problem.C > 1;
  const int64_t taps = problem.R * problem.S, row = problem.is_global() ? taps : problem.S;
  plan.kernel = nhwc ? "avg_pool2d_nhwc" : "avg_pool2d_nchw";
  if (!target.cuda || taps < least_shared_taps || (!nhwc && row < least_shared_row)) return plan;
  plan.kernel = nhwc ? "avg_pool2d_nhwc_shared" : "avg_pool2d_nchw_shared";
  plan.threads = nhwc || taps >= least_block_taps ? block_threads : warp_threads;
  return plan;
}

}  // namespace fastconv
