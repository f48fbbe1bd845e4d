// fprop and dgrad of bfloat16 without conversion, NCHW:
//
//   C[channel][pixel] = Σ_t weights[t][channel] · patch[t][pixel]     t = (contracted channel, tap)
//
// Both operands are panels of pairs of t. Patches are packed from the planes, in each task those of its pixels; rows of
// C are pieces of the planes of the result.
#pragma once

#include "conv2d_bfloat16_planes.h"

namespace fastconv::cpu {
namespace {

// fprop, or one phase of dgrad. panels: of the filters, [group][panel][pair][pair_cols][2]
struct Bfloat16PixelGather {
  Axis rows, cols;
  bfloat16_t* panels;
  int64_t depth, group_panels;

  int64_t panel_elements() const { return even(depth) * pair_cols; }
  bfloat16_t* panel(int64_t group, int64_t index) const {
    return panels + (group * group_panels + index) * panel_elements();
  }
};

// C of `rows` channels, panels of which are a, and of `cols` pixels, panels of which are b.
inline void multiply_panels(int64_t rows, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t a_panel,
                            const bfloat16_t* b, float* c, int64_t c_row, bool first, const FinishedRows* out) {
  for (int64_t row = 0; row < rows; row += pair_cols) {
    const FinishedRows here = out ? out->from(row, 0) : FinishedRows{};
    multiply_pairs(min_of(pair_cols, rows - row), cols, pairs, a + row / pair_cols * a_panel, 2, 2 * pair_cols, b,
                   pairs * 2 * pair_cols, c + row * c_row, c_row, first, out ? &here : nullptr,
                   [&](int64_t i, int64_t end) {  // lines are asked for while there are products to compute
                     for (; out && i < end; ++i)
                       for (int64_t col = 0; col < cols; col += 32)
                         __builtin_prefetch(here.data + i * here.row + col, 1);
                   });
  }
}

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
    const int64_t pairs = even(g.depth) / 2, pair_step = balanced(pairs, max_of<int64_t>(1, plan.tile_k / 2));
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
    const Bfloat16Planes p = planes_of(h, w, pr.groups * channels, source + group * channels * plane);
    const auto pack = w.step == 1 ? pack_pixel_panels<false> : pack_pixel_panels<true>;
    int64_t pair0 = 0;
    do {
      const int64_t pair1 = min_of(pairs, pair0 + pair_step);
      pack(p, channels, pixel0, count, pair0, pair1, packed);
      multiply_panels(m_count, count, pair1 - pair0, g.panel(group, m0 / pair_cols) + pair0 * 2 * pair_cols,
                      g.panel_elements(), packed, c, c_row, pair0 == 0, pair1 == pairs ? &finished : nullptr);
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

inline void fprop_pixels_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* x,
                                  const bfloat16_t* w, const bfloat16_t* bias, bfloat16_t* y, char* workspace,
                                  char* scratch, const Parallel& parallel) {
  const int64_t kg = pr.filters_per_group(), depth = pr.channels_per_group() * pr.R * pr.S;
  const Bfloat16PixelGather gather{fprop_rows(pr), fprop_cols(pr), reinterpret_cast<bfloat16_t*>(workspace), depth,
                                   ceil_div(kg, pair_cols)};
  for_each_task(parallel, pr.groups * gather.group_panels, [&](int, int64_t task) {
    const int64_t group = task / gather.group_panels, panel = task % gather.group_panels, k0 = panel * pair_cols;
    pack_transposed_panel(w + (group * kg + k0) * depth, depth, min_of(pair_cols, kg - k0), depth,
                          gather.panel(group, panel));
  });
  gather_pixels_bfloat16(pr, plan, [&](int64_t, int64_t) { return gather; }, x, pr.P, pr.Q, bias, y, scratch, parallel);
}

// out[channel][t − t0] = the weight of t = (filter, tap) of one phase, for some channels of the filters w.
inline void stage_filters(const Conv2dProblem& pr, const Axis& rows, const Axis& cols, const bfloat16_t* w,
                          int64_t channels, int64_t t0, int64_t t1, bfloat16_t* out) {
  const int64_t filter_taps = pr.R * pr.S, taps = rows.taps * cols.taps, filter = pr.channels_per_group() * filter_taps;
  for (int64_t t = t0, length; t < t1; t += length, out += length) {
    const int64_t tap = t % taps;
    length = min_of(taps - tap, t1 - t);
    for (int64_t c = 0; c < channels; ++c) {
      const bfloat16_t* from = w + t / taps * filter + c * filter_taps;
      bfloat16_t* to = out + c * (staged_depth + spill);
      if (taps == filter_taps)  // neighbours
        for (int64_t i = 0; i < length; i += 32)
          store_pairs(to + i, load_pairs(from + tap + i, first_lanes(length - i)));
      else
        for (int64_t i = 0; i < length; ++i)
          to[i] = from[(rows.filter_first + (tap + i) / cols.taps * rows.filter_step) * pr.S + cols.filter_first +
                       (tap + i) % cols.taps * cols.filter_step];
    }
  }
}

inline void dgrad_pixels_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* dy,
                                  const bfloat16_t* w, bfloat16_t* dx, char* workspace, char* scratch,
                                  const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), panels = ceil_div(cg, pair_cols);
  const Phases phases = phases_of(pr, Direction::dgrad);
  const auto gather_of = [&](int64_t a, int64_t b) {
    const Axis rows = dgrad_rows(pr, a), cols = dgrad_cols(pr, b);
    const int64_t before = taps_before(pr, a, b) * pr.groups * panels * (kg + 1) * pair_cols;
    return Bfloat16PixelGather{rows, cols, reinterpret_cast<bfloat16_t*>(workspace) + before,
                               rows.taps * cols.taps * kg, panels};
  };
  for_each_task(parallel, phases.rows * phases.cols * pr.groups * panels, [&](int worker, int64_t task) {
    const int64_t phase = task / panels / pr.groups, group = task / panels % pr.groups, panel = task % panels;
    const Bfloat16PixelGather g = gather_of(phase / phases.cols, phase % phases.cols);
    const int64_t c0 = panel * pair_cols, c_count = min_of(pair_cols, cg - c0);
    if (pr.R * pr.S == 1) {  // rows of w
      const bfloat16_t* row = w + group * kg * cg + c0;
      const __mmask32 mask = first_lanes(c_count);
      for (int64_t k = 0; k < g.depth; k += 2, row += 2 * cg)
        pack_row_pair(load_pairs(row, mask), k + 1 < kg ? load_pairs(row + cg, mask) : __m512i{},
                      g.panel(group, panel) + k * pair_cols);
      return;
    }
    auto* stage = reinterpret_cast<bfloat16_t*>(scratch + worker * plan.scratch_bytes);
    for (int64_t t = 0; t < g.depth; t += staged_depth) {
      const int64_t end = min_of(g.depth, t + staged_depth);
      stage_filters(pr, g.rows, g.cols, w + (group * kg * cg + c0) * pr.R * pr.S, c_count, t, end, stage);
      pack_transposed_panel(stage, staged_depth + spill, c_count, end - t, g.panel(group, panel) + t * pair_cols);
    }
  });
  gather_pixels_bfloat16(pr, plan, gather_of, dy, pr.H, pr.W, nullptr, dx, scratch, parallel);
}

}  // namespace
}  // namespace fastconv::cpu
