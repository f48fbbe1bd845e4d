// max_pool2d_forward, _backward, _indices, _gather: validate → allocate → plan → launch.
#include <stdexcept>
#include <tuple>

#include "device.h"

namespace fastconv::ops {
namespace {

Layout layout_of(bool channels_last) { return channels_last ? Layout::NHWC : Layout::NCHW; }

ScalarType offset_type(const MaxPool2dProblem& problem) {
  switch (problem.offset_bytes) {
    case 1: return ScalarType::Byte;
    case 2: return ScalarType::UInt16;
    default: return ScalarType::UInt32;
  }
}

Sizes output_size(const MaxPool2dProblem& p) { return {p.N, p.C, p.P, p.Q}; }

void check_offsets(const Tensor& offsets, const MaxPool2dProblem& problem) {
  if (sizes_of(offsets) != output_size(problem) || offsets.scalar_type() != offset_type(problem))
    throw std::runtime_error("fastconv: expected offsets of size " + format_sizes(output_size(problem)) + " and " +
                             std::to_string(problem.offset_bytes) + " bytes each, but got size " +
                             format_sizes(sizes_of(offsets)) + " and " + std::to_string(offsets.element_size()) +
                             " bytes");
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool2d_forward(const Tensor& x, const Sizes& kernel_size, const Sizes& stride,
                                              const Sizes& padding, const Sizes& dilation, bool ceil_mode,
                                              bool channels_last, bool return_offsets) {
  const MaxPool2dProblem problem = make_max_pool2d_problem(sizes_of(x), kernel_size, stride, padding, dilation,
                                                           ceil_mode, dtype_of(x), layout_of(channels_last));
  const Device device(x);
  const MaxPool2dPlan plan = plan_max_pool2d(problem, device.target);
  const Tensor x_dense = in_layout(x, problem.layout);
  Tensor y = empty(output_size(problem), problem.layout, scalar_type(problem.dtype), x);
  Tensor offsets = return_offsets ? empty(output_size(problem), problem.layout, offset_type(problem), x)
                                  : empty({0}, Layout::NCHW, offset_type(problem), x);
  if (problem.y_elements() == 0) return {y, offsets};
  void* offsets_data = return_offsets ? mutable_data(offsets) : nullptr;
  if (device.target.cuda)
    check(cuda::launchers()->max_pool2d_forward(problem, plan, data(x_dense), mutable_data(y), offsets_data,
                                                device.stream));
  else
    cpu::kernels().max_pool2d->forward(problem, plan, data(x_dense), mutable_data(y), offsets_data, device.parallel);
  return {y, offsets};
}

Tensor max_pool2d_backward(const Tensor& dy, const Tensor& offsets, const Sizes& x_size, const Sizes& kernel_size,
                           const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool ceil_mode,
                           bool channels_last) {
  const MaxPool2dProblem problem = make_max_pool2d_problem(x_size, kernel_size, stride, padding, dilation, ceil_mode,
                                                           dtype_of(dy), layout_of(channels_last));
  if (sizes_of(dy) != output_size(problem))
    throw std::runtime_error("fastconv: expected dy of size " + format_sizes(output_size(problem)) + ", but got " +
                             format_sizes(sizes_of(dy)));
  check_offsets(offsets, problem);
  const Device device(dy);
  const MaxPool2dPlan plan = plan_max_pool2d(problem, device.target);
  const Tensor dy_dense = in_layout(dy, problem.layout), offsets_dense = in_layout(offsets, problem.layout);
  Tensor dx = empty(x_size, problem.layout, scalar_type(problem.dtype), dy);
  if (problem.x_elements() == 0) return dx;
  if (device.target.cuda)
    check(cuda::launchers()->max_pool2d_backward(problem, plan, data(dy_dense), data(offsets_dense), mutable_data(dx),
                                                 device.stream));
  else
    cpu::kernels().max_pool2d->backward(problem, plan, data(dy_dense), data(offsets_dense), mutable_data(dx),
                                        device.parallel);
  return dx;
}

Tensor max_pool2d_indices(const Tensor& offsets, const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride,
                          const Sizes& padding, const Sizes& dilation, bool ceil_mode, bool channels_last) {
  const MaxPool2dProblem problem = make_max_pool2d_problem(x_size, kernel_size, stride, padding, dilation, ceil_mode,
                                                           DType::float32, layout_of(channels_last));
  check_offsets(offsets, problem);
  const Device device(offsets);
  const Tensor offsets_dense = in_layout(offsets, problem.layout);
  Tensor indices = empty(output_size(problem), problem.layout, ScalarType::Long, offsets);
  if (problem.y_elements() == 0) return indices;
  auto* indices_data = static_cast<int64_t*>(mutable_data(indices));
  if (device.target.cuda)
    check(cuda::launchers()->max_pool2d_indices(problem, data(offsets_dense), indices_data, device.stream));
  else
    cpu::kernels().max_pool2d->indices(problem, data(offsets_dense), indices_data, device.parallel);
  return indices;
}

Tensor max_pool2d_gather(const Tensor& x, const Tensor& offsets, const Sizes& kernel_size, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation, bool ceil_mode, bool channels_last) {
  const MaxPool2dProblem problem = make_max_pool2d_problem(sizes_of(x), kernel_size, stride, padding, dilation,
                                                           ceil_mode, dtype_of(x), layout_of(channels_last));
  check_offsets(offsets, problem);
  const Device device(x);
  const Tensor x_dense = in_layout(x, problem.layout), offsets_dense = in_layout(offsets, problem.layout);
  Tensor y = empty(output_size(problem), problem.layout, scalar_type(problem.dtype), x);
  if (problem.y_elements() == 0) return y;
  if (device.target.cuda)
    check(cuda::launchers()->max_pool2d_gather(problem, data(x_dense), data(offsets_dense), mutable_data(y),
                                               device.stream));
  else
    cpu::kernels().max_pool2d->gather(problem, data(x_dense), data(offsets_dense), mutable_data(y), device.parallel);
  return y;
}

#define FASTCONV_REGISTER(m)                                      \
  m.impl("max_pool2d_forward", TORCH_BOX(&max_pool2d_forward));   \
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward)); \
  m.impl("max_pool2d_indices", TORCH_BOX(&max_pool2d_indices));   \
  m.impl("max_pool2d_gather", TORCH_BOX(&max_pool2d_gather))

STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CPU, m) { FASTCONV_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CUDA, m) { FASTCONV_REGISTER(m); }

}  // namespace fastconv::ops
