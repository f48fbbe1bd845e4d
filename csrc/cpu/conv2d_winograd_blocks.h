// How Winograd's convolution is cut into pieces, and the memory it takes: one truth for the plan, which asks for the
// buffers, and for the kernels, which lay them out. Elements are of the type that sums are kept in.
#pragma once

#include "conv2d_blocks.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t tile_in = 6;         // a tile reads 6×6 of x
constexpr int64_t tile_products = 36;  // and takes so many products a pair of channels
constexpr int64_t line = 16;           // between matrices, so that the 36 of them don't fall into the same cache lines

// So many products, of channels or in wgrad of tiles, are added up at a time, and these sums in turn: the products are
// larger than those of the sum itself and cancel, so that a long chain of them would lose more than the transforms do.
constexpr int64_t chain = 32, tile_chain = 16;
static_assert(chain % max_panel_cols == 0);

// The tiles of all images, in order. A box of them, rows of an image or a part of one, is staged and transformed at
// once; a chunk of boxes is multiplied at once.
//
// A tile of y is step × step, but for an image's last row and column of tiles, which may be narrower: for `outputs` in
// a direction so many of the six points are enough as outputs and taps are together, less one. It takes the first ones
// and the last, ∞. So not all tiles take part in each of the 36 matrices; those that do follow each other there.
struct Tiles {
  int64_t step;
  int64_t rows, cols;          // of an image
  int64_t last_row, last_col;  // points that its last ones take
  int64_t box_rows, box_cols;
  int64_t boxes;  // of all images
  int64_t chunk_boxes;

  int64_t row_boxes() const { return pieces_of(rows, box_rows); }
  int64_t col_boxes() const { return pieces_of(cols, box_cols); }
  int64_t chunk_tiles() const { return chunk_boxes * box_rows * box_cols; }
  int64_t chunks() const { return chunk_boxes < 1 ? 0 : pieces_of(boxes, chunk_boxes); }
  // The number of the first tile of a box, also for the box after the last.
  int64_t first(int64_t box) const {
    const int64_t n = box / (row_boxes() * col_boxes());
    return (n * rows + box / col_boxes() % row_boxes() * box_rows) * cols + box % col_boxes() * box_cols;
  }

  int64_t row_points(int64_t i) const { return i + 1 < rows ? tile_in : last_row; }
  int64_t col_points(int64_t j) const { return j + 1 < cols ? tile_in : last_col; }
  // Whether the last row (2) and column (1) of tiles take part in matrix f: four kinds of matrices.
  int kind(int64_t f) const { return 2 * takes(last_row, f / tile_in) + takes(last_col, f % tile_in); }
  // Tiles before tile j of row i of image n that take part in a matrix of that kind.
  int64_t before(int kind, int64_t n, int64_t i, int64_t j) const {
    const int64_t r = rows - (kind / 2 ? 0 : 1), c = cols - (kind % 2 ? 0 : 1);
    return i < r ? (n * r + i) * c + j : (n + 1) * r * c;
  }
  static bool takes(int64_t points, int64_t point) { return point < points - 1 || point == tile_in - 1; }
};

// Of each kind.
struct TileCounts {
  int64_t of[4];
};
inline TileCounts tiles_before(const Tiles& tiles, int64_t tile) {
  const int64_t j = tile % tiles.cols, i = tile / tiles.cols % tiles.rows, n = tile / tiles.cols / tiles.rows;
  return {tiles.before(0, n, i, j), tiles.before(1, n, i, j), tiles.before(2, n, i, j), tiles.before(3, n, i, j)};
}
inline TileCounts operator-(const TileCounts& a, const TileCounts& b) {
  return {a.of[0] - b.of[0], a.of[1] - b.of[1], a.of[2] - b.of[2], a.of[3] - b.of[3]};
}

