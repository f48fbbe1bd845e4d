// fastconv/_introspect: the plans and build information for Python. It links libfastconv.so and calls the functions
// that the ops call, so what is explained is what is launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "plan.h"

namespace py = pybind11;
namespace fastconv {
namespace {

// A plan with all that can be said of it.
struct Explained {
  Conv2dProblem problem;
  Conv2dPlan plan;
  Reasons reasons;
};

DType parse_dtype(const std::string& text) {
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16})
    if (text == name(dtype)) return dtype;
  throw std::invalid_argument("fastconv has no kernel for " + text);
}

Explained explain(const Sizes& x_size, const Sizes& w_size, const Sizes& stride, const Sizes& padding,
                  const Sizes& dilation, int64_t groups, const std::string& dtype, bool channels_last, bool allow_tf32,
                  const std::string& direction, const std::string& arch, int num_sms,
                  const std::optional<std::string>& algo) {
  Explained e;
  e.problem = make_conv2d_problem(x_size, w_size, std::nullopt, stride, padding, dilation, groups, parse_dtype(dtype),
                                  channels_last ? Layout::NHWC : Layout::NCHW, allow_tf32);
  Target target = parse_arch(arch);
  if (num_sms) target.num_sms = num_sms;
  e.plan = plan_conv2d(e.problem, parse_direction(direction), target,
                       algo ? std::optional(parse_algo(*algo, target.cuda)) : std::nullopt, &e.reasons);
  return e;
}

std::vector<std::string> algorithm_names(bool cuda) {
  std::vector<std::string> names;
  for (Algo algo : algorithms(cuda)) names.push_back(name(algo));
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* table : cpu::all_kernels()) names.push_back(table->isa);
  return names;
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  py::class_<Explained>(m, "Plan")
      .def_property_readonly("problem", [](const Explained& e) { return describe(e.problem); })
      .def_property_readonly("direction", [](const Explained& e) { return name(e.plan.direction); })
      .def_property_readonly("algo", [](const Explained& e) { return name(e.plan.algo); })
      .def_property_readonly("kernel", [](const Explained& e) { return e.plan.kernel; })
      .def_property_readonly(
          "tile", [](const Explained& e) { return py::make_tuple(e.plan.tile_m, e.plan.tile_n, e.plan.tile_k); })
      .def_property_readonly("split", [](const Explained& e) { return e.plan.split; })
      .def_property_readonly("workspace_bytes", [](const Explained& e) { return e.plan.workspace_bytes; })
      .def_property_readonly("scratch_bytes", [](const Explained& e) { return e.plan.scratch_bytes; })
      .def_property_readonly("predicted_us",
                             [](const Explained& e) {
                               return e.plan.predicted_us > 0 ? std::optional(e.plan.predicted_us) : std::nullopt;
                             })
      .def_property_readonly("output_size",
                             [](const Explained& e) {
                               const Conv2dProblem& p = e.problem;
                               return py::make_tuple(p.N, p.K, p.P, p.Q);
                             })
      .def_property_readonly("unread_rows", [](const Explained& e) { return e.problem.unread_rows(); })
      .def_property_readonly("unread_cols", [](const Explained& e) { return e.problem.unread_cols(); })
      .def_property_readonly("multiply_adds", [](const Explained& e) { return e.problem.multiply_adds(); })
      .def_property_readonly("reasons", [](const Explained& e) {
        py::list reasons;
        for (const Reason& r : e.reasons) reasons.append(py::make_tuple(name(r.algo), r.taken, r.text));
        return reasons;
      });
  m.def("plan_conv2d", &explain);
  m.def("algorithms", &algorithm_names);
  m.def("isas", &isas);
  m.def("isa", [] { return cpu::kernels().isa; });
  m.def("use_isa", &cpu::use_isa, "For tests: run the CPU kernels of this instruction set from now on.");
  m.attr("built_with_cuda") = bool(FASTCONV_WITH_CUDA);
}

}  // namespace fastconv
