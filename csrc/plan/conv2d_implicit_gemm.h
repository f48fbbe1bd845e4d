// What the plan of implicit GEMM on CUDA cores and its launcher (cuda/conv2d_implicit_gemm.cu) must agree on, and the
// model of its time by which the plan chooses.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv::cuda {

constexpr int implicit_gemm_depth = 8;  // of the contraction, a step

// C[m][n] = Σ_k windows(m, k)·matrix(k, n), of each group and, of dgrad, each phase of the strides (the largest is
// meant here; see cuda/implicit_gemm.cuh and cuda/phases.cuh).
struct ImplicitGemmProduct {
  int64_t m, n, k, groups, phases;
};
ImplicitGemmProduct implicit_gemm_product(const Conv2dProblem& normalized, Direction direction);

// The workspace: partial sums [split][groups][m][n rounded up to 4], of wgrad also those of db [split][K].
struct ImplicitGemmWorkspace {
  int64_t sums_bytes, bias_sums_bytes;
};
ImplicitGemmWorkspace implicit_gemm_workspace(const Conv2dProblem& normalized, Direction direction, int split);

// Fills in tile, split, workspace, kernel and the predicted time of a call on an H200, in µs:
//
//   product  = (most blocks on one SM, at least those that fill it) · multiply-adds of a block / (rate of an SM ·
//   reach) memory   = bytes of x, w and y, each once / bandwidth time     = slower of the two + partial sums, written
//   and read / bandwidth + launches
//
// reach is the part of an SM's multiply-adds that a full SM makes: 64 of a thread come with 4 loads and, by the tile,
// 12 to 27 instructions that look windows up. The rest of it is an estimate until it is measured.
void plan_implicit_gemm(const Conv2dProblem& normalized, const Target& target, Conv2dPlan* plan);

// The same of a call that plan_im2col has planned, whose windows are also written and read once.
double im2col_time_us(const Conv2dProblem& normalized, const Target& target, const Conv2dPlan& plan);

}  // namespace fastconv::cuda
