// Convolution as matrix multiplication. im2col lays every patch of x out as one vector of C/groups·R·S elements; then
// a convolution is patches times filters. Here the patches never exist as a whole: each task multiplies those of a few
// hundred pixels, a few hundred elements of depth at a time. It reads them where they lie, in x or in a padded copy of
// the piece of x that its pixels read; elements of 16 bits are converted on the way.
//
//   fprop  y  = filters × patches of x
//   dgrad  dx = filters × patches of dy, a product for each of the stride² phases of dx, whose pixels share their taps:
//               nothing is multiplied by the zeros between strides, and nothing is scattered
//   wgrad  dw = dy × patches of x, summed over all pixels, in pieces that are then added in order
//
// Images of few channels have kernels of their own, in conv2d_stem.cpp.
//
// Everything is summed in float (double for float64) and rounded once.
#include <type_traits>

#include "conv2d_im2col_channels.h"
#include "conv2d_im2col_one_tap.h"
#include "conv2d_im2col_pixels.h"
#include "conv2d_im2col_pixels_wgrad.h"
#include "conv2d_stem_blocks.h"

namespace fastconv::cpu {

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_stem;
}

namespace {

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  if (is_stem(problem, plan.direction))
    return FASTCONV_ISA::conv2d_stem.fprop(problem, plan, x, w, bias, y, workspace, scratch, parallel);
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = along_pixels(problem, plan.direction) ? fprop_pixels<T> : fprop_channels<T>;
    run(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, workspace, (char*)scratch, parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  if (is_stem(problem, plan.direction))
    return FASTCONV_ISA::conv2d_stem.dgrad(problem, plan, dy, w, dx, workspace, scratch, parallel);
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      if (exchanges_operands(problem, plan.direction))
        return dgrad_one_tap(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (char*)scratch, parallel);
    }
    const auto run = along_pixels(problem, plan.direction) ? dgrad_pixels<T> : dgrad_channels<T>;
    run(problem, plan, (const T*)dy, (const T*)w, (T*)dx, workspace, (char*)scratch, parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  if (is_stem(problem, plan.direction))
    return FASTCONV_ISA::conv2d_stem.wgrad(problem, plan, dy, x, dw, db, workspace, scratch, parallel);
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const WgradOut<T> out{(T*)dw, (T*)db, plan.split > 1 ? (acc_t<T>*)workspace : nullptr, problem.w_elements(),
                          problem.K};
    const bool exchanged = exchanges_operands(problem, plan.direction);
    const bool along = !exchanged && along_pixels(problem, plan.direction);
    auto run = along ? wgrad_pixels<T> : wgrad_channels<T>;
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      if (exchanged) run = wgrad_one_tap<T>;
    }
    run(problem, plan, (const T*)dy, (const T*)x, out, (char*)scratch, parallel);
    if (plan.split > 1 && along) add_transposed_pieces(problem, out, plan.split, parallel);
    if (plan.split > 1 && !along) add_pieces(out, plan.split, parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_im2col;
const Conv2dKernels conv2d_im2col = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
