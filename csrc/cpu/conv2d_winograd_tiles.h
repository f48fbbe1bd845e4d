// Tiles of images on their way into and out of Winograd's products. Vectors run along the channels, a panel of them at
// a time, in both memory orders: NCHW is transposed on the way.
#pragma once

#include "conv2d_images.h"
#include "conv2d_stage.h"
#include "conv2d_winograd_blocks.h"
#include "conv2d_winograd_transforms.h"

namespace fastconv::cpu {
namespace {

// Planes of images that are read from (row, col) on for the first tile, and as zeros outside.
template <typename T>
struct TiledImages {
  Images<const T> images;
  int64_t height, width;
  int64_t row, col;
};

// stage[row][col][panel_cols]: rows × cols positions from (row0, col0) on, of up to panel_cols channels.
template <typename T>
void stage_positions(const TiledImages<T>& source, int64_t n, int64_t channel, int64_t channels, int64_t row0,
                     int64_t rows, int64_t col0, int64_t cols, acc_t<T>* stage) {
  constexpr int width = panel_cols<acc_t<T>>;
  const auto zero = [](acc_t<T>* to, const acc_t<T>* end) {
    for (; to < end; to += lanes<T>) store(to, vec_t<T>{});
  };
  const int64_t first = min_of(cols, max_of<int64_t>(0, -col0));
  const int64_t last = max_of(first, min_of(cols, source.width - col0));
  for (int64_t row = row0; row < row0 + rows; ++row, stage += cols * width) {
    if (row < 0 || row >= source.height || first == last) {
      zero(stage, stage + cols * width);
      continue;
    }
    zero(stage, stage + first * width);
    zero(stage + last * width, stage + cols * width);
    const T* from = source.images.at(n, channel, row, col0 + first);
    acc_t<T>* to = stage + first * width;
    if (source.images.col == 1) {
      transpose(from, source.images.channel, channels, last - first, to, width);
    } else if (channels == width) {
      for (int64_t col = first; col < last; ++col, from += source.images.col, to += width) {
        store(to, load(from));
        store(to + lanes<T>, load(from + lanes<T>));
      }
    } else {
      for (int64_t col = first; col < last; ++col, from += source.images.col, to += width)
        copy_strided(from, 1, to, channels);
    }
  }
}

// Where transformed tiles go: 36 matrices of the tiles that take part, from the first of a chunk on, `pitch` apart.
template <typename E>
struct TileMatrices {
  E* data;
  int64_t matrix, pitch;
};

// The matrix that point i of so many takes part in, as a row and as a column.
inline int point_number(int i, int64_t points) { return i < points - 1 ? i : int(tile_in) - 1; }

// Transforms one panel of channels of a box of tiles, which lie Step apart in the source. `first`: the tiles before the
// chunk. sums: Σ of what was staged, or null.
template <typename Matrix, int Step, typename T>
void transform_box(const TiledImages<T>& source, const Tiles& tiles, const PartialMatrices<acc_t<T>>& partial,
                   int64_t box, const TileCounts& first, int64_t channel, int64_t channels,
                   const TileMatrices<acc_t<T>>& out, acc_t<T>* sums, acc_t<T>* stage) {
  using E = acc_t<T>;
  constexpr int width = panel_cols<E>;
  const int64_t n = box / (tiles.row_boxes() * tiles.col_boxes());
  const int64_t i0 = box / tiles.col_boxes() % tiles.row_boxes() * tiles.box_rows;
  const int64_t j0 = box % tiles.col_boxes() * tiles.box_cols;
  const int64_t i_count = min_of(tiles.box_rows, tiles.rows - i0), j_count = min_of(tiles.box_cols, tiles.cols - j0);
  constexpr int64_t more = Matrix::in - Step;
  const int64_t rows = i_count * Step + more, cols = j_count * Step + more;
  stage_positions(source, n, channel, channels, source.row + i0 * Step, rows, source.col + j0 * Step, cols, stage);
  for (int half = 0; sums && half < width; half += lanes<E>) {
    vec_t<E> sum{};
    for (int64_t at = 0; at < rows * cols; ++at) sum += load(stage + at * width + half);
    store(sums + half, sum);
  }
  for (int64_t i = 0; i < i_count; ++i) {
    const TileRow row = tile_row(tiles, n, i0 + i, first, out.matrix, out.pitch);
    const int64_t row_points = tiles.row_points(i0 + i);
    for (int64_t j = 0; j < j_count; ++j) {
      const int64_t col_points = tiles.col_points(j0 + j);
      for (int half = 0; half < width; half += lanes<E>) {
        const E* from = stage + (i * cols + j) * Step * width + half;
        E* to = out.data + (j0 + j) * out.pitch + half;
        const auto get = [&](int k, int l) { return load(from + (k * cols + l) * width); };
        if (row_points == tile_in && col_points == tile_in)
          transform<E, Matrix>(get, [&](int k, int l, vec_t<E> v) { store(to + row.at[k * 6 + l], v); });
        else
          transform_partial<E>(row_points < tile_in ? partial.row : partial.whole,
                               col_points < tile_in ? partial.col : partial.whole, get, [&](int k, int l, vec_t<E> v) {
                                 store(to + row.at[point_number(k, row_points) * 6 + point_number(l, col_points)], v);
                               });
      }
    }
  }
}

}  // namespace
}  // namespace fastconv::cpu
