// conv2d_fprop, conv2d_dgrad, conv2d_wgrad: validate → allocate → plan → launch.
#include <stdexcept>
#include <tuple>

#include "device.h"

namespace fastconv::ops {
namespace {

// What the three ops share after their tensors.
struct Config {
  const Sizes& stride;
  const Sizes& padding;
  const Sizes& dilation;
  int64_t groups;
  bool channels_last;
  bool allow_tf32;
  const std::optional<std::string>& algo;

  Layout layout() const { return channels_last ? Layout::NHWC : Layout::NCHW; }
};

Conv2dProblem problem_of(const Sizes& x_size, const Sizes& w_size, const std::optional<Sizes>& bias_size, DType dtype,
                         const Config& config) {
  return make_conv2d_problem(x_size, w_size, bias_size, config.stride, config.padding, config.dilation, config.groups,
                             dtype, config.layout(), config.allow_tf32);
}

// A plan with the memory it asks for.
struct Prepared {
  Conv2dPlan plan;
  Tensor workspace, scratch;
  alignas(64) char little_scratch[4096];  // where this is enough, no memory need be asked for

  Prepared(const Conv2dProblem& problem, Direction direction, const Device& device, const Config& config,
           const Tensor& like)
      : plan(plan_conv2d(problem, direction, device.target,
                         config.algo ? std::optional(parse_algo(*config.algo, device.target.cuda)) : std::nullopt)) {
    if (plan.workspace_bytes) workspace = empty_bytes(plan.workspace_bytes, like);
    const int64_t scratch_bytes = plan.scratch_bytes * device.parallel.workers;
    if (scratch_bytes > int64_t(sizeof little_scratch)) scratch = empty_bytes(scratch_bytes, like);
  }

