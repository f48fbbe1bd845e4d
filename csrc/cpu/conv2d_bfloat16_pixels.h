// fprop and dgrad of bfloat16 without conversion, NCHW:
//
//   C[channel][pixel] = Σ_t weights[channel][t] · patch[t][pixel]     t = (contracted channel, tap)
//
// Each task packs the patches of its pixels from the planes. Filters are read where they lie, but for those that are
// not rows of pairs. Rows of C are pieces of the planes of the result.
#pragma once

#include "conv2d_bfloat16_planes.h"

namespace fastconv::cpu {
namespace {

// fprop, or one phase of dgrad. filters: [channel][filter_row], of all groups
struct Bfloat16PixelGather {
  Axis rows, cols;
  const bfloat16_t* filters;
  int64_t filter_row, depth;
};

template <typename GatherOf>
void gather_pixels_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const GatherOf& gather_of,
                            const bfloat16_t* source, int64_t out_height, int64_t out_width, const bfloat16_t* bias,
                            bfloat16_t* out, char* scratch, const Parallel& parallel) {
  const Phases phases = phases_of(pr, plan.direction);
  const int64_t produced = produced_channels(pr, plan.direction), channels = contracted_channels(pr, plan.direction);
  const int64_t tile_pixels = block_pixels(pr, plan), tile_channels = whole_panels(block_channels(pr, plan));
  const int64_t largest = pr.N * phases.largest_rows.outputs * phases.largest_cols.outputs;
  const int64_t m_blocks = ceil_div(produced, tile_channels), pixel_blocks = ceil_div(largest, tile_pixels);
  const int64_t phase_tasks = pixel_blocks * pr.groups * m_blocks, out_plane = out_height * out_width;
  const Bfloat16Scratch layout = bfloat16_pixels_scratch(pr, plan);
  for_each_task(parallel, phases.rows * phases.cols * phase_tasks, [&](int worker, int64_t task) {
    const int64_t phase = task / phase_tasks, pixel0 = task % phase_tasks / m_blocks / pr.groups * tile_pixels;
    const int64_t group = task / m_blocks % pr.groups, m0 = task % m_blocks * tile_channels;
    const Bfloat16PixelGather g = gather_of(phase / phases.cols, phase % phases.cols);
    const Axis &h = g.rows, &w = g.cols;
    const int64_t image = h.outputs * w.outputs, pixels = pr.N * image;
    if (pixel0 >= pixels) return;  // a phase smaller than the largest
    const int64_t count = min_of(tile_pixels, pixels - pixel0), m_count = min_of(tile_channels, produced - m0);
    const int64_t pairs = even(g.depth) / 2, pair_step = balanced(pairs, block_depth(pr, plan) / 2);
    const int64_t c_row = whole_panels(count), channel = group * produced + m0;
    char* memory = scratch + worker * plan.scratch_bytes;
    auto *packed = reinterpret_cast<bfloat16_t*>(memory), *rows = reinterpret_cast<bfloat16_t*>(memory + layout.rows);
    auto* c = reinterpret_cast<float*>(memory + layout.c);
    const auto place = [&](int64_t pixel) {  // in a plane of out
      return (h.out_first + pixel / w.outputs % h.outputs * h.out_step) * out_width + w.out_first +
             pixel % w.outputs * w.out_step;
    };
    const auto plane_of = [&](int64_t pixel) {
      return out + (pixel / image * pr.groups * produced + channel) * out_plane;
    };
    // Pixels that are no neighbours in a plane go there by way of scratch.
    const bool dense = h.out_step == 1 && w.out_step == 1, direct = dense && pixel0 % image + count <= image;
    FinishedRows finished{rows, c_row, count, nullptr, bias ? bias + channel : nullptr, pr.relu};
    if (direct) finished.data = plane_of(pixel0) + place(pixel0), finished.row = out_plane;
    const int64_t plane = h.source * w.source;
    const Bfloat16Planes p{h, w, pr.groups * channels, source + group * channels * plane};
    const auto pack = w.step == 1 ? pack_pixel_panels<false> : pack_pixel_panels<true>;
    int64_t pair0 = 0;
    do {
      const int64_t pair1 = min_of(pairs, pair0 + pair_step);
      pack(p, channels, pixel0, count, pair0, pair1, reinterpret_cast<TapRead*>(memory + layout.reads), packed);
      const FinishedRows* last = pair1 == pairs ? &finished : nullptr;
      const auto prefetch = [&](int64_t i, int64_t end) {  // while there are products to compute
        for (; last && i < end; ++i)
          for (int64_t col = 0; col < count; col += 32) __builtin_prefetch(finished.data + i * finished.row + col, 1);
      };
      multiply_pairs(m_count, count, pair1 - pair0, g.filters + channel * g.filter_row + 2 * pair0, g.filter_row, 2,
                     packed, (pair1 - pair0) * 2 * pair_cols, c, c_row, pair0 == 0, last, prefetch);
      pair0 = pair1;
    } while (pair0 < pairs);
    const int64_t joined = dense ? image : w.outputs;  // neighbours, or `out_step` apart
    for (int64_t at = 0, length; !direct && at < count; at += length) {
      length = min_of(count - at, joined - (pixel0 + at) % joined);
      const bfloat16_t* from = rows + at;
      bfloat16_t* to = plane_of(pixel0 + at) + place(pixel0 + at);
      for (int64_t m = 0; m < m_count; ++m, from += c_row, to += out_plane)
        if (dense)
          memcpy(to, from, 2 * length);
        else
          for (int64_t i = 0; i < length; ++i) to[i * w.out_step] = from[i];
    }
  });
}

// in[0 … length), and a zero where that is odd
inline void copy_filter(const bfloat16_t* in, int64_t length, bfloat16_t* out) {
  memcpy(out, in, 2 * length);
  if (length % 2) out[length] = {0};
}

inline void fprop_pixels_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* x,
                                  const bfloat16_t* w, const bfloat16_t* bias, bfloat16_t* y, char* workspace,
                                  char* scratch, const Parallel& parallel) {
  const int64_t depth = pr.channels_per_group() * pr.R * pr.S, row = filter_row(depth);
  Bfloat16PixelGather gather{fprop_rows(pr), fprop_cols(pr), w, depth, depth};
  if (!reads_filters(pr, plan.direction)) {
    auto* copy = reinterpret_cast<bfloat16_t*>(workspace);
    for_each_task(parallel, pr.K, [&](int, int64_t k) { copy_filter(w + k * depth, depth, copy + k * row); });
    gather.filters = copy, gather.filter_row = row;
  }
  gather_pixels_bfloat16(pr, plan, [&](int64_t, int64_t) { return gather; }, x, pr.P, pr.Q, bias, y, scratch, parallel);
}

