// Grouped convolution with few channels a group, where a matrix product would have too few rows or columns to fill
// registers: sums over the taps and the channels of a group, with vectors along the produced channels.
//
//   fprop  y[n,k,p,q]  = bias[k] + Σ_{c,r,s} w[k,c,r,s] · x[n,c,h,w]      c: the channels of k's group
//   dgrad  dx[n,c,h,w] = Σ_{k,r,s} w[k,c,r,s] · dy[n,k,p,q]               k: the filters of c's group
//   wgrad  dw[k,c,r,s] = Σ_{n,p,q} dy[n,k,p,q] · x[n,c,h,w]               db[k] = Σ_{n,p,q} dy[n,k,p,q]
//
// Rows are staged in L1 as in depthwise convolution (conv2d_grouped_rows.h). For each output, tap and contracted
// channel that is one multiply-add of a vector of weights by the channel's value: the same for all lanes where a group
// fills a vector, and otherwise each lane's own group's, by a permutation.
#include "conv2d_grouped_gather.h"
#include "conv2d_grouped_wgrad.h"

namespace fastconv::cpu {
namespace {

// Several groups share a vector.
template <typename T>
bool shares_vectors(const Conv2dProblem& problem, Direction direction) {
  return permutes && channel_blocks(problem, direction, lanes<T>, true).groups > 1;
}

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = shares_vectors<T>(problem, plan.direction) ? gather_grouped<T, GroupsOfVector<T>>
                                                                : gather_grouped<T, OneGroup<T>>;
    run(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, workspace, (char*)scratch, parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = shares_vectors<T>(problem, plan.direction) ? gather_grouped<T, GroupsOfVector<T>>
                                                                : gather_grouped<T, OneGroup<T>>;
    run(problem, plan, (const T*)dy, (const T*)w, nullptr, (T*)dx, workspace, (char*)scratch, parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = shares_vectors<T>(problem, plan.direction) ? wgrad_grouped<T, GroupsOfVector<T>>
                                                                : wgrad_grouped<T, OneGroup<T>>;
    run(problem, plan, (const T*)dy, (const T*)x, (T*)dw, (T*)db, workspace, (char*)scratch, parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_grouped;
const Conv2dKernels conv2d_grouped = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
