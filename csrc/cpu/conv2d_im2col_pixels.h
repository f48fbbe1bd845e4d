// im2col with vectors along the pixels, fprop and dgrad: NCHW, and NHWC where a group has few channels.
//
//   C[channel][pixel] = Σ_t weights[channel][t] · patch[t][pixel]     t = (contracted channel, tap)
//
// A task computes a block of pixels × channels. For each block of depth it stages the planes that the pixels read, with
// their padding; packs patches from them, panel by panel; and multiplies. Two short cuts: the patches of a 1×1
// convolution are read from the source itself, and where rows fill panels (reads_stage) the multiplication reads the
// stage directly, so that nothing is packed at all.
#pragma once

#include "conv2d_blocks.h"
#include "conv2d_stage.h"
#include "gemm.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// Images in either memory order, by strides in elements.
template <typename T>
struct Images {
  T* data;
  int64_t n, channel, row, col;

  T* at(int64_t image, int64_t ch, int64_t i, int64_t j) const {
    return data + image * n + ch * channel + i * row + j * col;
  }
};
template <typename T>
Images<T> images(T* data, Layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == Layout::NCHW) return {data, channels * height * width, height * width, width, 1};
  return {data, height * width * channels, 1, width * channels, channels};
}

// Filters in either memory order: element (group, produced channel m, contracted channel, r, s).
template <typename T>
struct Filters {
  const T* data;
  int64_t group, m, channel, r, s;
};
template <typename T>
Filters<T> filters(const T* w, const Conv2dProblem& p, Direction direction) {
  const int64_t cg = p.channels_per_group(), taps = p.R * p.S;
  const bool nchw = p.layout == Layout::NCHW;
  const int64_t k = cg * taps, c = nchw ? taps : 1, r = nchw ? p.S : p.S * cg, s = nchw ? 1 : cg;
  if (direction == Direction::fprop) return {w, p.filters_per_group() * k, k, c, r, s};
  return {w, p.filters_per_group() * k, c, k, r, s};
}

// fprop, or one phase of dgrad: out[n][m] = bias[m] + Σ over the channels and taps of m's group.
template <typename T>
struct Gather {
  Axis rows, cols;
  int64_t N, groups;
  int64_t channels, produced;  // a group's: contracted, and written
  Images<const T> source;
  Filters<T> filters;
  const T* bias;
  Images<T> out;

  int64_t taps() const { return rows.taps * cols.taps; }
  // Each output pixel is made of the source's pixel at the same place.
  bool pointwise() const {
    return taps() == 1 && rows.step == 1 && cols.step == 1 && rows.first == 0 && cols.first == 0 &&
           rows.source == rows.outputs && cols.source == cols.outputs;
  }
};

// What the multiplication reads as A: element (m, t) at data[m·row + t·col].
template <typename E>
struct PackedFilters {
  const E* data;
  int64_t row, col;
};

// t = (channel, tap) over ch_count channels and tap_count taps from (ch0, tap0) on, of filters m0 … m0 + m_count − 1.
template <typename T>
PackedFilters<acc_t<T>> pack_filters(const Gather<T>& g, int64_t group, int64_t m0, int64_t m_count, int64_t ch0,
                                     int64_t ch_count, int64_t tap0, int64_t tap_count, acc_t<T>* out) {
  const Filters<T>& f = g.filters;
  const T* from = f.data + group * f.group + m0 * f.m + ch0 * f.channel;
  const auto tap_offset = [&](int64_t tap) {
    return (g.rows.filter_first + tap / g.cols.taps * g.rows.filter_step) * f.r +
           (g.cols.filter_first + tap % g.cols.taps * g.cols.filter_step) * f.s;
  };
  if (f.m == 1) {
    const int64_t col = m_count + lanes<T>;
    acc_t<T>* to = out;
    for (int64_t ch = 0; ch < ch_count; ++ch)
      for (int64_t tap = tap0; tap < tap0 + tap_count; ++tap, to += col)
        copy_strided(from + ch * f.channel + tap_offset(tap), 1, to, m_count);
    return {out, 1, col};
  }
  const int64_t depth = ch_count * tap_count, row = depth + lanes<T>;
  const bool whole = f.s == 1 && f.r == g.cols.taps && g.rows.filter_step == 1 && g.cols.filter_step == 1;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (whole && f.channel == g.taps()) return {from + tap0, f.m, 1};  // fprop in NCHW: rows of (c, r, s) as they are
  }
  for (int64_t m = 0; m < m_count; ++m) {
    acc_t<T>* to = out + m * row;
    const T* filter = from + m * f.m;
    if (whole) {
      for (int64_t ch = 0; ch < ch_count; ++ch, to += tap_count)
        copy_strided<true>(filter + ch * f.channel + tap0, 1, to, tap_count);
    } else {
      for (int64_t tap = 0; tap < tap_count; ++tap) {
        const int64_t offset = tap_offset(tap0 + tap);
        for (int64_t ch = 0; ch < ch_count; ++ch) to[ch * tap_count + tap] = to_acc(filter[ch * f.channel + offset]);
      }
    }
  }
  return {out, row, 1};
}

