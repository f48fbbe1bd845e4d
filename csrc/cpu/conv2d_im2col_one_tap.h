// im2col of many 1×1 filters in NCHW: the gradients, with rows and columns exchanged, so that vectors run along the
// channels of x.
//
//   dgrad  C[pixel][channel]  = Σ_filter dy[filter][pixel] · w[filter][channel]
//   wgrad  C[filter][channel] = Σ_pixel  dy[filter][pixel] · x[channel][pixel]
//
// A is dy, read where it lies; panels of B are copied from w, or transposed from x. dgrad leaves no vector partly idle,
// whatever the image's size, and transposes its sums, once for all filters. wgrad transposes a panel of x once for all
// filters of a task, and its sums are rows of dw.
#pragma once

#include "conv2d_im2col_pixels_wgrad.h"

namespace fastconv::cpu {
namespace {

// out[row][panel_cols]: `count` columns of rows that are `pitch` apart. Those of the next piece of depth are asked for.
template <typename E>
void pack_filter_panel(const E* rows, int64_t pitch, int64_t depth, int64_t next, int64_t count, E* out) {
  constexpr int64_t width = panel_cols<E>, line = 64 / sizeof(E);
  for (int64_t t = 0; t < depth; ++t, rows += pitch, out += width) {
    if (t < next)
      for (int64_t i = 0; i < count; i += line) __builtin_prefetch(rows + depth * pitch + i, 0, 2);
    if (count == width) {
      const vec_t<E> left = load(rows), right = load(rows + lanes<E>);
      store(out, left);
      store(out + lanes<E>, right);
    } else {
      copy_strided<true>(rows, 1, out, count);
    }
  }
}

// a[t·a_col + row]: rows are neighbours. Those `ahead` elements further are asked for.
template <typename E, int Rows, int Vectors>
__attribute__((noinline)) void multiply_plane_tile(int64_t depth, const E* a, int64_t a_col, int64_t ahead, const E* b,
                                                   const TileOut<E>& to, int64_t row, int64_t col) {
  vec_t<E> sums[Rows][Vectors];
  clear_tile(sums);
  for (int64_t t = 0; t < depth; ++t, a += a_col, b += panel_cols<E>) {
    __builtin_prefetch(a + ahead, 0, 2);
    vec_t<E> values[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) values[v] = load(b + v * lanes<E>);
    add_products(sums, values, [&](int i) { return broadcast<E>(a[i]); });
  }
  if (to.add) add_tile(sums, to.add + row * to.add_row + col, to.add_row);
  store_tile(sums, to.c + row * to.c_row + col, to.c_row);
}

template <typename E>
void dgrad_one_tap(const Conv2dProblem& pr, const Conv2dPlan& plan, const E* dy_data, const E* w, E* dx_data,
                   char* scratch, const Parallel& parallel) {
  const Images<const E> dy = images(dy_data, pr.layout, pr.K, pr.P, pr.Q);
  const Images<E> dx = images(dx_data, pr.layout, pr.C, pr.H, pr.W);
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group();
  const PixelBlock block = gather_block(pr.N, pr.P, pr.Q, plan.tile_n);
  const Scratch layout = gather_scratch(pr, plan);
  const int64_t depth = balanced(kg, plan.tile_k), c_row = whole_panels(plan.tile_m);
  const int64_t i_blocks = ceil_div(pr.P, block.i), j_blocks = ceil_div(pr.Q, block.j);
  const int64_t c_blocks = ceil_div(cg, plan.tile_m);
  const int64_t tasks = ceil_div(pr.N, block.n) * i_blocks * j_blocks * pr.groups * c_blocks;
  for_each_task(parallel, tasks, [&](int worker, int64_t task) {
    const int64_t c0 = task % c_blocks * plan.tile_m, group = task / c_blocks % pr.groups;
    const int64_t pixel_task = task / c_blocks / pr.groups, j0 = pixel_task % j_blocks * block.j;
    const int64_t i0 = pixel_task / j_blocks % i_blocks * block.i, n0 = pixel_task / j_blocks / i_blocks * block.n;
    const int64_t n_count = min_of(block.n, pr.N - n0), c_count = min_of<int64_t>(plan.tile_m, cg - c0);
    const int64_t pixels = min_of(block.i, pr.P - i0) * min_of(block.j, pr.Q - j0);  // neighbours in a plane
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    E *panel = memory + layout.b, *c = memory + layout.c;
    for (int64_t k0 = 0; k0 < kg; k0 += depth) {
      const int64_t k_count = min_of(depth, kg - k0), next = min_of(depth, kg - k0 - k_count);
      for (int64_t col = 0; col < c_count; col += panel_cols<E>) {
        const int64_t count = min_of<int64_t>(panel_cols<E>, c_count - col);
        pack_filter_panel(w + (group * kg + k0) * cg + c0 + col, cg, k_count, next, count, panel);
        for (int64_t n = 0; n < n_count; ++n) {
          E* sums = c + n * pixels * c_row;
          const TileOut<E> to{sums, c_row, k0 > 0 ? sums : nullptr, c_row};
          const E* a = dy.at(n0 + n, group * kg + k0, i0, j0);
          const int64_t ahead = n + 1 < n_count ? dy.n : depth * dy.channel - (n_count - 1) * dy.n;
          for_row_tiles(pixels, [&](int64_t row, auto height) {
            if (count > lanes<E>)
              multiply_plane_tile<E, height.value, 2>(k_count, a + row, dy.channel, ahead, panel, to, row, col);
            else
              multiply_plane_tile<E, height.value, 1>(k_count, a + row, dy.channel, ahead, panel, to, row, col);
          });
        }
      }
    }
    for (int64_t n = 0; n < n_count; ++n)
      transpose(c + n * pixels * c_row, c_row, pixels, c_count, dx.at(n0 + n, group * cg + c0, i0, j0), dx.channel);
  });
}

// sums[row] (+)= Σ a[row][0 … count − 1]
template <typename E>
void add_row_sums(const E* const* a, int64_t rows, int64_t count, bool add, E* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    vec_t<E> sum{};
    int64_t i = 0;
    for (; i + lanes<E> <= count; i += lanes<E>) sum += load(a[row] + i);
    if (i < count) sum += load_first(a[row] + i, count - i);
    E total = add ? sums[row] : 0;
    for (int lane = 0; lane < lanes<E>; ++lane) total += sum[lane];
    sums[row] = total;
  }
}

template <typename E>
void wgrad_one_tap(const Conv2dProblem& pr, const Conv2dPlan& plan, const E* dy_data, const E* x_data,
                   const WgradOut<E>& out, char* scratch, const Parallel& parallel) {
  const Images<const E> x = images(x_data, pr.layout, pr.C, pr.H, pr.W);
  const Images<const E> dy = images(dy_data, pr.layout, pr.K, pr.P, pr.Q);
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group();
  const PixelBlock block = pixel_block(pr.N, pr.P, pr.Q, plan.tile_k);
  const Scratch layout = wgrad_scratch(pr, plan);
  const int64_t i_blocks = ceil_div(pr.P, block.i), j_blocks = ceil_div(pr.Q, block.j);
  const int64_t pixel_blocks = ceil_div(pr.N, block.n) * i_blocks * j_blocks;
  const int64_t c_blocks = ceil_div(cg, plan.tile_n), k_blocks = ceil_div(kg, plan.tile_m);
  for_each_task(parallel, plan.split * pr.groups * k_blocks * c_blocks, [&](int worker, int64_t task) {
    const int64_t c0 = task % c_blocks * plan.tile_n, k0 = task / c_blocks % k_blocks * plan.tile_m;
    const int64_t group = task / c_blocks / k_blocks % pr.groups, piece = task / c_blocks / k_blocks / pr.groups;
    const int64_t k_count = min_of<int64_t>(plan.tile_m, kg - k0), c_count = min_of<int64_t>(plan.tile_n, cg - c0);
    const int64_t panels = ceil_div(c_count, panel_cols<E>), filter = group * kg + k0;
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    const auto** a = reinterpret_cast<const E**>(memory);
    auto* out_rows = reinterpret_cast<int64_t*>(memory + layout.rows);
    E *bias_sums = memory + layout.stage, *b = memory + layout.b, *c = memory + layout.c;
    for (int64_t k = 0; k < k_count; ++k) out_rows[k] = (filter + k) * cg + c0;
    out.with_piece(piece, [&](E* dw, E* db) {
      const int64_t first = piece * pixel_blocks / plan.split, end = (piece + 1) * pixel_blocks / plan.split;
      for (int64_t index = first; index < end; ++index) {
        const int64_t j0 = index % j_blocks * block.j, i0 = index / j_blocks % i_blocks * block.i;
        const int64_t n0 = index / j_blocks / i_blocks * block.n, n_count = min_of(block.n, pr.N - n0);
        const int64_t line = min_of(block.i, pr.P - i0) * min_of(block.j, pr.Q - j0);  // neighbours in a plane
        const int64_t b_panel = n_count * line * panel_cols<E>;
        for (int64_t n = 0; n < n_count; ++n) {
          const E** rows = a + n * k_count;
          for (int64_t k = 0; k < k_count; ++k) rows[k] = dy.at(n0 + n, filter + k, i0, j0);
          pack_planes(x.at(n0 + n, group * cg + c0, i0, j0), x.channel, x.col, c_count, line,
                      b + n * line * panel_cols<E>, b_panel);
          if (c0 == 0 && db) add_row_sums(rows, k_count, line, index > first || n > 0, bias_sums);
        }
        const PiecesOut<E> sums{
            c,    panels * panel_cols<E>, index > first, index == end - 1 ? dw : nullptr, out_rows, c_count, nullptr,
            false};
        multiply_pieces<E>(k_count, panels, n_count, line, a, k_count, b, b_panel, sums);
      }
      if (c0 == 0 && db) convert_row(bias_sums, k_count, db + filter);
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
