// Winograd's wgrad by F(3×3, 4×4), where dy takes the filters' part:
//
//   dU[f][k][c] = Σ_tile D[f][tile][k] · X[f][tile][c]       f = 0 … 35
//
// X and D being the transformed 6×6 tiles of x and 4×4 blocks of dy. The sums stay in the workspace over all tiles,
// chunk by chunk, and go through one inverse transform at the end.
#pragma once

#include "conv2d_wgrad_out.h"
#include "conv2d_winograd_tiles.h"
#include "gemm.h"

namespace fastconv::cpu {
namespace {

// dw[k0 + k][c0 + c] = the inverse transform of dU. Whether it is finite.
template <typename T>
bool write_taps(const acc_t<T>* sums, int64_t row, int64_t matrix, int64_t k, int64_t c0, int64_t c_count,
                const Images<T>& dw) {
  using E = acc_t<T>;
  vec_t<E> zero{};  // NaN where a result was not finite
  for (int64_t c = c0; c < c0 + c_count; c += lanes<E>) {
    const int64_t count = min_of<int64_t>(lanes<E>, c0 + c_count - c);
    E taps[9][lanes<E>];
    transform<E, TapsMatrix>([&](int i, int j) { return load(sums + (i * 6 + j) * matrix + k * row + c); },
                             [&](int i, int j, vec_t<E> v) { store(taps[i * 3 + j], v); });
    for (int tap = 0; tap < 9; ++tap) zero += load_first(taps[tap], count) * E(0);
    if (dw.channel == 1) {
      for (int tap = 0; tap < 9; ++tap) convert_row(taps[tap], count, dw.at(k, c, tap / 3, tap % 3));
    } else {
      for (int64_t lane = 0; lane < count; ++lane)
        for (int tap = 0; tap < 9; ++tap) *dw.at(k, c + lane, tap / 3, tap % 3) = from_acc<T>(taps[tap][lane]);
    }
  }
  for (int lane = 0; lane < lanes<E>; ++lane)
    if (zero[lane] != 0) return false;
  return true;
}

// Whether all results are finite, as for fprop.
template <typename T>
bool winograd_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const T* dy, const T* x, T* dw, T* db,
                    void* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int width = panel_cols<E>;
  const Tiles tiles = make_tiles(p, Direction::wgrad, plan.tile_k);
  const WinogradMemory memory = winograd_memory(p, plan);
  const int64_t cg = p.channels_per_group(), kg = p.filters_per_group();
  const int64_t x_panels = ceil_div(cg, width), dy_panels = ceil_div(kg, width);
  const TiledImages<T> x_images{images(x, p.layout, p.C, p.H, p.W), p.H, p.W, -p.pad_h, -p.pad_w};
  const TiledImages<T> dy_images{images(dy, p.layout, p.K, p.P, p.Q), p.P, p.Q, 0, 0};
  E *const x_data = (E*)workspace + memory.x, *const dy_data = (E*)workspace + memory.dy;
  E* const dw_data = (E*)workspace + memory.dw;
  E *const box_sums = (E*)workspace + memory.box_sums, *const sums = (E*)workspace + memory.sums;
  const int64_t sums_row = whole_panels(kg);
  bool spoilt = false;
  for (int64_t group = 0; group < p.groups; ++group) {
    fill_zero<T>(sums, kg);
    for (int64_t box0 = 0; box0 < tiles.boxes; box0 += tiles.chunk_boxes) {
      const int64_t boxes = min_of(tiles.chunk_boxes, tiles.boxes - box0);
      const int64_t chunk0 = tiles.first(box0), count = tiles.first(box0 + boxes) - chunk0;
      for_each_task(parallel, boxes * (x_panels + dy_panels), [&](int worker, int64_t task) {
        const int64_t panel = task % (x_panels + dy_panels), box = task / (x_panels + dy_panels);
        E* const stage = (E*)(scratch + worker * plan.scratch_bytes);
        if (panel < x_panels) {
          const int64_t c = panel * width;
          transform_box<InputMatrix>(x_images, tiles, box0 + box, chunk0, group * cg + c,
                                     min_of<int64_t>(width, cg - c),
                                     {x_data + panel * count * width, memory.x_matrix, width}, (E*)nullptr, stage);
        } else {
          const int64_t k = (panel - x_panels) * width;
          transform_box<GradientMatrix>(dy_images, tiles, box0 + box, chunk0, group * kg + k,
                                        min_of<int64_t>(width, kg - k), {dy_data + k, memory.dy_matrix, memory.dy_row},
                                        db ? box_sums + box * sums_row + k : nullptr, stage);
        }
      });
      const int64_t k_blocks = ceil_div(kg, plan.tile_m), c_blocks = ceil_div(cg, plan.tile_n);
      for_each_task(parallel, tile_products * k_blocks * c_blocks, [&](int, int64_t task) {
        const int64_t f = task / c_blocks / k_blocks, k0 = task / c_blocks % k_blocks * plan.tile_m;
        const int64_t c0 = task % c_blocks * plan.tile_n, c_count = min_of<int64_t>(plan.tile_n, cg - c0);
        for (int64_t t = 0; t < count; t += chain)
          multiply_block(min_of<int64_t>(plan.tile_m, kg - k0), ceil_div(c_count, width), min_of(chain, count - t),
                         dy_data + f * memory.dy_matrix + t * memory.dy_row + k0, 1, memory.dy_row,
                         x_data + f * memory.x_matrix + c0 * count + t * width, count * width,
                         dw_data + f * memory.dw_matrix + k0 * memory.dw_row + c0, memory.dw_row, box0 + t > 0);
      });
      for (int64_t box = 0; db && box < boxes; ++box)
        for (int64_t k = 0; k < kg; k += lanes<E>)
          store(sums + k, load(sums + k) + load(box_sums + box * sums_row + k));
    }
    const Images<T> dw_images = images(dw + group * kg * p.w_elements() / max_of<int64_t>(p.K, 1), p.layout, cg, 3, 3);
    constexpr int64_t block = 64;
    const int64_t c_blocks = ceil_div(cg, block);
    for_each_task(parallel, kg * c_blocks, [&](int, int64_t task) {
      const int64_t c0 = task % c_blocks * block;
      if (!write_taps(dw_data, memory.dw_row, memory.dw_matrix, task / c_blocks, c0, min_of(block, cg - c0), dw_images))
        __atomic_store_n(&spoilt, true, __ATOMIC_RELAXED);
    });
    if (db) convert_row(sums, kg, db + group * kg);
  }
  return !spoilt;
}

}  // namespace
}  // namespace fastconv::cpu
