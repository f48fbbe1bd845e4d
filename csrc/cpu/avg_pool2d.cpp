// Average pooling: y[n,c,p,q] = Σ x[n,c,h,w] / divisor over the rows h and columns w of window (p, q). A window begins
// at p·stride − pad and is R long, or along an adaptive axis begins at floor(p·H/P) and ends before ceil((p+1)·H/P).
// The divisor is the number of elements in it, with those of the padding or without, or one that is given.
//
// Backward gathers: dx[h,w] = Σ dy[p,q] / divisor(p,q) over the windows that have element (h, w).
#include "avg_pool2d_nchw.h"
#include "avg_pool2d_nhwc.h"

namespace fastconv::cpu {
namespace {

void forward(const AvgPool2dProblem& problem, const AvgPool2dPlan&, const void* x, void* y, const Parallel& parallel) {
  if (problem.y_elements() == 0) return;
  const AvgPool2dProblem p = problem.normalized();
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = p.layout == Layout::NHWC ? forward_nhwc<T> : p.is_global() ? forward_global<T> : forward_nchw<T>;
    run(p, static_cast<const T*>(x), static_cast<T*>(y), parallel);
  });
}

void backward(const AvgPool2dProblem& problem, const AvgPool2dPlan&, const void* dy, void* dx,
              const Parallel& parallel) {
  if (problem.x_elements() == 0) return;
  const AvgPool2dProblem p = problem.normalized();
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = p.layout == Layout::NHWC ? backward_nhwc<T> : backward_nchw<T>;
    run(p, static_cast<const T*>(dy), static_cast<T*>(dx), parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const AvgPool2dKernels avg_pool2d;
const AvgPool2dKernels avg_pool2d = {forward, backward};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
