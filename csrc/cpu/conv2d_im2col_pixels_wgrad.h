// im2col with vectors along the pixels, wgrad: NCHW, and NHWC where a group has few channels.
//
//   C[t][filter] = Σ_pixel patch[t][pixel] · dy[filter][pixel]     t = (channel, tap)
//
// A task computes a block of patch elements × filters over its piece of all pixels, a block of them at a time: it
// stages the planes that they read, where the patches' rows are found, transposes dy into panels, and multiplies. db is
// the sum of dy's panels, which the tasks of the first block of patch elements add as well. The sums of a piece stay as
// they are, [group][t][filter]; they become dw where the pieces are added.
#pragma once

#include "conv2d_im2col_pieces.h"
#include "conv2d_im2col_pixels.h"
#include "conv2d_wgrad_out.h"

namespace fastconv::cpu {
namespace {

// panels[panel][pixel][lane] = planes[panel·panel_cols + lane][pixel] for `length` neighbouring pixels.
template <typename T>
void pack_planes(const T* planes, int64_t channel_pitch, int64_t col_pitch, int64_t channels, int64_t length,
                 acc_t<T>* out, int64_t panel_pitch) {
  constexpr int64_t cols = panel_cols<acc_t<T>>;
  for (int64_t ch = 0; ch < channels; ch += cols, out += panel_pitch) {
    const int64_t width = min_of(cols, channels - ch);
    if (col_pitch == 1) {
      constexpr int64_t step = 64 / int64_t(sizeof(T));
      for (int64_t i = 0; i < length; i += step) {
        for (int64_t row = ch + cols; row < min_of(ch + 2 * cols, channels); ++row)  // the next panel
          __builtin_prefetch(planes + row * channel_pitch + i);
        transpose(planes + ch * channel_pitch + i, channel_pitch, width, min_of(step, length - i), out + i * cols,
                  cols);
      }
    } else {
      for (int64_t i = 0; i < length; ++i) copy_strided(planes + i * col_pitch + ch, 1, out + i * cols, width);
    }
  }
}

// sums[col] += Σ_row b[panel][row][col] for every panel.
template <typename E>
void add_panel_rows(const E* b, int64_t panels, int64_t depth, E* sums) {
  for (int64_t panel = 0; panel < panels; ++panel, sums += panel_cols<E>) {
    vec_t<E> left{}, right{};
    for (int64_t t = 0; t < depth; ++t, b += panel_cols<E>) {
      left += load(b);
      right += load(b + lanes<E>);
    }
    store(sums, load(sums) + left);
    store(sums + lanes<E>, load(sums + lanes<E>) + right);
  }
}

// dw from sums[t][filter] of filters k0 … k0 + k_count − 1 and m_count elements of patches, `tap_count` taps of
// channels c0, …
template <typename T>
void write_dw(const Conv2dProblem& pr, const acc_t<T>* sums, int64_t pitch, int64_t group, int64_t k0, int64_t k_count,
              int64_t c0, int64_t tap0, int64_t m_count, int64_t tap_count, T* dw) {
  const int64_t cg = pr.channels_per_group(), taps = pr.R * pr.S;
  dw += (group * pr.filters_per_group() + k0) * cg * taps;
  if (pr.layout == Layout::NCHW)  // (c, r, s) is contiguous: blocks of taps are those of one channel
    return transpose(sums, pitch, m_count, k_count, dw + c0 * taps + tap0, cg * taps);
  for (int64_t k = 0; k < k_count; ++k)
    for (int64_t m = 0; m < m_count; ++m)
      dw[(k * taps + tap0 + m % tap_count) * cg + c0 + m / tap_count] = from_acc<T>(sums[m * pitch + k]);
}

// dw and db from the pieces, added in order.
template <typename T>
void add_transposed_pieces(const Conv2dProblem& pr, const WgradOut<T>& out, int64_t pieces, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int64_t width = 128;
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), taps = pr.R * pr.S;
  const int64_t channels = max_of<int64_t>(1, 16 / taps), c_blocks = ceil_div(cg, channels);
  const int64_t k_blocks = ceil_div(kg, width), tap_blocks = ceil_div(taps, 16);
  const int64_t dw_tasks = pr.groups * c_blocks * tap_blocks * k_blocks;
  for_each_task(parallel, dw_tasks + (out.db ? 1 : 0), [&](int, int64_t task) {
    if (task == dw_tasks) return add_partial_sums(out, pieces, out.w_elements, out.K, out.db);
    const int64_t k0 = task % k_blocks * width, tap0 = task / k_blocks % tap_blocks * 16;
    const int64_t c0 = task / k_blocks / tap_blocks % c_blocks * channels;
    const int64_t group = task / k_blocks / tap_blocks / c_blocks;
    const int64_t k_count = min_of(width, kg - k0), tap_count = min_of<int64_t>(16, taps - tap0);
    const int64_t m_count = min_of(channels, cg - c0) * tap_count;
    alignas(64) E sums[16 * width];
    const WgradOut<E> partial{nullptr, nullptr, out.partial, out.w_elements, out.K};
    for (int64_t m = 0; m < m_count; ++m)
      add_partial_sums(partial, pieces, ((group * cg + c0 + m / tap_count) * taps + tap0 + m % tap_count) * kg + k0,
                       k_count, sums + m * width);
    write_dw(pr, sums, width, group, k0, k_count, c0, tap0, m_count, tap_count, out.dw);
  });
}

template <typename T>
void wgrad_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy_data, const T* x_data,
                  const WgradOut<T>& out, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  const Images<const T> x = images(x_data, pr.layout, pr.C, pr.H, pr.W);
  const Images<const T> dy = images(dy_data, pr.layout, pr.K, pr.P, pr.Q);
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group(), taps = pr.R * pr.S;
  const PixelBlock block = pixel_block(pr.N, pr.P, pr.Q, plan.tile_k);
  const DepthBlock patch = depth_block(cg, taps, plan.tile_m);
  const Scratch layout = wgrad_scratch(pr, plan);
  const int64_t i_blocks = ceil_div(pr.P, block.i), j_blocks = ceil_div(pr.Q, block.j);
  const int64_t pixel_blocks = ceil_div(pr.N, block.n) * i_blocks * j_blocks;
  const int64_t c_blocks = ceil_div(cg, patch.channels), tap_blocks = ceil_div(taps, patch.taps);
  const int64_t k_blocks = ceil_div(kg, plan.tile_n);
  const bool in_place = windows_in_place(pr, plan.direction);  // the rows of A are those of x
  const bool joined = joins_rows(block.j);
  for_each_task(parallel, plan.split * pr.groups * c_blocks * tap_blocks * k_blocks, [&](int worker, int64_t task) {
    const int64_t k0 = task % k_blocks * plan.tile_n, tap0 = task / k_blocks % tap_blocks * patch.taps;
    const int64_t c0 = task / k_blocks / tap_blocks % c_blocks * patch.channels;
    const int64_t group = task / k_blocks / tap_blocks / c_blocks % pr.groups;
    const int64_t piece = task / k_blocks / tap_blocks / c_blocks / pr.groups;
    const int64_t k_count = min_of<int64_t>(plan.tile_n, kg - k0), panels = ceil_div(k_count, panel_cols<E>);
    const int64_t c_count = min_of(patch.channels, cg - c0), tap_count = min_of(patch.taps, taps - tap0);
    const int64_t m_count = c_count * tap_count, c_row = panels * panel_cols<E>;

    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    const auto** a = reinterpret_cast<const E**>(memory);
    E *stage = memory + layout.stage, *b = memory + layout.b, *c = memory + layout.c;
    E* bias_sums = c + m_count * c_row;
    fill_zero<T>(bias_sums, c_row);
    E* partial = out.partial ? out.partial + piece * (out.w_elements + out.K) : nullptr;
    auto* partial_rows = reinterpret_cast<int64_t*>(memory + layout.rows);
    for (int64_t m = 0; m < m_count; ++m)
      partial_rows[m] = ((group * cg + c0 + m / tap_count) * taps + tap0 + m % tap_count) * kg + k0;
    const int64_t first = piece * pixel_blocks / plan.split, end = (piece + 1) * pixel_blocks / plan.split;
    for (int64_t index = first; index < end; ++index) {
      const int64_t j0 = index % j_blocks * block.j, i0 = index / j_blocks % i_blocks * block.i;
      const int64_t n0 = index / j_blocks / i_blocks * block.n;
      const int64_t n_count = min_of(block.n, pr.N - n0);
      const int64_t i_count = min_of(block.i, pr.P - i0), j_count = min_of(block.j, pr.Q - j0);
      const int64_t pixels = n_count * i_count * j_count;
      // Lines of pixels that are neighbours in every row of A.
      const int64_t image_lines = joined || (in_place && j_count == pr.Q) ? 1 : i_count;
      const int64_t lines = n_count * image_lines, line = pixels / lines;
      const Strips row_strips = make_strips(rows, i_count);
      const Strips col_strips = joined ? Strips{1, j_count, 0, 0} : make_strips(cols, j_count);
      const int64_t pieces = joined ? pr.S : 1, row = col_strips.elements(), piece = row_strips.elements() * row;
      if (!in_place)
        stage_block<T>(x, n0, n_count, group * cg + c0, c_count, rows, row_strips, i0, cols, col_strips, j0, pieces,
                       stage);
      const E** to = a;
      for (int64_t n = 0; n < n_count; ++n)
        for (int64_t i = 0; i < image_lines; ++i)
          for (int64_t ch = 0; ch < c_count; ++ch)
            for (int64_t tap = tap0; tap < tap0 + tap_count; ++tap) {
              const int64_t r = tap / pr.S, s = tap % pr.S;
              const E* plane = stage + (ch * n_count + n) * pieces * piece;
              if constexpr (std::is_same_v<T, E>) {
                if (in_place) {
                  *to++ = x.at(n0 + n, group * cg + c0 + ch, i0 + i, j0);
                  continue;
                }
              }
              *to++ = plane + (row_strips.offset(r) + i) * row + (joined ? s * piece : col_strips.offset(s));
            }
      const int64_t b_panel = pixels * panel_cols<E>;
      const int64_t dy_lines = j_count == pr.Q ? 1 : i_count, dy_line = i_count * j_count / dy_lines;
      for (int64_t n = 0; n < n_count; ++n)
        for (int64_t i = 0; i < dy_lines; ++i)
          pack_planes(dy.at(n0 + n, group * kg + k0, i0 + i, j0), dy.channel, dy.col, k_count, dy_line,
                      b + (n * dy_lines + i) * dy_line * panel_cols<E>, b_panel);
      const PiecesOut<E> sums{c,       c_row,   index > first, index == end - 1 ? partial : nullptr, partial_rows,
                              k_count, nullptr, false};
      multiply_pieces<E>(m_count, panels, lines, line, a, m_count, b, b_panel, sums);
      if (c0 == 0 && tap0 == 0) add_panel_rows(b, panels, pixels, bias_sums);
    }
    const int64_t filter = group * kg + k0;
    if (c0 == 0 && tap0 == 0) {
      if (partial)
        convert_row(bias_sums, k_count, partial + out.w_elements + filter);
      else if (out.db)
        convert_row(bias_sums, k_count, out.db + filter);
    }
    if (partial) return;
    constexpr int64_t width = 16;  // filters, whose rows of dw are written from end to end
    for (int64_t k = 0; k < k_count; k += width)
      write_dw(pr, c + k, c_row, group, k0 + k, min_of(width, k_count - k), c0, tap0, m_count, tap_count, out.dw);
  });
}

}  // namespace
}  // namespace fastconv::cpu
