// The CPU kernels, one table for each instruction set the library was built for.
//
// Every kernel file in this folder is compiled once per instruction set into its own namespace (FASTCONV_ISA), but for
// those named *_bfloat16.cpp, which are all of avx512_bf16's: its other kernels are AVX-512's. A kernel file
// exports nothing but one `extern const` table: an inline function or template with external linkage would be merged
// by the linker with another file's copy and could execute instructions that this machine lacks.
// Pointers hold elements of problem.dtype in problem.layout, unless said otherwise. No kernel allocates or throws.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan.h"
#include "../problem.h"

namespace fastconv::cpu {

// Runs body(worker, context) for worker = 0 … workers−1, on as many threads as the caller's pool has.
struct Parallel {
  int workers = 1;
  void (*run)(int workers, void (*body)(int worker, void* context), void* context) = nullptr;
};

struct Conv2dKernels {
  // y = x ∗ w + bias, then ReLU where the problem says so. bias (K elements of dtype) may be null. scratch: workers ×
  // plan.scratch_bytes.
  void (*fprop)(const Conv2dProblem&, const Conv2dPlan&, const void* x, const void* w, const void* bias, void* y,
                void* workspace, void* scratch, const Parallel&);
  // dx = the gradient of x, every element written.
  void (*dgrad)(const Conv2dProblem&, const Conv2dPlan&, const void* dy, const void* w, void* dx, void* workspace,
                void* scratch, const Parallel&);
  // dw, and db (K elements) unless it is null.
  void (*wgrad)(const Conv2dProblem&, const Conv2dPlan&, const void* dy, const void* x, void* dw, void* db,
                void* workspace, void* scratch, const Parallel&);
};

struct MaxPool2dKernels {
  // offsets: problem.offset_bytes bytes each, laid out like y; null if no gradient is needed.
  void (*forward)(const MaxPool2dProblem&, const MaxPool2dPlan&, const void* x, void* y, void* offsets,
                  const Parallel&);
  // dx gathers from every window that covers it; every element written once.
  void (*backward)(const MaxPool2dProblem&, const MaxPool2dPlan&, const void* dy, const void* offsets, void* dx,
                   const Parallel&);
  // int64 indices h·W + w into each plane, laid out like y; a window without any input element gets index 0.
  void (*indices)(const MaxPool2dProblem&, const void* offsets, int64_t* indices, const Parallel&);
  // y[i] = x at the position that offsets[i] names; 0 for a window without any input element.
  void (*gather)(const MaxPool2dProblem&, const void* x, const void* offsets, void* y, const Parallel&);
};

struct AvgPool2dKernels {
  void (*forward)(const AvgPool2dProblem&, const AvgPool2dPlan&, const void* x, void* y, const Parallel&);
  // dx gathers from every window that covers it; every element written once.
  void (*backward)(const AvgPool2dProblem&, const AvgPool2dPlan&, const void* dy, void* dx, const Parallel&);
};

// With problem.relu, y = ReLU(x̂·weight + bias + residual); residual: like x, or null. weight, bias, mean, invstd,
// running_*, dweight, dbias: C values of the statistics' type (float64 for float64 x, float32 otherwise). weight, bias
// and the running pair may be null.
struct BatchNormKernels {
  // affine: null, or 2·C values, scale and shift: x̂·weight + bias = (x − mean)·scale + shift.
  // y, and the batch's mean and 1/sqrt(var + eps); running = (1 − momentum)·running + momentum·batch, var unbiased.
  void (*train)(const BatchNormProblem&, const BatchNormPlan&, const void* x, const void* weight, const void* bias,
                void* running_mean, void* running_var, double momentum, double eps, const void* residual, void* y,
                void* mean, void* invstd, void* affine, void* workspace, const Parallel&);
  // y = (x − mean) / sqrt(var + eps) · weight + bias, and then as in train.
  void (*eval)(const BatchNormProblem&, const BatchNormPlan&, const void* x, const void* weight, const void* bias,
               const void* mean, const void* var, double eps, const void* residual, void* y, const Parallel&);
  // moments: three rows of C float64 values, the count, the mean and Σ (x − mean)².
  void (*moments)(const BatchNormProblem&, const BatchNormPlan&, const void* x, double* moments, void* workspace,
                  const Parallel&);
};

struct BatchNormGradientKernels {
  // dx (if not null), dweight, dbias. training: mean and invstd depend on x; otherwise they are constants.
  // Behind a ReLU, one of affine and y says where it was positive, and with y, dz = the ReLU's own gradient is written,
  // which is the residual's too. y, dz: like x; null otherwise. In evaluation it is y.
  void (*backward)(const BatchNormProblem&, const BatchNormPlan&, const void* dy, const void* x, const void* weight,
                   const void* mean, const void* invstd, const void* affine, const void* y, bool training, void* dx,
                   void* dweight, void* dbias, void* dz, void* workspace, const Parallel&);
  // dx of training, where means has two rows of C values: ⟨dy⟩ and ⟨dy·x̂⟩, maybe over more than this dy and x.
  void (*apply_gradients)(const BatchNormProblem&, const BatchNormPlan&, const void* dy, const void* x,
                          const void* weight, const void* mean, const void* invstd, const void* means, void* dx,
                          const Parallel&);
};

struct Kernels {
  const char* isa;
  const Conv2dKernels* direct;
  const Conv2dKernels* im2col;
  const Conv2dKernels* depthwise;
  const Conv2dKernels* grouped;
  const Conv2dKernels* winograd;
  const MaxPool2dKernels* max_pool2d;
  const AvgPool2dKernels* avg_pool2d;
  const BatchNormKernels* batch_norm;
  const BatchNormGradientKernels* batch_norm_gradients;
};

const Kernels& kernels();                   // for the best instruction set that this machine has
std::vector<const Kernels*> all_kernels();  // those that this machine can run, plainest first
void use_isa(const char* isa);  // for tests: "baseline", "avx2", "avx512", "avx512_bf16"; throws if it is not there

const Conv2dKernels& conv2d_kernels(Algo algo);

}  // namespace fastconv::cpu
