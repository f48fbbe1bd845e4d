// What the plan of a convolution on tensor cores and its launcher (cuda/conv2d_mma.cu) must agree on.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv::cuda {

// C[m][n] = Σ_k A[m][k]·B[k][n], of each group and, of dgrad, each phase of the strides (the largest is meant here):
// rows h ≡ a (mod stride_h) and columns w ≡ b (mod stride_w) of dx meet the same taps, and no others.
struct MmaProduct {
  int64_t m, n, k, groups, phases;
};

inline MmaProduct mma_product(const Conv2dProblem& p, Direction direction) {
  const int64_t channels = p.channels_per_group(), filters = p.filters_per_group();
  const int64_t rows = std::clamp<int64_t>(p.H, 1, p.stride_h), columns = std::clamp<int64_t>(p.W, 1, p.stride_w);
  switch (direction) {
    case Direction::fprop: return {p.N * p.P * p.Q, filters, channels * p.R * p.S, p.groups, 1};
    case Direction::dgrad:
      return {p.N * pieces(p.H, rows) * pieces(p.W, columns), channels,
              filters * pieces(p.R, p.stride_h / std::gcd(p.stride_h, p.dilation_h)) *
                  pieces(p.S, p.stride_w / std::gcd(p.stride_w, p.dilation_w)),
              p.groups, rows * columns};
    default: return {filters, channels * p.R * p.S, p.N * p.P * p.Q, p.groups, 1};
  }
}

// The workspace: partial sums [split][groups][m][n rounded up to 4], of wgrad also those of db [split][K], both
// float32; and NHWC copies of x, w and y (or their gradients), for a problem in NCHW whose memory differs from that.
struct MmaWorkspace {
  int64_t sums, row_sums, x, w, y, end;  // where each begins, in bytes
};

inline MmaWorkspace mma_workspace(const Conv2dProblem& p, Direction direction, int split) {
  const MmaProduct product = mma_product(p, direction);
  const bool partial = split > 1, copies = p.layout == Layout::NCHW;
  const auto copy = [&](int64_t channels, int64_t plane, int64_t elements) {
    return copies && channels > 1 && plane > 1 ? round_up(elements * element_bytes(p.dtype), 256) : 0;
  };
  MmaWorkspace at = {};
  at.row_sums = partial ? round_up(4 * split * product.groups * product.m * round_up(product.n, 4), 256) : 0;
  at.x = at.row_sums + (partial && direction == Direction::wgrad ? round_up(4 * split * p.K, 256) : 0);
  at.w = at.x + copy(p.C, p.H * p.W, p.x_elements());
  at.y = at.w + copy(p.channels_per_group(), p.R * p.S, p.w_elements());
  at.end = at.y + copy(p.K, p.P * p.Q, p.y_elements());
  return at;
}

}  // namespace fastconv::cuda
