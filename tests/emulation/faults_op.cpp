// An op that launches a case of faults.cpp on an output that it allocates as the others do.
#include "../../csrc/ops/tensor.h"

extern "C" const char* fastconv_emulation_run_case(const char* name, float* out);

namespace {

using namespace fastconv::ops;

Tensor unwritten_output(const Tensor& like) {
  Tensor out = empty({64}, fastconv::Layout::NCHW, ScalarType::Float, like);
  fastconv_emulation_run_case("unwritten_output", static_cast<float*>(mutable_data(out)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTCONV_NAMESPACE, m) { m.def("unwritten_output(Tensor like) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(FASTCONV_NAMESPACE, CPU, m) { m.impl("unwritten_output", TORCH_BOX(&unwritten_output)); }
