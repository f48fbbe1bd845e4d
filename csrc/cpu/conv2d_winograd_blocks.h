// How Winograd's convolution is cut into pieces, and the memory it takes: one truth for the plan, which asks for the
// buffers, and for the kernels, which lay them out. Elements are of the type that sums are kept in.
#pragma once

#include "conv2d_blocks.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t tile_out = 4;        // a tile of y is 4×4
constexpr int64_t tile_in = 6;         // and reads 6×6 of x
constexpr int64_t tile_products = 36;  // for which it takes so many products a pair of channels, instead of 144
constexpr int64_t line = 16;           // between matrices, so that the 36 of them don't fall into the same cache lines

// So many products, of channels or in wgrad of tiles, are added up at a time, and these sums in turn: the products are
// larger than those of the sum itself and cancel, so that a long chain of them would lose more than the transforms do.
constexpr int64_t chain = 32;
static_assert(chain % max_panel_cols == 0);

// The tiles of all images, in order. A box of them, rows of an image or a part of one, is staged and transformed at
// once; a chunk of boxes is multiplied at once.
struct Tiles {
  int64_t rows, cols;  // of an image
  int64_t box_rows, box_cols;
  int64_t boxes;  // of all images
  int64_t chunk_boxes;

  int64_t row_boxes() const { return pieces_of(rows, box_rows); }
  int64_t col_boxes() const { return pieces_of(cols, box_cols); }
  int64_t chunk_tiles() const { return chunk_boxes * box_rows * box_cols; }
  int64_t chunks() const { return chunk_boxes < 1 ? 0 : pieces_of(boxes, chunk_boxes); }
  // fprop and dgrad: each chunk is a task of its own, with its tiles in scratch. Of fewer chunks the parts are tasks.
  bool apart() const { return chunks() >= 16; }
  // The number of the first tile of a box, also for the box after the last.
  int64_t first(int64_t box) const {
    const int64_t n = box / (row_boxes() * col_boxes());
    return (n * rows + box / col_boxes() % row_boxes() * box_rows) * cols + box % col_boxes() * box_cols;
  }
};

// plan.tile_k: tiles of a chunk
inline Tiles make_tiles(const Conv2dProblem& p, Direction direction, int64_t chunk) {
  const bool dgrad = direction == Direction::dgrad;
  Tiles t{pieces_of(dgrad ? p.H : p.P, tile_out), pieces_of(dgrad ? p.W : p.Q, tile_out), 0, 0, 0, 0};
  const PixelBlock box = pixel_block(1, t.rows, t.cols, 16);  // 16 channels of it stay in L1
  t.box_rows = box.i < 1 ? 1 : box.i;
  t.box_cols = box.j < 1 ? 1 : box.j;
  t.boxes = p.N * t.row_boxes() * t.col_boxes();
  const int64_t most = chunk / (t.box_rows * t.box_cols);
  t.chunk_boxes = balanced(t.boxes, most < 1 ? 1 : most);
  return t;
}

// Offsets into the workspace, for one group at a time.
struct WinogradMemory {
  int64_t dy_row, dw_row;                // pitches
  int64_t filters, filters_matrix;       // fprop, dgrad: 36 of [panel of produced][contracted][panel_cols]
  int64_t x, x_matrix;                   // 36 of [chain][tile][channel], wgrad: [panel][tile][channel]
  int64_t dy, dy_matrix, dw, dw_matrix;  // wgrad: 36 of [tile][filter], and of [filter][channel]
  int64_t box_sums, sums;                // wgrad: Σ dy of each box of a chunk, [box][filter], and of all
  int64_t end;
};
inline WinogradMemory winograd_memory(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const Tiles tiles = make_tiles(p, plan.direction, plan.tile_k);
  WinogradMemory m{};
  if (plan.direction != Direction::wgrad) {
    const int64_t contracted = contracted_channels(p, plan.direction);
    m.filters_matrix = whole_panels(produced_channels(p, plan.direction)) * contracted + line;
    m.x_matrix = tiles.chunk_tiles() * pieces_of(contracted, chain) * chain + line;
    m.x = m.filters + tile_products * m.filters_matrix;
    m.end = m.x + tile_products * m.x_matrix + slack;
  } else {
    const int64_t channels = whole_panels(p.channels_per_group()), filters = whole_panels(p.filters_per_group());
    m.dy_row = filters + line;
    m.dw_row = channels;
    m.x_matrix = tiles.chunk_tiles() * channels + line;
    m.dy_matrix = tiles.chunk_tiles() * m.dy_row + line;
    m.dw_matrix = p.filters_per_group() * m.dw_row + line;
    m.dy = m.x + tile_products * m.x_matrix;
    m.dw = m.dy + tile_products * m.dy_matrix;
    m.box_sums = m.dw + tile_products * m.dw_matrix;
    m.sums = m.box_sums + tiles.chunk_boxes * filters;
    m.end = m.sums + filters + slack;
  }
  return m;
}

// One thread's scratch, as offsets in elements. The stage is needed before the products are.
constexpr int64_t run_tiles = 16;  // neighbours in a row that are written at once
struct WinogradScratch {
  int64_t stage, products, products_row, products_matrix, outputs, x, end;
};
inline WinogradScratch winograd_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const Tiles tiles = make_tiles(p, plan.direction, plan.tile_k);
  const int64_t positions = (tiles.box_rows * tile_out + 2) * (tiles.box_cols * tile_out + 2);
  WinogradScratch s{};
  s.end = positions * max_panel_cols + slack;
  if (plan.direction != Direction::wgrad) {
    s.products_row = whole_panels(plan.tile_n);
    s.products_matrix = plan.tile_m * s.products_row + line;
    s.outputs = tile_products * s.products_matrix;
    const int64_t end = s.outputs + tile_out * tile_out * run_tiles * max_panel_cols + slack;
    if (end > s.end) s.end = end;
    s.x = s.end;
    if (tiles.apart()) s.end += tile_products * winograd_memory(p, plan).x_matrix + slack;
  }
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