// A run of pixels of a panel that are contiguous in the source of the patches.
struct Run {
  int64_t lane, length, offset;
};

// Splits `count` pixels from `pixel` on of a block [n][rows][cols] into runs.
FASTCONV_INLINE int find_runs(int64_t pixel, int64_t count, int64_t rows, int64_t cols, int64_t image_pitch,
                              int64_t row_pitch, Run* runs) {
  int found = 0;
  int64_t j = pixel % cols, i = pixel / cols % rows, n = pixel / cols / rows;
  for (int64_t lane = 0; lane < count;) {
    const int64_t length = min_of(count - lane, cols - j);
    runs[found++] = {lane, length, n * image_pitch + i * row_pitch + j};
    lane += length;
    j = 0;
    if (++i == rows) i = 0, ++n;
  }
  return found;
}

// Planes from which windows are read: staged ones, or those of the source itself.
template <typename E>
struct Planes {
  const E* data;
  int64_t image, plane, row;  // pitches
  const E* limit;             // nothing may be read from here on
};

// out[t][lane] = the value of tap t at the lane's pixel. Vectors spill past a run and past the row of a panel; what is
// written next overwrites that.
template <typename E>
void pack_panel(const Planes<E>& planes, int64_t channels, const int64_t* offsets, int64_t taps, const Run* runs,
                int run_count, E* out) {
  const bool whole = runs[0].length == panel_cols<E>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap, out += panel_cols<E>) {
      const E* from = planes.data + c * planes.plane + offsets[tap];
      if (whole) {
        const vec_t<E> left = load(from + runs[0].offset), right = load(from + runs[0].offset + lanes<E>);
        store(out, left);
        store(out + lanes<E>, right);
        continue;
      }
      for (int r = 0; r < run_count; ++r) {
        const E* run = from + runs[r].offset;
        if (planes.limit - run < runs[r].length + lanes<E>) {
          copy_strided(run, 1, out + runs[r].lane, runs[r].length);
        } else {
          for (int64_t i = 0; i < runs[r].length; i += lanes<E>) store(out + runs[r].lane + i, load(run + i));
        }
      }
    }
  }
}

// Stages `count` channels from (n0, ch0) on, of n_count images.
template <typename T>
Planes<acc_t<T>> stage_block(const Images<const T>& source, int64_t n0, int64_t n_count, int64_t ch0, int64_t ch_count,
                             const Axis& rows, const Strips& row_strips, int64_t i0, const Axis& cols,
                             const Strips& col_strips, int64_t j0, acc_t<T>* stage) {
  const int64_t plane = row_strips.elements() * col_strips.elements();
  for (int64_t n = 0; n < n_count; ++n) {
    acc_t<T>* to = stage + n * ch_count * plane;
    if (source.col == 1) {
      for (int64_t ch = 0; ch < ch_count; ++ch)
        stage_plane(source.at(n0 + n, ch0 + ch, 0, 0), rows, row_strips, i0, cols, col_strips, j0, to + ch * plane);
    } else {
      stage_pixels(source.at(n0 + n, ch0, 0, 0), source.col, ch_count, rows, row_strips, i0, cols, col_strips, j0, to,
                   plane);
    }
  }
  return {stage, ch_count * plane, plane, col_strips.elements(), stage + n_count * ch_count * plane + slack};
}

// out[j·step] = values[j] + bias, or ReLU of it
template <typename T>
FASTCONV_INLINE void write_row(const acc_t<T>* values, int64_t count, acc_t<T> bias, bool with_relu, T* out,
                               int64_t step) {
  int64_t j = 0;
  if (step == 1)
    for (; j + lanes<T> <= count; j += lanes<T>) {
      const vec_t<T> v = load(values + j) + broadcast<T>(bias);
      store(out + j, with_relu ? relu(v) : v);
    }
  for (; j < count; ++j) {
    const acc_t<T> v = values[j] + bias;
    out[j * step] = from_acc<T>(with_relu ? relu(v) : v);
  }
}

