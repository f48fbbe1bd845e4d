// What the plan of a convolution and its CUDA launcher must agree on: how the work is cut, and the bytes this takes.
// Pure functions of the problem; the plan calls them for its figures, the launcher to act on them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../plan.h"

namespace fastconv::cuda {

inline int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
inline int64_t round_up(int64_t n, int64_t multiple) { return pieces(n, multiple) * multiple; }
inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// The same convolution without strides and dilations that nothing depends on, however large they are.
inline Conv2dProblem normalized(Conv2dProblem p) {
  if (p.P <= 1) p.stride_h = 1;
  if (p.Q <= 1) p.stride_w = 1;
  if (p.R <= 1) p.dilation_h = 1;
  if (p.S <= 1) p.dilation_w = 1;
  return p;
}

// Whether the coordinates, the pixels of an image, the channels and the taps of a normalized problem can be counted in
// 32 bits (offsets into whole tensors never are).
inline bool counts_in_32_bits(const Conv2dProblem& p) {
  constexpr int64_t limit = int64_t{1} << 30;
  const auto small = [](int64_t a, int64_t b) { return a == 0 || b <= limit / a; };
  return std::max({p.N, p.C, p.H, p.W, p.K, p.R, p.S, p.P, p.Q}) <= limit &&
         std::max({p.pad_h, p.pad_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) <= limit &&
         small(p.H, p.W) && small(p.P, p.Q) && small(std::max(p.C, p.K), std::max(p.W, p.Q)) && small(p.R, p.S) &&
         small(p.C, p.R * p.S) && small(p.K, p.channels_per_group() * p.R * p.S) &&
         (p.P - 1) * p.stride_h + (p.R - 1) * p.dilation_h <= limit &&
         (p.Q - 1) * p.stride_w + (p.S - 1) * p.dilation_w <= limit;
}

// im2col: the matrix of windows is made for one chunk of the pixels (n, p, q) at a time. A chunk is whole images or a
// part of one: some of its pixels or, for dgrad, what some rows of dx gather from. So the workspace is bounded, and a
// chunk is still in the L2 cache, for the most part, when the product reads it.
constexpr int64_t im2col_bytes = int64_t{128} << 20;

struct Im2colChunks {
  bool identity;         // 1×1, stride 1, no padding: x is its own matrix of windows
  int64_t images;        // in a chunk
  int64_t part;          // pixels of y in a chunk (dgrad: rows of dx), of each image
  int64_t pixels;        // the most pixels of y that a chunk has, over all its images
  int64_t matrix_bytes;  // of the matrix of windows
  int64_t sums_bytes;    // of partial sums: [split][groups][m][n rounded up to 4]
  int64_t row_sums_bytes;

  int64_t workspace_bytes() const { return matrix_bytes + sums_bytes + row_sums_bytes; }
};

inline bool is_identity(const Conv2dProblem& p) {
  return p.R == 1 && p.S == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

inline Im2colChunks im2col_chunks(const Conv2dProblem& p, Direction direction, int split) {
  Im2colChunks chunks = {};
  chunks.identity = is_identity(p);
  // The windows of dgrad are sums, not copies of elements.
  const bool gathers = direction == Direction::dgrad && !chunks.identity;
  const int64_t acc_bytes = accumulator_bytes(p.dtype);
  const int64_t taps = p.channels_per_group() * p.R * p.S;
  const int64_t pixel_bytes = chunks.identity ? 0 : p.groups * taps * (gathers ? acc_bytes : element_bytes(p.dtype));
  int64_t limit = int64_t{1} << 30;
  if (pixel_bytes) limit = std::clamp<int64_t>(im2col_bytes / pixel_bytes, 4, limit);
  const int64_t image = std::max<int64_t>(p.P * p.Q, 1), count_limit = int64_t{1} << 30;

  int64_t most_images = limit / image;
  if (gathers) most_images = std::min(most_images, count_limit / std::max<int64_t>(p.C * p.H * p.W, 1));
  if (most_images > 0) {
    chunks.images = pieces(p.N, pieces(std::max<int64_t>(p.N, 1), most_images));
    chunks.part = gathers ? p.H : image;
    chunks.pixels = chunks.images * p.P * p.Q;
  } else if (!gathers) {
    chunks.images = 1;
    chunks.part = round_up(pieces(image, pieces(image, limit)), 4);
    chunks.pixels = chunks.part;
  } else {
    // b rows of dx gather from at most (b − 1 + span) / stride + 1 rows of y.
    const int64_t span = (p.R - 1) * p.dilation_h, y_rows = std::max<int64_t>(limit / std::max<int64_t>(p.Q, 1), 1);
    const int64_t b = std::clamp<int64_t>((y_rows - 1) * p.stride_h - span + 1, 1,
                                          std::max<int64_t>(count_limit / (p.C * p.W), 1));
    chunks.images = 1;
    chunks.part = pieces(p.H, pieces(p.H, b));
    chunks.pixels = std::min(p.P, (chunks.part - 1 + span) / p.stride_h + 1) * p.Q;
  }

  const bool nchw = p.layout == Layout::NCHW;
  if (!chunks.identity) {
    const int64_t elements = p.groups * (nchw ? taps * round_up(chunks.pixels, 4) : chunks.pixels * round_up(taps, 4));
    chunks.matrix_bytes = round_up(elements * (gathers ? acc_bytes : element_bytes(p.dtype)), 256);
  }
  if (direction == Direction::wgrad) {
    chunks.sums_bytes = round_up(split * p.K * round_up(taps, 4) * acc_bytes, 256);
    chunks.row_sums_bytes = round_up(split * p.K * acc_bytes, 256);
  } else if (split > 1) {
    const int64_t channels = direction == Direction::fprop ? p.filters_per_group() : p.channels_per_group();
    chunks.sums_bytes = round_up(split * p.groups * acc_bytes *
                                     (nchw ? channels * round_up(chunks.pixels, 4)
                                           : chunks.pixels * round_up(channels, 4)), 256);
  }
  return chunks;
}

}  // namespace fastconv::cuda
