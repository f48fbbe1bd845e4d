#include "device.h"

#include <array>
#include <stdexcept>
#include <string>

// Only a CUDA torch has this symbol: declared weak, the library also loads where it is missing.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastconv::ops {
namespace {

const cuda::DeviceInfo& device_info(int index) {
  constexpr int max_devices = 64;
  static std::array<cuda::DeviceInfo, max_devices> known;  // a device's capability never changes
  if (index < 0 || index >= max_devices) throw std::runtime_error("fastconv: CUDA device index out of range");
  cuda::DeviceInfo& info = known[size_t(index)];
  if (info.sm != 0) return info;
  const cuda::Launchers* launchers = cuda::launchers();
  if (!launchers)
    throw std::runtime_error(
        "fastconv was built without CUDA kernels: build it where an nvcc is found (FASTCONV_CUDA=1 says why not)");
  if (!aoti_torch_get_current_cuda_stream)
    throw std::runtime_error("fastconv found no CUDA stream in this torch: it needs a torch built with CUDA");
  cuda::DeviceInfo asked;
  check(launchers->device_info(index, &asked));
  if (asked.driver < 13000)
    throw std::runtime_error(
        "fastconv's CUDA kernels need a driver of version 580 or newer (CUDA 13.0), this one has CUDA " +
        std::to_string(asked.driver / 1000) + "." + std::to_string(asked.driver % 1000 / 10) +
        ": update the driver or move the tensors to the CPU");
  if (asked.sm < 75)
    throw std::runtime_error("fastconv's CUDA kernels need compute capability 7.5 or newer, this GPU has " +
                             std::to_string(asked.sm / 10) + "." + std::to_string(asked.sm % 10) +
                             ": move the tensors to the CPU");
  return info = asked;
}

}  // namespace

Device::Device(const Tensor& tensor) {
  if (!tensor.is_cuda()) {
    parallel = torch_threads();
    return;
  }
  const int index = tensor.get_device_index();
  const cuda::DeviceInfo& info = device_info(index);
  target = {true, info.sm, info.num_sms};
  guard.emplace(index);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
}

}  // namespace fastconv::ops

// For a test: a library linked without -ltorch would load under a CUDA torch, but find no stream.
extern "C" __attribute__((visibility("default"))) bool fastconv_stream_symbol_resolved() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}