// fprop, or all phases of dgrad: gather_of(a, b) describes one. They are tasks of one parallel region.
template <typename T, typename GatherOf>
void gather_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const GatherOf& gather_of, char* scratch,
                   const Parallel& parallel) {
  using E = acc_t<T>;
  const Phases phases = phases_of(pr, plan.direction);
  const int64_t row_outputs = phases.largest_rows.outputs, col_outputs = phases.largest_cols.outputs;
  const int64_t channels = contracted_channels(pr, plan.direction), produced = produced_channels(pr, plan.direction);
  const PixelBlock block = pixel_block(pr.N, row_outputs, col_outputs, plan.tile_n);
  const DepthBlock depth_most = depth_block(channels, phases.largest_rows.taps * phases.largest_cols.taps, plan.tile_k);
  const int64_t depth_channels = depth_most.channels;
  const Scratch layout = gather_scratch(pr, plan);
  const int64_t n_blocks = ceil_div(pr.N, block.n), m_blocks = ceil_div(produced, plan.tile_m);
  const int64_t i_blocks = ceil_div(row_outputs, block.i), j_blocks = ceil_div(col_outputs, block.j);
  const int64_t phase_tasks = n_blocks * i_blocks * j_blocks * pr.groups * m_blocks;
  for_each_task(parallel, phases.rows * phases.cols * phase_tasks, [&](int worker, int64_t task) {
    const int64_t phase = task / phase_tasks, pixel_task = task % phase_tasks / m_blocks / pr.groups;
    const int64_t m0 = task % m_blocks * plan.tile_m, group = task / m_blocks % pr.groups;
    const int64_t j0 = pixel_task % j_blocks * block.j, i0 = pixel_task / j_blocks % i_blocks * block.i;
    const int64_t n0 = pixel_task / j_blocks / i_blocks * block.n;
    const Gather<T> g = gather_of(phase / phases.cols, phase % phases.cols);
    const Axis &rows = g.rows, &cols = g.cols;
    if (i0 >= rows.outputs || j0 >= cols.outputs) return;  // a phase smaller than the largest
    const int64_t taps = g.taps(), depth_taps = min_of<int64_t>(max_of<int64_t>(taps, 1), depth_most.taps);
    const bool in_place = std::is_same_v<T, E> && g.source.col == 1 && g.pointwise();
    const bool windows = reads_stage(taps, produced, block.j);
    const int64_t m_count = min_of<int64_t>(plan.tile_m, g.produced - m0), n_count = min_of(block.n, g.N - n0);
    int64_t i_count = min_of(block.i, rows.outputs - i0), j_count = min_of(block.j, cols.outputs - j0);

    char* memory = scratch + worker * plan.scratch_bytes;
    auto* offsets = reinterpret_cast<int64_t*>(memory);
    E *stage = reinterpret_cast<E*>(memory) + layout.stage, *a_memory = reinterpret_cast<E*>(memory) + layout.a;
    E *b = reinterpret_cast<E*>(memory) + layout.b, *c = reinterpret_cast<E*>(memory) + layout.c;
    const Strips row_strips = make_strips(rows, i_count), col_strips = make_strips(cols, j_count);
    for (int64_t tap = 0; tap < taps; ++tap)
      offsets[tap] = row_strips.offset(tap / cols.taps) * col_strips.elements() + col_strips.offset(tap % cols.taps);

    // Rows that are neighbours in source and out are one row.
    const bool dense = rows.out_step == 1 && cols.out_step == 1 && j_count == cols.outputs && g.pointwise();
    if (dense) {
      j_count *= i_count;
      i_count = 1;
    }
    // Lines of C: pixels without gaps, or, where the stage is read directly, rows in panels of their own.
    const int64_t lines = n_count * i_count;
    const int64_t line = windows ? ceil_div(j_count, panel_cols<E>) * panel_cols<E> : j_count;
    const int64_t pixels = lines * line, panels = ceil_div(pixels, panel_cols<E>), c_row = panels * panel_cols<E>;
    if (taps * g.channels == 0) fill_zero<T>(c, m_count * c_row);

    for (int64_t ch0 = 0; ch0 < g.channels && taps > 0; ch0 += depth_channels) {
      const int64_t ch_count = min_of(depth_channels, g.channels - ch0);
      Planes<E> planes;
      if constexpr (std::is_same_v<T, E>) {
        if (in_place)
          planes = {g.source.at(n0, group * g.channels + ch0, i0, j0), g.source.n, g.source.channel, g.source.row,
                    g.source.data + g.N * g.source.n};
      }
      if (!in_place)
        planes = stage_block<T>(g.source, n0, n_count, group * g.channels + ch0, ch_count, rows, row_strips, i0, cols,
                                col_strips, j0, stage);
      for (int64_t tap0 = 0; tap0 < taps; tap0 += depth_taps) {
        const int64_t tap_count = min_of(depth_taps, taps - tap0), depth = ch_count * tap_count;
        const bool add = ch0 + tap0 > 0;
        const PackedFilters<E> a = pack_filters(g, group, m0, m_count, ch0, ch_count, tap0, tap_count, a_memory);
        if (windows) {
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t at = panel * panel_cols<E>, n = at / line / i_count, i = at / line % i_count;
            const E* window = planes.data + n * planes.image + i * planes.row + at % line;
            for_row_tiles(m_count, [&](int64_t m, auto height) {
              multiply_window_tile<E, height.value>(ch_count, planes.plane, tap_count, offsets + tap0,
                                                    a.data + m * a.row, a.row, a.col, window, c + m * c_row + at, c_row,
                                                    add);
            });
          }
        } else {
          for (int64_t panel = 0; panel < panels; ++panel) {
            Run runs[panel_cols<E>];
            const int64_t pixel = panel * panel_cols<E>, count = min_of<int64_t>(panel_cols<E>, pixels - pixel);
            const int run_count = find_runs(pixel, count, i_count, j_count, planes.image, planes.row, runs);
            pack_panel(planes, ch_count, offsets + tap0, tap_count, runs, run_count, b + pixel * depth);
          }
          multiply_block(m_count, panels, depth, a.data, a.row, a.col, b, panel_cols<E> * depth, c, c_row, add);
        }
      }
    }

    for (int64_t m = 0; m < m_count; ++m) {
      const int64_t channel = group * g.produced + m0 + m;
      const E bias = g.bias ? to_acc(g.bias[channel]) : 0;
      E* values = c + m * c_row;
      if (g.out.channel == 1) {
        if (g.bias || pr.relu)
          for (int64_t at = 0; at < c_row; at += lanes<E>) {
            const vec_t<E> v = load(values + at) + broadcast<E>(bias);
            store(values + at, pr.relu ? relu(v) : v);
          }
        continue;
      }
      for (int64_t at = 0; at < lines; ++at)
        write_row(values + at * line, j_count, bias, pr.relu,
                  g.out.at(n0 + at / i_count, channel, rows.out_first + (i0 + at % i_count) * rows.out_step,
                           cols.out_first + j0 * cols.out_step),
                  cols.out_step);
    }
    if (g.out.channel == 1)
      for (int64_t at = 0; at < lines; ++at)
        transpose(c + at * line, c_row, m_count, j_count,
                  g.out.at(n0 + at / i_count, group * g.produced + m0,
                           rows.out_first + (i0 + at % i_count) * rows.out_step, cols.out_first + j0 * cols.out_step),
                  cols.out_step * g.out.col);
  });
}

