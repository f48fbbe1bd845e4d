// im2col for machines that multiply bfloat16 (AVX512_BF16): those convolutions of bfloat16 whose products are large
// enough are multiplied as they are, in pairs, with half the bytes to pack and twice the products of an instruction.
// All others are AVX-512's. Sums are kept in float and rounded once, as there.
#include "conv2d_bfloat16_gather.h"
#include "conv2d_bfloat16_pixels.h"
#include "conv2d_bfloat16_pixels_wgrad.h"
#include "conv2d_bfloat16_wgrad.h"

namespace fastconv::cpu {

namespace avx512 {
extern const Conv2dKernels conv2d_im2col;
}

namespace {

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  if (!multiplies_bfloat16(problem, plan.direction))
    return avx512::conv2d_im2col.fprop(problem, plan, x, w, bias, y, workspace, scratch, parallel);
  const auto run = problem.layout == Layout::NCHW ? fprop_pixels_bfloat16 : fprop_bfloat16;
  run(problem, plan, (const bfloat16_t*)x, (const bfloat16_t*)w, (const bfloat16_t*)bias, (bfloat16_t*)y,
      (char*)workspace, (char*)scratch, parallel);
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  if (!multiplies_bfloat16(problem, plan.direction))
    return avx512::conv2d_im2col.dgrad(problem, plan, dy, w, dx, workspace, scratch, parallel);
  const auto run = problem.layout == Layout::NCHW ? dgrad_pixels_bfloat16 : dgrad_bfloat16;
  run(problem, plan, (const bfloat16_t*)dy, (const bfloat16_t*)w, (bfloat16_t*)dx, (char*)workspace, (char*)scratch,
      parallel);
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  if (!multiplies_bfloat16(problem, plan.direction))
    return avx512::conv2d_im2col.wgrad(problem, plan, dy, x, dw, db, workspace, scratch, parallel);
  const WgradOut<bfloat16_t> out{(bfloat16_t*)dw, (bfloat16_t*)db, plan.split > 1 ? (float*)workspace : nullptr,
                                 problem.w_elements(), problem.K};
  const auto run = problem.layout == Layout::NCHW ? wgrad_pixels_bfloat16 : wgrad_bfloat16;
  run(problem, plan, (const bfloat16_t*)dy, (const bfloat16_t*)x, out, (char*)scratch, parallel);
  if (plan.split > 1) add_pieces(out, plan.split, parallel);
}

}  // namespace

namespace avx512_bf16 {
extern const Conv2dKernels conv2d_im2col;
const Conv2dKernels conv2d_im2col = {fprop, dgrad, wgrad};
}  // namespace avx512_bf16

}  // namespace fastconv::cpu
