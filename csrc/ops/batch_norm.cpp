// batch_norm_train, batch_norm_eval, batch_norm_backward; the same with a residual and ReLU, batch_norm_act_train,
// batch_norm_act_eval, batch_norm_act_backward; and the steps of training that several machines exchange sums
// between: batch_norm_moments, batch_norm_backward_sums, batch_norm_backward_apply. Validate → allocate → plan →
// launch.
#include <stdexcept>
#include <tuple>

#include "device.h"

namespace fastconv::ops {
namespace {

void check_parameter(const char* what, const Tensor& parameter, const BatchNormProblem& problem) {
  if (parameter.numel() != problem.C)
    throw std::runtime_error(std::string(what) + " should contain " + std::to_string(problem.C) + " elements not " +
                             std::to_string(parameter.numel()));
}

// torch takes parameters in x's dtype or, for low precision x, in float32, and all of them in the same.
void check_dtypes(const Tensor& x, std::initializer_list<const std::optional<Tensor>*> parameters) {
  const Tensor* first = nullptr;
  for (const std::optional<Tensor>* parameter : parameters) {
    if (!*parameter) continue;
    check_same_device(x, **parameter);
    const ScalarType dtype = (*parameter)->scalar_type();
    const bool low = dtype_of(x) == DType::float16 || dtype_of(x) == DType::bfloat16;
    if (dtype != x.scalar_type() && !(low && dtype == ScalarType::Float))
      throw std::runtime_error(low || x.scalar_type() == ScalarType::Float
                                   ? "mixed dtype (CPU): expect parameter to have scalar type of Float"
                                   : "mixed dtype (CPU): all inputs must share same datatype.");
    if (!first) first = &**parameter;
    if (first->scalar_type() != dtype)
      throw std::runtime_error("mixed dtype (CPU): expect parameter to have scalar type of Float");
  }
}

void check_statistics(const char* what, const Tensor& statistics, const BatchNormProblem& problem) {
  check_parameter(what, statistics, problem);
  if (statistics.dim() != 1)
    throw std::runtime_error("fastconv: expected " + std::string(what) + " to be 1-dimensional, but got size " +
                             format_sizes(sizes_of(statistics)));
}

std::optional<Tensor> as_statistics(const std::optional<Tensor>& tensor, const BatchNormProblem& problem) {
  return tensor ? std::optional(convert(*tensor, statistics_type(problem.dtype))) : std::nullopt;
}

void* mutable_data(const std::optional<Tensor>& tensor) { return tensor ? ops::mutable_data(*tensor) : nullptr; }

BatchNormProblem problem_of(const Tensor& x, bool channels_last) {
  return make_batch_norm_problem(sizes_of(x), dtype_of(x), channels_last ? Layout::NHWC : Layout::NCHW);
}

Tensor workspace_of(const BatchNormPlan& plan, const Tensor& like) { return empty_bytes(plan.workspace_bytes, like); }

// What comes behind: nothing, or a residual, which may be absent, and ReLU.
struct Activation {
  bool relu = false;
  const std::optional<Tensor>* residual = nullptr;

