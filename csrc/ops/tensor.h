// What the ops need of tensors, over LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../problem.h"

namespace fastconv::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Sizes sizes_of(const Tensor& tensor);
DType dtype_of(const Tensor& tensor);  // throws for what no kernel of ours computes
ScalarType scalar_type(DType dtype);
ScalarType statistics_type(DType dtype);  // float64 for float64, float32 otherwise

// The tensor itself if its memory is dense in this order already, otherwise a copy that is.
// Tensors of 4 (5) dimensions are channels_last (channels_last_3d) in NHWC.
Tensor in_layout(const Tensor& tensor, Layout layout);

// An uninitialized tensor on the device of `like`; every allocation of the library goes through here. Failing to
// allocate throws torch's own text.
Tensor allocate(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor& like);

Tensor empty(const Sizes& sizes, Layout layout, ScalarType dtype, const Tensor& like);  // dense
Tensor empty_bytes(int64_t bytes, const Tensor& like);

Tensor convert(const Tensor& tensor, ScalarType dtype);  // dense, in this dtype; the tensor itself if it is both

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Throws torch's error if one of them is on a GPU and the other is not, or on another one.
void check_same_device(const Tensor& x, const Tensor& other);

// The names that torch's messages use: "Float"; "torch.FloatTensor", "torch.cuda.HalfTensor"; "float", "c10::Half".
std::string type_name(const Tensor& tensor);
std::string tensor_type_name(const Tensor& tensor);
std::string scalar_type_name(const Tensor& tensor);

}  // namespace fastconv::ops