// Tile j of a row is at at[f] + j · pitch in matrix f.
struct TileRow {
  int64_t at[tile_products];
};
// Row i of image n; `first`: the tiles before those that the matrices hold.
inline TileRow tile_row(const Tiles& tiles, int64_t n, int64_t i, const TileCounts& first, int64_t matrix,
                        int64_t pitch) {
  int64_t offset[4];
  for (int kind = 0; kind < 4; ++kind) offset[kind] = (tiles.before(kind, n, i, 0) - first.of[kind]) * pitch;
  TileRow row;
  for (int64_t f = 0; f < tile_products; ++f) row.at[f] = f * matrix + offset[tiles.kind(f)];
  return row;
}

// wgrad by F(5×5, 2×2) would lose too much. It computes 3×3 taps at a time, so a 5×5 filter in four pieces.
inline int64_t wgrad_pieces(const Conv2dProblem& p) { return pieces_of(p.R, 3) * pieces_of(p.R, 3); }

// plan.tile_k: tiles of a chunk
inline Tiles make_tiles(const Conv2dProblem& p, Direction direction, int64_t chunk) {
  const bool dgrad = direction == Direction::dgrad;
  const int64_t step = direction == Direction::wgrad ? 4 : tile_in + 1 - p.R;
  const int64_t height = dgrad ? p.H : p.P, width = dgrad ? p.W : p.Q;
  Tiles t{};
  t.step = step;
  t.rows = pieces_of(height, step);
  t.cols = pieces_of(width, step);
  t.last_row = tile_in - (t.rows * step - height);
  t.last_col = tile_in - (t.cols * step - width);
  const PixelBlock box = pixel_block(1, t.rows, t.cols, 64 / step);  // 16 channels of it stay in L1
  t.box_rows = box.i < 1 ? 1 : box.i;
  t.box_cols = box.j < 1 ? 1 : box.j;
  t.boxes = p.N * t.row_boxes() * t.col_boxes();
  const int64_t most = chunk / (t.box_rows * t.box_cols);
  t.chunk_boxes = balanced(t.boxes, most < 1 ? 1 : most);
  return t;
}

// fprop and dgrad come in three forms:
//   passing  each task transforms the filters that it needs, a chain at a time, so that they never leave the cache; for
//            few tiles, or filters that are too large to be kept;
//   apart    all filters are transformed first; then each chunk is a task of its own, with its tiles in scratch;
//   chunks   all filters are transformed first; then each chunk is shared by all tasks.
enum class GatherForm { passing, apart, chunks };
constexpr int64_t passing_tiles = 128, kept_elements = 1 << 21;
inline GatherForm gather_form(const Conv2dProblem& p, const Tiles& tiles, Direction direction) {
  const int64_t filters = tile_products * contracted_channels(p, direction) * produced_channels(p, direction);
  if (p.N * tiles.rows * tiles.cols <= passing_tiles || filters > kept_elements) return GatherForm::passing;
  return tiles.chunks() >= 16 ? GatherForm::apart : GatherForm::chunks;
}

// wgrad: a task adds up a block of filters × channels, for some of the 36 matrices, over the tiles of a chunk. If that
// is all there is of the block, its sums stay in scratch; else they are kept in the workspace.
struct WgradTasks {
  int64_t k_blocks, c_blocks, parts;
  bool kept;
  int64_t matrix, block;  // of sums: elements of one matrix and of 36

  int64_t blocks() const { return k_blocks * c_blocks; }
};
inline WgradTasks wgrad_tasks(const Conv2dProblem& p, const Conv2dPlan& plan, const Tiles& tiles) {
  WgradTasks t{};
  t.k_blocks = pieces_of(p.filters_per_group(), plan.tile_m);
  t.c_blocks = pieces_of(p.channels_per_group(), plan.tile_n);
  t.parts = 1;
  while (t.blocks() * t.parts < 16 && t.parts < tile_products) t.parts *= t.parts == 4 || t.parts == 12 ? 3 : 2;
  t.kept = t.parts > 1 || tiles.chunks() > 1;
  t.matrix = plan.tile_m * plan.tile_n + line;
  t.block = tile_products * t.matrix;
  return t;
}

