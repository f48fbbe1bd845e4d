// wgrad of bfloat16 without conversion, NCHW, summed over pairs of neighbouring pixels:
//
//   C[t][filter] = Σ_pixel patch[t][pixel] · dy[filter][pixel]     t = (channel, tap)
//
// Rows of patches are copied from the planes of x. A row of ones behind them gives the gradient of the bias.
#pragma once

#include "conv2d_bfloat16_planes.h"
#include "conv2d_wgrad_out.h"

namespace fastconv::cpu {
namespace {

// Neighbouring pixels of one image, that take a whole number of pairs of a block.
struct PixelRun {
  int64_t pixel, length, pair;
};
template <typename Visit>
FASTCONV_INLINE int64_t for_pixel_runs(int64_t pixel0, int64_t count, int64_t image, const Visit& visit) {
  int64_t pairs = 0;
  for (int64_t pixel = pixel0; pixel < pixel0 + count;) {
    const int64_t length = min_of(pixel0 + count - pixel, image - pixel % image);
    visit(PixelRun{pixel, length, pairs});
    pairs += ceil_div(length, 2);
    pixel += length;
  }
  return pairs;
}

inline void wgrad_pixels_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* dy,
                                  const bfloat16_t* x, const WgradOut<bfloat16_t>& out, char* scratch,
                                  const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), taps = pr.R * pr.S;
  const int64_t image = pr.P * pr.Q, pixels = pr.N * image, plane = pr.H * pr.W;
  const DepthBlock block = depth_block(cg, taps, block_elements(pr, plan));
  const int64_t tile_filters = block_filters(pr, plan), tile_pixels = summed_pixels(pr, plan);
  const int64_t c_blocks = ceil_div(cg, block.channels), tap_blocks = ceil_div(taps, block.taps);
  const int64_t k_blocks = ceil_div(kg, tile_filters), pixel_blocks = ceil_div(pixels, tile_pixels);
  const Bfloat16Scratch layout = bfloat16_pixels_wgrad_scratch(pr, plan);
  for_each_task(parallel, plan.split * pr.groups * c_blocks * tap_blocks * k_blocks, [&](int worker, int64_t task) {
    const int64_t k0 = task % k_blocks * tile_filters, tap0 = task / k_blocks % tap_blocks * block.taps;
    const int64_t c0 = task / k_blocks / tap_blocks % c_blocks * block.channels;
    const int64_t group = task / k_blocks / tap_blocks / c_blocks % pr.groups;
    const int64_t piece = task / k_blocks / tap_blocks / c_blocks / pr.groups;
    const int64_t k_count = min_of(tile_filters, kg - k0), c_count = min_of(block.channels, cg - c0);
    const int64_t tap_count = min_of(block.taps, taps - tap0), depth = c_count * tap_count;
    const bool with_bias = out.db && c0 == 0 && tap0 == 0;
    const int64_t rows = depth + with_bias, panels = ceil_div(k_count, pair_cols), c_row = panels * pair_cols;
    const int64_t a_row = layout.a_row, b_panel = layout.pairs * 2 * pair_cols;
    char* memory = scratch + worker * plan.scratch_bytes;
    auto *a = reinterpret_cast<bfloat16_t*>(memory), *b = reinterpret_cast<bfloat16_t*>(memory + layout.b);
    auto* reads = reinterpret_cast<TapRead*>(memory + layout.reads);
    auto* c = reinterpret_cast<float*>(memory + layout.c);
    memset(c, 0, sizeof(float) * rows * c_row);
    if (with_bias)
      for (int64_t i = 0; i < 2 * layout.pairs; ++i) a[depth * a_row + i] = {0x3f80};  // 1
    const Bfloat16Planes p{fprop_rows(pr), fprop_cols(pr), pr.C, x + (group * cg + c0) * plane};
    const auto pack_rows = pr.stride_w == 1 ? pack_pixel_rows<false> : pack_pixel_rows<true>;
    for (int64_t index = piece * pixel_blocks / plan.split; index < (piece + 1) * pixel_blocks / plan.split; ++index) {
      const int64_t pixel0 = index * tile_pixels, count = min_of(tile_pixels, pixels - pixel0);
      const int64_t pairs = for_pixel_runs(pixel0, count, image, [&](const PixelRun& run) {
        pack_rows(p, c_count, tap0, tap_count, run.pixel, run.length, reads, a + 2 * run.pair, a_row);
        for (int64_t t = 0; run.length % 2 && t < depth; ++t) a[t * a_row + 2 * run.pair + run.length] = {0};
        const bfloat16_t* planes = dy + (run.pixel / image * pr.K + group * kg + k0) * image + run.pixel % image;
        for (int64_t panel = 0; panel < panels; ++panel)
          pack_transposed_panel(planes + panel * pair_cols * image, image,
                                min_of(pair_cols, k_count - panel * pair_cols), run.length,
                                b + panel * b_panel + run.pair * 2 * pair_cols);
      });
      multiply_pairs(rows, k_count, pairs, a, a_row, 2, b, b_panel, c, c_row, false, nullptr, [](int64_t, int64_t) {});
    }
    // A block of some taps is of one channel: rows are neighbours in dw.
    const int64_t filter = group * kg + k0;
    out.with_piece(piece, [&](auto* dw, auto* db) {
      transpose(c, c_row, depth, k_count, dw + (filter * cg + c0) * taps + tap0, cg * taps);
      if (with_bias) convert_row(c + depth * c_row, k_count, db + filter);
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
