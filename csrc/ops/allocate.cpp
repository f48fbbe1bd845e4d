#include <stdexcept>

#include "tensor.h"

// In torch 2.13 and newer: the text of the exception behind an error code.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastconv::ops {

Tensor allocate(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype_code, device_type,
                               like.get_device_index(), &handle) != TORCH_SUCCESS) {
    if (torch_exception_get_what_without_backtrace)
      throw std::runtime_error(torch_exception_get_what_without_backtrace());
    int64_t bytes = aoti_torch_dtype_element_size(dtype_code);
    for (int64_t size : sizes) bytes *= size;
    throw std::runtime_error(like.is_cuda()
                                 ? "CUDA out of memory. Tried to allocate " + std::to_string(bytes) + " bytes"
                                 : "DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                                       std::to_string(bytes) + " bytes.");
  }
  return Tensor(handle);
}

}  // namespace fastconv::ops
