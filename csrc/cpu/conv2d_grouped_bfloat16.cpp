// Grouped convolution for machines that multiply bfloat16 (AVX512_BF16): fprop and dgrad of groups with an even number
// of contracted channels. All others are AVX-512's. Sums are kept in float and rounded once, as there.
#include "conv2d_grouped_gather.h"
#include "conv2d_grouped_pairs.h"

namespace fastconv::cpu {

namespace avx512 {
extern const Conv2dKernels conv2d_grouped;
}

namespace {

bool has_pairs(const Conv2dProblem& problem, Direction direction) {
  return problem.dtype == DType::bfloat16 && contracted_channels(problem, direction) % 2 == 0;
}

void gather(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* source, const void* w, const void* bias,
            void* out, void* workspace, void* scratch, const Parallel& parallel) {
  using T = bfloat16_t;
  const bool shares_vectors = channel_blocks(problem, plan.direction, lanes<T>, true).groups > 1;
  const auto run = shares_vectors ? gather_grouped<T, GroupsOfVector<T, ChannelPairs>>
                                  : gather_grouped<T, OneGroup<T, ChannelPairs>>;
  run(problem, plan, (const T*)source, (const T*)w, (const T*)bias, (T*)out, workspace, (char*)scratch, parallel);
}

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  const auto run = has_pairs(problem, plan.direction) ? gather : avx512::conv2d_grouped.fprop;
  run(problem, plan, x, w, bias, y, workspace, scratch, parallel);
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  if (has_pairs(problem, plan.direction))
    gather(problem, plan, dy, w, nullptr, dx, workspace, scratch, parallel);
  else
    avx512::conv2d_grouped.dgrad(problem, plan, dy, w, dx, workspace, scratch, parallel);
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  avx512::conv2d_grouped.wgrad(problem, plan, dy, x, dw, db, workspace, scratch, parallel);
}

}  // namespace

namespace avx512_bf16 {
extern const Conv2dKernels conv2d_grouped;
const Conv2dKernels conv2d_grouped = {fprop, dgrad, wgrad};
}  // namespace avx512_bf16

}  // namespace fastconv::cpu
