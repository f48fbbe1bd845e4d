// avg_pool2d_forward, _backward: validate → allocate → plan → launch.
#include <stdexcept>

#include "device.h"

namespace fastconv::ops {
namespace {

Sizes output_size_of(const AvgPool2dProblem& p) { return {p.N, p.C, p.P, p.Q}; }

// output_size makes the pooling adaptive, unless it is empty.
AvgPool2dProblem make_problem(const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                              bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override,
                              const Sizes& output_size, DType dtype, bool channels_last) {
  const Layout layout = channels_last ? Layout::NHWC : Layout::NCHW;
  if (!output_size.empty()) return make_adaptive_avg_pool2d_problem(x_size, output_size, dtype, layout);
  return make_avg_pool2d_problem(x_size, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
                                 dtype, layout);
}

}  // namespace

Tensor avg_pool2d_forward(const Tensor& x, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                          bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override,
                          const Sizes& output_size, bool channels_last) {
  const AvgPool2dProblem problem = make_problem(sizes_of(x), kernel_size, stride, padding, ceil_mode, count_include_pad,
                                                divisor_override, output_size, dtype_of(x), channels_last);
  const Device device(x);
  const AvgPool2dPlan plan = plan_avg_pool2d(problem, device.target);
  const Tensor x_dense = in_layout(x, problem.layout);
  Tensor y = empty(output_size_of(problem), problem.layout, scalar_type(problem.dtype), x);
  if (problem.y_elements() == 0) return y;
  if (device.target.cuda)
    check(cuda::launchers()->avg_pool2d_forward(problem, plan, data(x_dense), mutable_data(y), device.stream));
  else
    cpu::kernels().avg_pool2d->forward(problem, plan, data(x_dense), mutable_data(y), device.parallel);
  return y;
}

Tensor avg_pool2d_backward(const Tensor& dy, const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride,
                           const Sizes& padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, const Sizes& output_size, bool channels_last) {
  const AvgPool2dProblem problem = make_problem(x_size, kernel_size, stride, padding, ceil_mode, count_include_pad,
                                                divisor_override, output_size, dtype_of(dy), channels_last);
  if (sizes_of(dy) != output_size_of(problem))
    throw std::runtime_error("fastconv: expected dy of size " + format_sizes(output_size_of(problem)) + ", but got " +
                             format_sizes(sizes_of(dy)));
  const Device device(dy);
  const AvgPool2dPlan plan = plan_avg_pool2d(problem, device.target);
  const Tensor dy_dense = in_layout(dy, problem.layout);
  Tensor dx = empty(x_size, problem.layout, scalar_type(problem.dtype), dy);
  if (problem.x_elements() == 0) return dx;
  if (device.target.cuda)
    check(cuda::launchers()->avg_pool2d_backward(problem, plan, data(dy_dense), mutable_data(dx), device.stream));
  else
    cpu::kernels().avg_pool2d->backward(problem, plan, data(dy_dense), mutable_data(dx), device.parallel);
  return dx;
}

#define FASTCONV_REGISTER(m)                                    \
  m.impl("avg_pool2d_forward", TORCH_BOX(&avg_pool2d_forward)); \
  m.impl("avg_pool2d_backward", TORCH_BOX(&avg_pool2d_backward))

STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CPU, m) { FASTCONV_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CUDA, m) { FASTCONV_REGISTER(m); }

}  // namespace fastconv::ops
