// fprop and dgrad of bfloat16 without conversion, NHWC:
//
//   C[pixel][channel] = Σ_t patch[pixel][t] · weights[t][channel]     t = (tap, contracted channel)
#pragma once

#include "conv2d_bfloat16_patches.h"

namespace fastconv::cpu {
namespace {

// fprop, or one phase of dgrad. panels: [group][panel][t/2][pair_cols][2]
struct Bfloat16Gather {
  Bfloat16Patches patches;
  bfloat16_t* panels;
  int64_t depth, group_panels;

  bfloat16_t* panel(int64_t group, int64_t index) const {
    return panels + (group * group_panels + index) * even(depth) * pair_cols;
  }
};

template <typename GatherOf>
void gather_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const GatherOf& gather_of, int64_t out_height,
                     int64_t out_width, const bfloat16_t* bias, bfloat16_t* out, char* scratch,
                     const Parallel& parallel) {
  const Phases phases = phases_of(pr, plan.direction);
  const int64_t produced = produced_channels(pr, plan.direction), channels = contracted_channels(pr, plan.direction);
  const int64_t tile_pixels = block_pixels(pr, plan);
  const int64_t tile_channels = whole_panels(block_channels(pr, plan));
  const int64_t largest = pr.N * phases.largest_rows.outputs * phases.largest_cols.outputs;
  const int64_t m_blocks = ceil_div(produced, tile_channels), pixel_blocks = ceil_div(largest, tile_pixels);
  // Groups whose channels share lines of memory are one task's: two threads that write a line wait for each other.
  const int64_t group_step = ceil_div(64, produced), group_blocks = ceil_div(pr.groups, group_step);
  const int64_t phase_tasks = pixel_blocks * group_blocks * m_blocks, out_plane = out_height * out_width;
  const Bfloat16Scratch layout = bfloat16_gather_scratch(pr, plan);
  const auto block = [&](int worker, int64_t phase, int64_t pixel0, int64_t group, int64_t m0) {
    const Bfloat16Gather g = gather_of(phase / phases.cols, phase % phases.cols);
    const Bfloat16Patches& p = g.patches;
    const int64_t pixels = p.pixels(), depth_step = even(balanced(g.depth, block_depth(pr, plan)));
    if (pixel0 >= pixels) return;  // a phase smaller than the largest
    const int64_t count = min_of(tile_pixels, pixels - pixel0);
    const int64_t m_count = min_of(tile_channels, produced - m0), panels = ceil_div(m_count, pair_cols);
    char* memory = scratch + worker * plan.scratch_bytes;
    auto *packed = reinterpret_cast<bfloat16_t*>(memory), *rows = reinterpret_cast<bfloat16_t*>(memory + layout.rows);
    auto* c = reinterpret_cast<float*>(memory + layout.c);
    const int64_t c_row = panels * pair_cols, out_row = pr.groups * produced, channel = group * produced + m0;
    const Axis &h = p.rows, &w = p.cols;
    const auto place = [&](int64_t pixel) {  // in a plane of out
      return (h.out_first + pixel / w.outputs % h.outputs * h.out_step) * out_width + w.out_first +
             pixel % w.outputs * w.out_step;
    };
    // Where out's pixels are not neighbours, finished rows go there by way of scratch.
    const bool direct = h.out_step == 1 && w.out_step == 1;
    FinishedRows finished{rows, c_row, m_count, bias ? bias + channel : nullptr, nullptr, pr.relu};
    if (direct) finished.data = out + pixel0 * out_row + channel, finished.row = out_row;
    const bool in_place = is_pointwise(h, w) && channels % 2 == 0;
    int64_t t0 = 0;
    do {
      const int64_t t1 = min_of(g.depth, t0 + depth_step);
      const bfloat16_t* a = packed;
      int64_t a_row = layout.a_row;
      if (in_place) {
        a_row = p.pitch;
        a = p.source + pixel0 * a_row + group * channels + t0;
      } else {
        pack_patch_rows(p, group * channels, channels, 0, pixel0, count, t0, t1, packed, a_row);
      }
      const bool last = t1 == g.depth;
      // Lines from memory are asked for while there are products to compute.
      const auto prefetch = [&](int64_t i, int64_t end) {
        for (int64_t next = end; in_place && next < min_of(count, 2 * end - i); ++next)
          for (int64_t t = 0; t < t1 - t0; t += 32) __builtin_prefetch(a + next * a_row + t);
        for (; last && direct && i < end; ++i)
          for (int64_t m = 0; m < m_count; m += 32) __builtin_prefetch(finished.data + i * out_row + m, 1);
      };
      multiply_pairs(count, m_count, even(t1 - t0) / 2, a, a_row, 2, g.panel(group, m0 / pair_cols) + t0 * pair_cols,
                     even(g.depth) * pair_cols, c, c_row, t0 == 0, last ? &finished : nullptr, prefetch);
      t0 = t1;
    } while (t0 < g.depth);
    const int64_t image = h.outputs * w.outputs;
    for (int64_t i = 0; !direct && i < count; ++i)
      memcpy(out + ((pixel0 + i) / image * out_plane + place(pixel0 + i)) * out_row + channel, rows + i * c_row,
             2 * m_count);
  };
  for_each_task(parallel, phases.rows * phases.cols * phase_tasks, [&](int worker, int64_t task) {
    const int64_t group0 = task / m_blocks % group_blocks * group_step;
    for (int64_t group = group0; group < min_of(pr.groups, group0 + group_step); ++group)
      block(worker, task / phase_tasks, task % phase_tasks / m_blocks / group_blocks * tile_pixels, group,
            task % m_blocks * tile_channels);
  });
}

inline void fprop_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* x, const bfloat16_t* w,
                           const bfloat16_t* bias, bfloat16_t* y, char* workspace, char* scratch,
                           const Parallel& parallel) {
  const int64_t kg = pr.filters_per_group(), depth = pr.channels_per_group() * pr.R * pr.S;
  const Bfloat16Gather gather{{fprop_rows(pr), fprop_cols(pr), pr.N, pr.C, x},
                              reinterpret_cast<bfloat16_t*>(workspace),
                              depth,
                              ceil_div(kg, pair_cols)};
  for_each_task(parallel, pr.groups * gather.group_panels, [&](int, int64_t task) {
    const int64_t group = task / gather.group_panels, panel = task % gather.group_panels, k0 = panel * pair_cols;
    pack_transposed_panel(w + (group * kg + k0) * depth, depth, min_of(pair_cols, kg - k0), depth,
                          gather.panel(group, panel));
  });
  gather_bfloat16(pr, plan, [&](int64_t, int64_t) { return gather; }, pr.P, pr.Q, bias, y, scratch, parallel);
}