// out[channel][t] = the weight of t = (filter, tap) of one phase of dgrad, for `channels` of the filters w.
inline void pack_filters(const Conv2dProblem& pr, const Axis& rows, const Axis& cols, const bfloat16_t* w,
                         int64_t channels, bfloat16_t* out, int64_t out_row) {
  const int64_t filter_taps = pr.R * pr.S, taps = rows.taps * cols.taps, filters = pr.filters_per_group();
  const int64_t filter = pr.channels_per_group() * filter_taps;
  if (filter_taps == 1) {
    transpose_bfloat16(w, filter, filters * taps, channels, out, out_row);
  } else {
    for (int64_t k = 0; k < filters; ++k)
      for (int64_t c = 0; c < channels; ++c) {
        const bfloat16_t* from = w + k * filter + c * filter_taps;
        bfloat16_t* to = out + c * out_row + k * taps;
        __builtin_prefetch(from + 2 * filter);  // other lines each time, which no pattern foretells
        __builtin_prefetch(to + 64, 1);
        if (taps == filter_taps)  // neighbours
          for (int64_t i = 0; i < taps; i += 32) {
            const __mmask32 mask = first_lanes(taps - i);
            _mm512_mask_storeu_epi16(to + i, mask, load_pairs(from + i, mask));
          }
        else
          for (int64_t r = 0; r < rows.taps; ++r)
            for (int64_t col = 0; col < cols.taps; ++col)
              *to++ =
                  from[(rows.filter_first + r * rows.filter_step) * pr.S + cols.filter_first + col * cols.filter_step];
      }
  }
  if (filters * taps % 2)
    for (int64_t c = 0; c < channels; ++c) out[c * out_row + filters * taps] = {0};
}

inline void dgrad_pixels_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* dy,
                                  const bfloat16_t* w, bfloat16_t* dx, char* workspace, char* scratch,
                                  const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), blocks = ceil_div(cg, 32);
  const Phases phases = phases_of(pr, Direction::dgrad);
  auto* filters = reinterpret_cast<bfloat16_t*>(workspace);
  // Each phase has its filters behind those of the phases before it, whose taps are those of the filter in turn.
  const auto gather_of = [&](int64_t a, int64_t b) {
    const Axis rows = dgrad_rows(pr, a), cols = dgrad_cols(pr, b);
    const int64_t depth = rows.taps * cols.taps * kg;
    return Bfloat16PixelGather{rows, cols, filters + taps_before(pr, a, b) * pr.C * filter_row_limit(kg),
                               filter_row(depth), depth};
  };
  for_each_task(parallel, phases.rows * phases.cols * pr.groups * blocks, [&](int, int64_t task) {
    const int64_t phase = task / blocks / pr.groups, group = task / blocks % pr.groups, c0 = task % blocks * 32;
    const Bfloat16PixelGather g = gather_of(phase / phases.cols, phase % phases.cols);
    pack_filters(pr, g.rows, g.cols, w + (group * kg * cg + c0) * pr.R * pr.S, min_of<int64_t>(32, cg - c0),
                 filters + (g.filters - filters) + (group * cg + c0) * g.filter_row, g.filter_row);
  });
  gather_pixels_bfloat16(pr, plan, gather_of, dy, pr.H, pr.W, nullptr, dx, scratch, parallel);
}

}  // namespace
}  // namespace fastconv::cpu
