// What the plan of a convolution on tensor cores and its launcher (cuda/conv2d_mma.cu) must agree on, and the model of
// its time by which the plan chooses.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv::cuda {

// x, w and y (or their gradients) as the kernel reads and writes them, in NHWC: in place or copies in the workspace.
// What is read has its channels and filters rounded up, with zeros, where wider loads are worth the copy's bytes.
struct MmaOperands {
  int64_t x_channels, w_channels;  // of a group
  int64_t w_filters, y_filters;    // of a group
  bool copies_x, copies_w, copies_y;
};
MmaOperands mma_operands(const Conv2dProblem& normalized, Direction direction);

// C[m][n] = Σ_k A[m][k]·B[k][n], of each group and, of dgrad, each phase of the strides (the largest is meant here):
// rows h ≡ a (mod stride_h) and columns w ≡ b (mod stride_w) of dx meet the same taps, and no others.
struct MmaProduct {
  int64_t m, n, k, groups, phases;
};
MmaProduct mma_product(const Conv2dProblem& normalized, Direction direction);

// The workspace: partial sums [split][groups][m][n rounded up to 4], of wgrad also those of db [split][K], both in the
// accumulation type; and the copies of x, w and y.
struct MmaWorkspace {
  int64_t sums, row_sums, x, w, y, end;  // where each begins, in bytes
};
MmaWorkspace mma_workspace(const Conv2dProblem& normalized, Direction direction, int split);

// A block's tile of m × n results.
struct MmaTile {
  int m, n;
  double reach;     // of the tensor cores' rate, by an SM that is full of such blocks
  int64_t to_fill;  // blocks that fill an SM
};

// What a call takes on an H200, in µs: the slower of the tensor cores and memory, the copies, and the launches.
//
//   steps     = contraction of a split / 64 bytes, + 2 to fill the pipeline and to store
//   blocks    = most on one SM: this is the waves' quantization, 133 blocks take twice as long as 132
//   products  = steps · the slower of  max(blocks, to_fill) · multiply-adds of a step / (rate of an SM · reach)
//                                and   blocks · bytes of a step / an SM's part of the L2 cache's bandwidth
//   memory    = bytes of x, w and y / bandwidth; of their copies and of partial sums, written and read, likewise
double mma_time_us(const Conv2dProblem& normalized, Direction direction, const MmaTile& tile, int split, int num_sms);

// Fills in tile, split, workspace and kernel, and says why the other tiles were not taken.
void plan_mma(const Conv2dProblem& normalized, const Target& target, Conv2dPlan* plan, Reasons* reasons);

}  // namespace fastconv::cuda
