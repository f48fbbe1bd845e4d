#include "../plan.h"
namespace fastconv {
BatchNormPlan plan_batch_norm_cuda(const BatchNormProblem&, const Target&) { return {}; }
}  // namespace fastconv
