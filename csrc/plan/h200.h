// What the models of time assume of the GPU, an H200. The rates of large copies, of bf16 products that use all of the
// tensor cores, and of the L2 cache are those that others report; CUDA cores' are NVIDIA's data sheet's; a launch is an
// estimate. None was measured by this project.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv::cuda::h200 {

constexpr int sms = 132;
constexpr double float32_tflops = 67, float64_tflops = 34;  // multiply-adds on CUDA cores, two operations each
constexpr double bf16_tflops = 790;
constexpr double copy_bytes_per_us = 4.3e6, l2_bytes_per_us = 5.5e6, launch_us = 2.5;

// Multiply-adds of an SM's CUDA cores in a µs.
inline double multiply_adds_per_us(DType dtype) {
  return (dtype == DType::float64 ? float64_tflops : float32_tflops) / 2 * 1e6 / sms;
}

}  // namespace fastconv::cuda::h200
