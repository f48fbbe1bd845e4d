// What conv2d_mma.cu hands to its kernel.
#pragma once

#include "index.cuh"

namespace fastconv::cuda {

// Along one axis, output i reads input i·step + first + tap·delta.
struct WindowAxis {
  int size, step, first, delta;
};

// windows(pixel, tap) of an NHWC tensor, for the pixels (n, i, j) of its outputs and the taps (r, s, channel).
struct Windows {
  const void* data;
  WindowAxis h, w;
  int64_t pitch;                 // elements between neighbouring pixels
  Divisor image, row;            // outputs of an image, and of a row of it
  Divisor filter_row, channels;  // taps of a row of the filter, and channels of a group
};

struct ConvMma {
  Windows windows;
  const void* other;               // fprop, dgrad: w; wgrad: dy
  int64_t other_row, other_group;  // elements between its rows (n; filter and tap; k), and between its groups
  void* out;
  const void* bias;  // null, or fprop's
  bool relu;         // of fprop
  void* db;          // null, or wgrad's, in the elements' type
  void* sums;        // null, or partial sums instead of out, of the accumulation type; row_sums likewise of db
  void* row_sums;
  int m, n, k, groups, phases, splits, k_per_split, tiles_m, tiles_n;
  int64_t out_pitch;     // elements between the rows of out
  int piece_a, piece_b;  // bytes that may be loaded at once
  bool out_pairs;
  // Of dgrad: of dx and of the filters.
  int H, W, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tap_step_h, tap_step_w, phases_w;
};

// Floats rounded to tf32, where the other types are multiplied as they are.
struct Tf32 {};

// Queues the kernel of the plan's direction and tile. Math is __half, __nv_bfloat16, float, double or Tf32, each
// instantiated in one of the files conv2d_mma_*.cu, which take long to compile.
template <typename Math>
Status launch_conv2d_mma(const ConvMma& g, const Conv2dPlan& plan, Stream stream);

}  // namespace fastconv::cuda