  void* workspace_data() { return plan.workspace_bytes ? mutable_data(workspace) : nullptr; }
  void* scratch_data() { return scratch.defined() ? mutable_data(scratch) : little_scratch; }
};

void check_same_type(const Tensor& x, const Tensor& w) {
  if (x.scalar_type() == w.scalar_type() && x.is_cuda() == w.is_cuda()) return;
  if (x.is_cuda() == w.is_cuda() && !x.is_cuda() && x.scalar_type() != ScalarType::Float)
    throw std::runtime_error("expected scalar type " + type_name(x) + " but found " + type_name(w));
  throw std::runtime_error("Input type (" + tensor_type_name(x) + ") and weight type (" + tensor_type_name(w) +
                           ") should be the same" +
                           (x.is_cuda() ? "" : " or input should be a MKLDNN tensor and weight is a dense tensor"));
}

void check_dy(const Tensor& dy, const Conv2dProblem& p) {
  const Sizes expected{p.N, p.K, p.P, p.Q};
  if (sizes_of(dy) != expected)
    throw std::runtime_error("fastconv: expected dy of size " + format_sizes(expected) + ", but got " +
                             format_sizes(sizes_of(dy)));
}

}  // namespace

Tensor conv2d_fprop(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation, int64_t groups, bool channels_last, bool allow_tf32,
                    const std::optional<std::string>& algo, bool relu) {
  const Config config{stride, padding, dilation, groups, channels_last, allow_tf32, algo};
  Conv2dProblem problem =
      problem_of(sizes_of(x), sizes_of(w), bias ? std::optional(sizes_of(*bias)) : std::nullopt, dtype_of(x), config);
  problem.relu = relu;
  check_same_type(x, w);
  if (bias && bias->scalar_type() != x.scalar_type())
    throw std::runtime_error("Input type (" + scalar_type_name(x) + ") and bias type (" + scalar_type_name(*bias) +
                             ") should be the same");
  if (bias) check_same_device(x, *bias);
  const Device device(x);
  Prepared prepared(problem, Direction::fprop, device, config, x);
  const Tensor x_dense = in_layout(x, problem.layout), w_dense = in_layout(w, problem.layout);
  const std::optional<Tensor> bias_dense = bias ? std::optional(in_layout(*bias, Layout::NCHW)) : std::nullopt;
  Tensor y = empty({problem.N, problem.K, problem.P, problem.Q}, problem.layout, scalar_type(problem.dtype), x);
  if (problem.y_elements() == 0) return y;
  if (device.target.cuda)
    check(cuda::launchers()->conv2d_fprop[int(prepared.plan.algo)](problem, prepared.plan, data(x_dense), data(w_dense),
                                                                   data(bias_dense), mutable_data(y),
                                                                   prepared.workspace_data(), device.stream));
  else
    cpu::conv2d_kernels(prepared.plan.algo)
        .fprop(problem, prepared.plan, data(x_dense), data(w_dense), data(bias_dense), mutable_data(y),
               prepared.workspace_data(), prepared.scratch_data(), device.parallel);
  return y;
}

Tensor conv2d_dgrad(const Tensor& dy, const Tensor& w, const Sizes& x_size, const Sizes& stride, const Sizes& padding,
                    const Sizes& dilation, int64_t groups, bool channels_last, bool allow_tf32,
                    const std::optional<std::string>& algo) {
  const Config config{stride, padding, dilation, groups, channels_last, allow_tf32, algo};
  const Conv2dProblem problem = problem_of(x_size, sizes_of(w), std::nullopt, dtype_of(dy), config);
  check_same_type(dy, w);
  check_dy(dy, problem);
  const Device device(dy);
  Prepared prepared(problem, Direction::dgrad, device, config, dy);
  const Tensor dy_dense = in_layout(dy, problem.layout), w_dense = in_layout(w, problem.layout);
  Tensor dx = empty(x_size, problem.layout, scalar_type(problem.dtype), dy);
  if (problem.x_elements() == 0) return dx;
  if (device.target.cuda)
    check(cuda::launchers()->conv2d_dgrad[int(prepared.plan.algo)](problem, prepared.plan, data(dy_dense),
                                                                   data(w_dense), mutable_data(dx),
                                                                   prepared.workspace_data(), device.stream));
  else
    cpu::conv2d_kernels(prepared.plan.algo)
        .dgrad(problem, prepared.plan, data(dy_dense), data(w_dense), mutable_data(dx), prepared.workspace_data(),
               prepared.scratch_data(), device.parallel);
  return dx;
}

std::tuple<Tensor, Tensor> conv2d_wgrad(const Tensor& dy, const Tensor& x, const Sizes& w_size, bool bias_grad,
                                        const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                        int64_t groups, bool channels_last, bool allow_tf32,
                                        const std::optional<std::string>& algo) {
  const Config config{stride, padding, dilation, groups, channels_last, allow_tf32, algo};
  const Conv2dProblem problem = problem_of(sizes_of(x), w_size, std::nullopt, dtype_of(dy), config);
  check_same_type(dy, x);
  check_dy(dy, problem);
  const Device device(dy);
  Prepared prepared(problem, Direction::wgrad, device, config, dy);
  const Tensor dy_dense = in_layout(dy, problem.layout), x_dense = in_layout(x, problem.layout);
  Tensor dw = empty(w_size, problem.layout, scalar_type(problem.dtype), dy);
  Tensor db = empty({bias_grad ? problem.K : 0}, Layout::NCHW, scalar_type(problem.dtype), dy);
  if (problem.y_elements() == 0 || problem.w_elements() == 0) {
    torch::stable::zero_(dw);
    torch::stable::zero_(db);
    return {dw, db};
  }
  void* db_data = bias_grad ? mutable_data(db) : nullptr;
  if (device.target.cuda)
    check(cuda::launchers()->conv2d_wgrad[int(prepared.plan.algo)](problem, prepared.plan, data(dy_dense),
                                                                   data(x_dense), mutable_data(dw), db_data,
                                                                   prepared.workspace_data(), device.stream));
  else
    cpu::conv2d_kernels(prepared.plan.algo)
        .wgrad(problem, prepared.plan, data(dy_dense), data(x_dense), mutable_data(dw), db_data,
               prepared.workspace_data(), prepared.scratch_data(), device.parallel);
  return {dw, db};
}

#define FASTCONV_REGISTER(m)                        \
  m.impl("conv2d_fprop", TORCH_BOX(&conv2d_fprop)); \
  m.impl("conv2d_dgrad", TORCH_BOX(&conv2d_dgrad)); \
  m.impl("conv2d_wgrad", TORCH_BOX(&conv2d_wgrad))

STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CPU, m) { FASTCONV_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CUDA, m) { FASTCONV_REGISTER(m); }

}  // namespace fastconv::ops