  // The residual in the problem's layout.
  std::optional<Tensor> dense(const Tensor& x, const BatchNormProblem& problem) const {
    if (!residual || !*residual) return std::nullopt;
    check_same_device(x, **residual);
    if (sizes_of(**residual) != sizes_of(x) || (*residual)->scalar_type() != x.scalar_type())
      throw std::runtime_error("fastconv: expected residual like x, of size " + format_sizes(sizes_of(x)) +
                               ", but got " + format_sizes(sizes_of(**residual)));
    return in_layout(**residual, problem.layout);
  }
};

struct Trained {
  Tensor y, mean, invstd, affine;
};

Trained train(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, double momentum,
              double eps, bool channels_last, const Activation& activation) {
  BatchNormProblem problem = problem_of(x, channels_last);
  problem.relu = activation.relu;
  if (running_mean.has_value() != running_var.has_value())
    throw std::invalid_argument("running_mean and running_var must either both be None or neither be None");
  if (running_mean) check_statistics("running_mean", *running_mean, problem);
  if (running_var) check_statistics("running_var", *running_var, problem);
  if (weight) check_parameter("weight", *weight, problem);
  if (bias) check_parameter("bias", *bias, problem);
  check_dtypes(x, {&weight, &bias, &running_mean, &running_var});
  const Device device(x);
  const BatchNormPlan plan = plan_batch_norm(problem, device.target);
  const ScalarType statistics = statistics_type(problem.dtype);
  const Tensor x_dense = in_layout(x, problem.layout);
  Tensor y = empty(sizes_of(x), problem.layout, x.scalar_type(), x);
  Tensor mean = empty({problem.C}, Layout::NCHW, statistics, x);
  Tensor invstd = empty({problem.C}, Layout::NCHW, statistics, x);
  const std::optional<Tensor> residual = activation.dense(x, problem);
  Tensor affine;
  void* affine_data = nullptr;
  if (activation.relu) {
    affine = empty({residual ? 0 : 2, problem.C}, Layout::NCHW, statistics, x);
    if (!residual) affine_data = mutable_data(affine);
  }
  if (problem.x_elements() == 0) {  // no value, so nothing to learn from: the running statistics stay
    torch::stable::zero_(mean);
    torch::stable::zero_(invstd);
    if (activation.relu) torch::stable::zero_(affine);
    return {y, mean, invstd, affine};
  }
  const Tensor workspace = workspace_of(plan, x);
  const std::optional<Tensor> gamma = as_statistics(weight, problem), beta = as_statistics(bias, problem);
  // Statistics that are kept in another dtype or not densely are updated in a copy and copied back.
  const std::optional<Tensor> new_mean = as_statistics(running_mean, problem);
  const std::optional<Tensor> new_var = as_statistics(running_var, problem);
  if (device.target.cuda)
    check(cuda::launchers()->batch_norm_train(problem, plan, data(x_dense), data(gamma), data(beta),
                                              mutable_data(new_mean), mutable_data(new_var), momentum, eps,
                                              data(residual), mutable_data(y), mutable_data(mean), mutable_data(invstd),
                                              affine_data, mutable_data(workspace), device.stream));
  else
    cpu::kernels().batch_norm->train(problem, plan, data(x_dense), data(gamma), data(beta), mutable_data(new_mean),
                                     mutable_data(new_var), momentum, eps, data(residual), mutable_data(y),
                                     mutable_data(mean), mutable_data(invstd), affine_data, mutable_data(workspace),
                                     device.parallel);
  const auto write_back = [](const std::optional<Tensor>& kept, const std::optional<Tensor>& updated) {
    if (!kept || data(*kept) == data(*updated)) return;
    Tensor target = *kept;
    torch::stable::copy_(target, *updated);
  };
  write_back(running_mean, new_mean);
  write_back(running_var, new_var);
  return {y, mean, invstd, affine};
}

Tensor evaluate(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const Tensor& running_mean, const Tensor& running_var, double eps, bool channels_last,
                const Activation& activation) {
  BatchNormProblem problem = problem_of(x, channels_last);
  problem.relu = activation.relu;
  check_statistics("running_mean", running_mean, problem);
  check_statistics("running_var", running_var, problem);
  if (weight) check_parameter("weight", *weight, problem);
  if (bias) check_parameter("bias", *bias, problem);
  const std::optional<Tensor> kept_mean = running_mean, kept_var = running_var;
  check_dtypes(x, {&weight, &bias, &kept_mean, &kept_var});
  const Device device(x);
  const BatchNormPlan plan = plan_batch_norm(problem, device.target);
  const Tensor x_dense = in_layout(x, problem.layout);
  Tensor y = empty(sizes_of(x), problem.layout, x.scalar_type(), x);
  if (problem.x_elements() == 0) return y;
  const std::optional<Tensor> gamma = as_statistics(weight, problem), beta = as_statistics(bias, problem);
  const std::optional<Tensor> mean = as_statistics(kept_mean, problem), var = as_statistics(kept_var, problem);
  const std::optional<Tensor> residual = activation.dense(x, problem);
  if (device.target.cuda)
    check(cuda::launchers()->batch_norm_eval(problem, plan, data(x_dense), data(gamma), data(beta), data(mean),
                                             data(var), eps, data(residual), mutable_data(y), device.stream));
  else
    cpu::kernels().batch_norm->eval(problem, plan, data(x_dense), data(gamma), data(beta), data(mean), data(var), eps,
                                    data(residual), mutable_data(y), device.parallel);
  return y;
}

void check_gradient(const Tensor& dy, const Tensor& x) {
  if (sizes_of(dy) != sizes_of(x) || dy.scalar_type() != x.scalar_type())
    throw std::runtime_error("fastconv: expected dy like x, of size " + format_sizes(sizes_of(x)) + ", but got " +
                             format_sizes(sizes_of(dy)));
}

struct Gradients {
  Tensor dx, dweight, dbias, dz;
};

// The gradients of weight and bias come in the statistics' dtype, whether or not there is a weight.
Gradients backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& mean,
                   const Tensor& invstd, bool relu, const std::optional<Tensor>& affine, const std::optional<Tensor>& y,
                   bool training, bool channels_last) {
  BatchNormProblem problem = problem_of(x, channels_last);
  problem.relu = relu;
  check_gradient(dy, x);
  if (y) check_gradient(*y, x);
  if (relu && (y.has_value() == affine.has_value() || (!training && !y)))
    throw std::runtime_error("fastconv: expected either affine or y, and y in evaluation");
  if (affine && sizes_of(*affine) != Sizes{2, problem.C})
    throw std::runtime_error("fastconv: expected affine of size " + format_sizes({2, problem.C}) + ", but got " +
                             format_sizes(sizes_of(*affine)));
  check_parameter("mean", mean, problem);
  check_parameter("invstd", invstd, problem);
  if (weight) check_parameter("weight", *weight, problem);
  const Device device(x);
  const BatchNormPlan plan = plan_batch_norm(problem, device.target);
  const ScalarType statistics = statistics_type(problem.dtype);
  const Tensor dy_dense = in_layout(dy, problem.layout), x_dense = in_layout(x, problem.layout);
  Tensor dx = empty(sizes_of(x), problem.layout, x.scalar_type(), x);
  Tensor dweight = empty({problem.C}, Layout::NCHW, statistics, x);
  Tensor dbias = empty({problem.C}, Layout::NCHW, statistics, x);
  Tensor dz;
  if (relu)
    dz = y ? empty(sizes_of(x), problem.layout, x.scalar_type(), x) : empty({0}, Layout::NCHW, x.scalar_type(), x);
  if (problem.x_elements() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias, dz};
  }
  const std::optional<Tensor> y_dense = y ? std::optional(in_layout(*y, problem.layout)) : std::nullopt;
  const std::optional<Tensor> affine_dense = as_statistics(affine, problem);
  void* dz_data = y ? mutable_data(dz) : nullptr;
  const Tensor workspace = workspace_of(plan, x);
  const std::optional<Tensor> gamma = as_statistics(weight, problem);
  const Tensor mean_dense = convert(mean, statistics), invstd_dense = convert(invstd, statistics);
  if (device.target.cuda)
    check(cuda::launchers()->batch_norm_backward(problem, plan, data(dy_dense), data(x_dense), data(gamma),
                                                 data(mean_dense), data(invstd_dense), data(affine_dense),
                                                 data(y_dense), training, mutable_data(dx), mutable_data(dweight),
                                                 mutable_data(dbias), dz_data, mutable_data(workspace), device.stream));
  else
    cpu::kernels().batch_norm_gradients->backward(
        problem, plan, data(dy_dense), data(x_dense), data(gamma), data(mean_dense), data(invstd_dense),
        data(affine_dense), data(y_dense), training, mutable_data(dx), mutable_data(dweight), mutable_data(dbias),
        dz_data, mutable_data(workspace), device.parallel);
  return {dx, dweight, dbias, dz};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& running_mean,
                                                    const std::optional<Tensor>& running_var, double momentum,
                                                    double eps, bool channels_last) {
  const Trained t = train(x, weight, bias, running_mean, running_var, momentum, eps, channels_last, {});
  return {t.y, t.mean, t.invstd};
}

