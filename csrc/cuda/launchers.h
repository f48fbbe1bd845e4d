// The CUDA launchers, as plain C++: no CUDA header is needed to call them.
// Pointers are device pointers to elements of problem.dtype in problem.layout unless said otherwise; `stream` is a
// cudaStream_t. Nothing here allocates, synchronizes or throws. What each pointer means, which may be null and what is
// written is said once, in cpu/kernels.h; the two sets of kernels have the same contract.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "../problem.h"

namespace fastconv::cuda {

// A failed CUDA call: what was called and the driver's words. Both are static strings; null means success.
struct Status {
  const char* where = nullptr;
  const char* error = nullptr;
  bool ok() const { return error == nullptr; }
};

using Stream = void*;

struct DeviceInfo {
  int sm = 0;  // compute capability × 10
  int num_sms = 0;
  int driver = 0;  // CUDA version the driver supports, e.g. 13000
};
Status device_info(int device, DeviceInfo* info);

// conv2d_direct_naive.cu, conv2d_direct.cu, conv2d_im2col.cu, conv2d_implicit_gemm*.cu, conv2d_depthwise.cu,
// conv2d_mma.cu
using Conv2dFprop = Status(const Conv2dProblem&, const Conv2dPlan&, const void* x, const void* w, const void* bias,
                           void* y, void* workspace, Stream);
using Conv2dDgrad = Status(const Conv2dProblem&, const Conv2dPlan&, const void* dy, const void* w, void* dx,
                           void* workspace, Stream);
using Conv2dWgrad = Status(const Conv2dProblem&, const Conv2dPlan&, const void* dy, const void* x, void* dw, void* db,
                           void* workspace, Stream);
Conv2dFprop conv2d_direct_naive_fprop, conv2d_direct_fprop, conv2d_im2col_fprop, conv2d_implicit_gemm_tile_fprop,
    conv2d_implicit_gemm_registers_fprop, conv2d_implicit_gemm_vectors_fprop, conv2d_implicit_gemm_fprop,
    conv2d_depthwise_fprop, conv2d_mma_fprop;
Conv2dDgrad conv2d_direct_dgrad, conv2d_im2col_dgrad, conv2d_implicit_gemm_dgrad, conv2d_depthwise_dgrad,
    conv2d_mma_dgrad;
Conv2dWgrad conv2d_direct_wgrad, conv2d_im2col_wgrad, conv2d_implicit_gemm_wgrad, conv2d_depthwise_wgrad,
    conv2d_mma_wgrad;

// max_pool2d.cu
Status max_pool2d_forward(const MaxPool2dProblem&, const MaxPool2dPlan&, const void* x, void* y, void* offsets, Stream);
Status max_pool2d_backward(const MaxPool2dProblem&, const MaxPool2dPlan&, const void* dy, const void* offsets, void* dx,
                           Stream);
Status max_pool2d_indices(const MaxPool2dProblem&, const void* offsets, int64_t* indices, Stream);
Status max_pool2d_gather(const MaxPool2dProblem&, const void* x, const void* offsets, void* y, Stream);

// avg_pool2d.cu
Status avg_pool2d_forward(const AvgPool2dProblem&, const AvgPool2dPlan&, const void* x, void* y, Stream);
Status avg_pool2d_backward(const AvgPool2dProblem&, const AvgPool2dPlan&, const void* dy, void* dx, Stream);

// batch_norm.cu
Status batch_norm_train(const BatchNormProblem&, const BatchNormPlan&, const void* x, const void* weight,
                        const void* bias, void* running_mean, void* running_var, double momentum, double eps,
                        const void* residual, void* y, void* mean, void* invstd, void* affine, void* workspace, Stream);
Status batch_norm_eval(const BatchNormProblem&, const BatchNormPlan&, const void* x, const void* weight,
                       const void* bias, const void* mean, const void* var, double eps, const void* residual, void* y,
                       Stream);
Status batch_norm_moments(const BatchNormProblem&, const BatchNormPlan&, const void* x, double* moments,
                          void* workspace, Stream);

// batch_norm_gradients.cu
Status batch_norm_backward(const BatchNormProblem&, const BatchNormPlan&, const void* dy, const void* x,
                           const void* weight, const void* mean, const void* invstd, const void* affine, const void* y,
                           bool training, void* dx, void* dweight, void* dbias, void* dz, void* workspace, Stream);
Status batch_norm_backward_apply(const BatchNormProblem&, const BatchNormPlan&, const void* dy, const void* x,
                                 const void* weight, const void* mean, const void* invstd, const void* means, void* dx,
                                 Stream);

// All of the above, or null in a library that was built without CUDA kernels.
struct Launchers {
  decltype(&fastconv::cuda::device_info) device_info;
  Conv2dFprop* conv2d_fprop[num_algos];  // by Algo; null where an algorithm has no kernel for the direction
  Conv2dDgrad* conv2d_dgrad[num_algos];
  Conv2dWgrad* conv2d_wgrad[num_algos];
  decltype(&fastconv::cuda::max_pool2d_forward) max_pool2d_forward;
  decltype(&fastconv::cuda::max_pool2d_backward) max_pool2d_backward;
  decltype(&fastconv::cuda::max_pool2d_indices) max_pool2d_indices;
  decltype(&fastconv::cuda::max_pool2d_gather) max_pool2d_gather;
  decltype(&fastconv::cuda::avg_pool2d_forward) avg_pool2d_forward;
  decltype(&fastconv::cuda::avg_pool2d_backward) avg_pool2d_backward;
  decltype(&fastconv::cuda::batch_norm_train) batch_norm_train;
  decltype(&fastconv::cuda::batch_norm_eval) batch_norm_eval;
  decltype(&fastconv::cuda::batch_norm_backward) batch_norm_backward;
  decltype(&fastconv::cuda::batch_norm_moments) batch_norm_moments;
  decltype(&fastconv::cuda::batch_norm_backward_apply) batch_norm_backward_apply;
};
const Launchers* launchers();

}  // namespace fastconv::cuda
