// wgrad of bfloat16 without conversion, summed over pairs of neighbouring pixels:
//
//   C[filter][t] = Σ_pixel dy[pixel][filter] · patch[pixel][t]     t = (tap, channel) over a block of channels
//
// NCHW: x is transposed to NHWC first, but for a 1×1 convolution, whose x is transposed as it is packed.
#pragma once

#include "conv2d_bfloat16_patches.h"
#include "conv2d_wgrad_out.h"

namespace fastconv::cpu {
namespace {

// out[pixel/2][filter][2], rows of whole registers; and sums[filter] += Σ_pixel dy[pixel][filter] if there are sums.
inline void pack_gradient(const bfloat16_t* dy, int64_t pitch, int64_t filters, int64_t pixels, bfloat16_t* out,
                          int64_t out_row, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t k = 0; k < filters; k += 32) {
    const __mmask32 mask = first_lanes(filters - k);
    __m512 left{}, right{};
    bfloat16_t* to = out + 2 * k;
    const bfloat16_t* from = dy + k;
    for (int64_t i = 0; i < pixels; i += 2, from += 2 * pitch, to += out_row) {
      const __m512i even_row = load_pairs(from, mask);
      const __m512i odd_row = i + 1 < pixels ? load_pairs(from + pitch, mask) : __m512i{};
      const __m512i first = interleave<0>(even_row, odd_row), second = interleave<1>(even_row, odd_row);
      store_pairs(to, first);
      store_pairs(to + 32, second);
      if (sums) {
        left = _mm512_dpbf16_ps(left, (__m512bh)first, ones);
        right = _mm512_dpbf16_ps(right, (__m512bh)second, ones);
      }
    }
    if (sums) {
      _mm512_storeu_ps(sums + k, _mm512_loadu_ps(sums + k) + left);
      _mm512_storeu_ps(sums + k + 16, _mm512_loadu_ps(sums + k + 16) + right);
    }
  }
}

// Neighbouring pixels, in NCHW of one image, that take a whole number of pairs of a block.
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

// NCHW: out[filter][pair][2] = planes[filter][pixel], rows out_row apart; and sums.
inline void copy_gradient(const bfloat16_t* planes, int64_t plane, int64_t filters, int64_t pixels, bfloat16_t* out,
                          int64_t out_row, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t k = 0; k < filters; ++k, planes += plane, out += out_row) {
    __m512 sum{};
    for (int64_t i = 0; i < pixels; i += 32) {
      const __m512i values = load_pairs(planes + i, first_lanes(pixels - i));
      store_pairs(out + i, values);  // zeros past the end: one completes a pair, the next run overwrites the rest
      sum = _mm512_dpbf16_ps(sum, (__m512bh)values, ones);
    }
    if (sums) sums[k] += _mm512_reduce_add_ps(sum);
  }
}

