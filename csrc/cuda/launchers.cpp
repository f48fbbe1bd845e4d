// The table of launchers in a library with CUDA kernels; absent.cpp takes its place in one without.
#include "launchers.h"

namespace fastconv::cuda {

const Launchers* launchers() {
  static const Launchers table = {
      device_info,
      {conv2d_direct_naive_fprop, conv2d_direct_fprop, conv2d_im2col_fprop, conv2d_implicit_gemm_tile_fprop,
       conv2d_implicit_gemm_registers_fprop, conv2d_implicit_gemm_vectors_fprop, conv2d_implicit_gemm_fprop,
       conv2d_depthwise_fprop, conv2d_mma_fprop},
      {nullptr, conv2d_direct_dgrad, conv2d_im2col_dgrad, nullptr, nullptr, nullptr, conv2d_implicit_gemm_dgrad,
       conv2d_depthwise_dgrad, conv2d_mma_dgrad},
      {nullptr, conv2d_direct_wgrad, conv2d_im2col_wgrad, nullptr, nullptr, nullptr, conv2d_implicit_gemm_wgrad,
       conv2d_depthwise_wgrad, conv2d_mma_wgrad},
      max_pool2d_forward,
      max_pool2d_backward,
      max_pool2d_indices,
      max_pool2d_gather,
      avg_pool2d_forward,
      avg_pool2d_backward,
      batch_norm_train,
      batch_norm_eval,
      batch_norm_backward,
      batch_norm_moments,
      batch_norm_backward_apply,
  };
  return &table;
}

}  // namespace fastconv::cuda