inline void dgrad_bfloat16(const Conv2dProblem& pr, const Conv2dPlan& plan, const bfloat16_t* dy, const bfloat16_t* w,
                           bfloat16_t* dx, char* workspace, char* scratch, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), panels = ceil_div(cg, pair_cols);
  const Phases phases = phases_of(pr, Direction::dgrad);
  // Each phase has its panels behind those of the phases before it, whose taps are those of the filter in turn.
  const auto gather_of = [&](int64_t a, int64_t b) {
    const Axis rows = dgrad_rows(pr, a), cols = dgrad_cols(pr, b);
    const int64_t before = taps_before(pr, a, b) * pr.groups * panels * (kg + 1) * pair_cols;
    return Bfloat16Gather{{rows, cols, pr.N, pr.K, dy},
                          reinterpret_cast<bfloat16_t*>(workspace) + before,
                          rows.taps * cols.taps * kg,
                          panels};
  };
  for_each_task(parallel, phases.rows * phases.cols * pr.groups * panels, [&](int, int64_t task) {
    const int64_t phase = task / panels / pr.groups, group = task / panels % pr.groups, panel = task % panels;
    const Bfloat16Gather g = gather_of(phase / phases.cols, phase % phases.cols);
    const Axis &rows = g.patches.rows, &cols = g.patches.cols;
    const __mmask32 mask = first_lanes(cg - panel * pair_cols);
    const auto row = [&](int64_t t) {
      const int64_t k = t % kg, r = rows.filter_first + t / kg / cols.taps * rows.filter_step;
      const int64_t col = cols.filter_first + t / kg % cols.taps * cols.filter_step;
      return load_pairs(w + (((group * kg + k) * pr.R + r) * pr.S + col) * cg + panel * pair_cols, mask);
    };
    bfloat16_t* to = g.panel(group, panel);
    for (int64_t t = 0; t < g.depth; t += 2, to += 2 * pair_cols)
      pack_row_pair(row(t), t + 1 < g.depth ? row(t + 1) : __m512i{}, to);
  });
  gather_bfloat16(pr, plan, gather_of, pr.H, pr.W, nullptr, dx, scratch, parallel);
}

}  // namespace
}  // namespace fastconv::cpu
