#include "tensor.h"

#include <stdexcept>

namespace fastconv::ops {
namespace {

template <typename S>
bool channels_inside(const S& sizes, Layout layout) {
  return layout == Layout::NHWC && sizes.size() >= 4;
}

// Calls f(dim, stride) for the dimensions of a dense tensor, from the innermost outward.
template <typename S, typename F>
void for_each_dense_stride(const S& sizes, Layout layout, F&& f) {
  int64_t stride = 1;
  const auto place = [&](int dim) {
    f(dim, stride);
    stride *= sizes[dim] > 1 ? sizes[dim] : 1;
  };
  const bool inside = channels_inside(sizes, layout);
  if (inside) place(1);
  for (int dim = int(sizes.size()) - 1; dim >= 0; --dim)
    if (!(inside && dim == 1)) place(dim);
}

}  // namespace

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw std::runtime_error("fastconv has kernels for float32, float64, float16 and bfloat16 tensors only");
  }
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::float32: return ScalarType::Float;
    case DType::float64: return ScalarType::Double;
    case DType::float16: return ScalarType::Half;
    case DType::bfloat16: return ScalarType::BFloat16;
  }
  return ScalarType::Undefined;
}

ScalarType statistics_type(DType dtype) { return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float; }

Tensor in_layout(const Tensor& tensor, Layout layout) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  bool dense = true;
  for_each_dense_stride(sizes, layout,
                        [&](int dim, int64_t stride) { dense &= sizes[dim] <= 1 || strides[dim] == stride; });
  if (dense) return tensor;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(tensor, !channels_inside(sizes, layout) ? MemoryFormat::Contiguous
                                           : sizes.size() == 4             ? MemoryFormat::ChannelsLast
                                                                           : MemoryFormat::ChannelsLast3d);
}

Tensor empty(const Sizes& sizes, Layout layout, ScalarType dtype, const Tensor& like) {
  Sizes strides(sizes.size());
  for_each_dense_stride(sizes, layout, [&](int dim, int64_t stride) { strides[size_t(dim)] = stride; });
  return allocate(sizes, strides, dtype, like);
}

Tensor empty_bytes(int64_t bytes, const Tensor& like) { return empty({bytes}, Layout::NCHW, ScalarType::Byte, like); }

Tensor convert(const Tensor& tensor, ScalarType dtype) {
  const Tensor typed = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return in_layout(typed, Layout::NCHW);
}

void check_same_device(const Tensor& x, const Tensor& other) {
  if (x.is_cuda() == other.is_cuda() && (!x.is_cuda() || x.get_device_index() == other.get_device_index())) return;
  const auto name = [](const Tensor& t) {
    return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("cpu");
  };
  throw std::runtime_error("Expected all tensors to be on the same device, but found at least two devices, " + name(x) +
                           " and " + name(other) + "!");
}

std::string type_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "Float";
    case ScalarType::Double: return "Double";
    case ScalarType::Half: return "Half";
    case ScalarType::BFloat16: return "BFloat16";
    case ScalarType::Int: return "Int";
    case ScalarType::Long: return "Long";
    case ScalarType::Short: return "Short";
    case ScalarType::Char: return "Char";
    case ScalarType::Byte: return "Byte";
    case ScalarType::Bool: return "Bool";
    case ScalarType::ComplexFloat: return "ComplexFloat";
    case ScalarType::ComplexDouble: return "ComplexDouble";
    default: return "Unknown";
  }
}

std::string tensor_type_name(const Tensor& tensor) {
  return std::string("torch.") + (tensor.is_cuda() ? "cuda." : "") + type_name(tensor) + "Tensor";
}

std::string scalar_type_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float";
    case ScalarType::Double: return "double";
    case ScalarType::Half: return "c10::Half";
    case ScalarType::BFloat16: return "c10::BFloat16";
    case ScalarType::Int: return "int";
    case ScalarType::Long: return "long int";
    default: return tensor_type_name(tensor);
  }
}

}  // namespace fastconv::ops
