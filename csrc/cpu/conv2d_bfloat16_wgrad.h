// wgrad of bfloat16 without conversion, NHWC, summed over pairs of neighbouring pixels:
//
//   C[filter][t] = Σ_pixel dy[pixel][filter] · patch[pixel][t]     t = (tap, channel) over a block of channels
#pragma once

#include "conv2d_bfloat16_patches.h"
#include "conv2d_wgrad_out.h"

namespace fastconv::cpu {
namespace {

// out[pair][filter][2] = dy[pixel][filter] of two neighbours; a zero completes the last pair.
// sums[filter] += Σ_pixel dy, if there are sums.
inline void pack_gradient(const bfloat16_t* dy, int64_t pitch, int64_t filters, int64_t pixels, bfloat16_t* out,
                          int64_t out_pair, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t k = 0; k < filters; k += 32) {
    const __mmask32 mask = first_lanes(filters - k);
    __m512 left{}, right{};
    for (int64_t i = 0; i < pixels; i += 2) {
      const bfloat16_t* from = dy + i * pitch + k;
      bfloat16_t* to = out + i / 2 * out_pair + 2 * k;
      pack_row_pair(load_pairs(from, mask), i + 1 < pixels ? load_pairs(from + pitch, mask) : __m512i{}, to);
      if (!sums) continue;
      left = _mm512_dpbf16_ps(left, (__m512bh)_mm512_loadu_si512(to), ones);
      right = _mm512_dpbf16_ps(right, (__m512bh)_mm512_loadu_si512(to + 32), ones);
    }
    if (!sums) continue;
    _mm512_storeu_ps(sums + k, _mm512_loadu_ps(sums + k) + left);
    _mm512_storeu_ps(sums + k + 16, _mm512_loadu_ps(sums + k + 16) + right);
  }
}

// Panels of what pairs of neighbouring pixels read at a tap, of whole panels of channels:
// out[panel][pair][pair_cols][2].
inline void pack_tap_panels(const Bfloat16Patches& p, int64_t first, int64_t channels, int64_t tap, int64_t pixel0,
                            int64_t count, const bfloat16_t** sources, bfloat16_t* out, int64_t out_panel) {
  tap_sources(p, first, tap, pixel0, count, sources);
  if (count % 2) sources[count] = nullptr;
  for (int64_t c = 0; c < channels; c += pair_cols, out += out_panel)
    for (int64_t i = 0; i < count; i += 2) {
      const bfloat16_t *even_pixel = sources[i], *odd_pixel = sources[i + 1];
      pack_row_pair(even_pixel ? _mm512_loadu_si512(even_pixel + c) : __m512i{},
                    odd_pixel ? _mm512_loadu_si512(odd_pixel + c) : __m512i{}, out + i * pair_cols);
    }
}

inline void wgrad_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* dy, const bfloat16_t* x,
                           const WgradOut<bfloat16_t>& out, char* scratch, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), taps = pr.R * pr.S;
  const int64_t pixels = pr.N * pr.P * pr.Q;
  const Bfloat16Patches p{fprop_rows(pr), fprop_cols(pr), pr.N, pr.C, x};
  const DepthBlock block = block_patch(pr, plan);
  const int64_t tile_filters = block_filters(pr, plan), tile_pixels = summed_pixels(pr, plan);
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
    const int64_t a_pair = layout.a_pair, b_panel = layout.pairs * 2 * pair_cols;
    char* memory = scratch + worker * plan.scratch_bytes;
    auto* a = reinterpret_cast<bfloat16_t*>(memory);
    auto* sources = reinterpret_cast<const bfloat16_t**>(memory + layout.sources);
    auto* rows = reinterpret_cast<bfloat16_t*>(memory + layout.rows);
    auto* b = reinterpret_cast<bfloat16_t*>(memory + layout.b);
    auto *c = reinterpret_cast<float*>(memory + layout.c), *bias_sums = c + k_count * c_row;
    float* sums = c0 == 0 && tap0 == 0 ? bias_sums : nullptr;
    memset(c, 0, sizeof(float) * (k_count * c_row + whole_panels(k_count)));
    for (int64_t index = piece * pixel_blocks / plan.split; index < (piece + 1) * pixel_blocks / plan.split; ++index) {
      const int64_t pixel0 = index * tile_pixels, count = min_of(tile_pixels, pixels - pixel0);
      pack_gradient(dy + pixel0 * pr.K + group * kg + k0, pr.K, k_count, count, a, a_pair, sums);
      const bool whole = c_count % pair_cols == 0;
      for (int64_t tap = 0; whole && tap < tap_count; ++tap)
        pack_tap_panels(p, group * cg + c0, c_count, tap0 + tap, pixel0, count, sources,
                        b + tap * c_count / pair_cols * b_panel, b_panel);
      for (int64_t at = 0; !whole && at < count; at += staged_pixels) {
        const int64_t staged = min_of(staged_pixels, count - at);
        pack_patch_rows(p, group * cg + c0, c_count, tap0, pixel0 + at, staged, 0, depth, rows, layout.a_row);
        for (int64_t i = 0; i < staged; i += 2)
          for (int64_t panel = 0; panel < panels; ++panel) {
            const bfloat16_t* row = rows + i * layout.a_row + panel * pair_cols;
            pack_row_pair(_mm512_loadu_si512(row), i + 1 < staged ? _mm512_loadu_si512(row + layout.a_row) : __m512i{},
                          b + panel * b_panel + (at + i) * pair_cols);
          }
      }
      multiply_pairs(k_count, depth, even(count) / 2, a, 2, a_pair, b, b_panel, c, c_row, false, nullptr,
                     [](int64_t, int64_t) {});
    }
    const int64_t filter = group * kg + k0;
    out.with_piece(piece, [&](auto* dw, auto* db) {
      for (int64_t k = 0; k < k_count; ++k) {
        const float* sums = c + k * c_row;
        const int64_t pieces = c_count == cg ? 1 : tap_count, length = depth / pieces;
        for (int64_t tap = 0; tap < pieces; ++tap)
          convert_row(sums + tap * length, length, dw + ((filter + k) * taps + tap0 + tap) * cg + c0);
      }
      if (db && c0 == 0 && tap0 == 0) convert_row(bias_sums, k_count, db + filter);
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
