// Convolution by Winograd's minimal filtering with tiles of 6×6: F(4×4, 3×3), 36 products for 16 outputs of a 3×3
// filter instead of 144, and F(2×2, 5×5), 36 for 4 outputs of a 5×5 filter instead of 100.
//
// Tiles of x, 6×6 each, and the filters are transformed (conv2d_winograd_transforms.h); then each of the 36 elements is
// a matrix product over the channels, and the inverse transform makes a tile of y. Vectors run along the channels in
// both memory orders. The tiles that an image ends in, where they have fewer outputs, take fewer products.
//
// The transforms multiply and add what a tile reads, so an infinity or NaN would reach all of the tile's outputs. Where
// any result is not finite, the call is computed once more by im2col, whose results then are what torch's are.
#include "conv2d_winograd_gather.h"
#include "conv2d_winograd_wgrad.h"

namespace fastconv::cpu {

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_im2col;
}

namespace {

Conv2dPlan im2col_plan(const Conv2dProblem& problem, Direction direction) {
  return plan_conv2d_cpu(problem, direction, Algo::im2col, nullptr);
}

// Calls f(T{}, integral_constant of the filter's size).
template <typename F>
void dispatch_winograd(const Conv2dProblem& p, const F& f) {
  dispatch(p.dtype, [&](auto element) {
    if (p.R == 3)
      f(element, std::integral_constant<int, 3>());
    else
      f(element, std::integral_constant<int, 5>());
  });
}

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  dispatch_winograd(problem, [&](auto element, auto size) {
    using T = decltype(element);
    if (!winograd_fprop<size.value>(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, workspace,
                                    (char*)scratch, parallel))
      FASTCONV_ISA::conv2d_im2col.fprop(problem, im2col_plan(problem, plan.direction), x, w, bias, y, workspace,
                                        scratch, parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch_winograd(problem, [&](auto element, auto size) {
    using T = decltype(element);
    if (!winograd_dgrad<size.value>(problem, plan, (const T*)dy, (const T*)w, (T*)dx, workspace, (char*)scratch,
                                    parallel))
      FASTCONV_ISA::conv2d_im2col.dgrad(problem, im2col_plan(problem, plan.direction), dy, w, dx, workspace, scratch,
                                        parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (!winograd_wgrad(problem, plan, (const T*)dy, (const T*)x, (T*)dw, (T*)db, workspace, (char*)scratch, parallel))
      FASTCONV_ISA::conv2d_im2col.wgrad(problem, im2col_plan(problem, plan.direction), dy, x, dw, db, workspace,
                                        scratch, parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_winograd;
const Conv2dKernels conv2d_winograd = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
