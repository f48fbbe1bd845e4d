// Convolutions of images with few channels, a network's first: im2col's products, of windows that are read in place.
#include "conv2d_stem_dgrad.h"
#include "conv2d_stem_fprop.h"
#include "conv2d_stem_wgrad.h"

namespace fastconv::cpu {
namespace {

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    stem_fprop(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (acc_t<T>*)workspace, (char*)scratch,
               parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    stem_dgrad(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (acc_t<T>*)workspace, (char*)scratch, parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const WgradOut<T> out{(T*)dw, (T*)db, plan.split > 1 ? (acc_t<T>*)workspace : nullptr, problem.w_elements(),
                          problem.K};
    stem_wgrad(problem, plan, (const T*)dy, (const T*)x, out, (char*)scratch, parallel);
    if (plan.split > 1) add_pieces(out, plan.split, parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_stem;
const Conv2dKernels conv2d_stem = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