template <typename T>
void fprop_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y, void*,
                  char* scratch, const Parallel& parallel) {
  const Gather<T> gather{fprop_rows(pr),
                         fprop_cols(pr),
                         pr.N,
                         pr.groups,
                         pr.channels_per_group(),
                         pr.filters_per_group(),
                         images(x, pr.layout, pr.C, pr.H, pr.W),
                         filters(w, pr, Direction::fprop),
                         bias,
                         images(y, pr.layout, pr.K, pr.P, pr.Q)};
  gather_pixels<T>(pr, plan, [&](int64_t, int64_t) { return gather; }, scratch, parallel);
}

template <typename T>
void dgrad_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, void*, char* scratch,
                  const Parallel& parallel) {
  const auto gather_of = [&](int64_t a, int64_t b) {
    return Gather<T>{dgrad_rows(pr, a),
                     dgrad_cols(pr, b),
                     pr.N,
                     pr.groups,
                     pr.filters_per_group(),
                     pr.channels_per_group(),
                     images(dy, pr.layout, pr.K, pr.P, pr.Q),
                     filters(w, pr, Direction::dgrad),
                     nullptr,
                     images(dx, pr.layout, pr.C, pr.H, pr.W)};
  };
  gather_pixels<T>(pr, plan, gather_of, scratch, parallel);
}

}  // namespace
}  // namespace fastconv::cpu
