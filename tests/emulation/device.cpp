// In place of csrc/ops/device.cpp: CPU tensors, planned for a small GPU and computed by the emulated kernels.
#include "../../csrc/ops/device.h"

namespace fastconv::ops {

Device::Device(const Tensor&) : target{true, 80, 4} {}

}  // namespace fastconv::ops
