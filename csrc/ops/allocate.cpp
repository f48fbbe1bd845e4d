#include <stdexcept>

#include "tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// In torch 2.13 and newer: the text of the exception behind an error code.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastconv::ops {

#if defined(MADV_HUGEPAGE)
namespace {

constexpr uintptr_t huge_page = 1 << 21;

// A large tensor's memory is often new, and comes page by page as it is first written. 512 pages at once, which Linux
// gives to those who ask, take a small part of that time. What of the tensor is not a whole huge page is left alone:
// it is asked for nothing but its own bytes.
void ask_for_huge_pages(const Tensor& tensor, int32_t dtype_code) {
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t bytes = uintptr_t(tensor.numel()) * aoti_torch_dtype_element_size(dtype_code);
  const uintptr_t begin = (data + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (data + bytes) / huge_page * huge_page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // or not: only time is lost
}

}  // namespace
#endif

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
  Tensor tensor(handle);
#if defined(MADV_HUGEPAGE)
  if (!like.is_cuda()) ask_for_huge_pages(tensor, dtype_code);
#endif
  return tensor;
}

}  // namespace fastconv::ops
