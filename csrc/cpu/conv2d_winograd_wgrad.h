// Winograd's wgrad by F(3×3, 4×4), where dy takes the filters' part:
//
//   dU[f][k][c] = Σ_tile D[f][tile][k] · X[f][tile][c]       f = 0 … 35
//
// X and D being the transformed tiles of x, 6×6, and of dy, 4×4. All tiles are transformed, or as many as the workspace
// holds, before they are multiplied: then a task adds up a block of dU over all of them without leaving the cache, and
// the inverse transform takes it from there. 5×5 taps are computed in four pieces, of 3×3 taps or fewer, each with
// tiles of x of its own.
#pragma once

#include "conv2d_wgrad_out.h"
#include "conv2d_winograd_products.h"
#include "conv2d_winograd_tiles.h"

namespace fastconv::cpu {
namespace {

// Asks for the taps of a filter's channels: R × S of them from (r, s) on, or all where channels are neighbours in
// memory.
template <typename T>
FASTCONV_INLINE void prefetch_taps(const Images<T>& dw, int64_t k, int64_t c, int64_t channels, int64_t r, int64_t s,
                                   int64_t R, int64_t S) {
  if (dw.channel != 1) return prefetch_lines<true, 1>(dw.at(k, c, 0, 0), channels * dw.channel);
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < S; ++j) prefetch_lines<true>(dw.at(k, c, r + i, s + j), channels);
}

// dw[k][c] = the inverse transform of sums[f][c], of the piece's taps that the filter has, R × S from (r, s) on.
// Whether it is finite. The next k, `row` further, is on its way meanwhile.
template <typename T>
bool write_taps(const acc_t<T>* sums, int64_t row, int64_t matrix, int64_t k, int64_t c0, int64_t c_count, int64_t r,
                int64_t s, int64_t R, int64_t S, const Images<T>& dw) {
  using E = acc_t<T>;
  vec_t<E> zero{};  // NaN where a result was not finite
  for (int64_t c = 0; c < c_count; c += lanes<E>) {
    const int64_t count = min_of<int64_t>(lanes<E>, c_count - c);
    E taps[9][lanes<E>];
    for (int f = 0; f < tile_products; ++f) __builtin_prefetch(sums + f * matrix + c + row);
    transform<E, OutputMatrix<3>>([&](int i, int j) { return load(sums + (i * 6 + j) * matrix + c); },
                                  [&](int i, int j, vec_t<E> v) { store(taps[i * 3 + j], v); });
    for (int tap = 0; tap < 9; ++tap) zero += load_first(taps[tap], count) * E(0);
    if (dw.channel == 9) {
      transpose(taps[0], lanes<E>, 9, count, dw.at(k, c0 + c, 0, 0), 9);
      continue;
    }
    for (int64_t i = 0; i < R; ++i)
      if (dw.channel == 1)
        for (int64_t j = 0; j < S; ++j) convert_row(taps[i * 3 + j], count, dw.at(k, c0 + c, r + i, s + j));
      else
        transpose(taps[i * 3], lanes<E>, S, count, dw.at(k, c0 + c, r + i, s), dw.channel);
  }
  for (int lane = 0; lane < lanes<E>; ++lane)
    if (zero[lane] != 0) return false;
  return true;
}

// sums[k][c] (+)= Σ_t d[t][k] · x[t][c] of a panel of each, in three levels: chains, chains of these, and what is left.
template <typename E>
void add_tiles(int64_t rows, int64_t count, const E* d, const E* x, E* sums, int64_t sums_row, bool add) {
  constexpr int64_t width = panel_cols<E>, chains = 256;
  for (int64_t i = 0; count == 0 && !add && i < rows; ++i)  // none takes part
    for (int64_t j = 0; j < width; j += lanes<E>) store(sums + i * sums_row + j, vec_t<E>{});
  E partial[width * width];
  for (int64_t t0 = 0; t0 < count; t0 += chains, add = true) {
    const int64_t t1 = min_of(t0 + chains, count);
    E* const to = add ? partial : sums;
    const int64_t to_row = add ? width : sums_row;
    for (int64_t t = t0; t < t1; t += tile_chain)
      multiply_chain<1, width>(rows, min_of(tile_chain, t1 - t), d + t * width, x + t * width, to, to_row, t > t0,
                               d + (t + tile_chain) * width);
    for (int64_t i = 0; add && i < rows; ++i)
      for (int64_t j = 0; j < width; j += lanes<E>)
        store(sums + i * sums_row + j, load(sums + i * sums_row + j) + load(partial + i * width + j));
  }
}

// Whether all results are finite, as for fprop.
template <typename T>
bool winograd_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const T* dy, const T* x, T* dw, T* db,
                    void* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int width = panel_cols<E>;
  const Tiles tiles = make_tiles(p, Direction::wgrad, plan.tile_k);
  const WgradTasks tasks = wgrad_tasks(p, plan, tiles);
  const WinogradMemory memory = winograd_memory(p, plan);
  const int64_t cg = p.channels_per_group(), kg = p.filters_per_group();
  const int64_t x_panels = ceil_div(cg, width), dy_panels = ceil_div(kg, width);
  const TiledImages<T> dy_images{images(dy, p.layout, p.K, p.P, p.Q), p.P, p.Q, 0, 0};
  E *const x_data = (E*)workspace + memory.x, *const dy_data = (E*)workspace + memory.dy;
  E* const kept_sums = (E*)workspace + memory.dw;
  E *const box_sums = (E*)workspace + memory.box_sums, *const sums = (E*)workspace + memory.sums;
  const int64_t sums_row = whole_panels(kg);
  const auto partial_x = partial_matrices<E, InputMatrix>(tiles.last_row, tiles.last_col);
  const auto partial_dy = partial_matrices<E, FilterMatrix<4>>(tiles.last_row, tiles.last_col);
  bool spoilt = false;
  // One of the pieces of a group, of 3×3 taps from (r, s) on.
  const auto compute_piece = [&](int64_t group, int64_t r, int64_t s) {
    const bool first = r == 0 && s == 0;
    const TiledImages<T> x_images{images(x, p.layout, p.C, p.H, p.W), p.H, p.W, r - p.pad_h, s - p.pad_w};
    const Images<T> dw_images =
        images(dw + group * kg * p.w_elements() / max_of<int64_t>(p.K, 1), p.layout, cg, p.R, p.S);
    const int64_t R = min_of<int64_t>(3, p.R - r), S = min_of<int64_t>(3, p.S - s);
    const auto write_rows = [&](const E* block, int64_t k0, int64_t c0, int64_t row0, int64_t rows) {
      const int64_t c_count = min_of<int64_t>(plan.tile_n, cg - c0);
      for (int64_t row = row0; row < min_of(row0 + rows, kg - k0); ++row) {
        if (tasks.kept) prefetch_taps(dw_images, k0 + row + 1, c0, c_count, r, s, R, S);
        if (!write_taps(block + row * plan.tile_n, plan.tile_n, tasks.matrix, k0 + row, c0, c_count, r, s, R, S,
                        dw_images))
          __atomic_store_n(&spoilt, true, __ATOMIC_RELAXED);
      }
    };
    for (int64_t box0 = 0; box0 < tiles.boxes; box0 += tiles.chunk_boxes) {
      const int64_t boxes = min_of(tiles.chunk_boxes, tiles.boxes - box0);
      const int64_t chunk0 = tiles.first(box0), count = tiles.first(box0 + boxes) - chunk0;
      const TileCounts before = tiles_before(tiles, chunk0), counts = tiles_before(tiles, chunk0 + count) - before;
      const int64_t matrix = tiles_matrix(count, width), panel_elements = tile_products * matrix;
      for_each_task(parallel, x_panels * boxes, [&](int worker, int64_t task) {
        const int64_t panel = task / boxes, box = task % boxes, c = panel * width;
        transform_box<InputMatrix, 4>(x_images, tiles, partial_x, box0 + box, before, group * cg + c,
                                      min_of<int64_t>(width, cg - c), {x_data + panel * panel_elements, matrix, width},
                                      (E*)nullptr, (E*)(scratch + worker * plan.scratch_bytes));
      });
      const bool new_dy = first || tiles.chunks() > 1;  // D of one chunk is still there
      for_each_task(parallel, new_dy ? dy_panels * boxes : 0, [&](int worker, int64_t task) {
        const int64_t panel = task / boxes, box = task % boxes, k = panel * width;
        transform_box<FilterMatrix<4>, 4>(
            dy_images, tiles, partial_dy, box0 + box, before, group * kg + k, min_of<int64_t>(width, kg - k),
            {dy_data + panel * panel_elements, matrix, width}, db ? box_sums + box * sums_row + k : nullptr,
            (E*)(scratch + worker * plan.scratch_bytes));
      });
      for_each_task(parallel, tasks.blocks() * tasks.parts, [&](int worker, int64_t task) {
        const int64_t index = task / tasks.parts, part = task % tasks.parts;
        const int64_t k0 = index / tasks.c_blocks * plan.tile_m, k1 = min_of(k0 + plan.tile_m, kg);
        const int64_t c0 = index % tasks.c_blocks * plan.tile_n, c1 = min_of(c0 + plan.tile_n, cg);
        E* const block = tasks.kept ? kept_sums + index * tasks.block : (E*)(scratch + worker * plan.scratch_bytes);
        for (int64_t k = k0; k < k1; k += width)
          for (int64_t c = c0; c < c1; c += width)
            for (int64_t f = part * tile_products / tasks.parts; f < (part + 1) * tile_products / tasks.parts; ++f) {
              if (!tasks.kept && k == k0 && c == c0 && f < k1 - k0)
                prefetch_taps(dw_images, k0 + f, c0, c1 - c0, r, s, R, S);
              add_tiles(min_of<int64_t>(width, k1 - k), counts.of[tiles.kind(f)],
                        dy_data + k / width * panel_elements + f * matrix,
                        x_data + c / width * panel_elements + f * matrix,
                        block + f * tasks.matrix + (k - k0) * plan.tile_n + (c - c0), plan.tile_n, box0 > 0);
            }
        if (!tasks.kept) write_rows(block, k0, c0, 0, plan.tile_m);
      });
      for (int64_t box = 0; db && first && box < boxes; ++box)
        for (int64_t k = 0; k < kg; k += lanes<E>)
          store(sums + k, load(sums + k) + load(box_sums + box * sums_row + k));
    }
    if (!tasks.kept) return;
    constexpr int64_t rows = 8;
    const int64_t pieces = ceil_div(plan.tile_m, rows);
    for_each_task(parallel, tasks.blocks() * pieces, [&](int, int64_t task) {
      const int64_t index = task / pieces;
      write_rows(kept_sums + index * tasks.block, index / tasks.c_blocks * plan.tile_m,
                 index % tasks.c_blocks * plan.tile_n, task % pieces * rows, rows);
    });
  };
  for (int64_t group = 0; group < p.groups; ++group) {
    fill_zero<T>(sums, kg);
    for (int64_t r = 0; r < p.R; r += 3)
      for (int64_t s = 0; s < p.S; s += 3) compute_piece(group, r, s);
    if (db) convert_row(sums, kg, db + group * kg);
  }
  return !spoilt;
}

}  // namespace
}  // namespace fastconv::cpu
