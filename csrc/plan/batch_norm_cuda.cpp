// BatchNorm on CUDA: a block gathers the statistics of one channel (NCHW) or of a row of channels (NHWC). Where there
// are too few such blocks to fill the device, each channel is split into pieces, whose statistics are merged in order.
#include <algorithm>

#include "../plan.h"

namespace fastconv {
namespace {

constexpr int64_t blocks_a_multiprocessor = 8;  // of 256 threads
constexpr int64_t piece_values = 16384;         // below this a piece is not worth its merge
constexpr int64_t most_pieces = 1024;
constexpr int64_t block_bytes = 512;  // NHWC: of a row of x, what a block's channels take

}  // namespace

BatchNormPlan plan_batch_norm_cuda(const BatchNormProblem& problem, const Target& target) {
  BatchNormPlan plan;
  // N×C×1 is the same memory in both layouts, and so is N×1×L.
  const bool nhwc = problem.L == 1 || (problem.layout == Layout::NHWC && problem.C > 1);
  const int64_t channels = nhwc ? std::min(problem.C, block_bytes / element_bytes(problem.dtype)) : 1;
  if (problem.x_elements() > 0) {
    const int64_t blocks = (problem.C + channels - 1) / channels;
    const int64_t split = std::min({blocks_a_multiprocessor * target.num_sms / blocks,
                                    problem.count() * channels / piece_values, problem.count(), most_pieces});
    plan.split = int(std::max<int64_t>(split, 1));
  }
  plan.kernel = nhwc ? (plan.split > 1 ? "batch_norm_nhwc_split" : "batch_norm_nhwc")
                     : (plan.split > 1 ? "batch_norm_nchw_split" : "batch_norm_nchw");
  // Three float64 moments a channel and piece; and one value a channel, what training adds in the end.
  const int64_t pieces = plan.split > 1 ? plan.split : 0;
  plan.workspace_bytes = (3 * pieces + 1) * problem.C * int64_t(sizeof(double));
  return plan;
}

}  // namespace fastconv
