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
         std::max({p.pad_h, p.pad_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) <= limit && small(p.H, p.W) &&
         small(p.P, p.Q) && small(std::max(p.C, p.K), std::max(p.W, p.Q)) && small(p.R, p.S) && small(p.C, p.R * p.S) &&
         small(p.K, p.channels_per_group() * p.R * p.S) && (p.P - 1) * p.stride_h + (p.R - 1) * p.dilation_h <= limit &&
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
    const int64_t b =
        std::clamp<int64_t>((y_rows - 1) * p.stride_h - span + 1, 1, std::max<int64_t>(count_limit / (p.C * p.W), 1));
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
    chunks.sums_bytes =
        round_up(split * p.groups * acc_bytes *
                     (nchw ? channels * round_up(chunks.pixels, 4) : chunks.pixels * round_up(channels, 4)),
                 256);
  }
  return chunks;
}

// direct: a block computes a tile of outputs from a patch of the input and a slice of the filters in shared memory.
// Along one axis, output i reads input i·step + first + j·delta through tap j. For fprop and wgrad step is the stride
// and delta the dilation. dgrad is such a gather too, once for each phase of the stride: rows h of dx with one
// remainder meet the same taps r, every (stride / gcd)-th, and h + pad − r·dilation is stride times a row p of its
// input dy.
constexpr int direct_threads = 256;
constexpr int direct_patch = 4096;   // elements
constexpr int direct_filter = 2048;  // elements; wgrad keeps dy there

struct DirectAxis {
  int64_t input, output, taps;  // sizes
  int64_t stride, pad, dilation;
  int64_t phases, step, delta, tap_step;
  int64_t tiles;                    // of a phase
  int tile;                         // outputs
  int chunk;                        // taps at a time
  int64_t spacing;                  // the patch holds every spacing-th input, the others are never read
  int64_t extent;                   // of the patch
  int64_t patch_step, patch_delta;  // step and delta in the patch
};

struct DirectTile {
  DirectAxis h, w;
  int images;
  int filters;    // outputs' channels in a tile, of a group; of dw its filters: a multiple of 4
  int channels;   // inputs' channels at a time; of dw the channels in a tile
  int64_t plane;  // patch elements of one channel

  int pixels() const { return images * h.tile * w.tile; }
};

inline DirectAxis direct_axis(int64_t input, int64_t output, int64_t taps, int64_t stride, int64_t pad,
                              int64_t dilation, bool dgrad) {
  DirectAxis axis = {};
  axis.taps = taps, axis.stride = stride, axis.pad = pad, axis.dilation = dilation;
  const int64_t common = std::gcd(stride, dilation);
  axis.input = dgrad ? output : input, axis.output = dgrad ? input : output;
  axis.phases = dgrad ? std::clamp<int64_t>(input, 1, stride) : 1;
  axis.step = dgrad ? 1 : stride;
  axis.delta = dgrad ? -dilation / common : dilation;
  axis.tap_step = dgrad ? stride / common : 1;
  return axis;
}

inline int64_t direct_extent(DirectAxis& axis) {
  const int64_t step = axis.tile > 1 ? axis.step : 0, delta = axis.chunk > 1 ? axis.delta : 0;
  axis.spacing = std::max<int64_t>(std::gcd(step, delta), 1);
  axis.patch_step = step / axis.spacing;
  axis.patch_delta = delta / axis.spacing;
  axis.extent = (axis.tile - 1) * axis.patch_step + (axis.chunk - 1) * std::abs(axis.patch_delta) + 1;
  return std::min<int64_t>(axis.extent, direct_patch + 1);
}

