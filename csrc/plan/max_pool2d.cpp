// Max pooling needs no workspace and no split: each output, and each element of dx, is computed by one thread.
#include "../plan.h"

namespace fastconv {

MaxPool2dPlan plan_max_pool2d(const MaxPool2dProblem& problem, const Target&) {
  MaxPool2dPlan plan;
  // With one channel the two layouts are the same, and rows make longer vectors.
  plan.kernel = problem.layout == Layout::NHWC && problem.C > 1 ? "max_pool2d_nhwc" : "max_pool2d_nchw";
  return plan;
}

}  // namespace fastconv
