// Where an op runs: the tensor's device made current, its plan target, its stream, its threads.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../cpu/kernels.h"
#include "../cuda/launchers.h"
#include "../plan.h"
#include "tensor.h"

namespace fastconv::ops {

// device.cpp implements the constructor; the emulated library has its own, which plans for CUDA and runs on the CPU.
struct Device {
  explicit Device(const Tensor& tensor);

  Target target;
  cuda::Stream stream = nullptr;
  cpu::Parallel parallel;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

cpu::Parallel torch_threads();

// Throws what a launcher reports.
void check(const cuda::Status& status);

}  // namespace fastconv::ops