Tensor batch_norm_eval(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                       const Tensor& running_mean, const Tensor& running_var, double eps, bool channels_last) {
  return evaluate(x, weight, bias, running_mean, running_var, eps, channels_last, {});
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& dy, const Tensor& x,
                                                       const std::optional<Tensor>& weight, const Tensor& mean,
                                                       const Tensor& invstd, bool training, bool channels_last) {
  const Gradients g = backward(dy, x, weight, mean, invstd, false, std::nullopt, std::nullopt, training, channels_last);
  return {g.dx, g.dweight, g.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_train(const Tensor& x, const std::optional<Tensor>& weight,
                                                                const std::optional<Tensor>& bias,
                                                                const std::optional<Tensor>& running_mean,
                                                                const std::optional<Tensor>& running_var,
                                                                const std::optional<Tensor>& residual, double momentum,
                                                                double eps, bool channels_last) {
  const Trained t = train(x, weight, bias, running_mean, running_var, momentum, eps, channels_last, {true, &residual});
  return {t.y, t.mean, t.invstd, t.affine};
}

Tensor batch_norm_act_eval(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                           const Tensor& running_mean, const Tensor& running_var, const std::optional<Tensor>& residual,
                           double eps, bool channels_last) {
  return evaluate(x, weight, bias, running_mean, running_var, eps, channels_last, {true, &residual});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& invstd,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& y, bool training, bool channels_last) {
  const Gradients g = backward(dy, x, weight, mean, invstd, true, affine, y, training, channels_last);
  return {g.dx, g.dweight, g.dbias, g.dz};
}

// Three rows of C values: the count, the mean and Σ (x − mean)², all zero where there is no x. In float64, so that
// merging those of several machines loses nothing.
Tensor batch_norm_moments(const Tensor& x, bool channels_last) {
  const BatchNormProblem problem = problem_of(x, channels_last);
  const Device device(x);
  const BatchNormPlan plan = plan_batch_norm(problem, device.target);
  const Tensor x_dense = in_layout(x, problem.layout);
  Tensor moments = empty({3, problem.C}, Layout::NCHW, ScalarType::Double, x);
  if (problem.x_elements() == 0) {
    torch::stable::zero_(moments);
    return moments;
  }
  const Tensor workspace = workspace_of(plan, x);
  double* out = static_cast<double*>(mutable_data(moments));
  if (device.target.cuda)
    check(cuda::launchers()->batch_norm_moments(problem, plan, data(x_dense), out, mutable_data(workspace),
                                                device.stream));
  else
    cpu::kernels().batch_norm->moments(problem, plan, data(x_dense), out, mutable_data(workspace), device.parallel);
  return moments;
}

// Two rows of C values, Σ dy and Σ dy·x̂: the backward pass without its dx.
Tensor batch_norm_backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                bool channels_last) {
  const BatchNormProblem problem = problem_of(x, channels_last);
  check_gradient(dy, x);
  check_parameter("mean", mean, problem);
  check_parameter("invstd", invstd, problem);
  const Device device(x);
  const BatchNormPlan plan = plan_batch_norm(problem, device.target);
  const ScalarType statistics = statistics_type(problem.dtype);
  const Tensor dy_dense = in_layout(dy, problem.layout), x_dense = in_layout(x, problem.layout);
  Tensor sums = empty({2, problem.C}, Layout::NCHW, statistics, x);
  if (problem.x_elements() == 0) {
    torch::stable::zero_(sums);
    return sums;
  }
  const Tensor workspace = workspace_of(plan, x);
  const Tensor mean_dense = convert(mean, statistics), invstd_dense = convert(invstd, statistics);
  void* sum_dy = mutable_data(sums);
  void* sum_dyx = static_cast<char*>(sum_dy) + problem.C * (statistics == ScalarType::Double ? 8 : 4);
  if (device.target.cuda)
    check(cuda::launchers()->batch_norm_backward(problem, plan, data(dy_dense), data(x_dense), nullptr,
                                                 data(mean_dense), data(invstd_dense), nullptr, nullptr, true, nullptr,
                                                 sum_dyx, sum_dy, nullptr, mutable_data(workspace), device.stream));
  else
    cpu::kernels().batch_norm_gradients->backward(problem, plan, data(dy_dense), data(x_dense), nullptr,
                                                  data(mean_dense), data(invstd_dense), nullptr, nullptr, true, nullptr,
                                                  sum_dyx, sum_dy, nullptr, mutable_data(workspace), device.parallel);
  return sums;
}

// dx, from ⟨dy⟩ and ⟨dy·x̂⟩, the two rows of `means`.
Tensor batch_norm_backward_apply(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight,
                                 const Tensor& mean, const Tensor& invstd, const Tensor& means, bool channels_last) {
  const BatchNormProblem problem = problem_of(x, channels_last);
  check_gradient(dy, x);
  check_parameter("mean", mean, problem);
  check_parameter("invstd", invstd, problem);
  if (weight) check_parameter("weight", *weight, problem);
  if (sizes_of(means) != Sizes{2, problem.C})
    throw std::runtime_error("fastconv: expected means of size " + format_sizes({2, problem.C}) + ", but got " +
                             format_sizes(sizes_of(means)));
  const Device device(x);
  const BatchNormPlan plan = plan_batch_norm(problem, device.target);
  const ScalarType statistics = statistics_type(problem.dtype);
  const Tensor dy_dense = in_layout(dy, problem.layout), x_dense = in_layout(x, problem.layout);
  Tensor dx = empty(sizes_of(x), problem.layout, x.scalar_type(), x);
  if (problem.x_elements() == 0) return dx;
  const std::optional<Tensor> gamma = as_statistics(weight, problem);
  const Tensor mean_dense = convert(mean, statistics), invstd_dense = convert(invstd, statistics);
  const Tensor means_dense = convert(means, statistics);
  if (device.target.cuda)
    check(cuda::launchers()->batch_norm_backward_apply(problem, plan, data(dy_dense), data(x_dense), data(gamma),
                                                       data(mean_dense), data(invstd_dense), data(means_dense),
                                                       mutable_data(dx), device.stream));
  else
    cpu::kernels().batch_norm_gradients->apply_gradients(problem, plan, data(dy_dense), data(x_dense), data(gamma),
                                                         data(mean_dense), data(invstd_dense), data(means_dense),
                                                         mutable_data(dx), device.parallel);
  return dx;
}

#define FASTCONV_REGISTER(m)                                                \
  m.impl("batch_norm_act_train", TORCH_BOX(&batch_norm_act_train));         \
  m.impl("batch_norm_act_eval", TORCH_BOX(&batch_norm_act_eval));           \
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));   \
  m.impl("batch_norm_train", TORCH_BOX(&batch_norm_train));                 \
  m.impl("batch_norm_eval", TORCH_BOX(&batch_norm_eval));                   \
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));           \
  m.impl("batch_norm_moments", TORCH_BOX(&batch_norm_moments));             \
  m.impl("batch_norm_backward_sums", TORCH_BOX(&batch_norm_backward_sums)); \
  m.impl("batch_norm_backward_apply", TORCH_BOX(&batch_norm_backward_apply))

STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CPU, m) { FASTCONV_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CUDA, m) { FASTCONV_REGISTER(m); }

}  // namespace fastconv::ops
