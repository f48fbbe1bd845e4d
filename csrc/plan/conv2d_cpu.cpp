// How a convolution is done on a CPU.
#include <algorithm>
#include <stdexcept>

#include "../plan.h"

namespace fastconv {

Conv2dPlan plan_conv2d_cpu(const Conv2dProblem& problem, Direction direction, std::optional<Algo>, Reasons*) {
  Conv2dPlan plan;
  plan.direction = direction;
  plan.algo = Algo::direct;
  plan.kernel = "conv2d_direct";
  plan.scratch_bytes = std::max(problem.Q, problem.W) * 8;
  return plan;
}

}  // namespace fastconv