inline DirectTile direct_tile(const Conv2dProblem& p, Direction direction) {
  const bool dgrad = direction == Direction::dgrad, wgrad = direction == Direction::wgrad;
  DirectTile tile = {};
  tile.h = direct_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h, dgrad);
  tile.w = direct_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w, dgrad);
  const int64_t out_channels = dgrad ? p.channels_per_group() : p.filters_per_group();
  const int64_t in_channels = dgrad ? p.filters_per_group() : p.channels_per_group();

  // Threads for the filters, four each; what is left are threads for four pixels each (wgrad: four taps each).
  int filter_threads = 1;
  while (4 * filter_threads < out_channels && filter_threads < (wgrad ? 4 : 16)) filter_threads *= 2;
  tile.filters = 4 * filter_threads;
  const int64_t pixels = wgrad ? direct_filter / tile.filters : 4 * direct_threads / filter_threads;
  const int64_t most_taps = wgrad ? 4 * direct_threads / filter_threads : direct_filter / (tile.filters + 4);

  // As square as 32 columns allow, in tiles of equal size; small images share a tile.
  const auto count = [](const DirectAxis& axis) { return std::max<int64_t>(pieces(axis.output, axis.phases), 1); };
  const int64_t rows = count(tile.h), columns = count(tile.w);
  const int64_t most_columns = std::clamp<int64_t>(pixels / rows, std::min<int64_t>(32, pixels), pixels);
  tile.w.tiles = pieces(columns, most_columns);
  tile.w.tile = int(pieces(columns, tile.w.tiles));
  tile.h.tiles = pieces(rows, pixels / tile.w.tile);
  tile.h.tile = int(pieces(rows, tile.h.tiles));
  tile.images = int(std::clamp<int64_t>(pixels / (tile.h.tile * tile.w.tile), 1, std::max<int64_t>(p.N, 1)));

  // All taps at once if they fit, else halves of them; one tap always does.
  const auto taps_of = [](const DirectAxis& axis) {
    return int(std::clamp<int64_t>(pieces(axis.taps, axis.tap_step), 1, 1024));
  };
  tile.h.chunk = taps_of(tile.h);
  tile.w.chunk = taps_of(tile.w);
  for (;;) {
    tile.plane = tile.images * direct_extent(tile.h) * direct_extent(tile.w) | 1;  // odd: channels in different banks
    if (tile.plane <= direct_patch && tile.h.chunk * tile.w.chunk <= most_taps) break;
    if (tile.h.chunk == 1 && tile.w.chunk == 1) break;
    int& longer = tile.h.chunk >= tile.w.chunk ? tile.h.chunk : tile.w.chunk;
    longer = (longer + 1) / 2;
  }
  const int64_t most_channels = std::min(direct_patch / tile.plane, most_taps / (tile.h.chunk * tile.w.chunk));
  tile.channels = int(std::clamp<int64_t>(most_channels, 1, std::max<int64_t>(in_channels, 1)));
  return tile;
}

// Blocks of wgrad, each for some filters and taps of a group; the plan multiplies them by splitting the pixels.
inline int64_t direct_wgrad_blocks(const Conv2dProblem& p, const DirectTile& tile) {
  return p.groups * pieces(p.filters_per_group(), tile.filters) * pieces(p.channels_per_group(), tile.channels) *
         pieces(p.R, tile.h.chunk) * pieces(p.S, tile.w.chunk);
}

// Of the partial sums of dw and db.
inline int64_t split_wgrad_bytes(const Conv2dProblem& p, int split) {
  return split * (p.w_elements() + p.K) * accumulator_bytes(p.dtype);
}

// depthwise: wgrad's blocks, each for some channels (one of NCHW, neighbours of NHWC) and 3 × 3 taps.
constexpr int depthwise_threads = 256;

inline int depthwise_channel_lanes(const Conv2dProblem& p) {
  int lanes = 1;
  if (p.layout == Layout::NHWC)
    while (lanes < p.K && lanes < 32) lanes *= 2;
  return lanes;
}

inline int64_t depthwise_wgrad_blocks(const Conv2dProblem& p) {
  return pieces(p.K, depthwise_channel_lanes(p)) * pieces(p.R, 3) * pieces(p.S, 3);
}

}  // namespace fastconv::cuda