inline void wgrad_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* dy, const bfloat16_t* x,
                           const WgradOut<bfloat16_t>& out, char* workspace, char* scratch, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), taps = pr.R * pr.S;
  const bool nchw = pr.layout == Layout::NCHW, from_planes = nchw && is_pointwise(pr, Direction::wgrad);
  const int64_t image = pr.P * pr.Q, pixels = pr.N * image, run_image = nchw ? image : pixels;
  const bfloat16_t* nhwc = x;
  if (nchw && !from_planes) {
    auto* copy = reinterpret_cast<bfloat16_t*>(workspace + bfloat16_memory(pr, plan).source);
    to_nhwc(x, pr.N, pr.C, pr.H * pr.W, copy, parallel);
    nhwc = copy;
  }
  const Bfloat16Patches p{fprop_rows(pr), fprop_cols(pr), pr.N, pr.C, nhwc};
  const DepthBlock block = block_patch(pr, plan);
  const int64_t tile_filters = block_filters(pr, plan), tile_pixels = even(plan.tile_k);
  const int64_t c_blocks = ceil_div(cg, block.channels), tap_blocks = ceil_div(taps, block.taps);
  const int64_t k_blocks = ceil_div(kg, tile_filters), pixel_blocks = ceil_div(pixels, tile_pixels);
  const Bfloat16Scratch layout = bfloat16_wgrad_scratch(pr, plan);
  for_each_task(parallel, plan.split * pr.groups * c_blocks * tap_blocks * k_blocks, [&](int worker, int64_t task) {
    const int64_t k0 = task % k_blocks * tile_filters, tap0 = task / k_blocks % tap_blocks * block.taps;
    const int64_t c0 = task / k_blocks / tap_blocks % c_blocks * block.channels;
    const int64_t group = task / k_blocks / tap_blocks / c_blocks % pr.groups;
    const int64_t piece = task / k_blocks / tap_blocks / c_blocks / pr.groups;
    const int64_t k_count = min_of(tile_filters, kg - k0), c_count = min_of(block.channels, cg - c0);
    const int64_t tap_count = min_of(block.taps, taps - tap0), depth = c_count * tap_count;
    const int64_t panels = ceil_div(depth, pair_cols), c_row = panels * pair_cols;
    // A: NCHW [filter][pair][2], NHWC [pair][filter][2], whose rows don't all fall into the same lines of L1
    const int64_t a_row = nchw ? layout.pairs * 2 + spill : 2, a_pair = nchw ? 2 : 2 * whole_panels(k_count) + spill;
    const int64_t b_panel = layout.pairs * 2 * pair_cols;
    char* memory = scratch + worker * plan.scratch_bytes;
    auto *a = reinterpret_cast<bfloat16_t*>(memory), *rows = reinterpret_cast<bfloat16_t*>(memory + layout.rows);
    auto* b = reinterpret_cast<bfloat16_t*>(memory + layout.b);
    auto *c = reinterpret_cast<float*>(memory + layout.c), *bias_sums = c + k_count * c_row;
    float* sums = c0 == 0 && tap0 == 0 ? bias_sums : nullptr;
    memset(c, 0, sizeof(float) * (k_count * c_row + whole_panels(k_count)));
    for (int64_t index = piece * pixel_blocks / plan.split; index < (piece + 1) * pixel_blocks / plan.split; ++index) {
      const int64_t pixel0 = index * tile_pixels, count = min_of(tile_pixels, pixels - pixel0);
      const int64_t pairs = for_pixel_runs(pixel0, count, run_image, [&](const PixelRun& run) {
        const int64_t n = run.pixel / image, pixel = run.pixel % image;
        if (nchw)
          copy_gradient(dy + (n * pr.K + group * kg + k0) * image + pixel, image, k_count, run.length, a + 2 * run.pair,
                        a_row, sums);
        else
          pack_gradient(dy + run.pixel * pr.K + group * kg + k0, pr.K, k_count, run.length, a, a_pair, sums);
        bfloat16_t* panel0 = b + run.pair * 2 * pair_cols;
        for (int64_t panel = 0; from_planes && panel < panels; ++panel)
          pack_transposed_panel(x + (n * pr.C + group * cg + c0 + panel * pair_cols) * image + pixel, image,
                                min_of(pair_cols, c_count - panel * pair_cols), run.length, panel0 + panel * b_panel);
        for (int64_t at = 0; !from_planes && at < run.length; at += staged_rows) {
          const int64_t staged = min_of(staged_rows, run.length - at);
          pack_patch_rows(p, group * cg + c0, c_count, tap0, run.pixel + at, staged, 0, depth, rows, layout.a_row);
          for (int64_t i = 0; i < staged; i += 2)
            for (int64_t panel = 0; panel < panels; ++panel) {
              const bfloat16_t* row = rows + i * layout.a_row + panel * pair_cols;
              pack_row_pair(_mm512_loadu_si512(row),
                            i + 1 < staged ? _mm512_loadu_si512(row + layout.a_row) : __m512i{},
                            panel0 + panel * b_panel + (at + i) * pair_cols);
            }
        }
      });
      multiply_pairs(
          k_count, panels, pairs, a, a_row, a_pair, b, b_panel, c, c_row, true, [](int64_t, int64_t) {},
          [](int64_t, int64_t) {});
    }
    const int64_t filter = group * kg + k0;
    out.with_piece(piece, [&](auto* dw, auto* db) {
      for (int64_t k = 0; k < k_count; ++k) {
        const float* sums = c + k * c_row;
        if (nchw) {
          transpose(sums, c_count, tap_count, c_count, dw + ((filter + k) * cg + c0) * taps + tap0, taps);
        } else {
          const int64_t pieces = c_count == cg ? 1 : tap_count, length = depth / pieces;
          for (int64_t tap = 0; tap < pieces; ++tap)
            convert_row(sums + tap * length, length, dw + ((filter + k) * taps + tap0 + tap) * cg + c0);
        }
      }
      if (db && c0 == 0 && tap0 == 0) convert_row(bias_sums, k_count, db + filter);
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