// Transformed tiles: [panel of channels][f][tile][width], so that a task reads them in one piece. For panels of any
// width from 4 on, channels being whole ones.
inline int64_t tiles_matrix(int64_t tiles, int64_t width) { return tiles * width + line; }
inline int64_t tiles_elements(int64_t tiles, int64_t channels) { return tile_products * channels * (tiles + line / 4); }

// Offsets into the workspace, for one group at a time.
struct WinogradMemory {
  int64_t filters, filters_matrix;  // fprop, dgrad: 36 of [panel of produced][contracted][panel_cols]
  int64_t x;                        // transformed tiles, in panels of a chain; wgrad: of panel_cols
  int64_t dy;                       // wgrad: transformed tiles, in panels of panel_cols
  int64_t dw;                       // wgrad, where they are kept: sums, [block][f][filter][channel]
  int64_t box_sums, sums;           // wgrad: Σ dy of each box of a chunk, [box][filter], and of all
  int64_t end;
};
inline WinogradMemory winograd_memory(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const Tiles tiles = make_tiles(p, plan.direction, plan.tile_k);
  WinogradMemory m{};
  if (plan.direction != Direction::wgrad) {
    const int64_t contracted = contracted_channels(p, plan.direction);
    if (gather_form(p, tiles, plan.direction) != GatherForm::passing)
      m.filters_matrix = whole_panels(produced_channels(p, plan.direction)) * contracted + line;
    m.x = m.filters + tile_products * m.filters_matrix;
    m.end = m.x + slack;
    if (gather_form(p, tiles, plan.direction) != GatherForm::apart)
      m.end += tiles_elements(tiles.chunk_tiles(), whole_panels(contracted));
  } else {
    const int64_t channels = whole_panels(p.channels_per_group()), filters = whole_panels(p.filters_per_group());
    const WgradTasks tasks = wgrad_tasks(p, plan, tiles);
    m.dy = m.x + tiles_elements(tiles.chunk_tiles(), channels);
    m.dw = m.dy + tiles_elements(tiles.chunk_tiles(), filters);
    m.box_sums = m.dw + (tasks.kept ? tasks.blocks() * tasks.block : 0);
    m.sums = m.box_sums + tiles.chunk_boxes * filters;
    m.end = m.sums + filters + slack;
  }
  return m;
}

// One thread's scratch, as offsets in elements. The stage is needed before the products are.
constexpr int64_t run_tiles = 16;  // neighbours in a row that are written at once
struct WinogradScratch {
  int64_t stage, products, products_row, products_matrix, outputs, filters, filters_matrix, x, end;
};
inline WinogradScratch winograd_scratch(const Conv2dProblem& p, const Conv2dPlan& plan) {
  const Tiles tiles = make_tiles(p, plan.direction, plan.tile_k);
  const int64_t more = tile_in - tiles.step;
  const int64_t positions = (tiles.box_rows * tiles.step + more) * (tiles.box_cols * tiles.step + more);
  WinogradScratch s{};
  s.end = positions * max_panel_cols + slack;
  if (plan.direction == Direction::wgrad) {
    const WgradTasks tasks = wgrad_tasks(p, plan, tiles);
    if (!tasks.kept && tasks.block + slack > s.end) s.end = tasks.block + slack;
    return s;
  }
  const GatherForm form = gather_form(p, tiles, plan.direction);
  s.products_row = whole_panels(plan.tile_n);
  s.products_matrix = plan.tile_m * s.products_row + line;
  s.outputs = tile_products * s.products_matrix;
  s.filters = s.outputs + tiles.step * tiles.step * run_tiles * max_panel_cols + slack;
  s.filters_matrix = form == GatherForm::passing ? chain * s.products_row + line : 0;
  const int64_t end = s.filters + tile_products * s.filters_matrix + slack;
  if (end > s.end) s.end = end;
  s.x = s.end;
  if (form == GatherForm::apart)
    s.end += tiles_elements(tiles.chunk_tiles(), whole_panels(contracted_channels(p, plan.direction))) + slack;
  return s;
}

}  // namespace
}  // namespace fastconv::cpu
