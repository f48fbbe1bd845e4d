// In place of csrc/ops/allocate.cpp: outputs and workspaces start as NaN, so that what no kernel writes shows. What
// lies past their ends is AddressSanitizer's: torch takes each from malloc.
#include "../../csrc/ops/tensor.h"
#include "nan.h"

namespace fastconv::ops {

Tensor allocate(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor&) {
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype_code,
                                                  aoti_torch_device_type_cpu(), -1, &handle));
  Tensor tensor(handle);
  emulation::fill_with_nan(tensor.mutable_data_ptr(),
                           size_t(tensor.numel()) * aoti_torch_dtype_element_size(dtype_code));
  return tensor;
}

}  // namespace fastconv::ops
