// Picks the table of kernels that this machine's instruction set allows.
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastconv::cpu {

#define FASTCONV_DECLARE_ISA(isa)                               \
  namespace isa {                                               \
  extern const Conv2dKernels conv2d_direct;                     \
  extern const Conv2dKernels conv2d_im2col;                     \
  extern const Conv2dKernels conv2d_depthwise;                  \
  extern const Conv2dKernels conv2d_grouped;                    \
  extern const Conv2dKernels conv2d_winograd;                   \
  extern const MaxPool2dKernels max_pool2d;                     \
  extern const AvgPool2dKernels avg_pool2d;                     \
  extern const BatchNormKernels batch_norm;                     \
  extern const BatchNormGradientKernels batch_norm_gradients;   \
  }                                                             \
  static const Kernels isa##_kernels = {#isa,                   \
                                        &isa::conv2d_direct,    \
                                        &isa::conv2d_im2col,    \
                                        &isa::conv2d_depthwise, \
                                        &isa::conv2d_grouped,   \
                                        &isa::conv2d_winograd,  \
                                        &isa::max_pool2d,       \
                                        &isa::avg_pool2d,       \
                                        &isa::batch_norm,       \
                                        &isa::batch_norm_gradients}

FASTCONV_DECLARE_ISA(baseline);
#if defined(__x86_64__)
FASTCONV_DECLARE_ISA(avx2);
FASTCONV_DECLARE_ISA(avx512);
namespace avx512_bf16 {
extern const Conv2dKernels conv2d_im2col;
extern const Conv2dKernels conv2d_grouped;
}  // namespace avx512_bf16
static const Kernels avx512_bf16_kernels = [] {
  Kernels kernels = avx512_kernels;
  kernels.isa = "avx512_bf16";
  kernels.im2col = &avx512_bf16::conv2d_im2col;
  kernels.grouped = &avx512_bf16::conv2d_grouped;
  return kernels;
}();
#endif

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> tables{&baseline_kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {  // every such CPU has F16C too
    tables.push_back(&avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      tables.push_back(&avx512_kernels);
      if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16_kernels);
    }
  }
#endif
  return tables;
}

static const Kernels*& current() {
  static const Kernels* table = all_kernels().back();
  return table;
}

const Kernels& kernels() { return *current(); }

const Conv2dKernels& conv2d_kernels(Algo algo) {
  switch (algo) {
    case Algo::im2col: return *kernels().im2col;
    case Algo::depthwise: return *kernels().depthwise;
    case Algo::grouped: return *kernels().grouped;
    case Algo::winograd: return *kernels().winograd;
    default: return *kernels().direct;
  }
}

void use_isa(const char* isa) {
  for (const Kernels* table : all_kernels())
    if (std::string(isa) == table->isa) {
      current() = table;
      return;
    }
  throw std::invalid_argument(std::string("this machine has no ") + isa);
}

}  // namespace fastconv::cpu
