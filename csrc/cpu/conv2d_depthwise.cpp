// Depthwise convolution, groups = C = K: every channel has a filter of its own.
//
//   fprop  y[n,c,p,q]  = bias[c] + Σ_{r,s} w[c,r,s] · x[n,c,h,w]      h = p·stride_h + r·dilation_h − pad_h
//   dgrad  dx[n,c,h,w] = Σ_{r,s} w[c,r,s] · dy[n,c,p,q]               over the (p, q) that read (h, w)
//   wgrad  dw[c,r,s]   = Σ_{n,p,q} dy[n,c,p,q] · x[n,c,h,w]           db[c] = Σ_{n,p,q} dy[n,c,p,q]
//
// There is no reuse across channels, so this is memory traffic: each block is read once, used by all taps, written
// once.
#include "conv2d_depthwise_3x3.h"
#include "conv2d_depthwise_3x3_nhwc.h"
#include "conv2d_depthwise_nchw.h"
#include "conv2d_depthwise_nhwc.h"

namespace fastconv::cpu {
namespace {

// dw and db from NCHW's pieces, added in order.
template <typename T>
void reduce_nchw(const Conv2dProblem& pr, const Conv2dPlan& plan, const acc_t<T>* partial, T* dw, T* db) {
  const int64_t taps = pr.R * pr.S, piece_elements = (taps + 1) * pr.C;
  for (int64_t c = 0; c < pr.C; ++c) {
    for (int64_t t = 0; t <= taps; ++t) {
      acc_t<T> sum = 0;
      for (int64_t piece = 0; piece < plan.split; ++piece) sum += partial[piece * piece_elements + c * (taps + 1) + t];
      if (t < taps)
        dw[c * taps + t] = from_acc<T>(sum);
      else if (db)
        db[c] = from_acc<T>(sum);
    }
  }
}

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (depthwise_3x3(problem))
      fprop_3x3(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (char*)scratch, parallel);
    else if (problem.layout == Layout::NCHW)
      fprop_nchw(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (char*)scratch, parallel);
    else if (depthwise_3x3_nhwc(problem, plan.direction))
      fprop_3x3_nhwc(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (acc_t<T>*)workspace, parallel);
    else
      fprop_nhwc(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (acc_t<T>*)workspace, parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (depthwise_3x3(problem))
      dgrad_3x3(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (char*)scratch, parallel);
    else if (problem.layout == Layout::NCHW)
      dgrad_nchw(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (char*)scratch, parallel);
    else if (depthwise_3x3_nhwc(problem, plan.direction))
      dgrad_3x3_nhwc(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (acc_t<T>*)workspace, parallel);
    else
      dgrad_nhwc(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (acc_t<T>*)workspace, parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    auto* partial = (acc_t<T>*)workspace;
    if (problem.layout == Layout::NHWC) {
      const auto run = !depthwise_3x3_nhwc(problem, plan.direction) ? wgrad_nhwc<T>
                       : problem.stride_h == 1                      ? wgrad_3x3_nhwc<T, 1>
                                                                    : wgrad_3x3_nhwc<T, 2>;
      run(problem, plan, (const T*)dy, (const T*)x, partial, parallel);
      return reduce_nhwc(problem, plan, partial, (T*)dw, (T*)db, parallel);
    }
    if (depthwise_3x3(problem))
      wgrad_3x3(problem, plan, (const T*)dy, (const T*)x, partial, (char*)scratch, parallel);
    else
      wgrad_nchw(problem, plan, (const T*)dy, (const T*)x, partial, (char*)scratch, parallel);
    reduce_nchw(problem, plan, partial, (T*)dw, (T*)db);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_depthwise;
const Conv2dKernels conv2d_depthwise = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
