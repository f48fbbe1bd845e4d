// Depthwise convolution with 3×3 filters of stride 1 or 2 in NCHW: blocks of a plane's rows are staged with their
// padding, with stride 2 the even columns of a row first, so that every tap is a vector at a fixed offset. Each vector
// that is loaded serves all of the rows of outputs that read it.
#pragma once

#include <type_traits>

#include "conv2d_depthwise_blocks.h"
#include "conv2d_depthwise_columns.h"

namespace fastconv::cpu {
namespace {

// How the planes of a direction are read: blocks of rows by way of a worker's memory.
template <typename T>
struct PlaneReader {
  StagedPlane staged;
  PlaneScratch layout;
  int64_t block_rows;

  PlaneReader(const Conv2dProblem& p, const Conv2dPlan& plan)
      : staged(staged_plane(p, plan.direction)), layout(plane_scratch(p, plan)), block_rows(plan.tile_m) {}
};

// out[r][pitch]: rows row0 … row0 + count − 1 of a plane. Each writes zeros past its end, where the next one begins.
// The rows behind them, of this plane or the next, are fetched meanwhile.
template <typename T>
void stage_rows(const StagedPlane& staged, const T* plane, int64_t row0, int64_t count, acc_t<T>* row_memory,
                acc_t<T>* out) {
  for (int64_t row = row0; row < row0 + count; ++row, out += staged.pitch) {
    if (row < 0 || row >= staged.rows) {
      for (int64_t j = 0; j < staged.pitch; j += lanes<T>) store(out + j, vec_t<T>{});
      continue;
    }
    const char* next = reinterpret_cast<const char*>(plane + (row + count) * staged.cols);
    for (int64_t i = 0; i < staged.cols * int64_t(sizeof(T)); i += 64) __builtin_prefetch(next + i, 0, 2);
    acc_t<T>* to = staged.stride == 1 ? out : row_memory;
    const int64_t filled = staged.pad_w + staged.cols, end = staged.stride == 1 ? staged.pitch : 2 * staged.half;
    store(to, vec_t<T>{});  // padding is at most two columns
    copy_strided<true>(plane + row * staged.cols, 1, to + staged.pad_w, staged.cols);
    for (int64_t j = filled; j < end; j += lanes<T>) store(to + j, vec_t<T>{});
    if (staged.stride == 1) continue;
    for (int64_t j = 0; j < staged.half; j += lanes<T>) {
      const vec_t<T> left = load(to + 2 * j), right = load(to + 2 * j + lanes<T>);
      constexpr std::make_integer_sequence<int, lanes<T>> sequence;
      store(out + j, even_lanes<acc_t<T>>(left, right, sequence));
      store(out + staged.half + j, odd_lanes<acc_t<T>>(left, right, sequence));
    }
  }
}

// Column offset of tap s in a staged row.
template <int Stride>
FASTCONV_INLINE int64_t tap_column(int64_t s, int64_t half) {
  return Stride == 1 ? s : s == 1 ? half : s / 2;
}

// Rows outputs below each other, one vector wide: the rows of `in` are read once each.
template <typename T, int Stride, int Rows>
FASTCONV_INLINE void tile_3x3(const acc_t<T>* in, int64_t pitch, int64_t half, const vec_t<T> (&weights)[9],
                              vec_t<T> start, bool with_relu, T* out, int64_t out_pitch, int64_t left) {
  vec_t<T> sums[Rows];
  for (int i = 0; i < Rows; ++i) sums[i] = start;
#pragma GCC unroll 32
  for (int row = 0; row < (Rows - 1) * Stride + 3; ++row) {
    for (int s = 0; s < 3; ++s) {
      const vec_t<T> v = load(in + row * pitch + tap_column<Stride>(s, half));
      for (int r = 0; r < 3; ++r)
        if (row >= r && (row - r) % Stride == 0 && (row - r) / Stride < Rows)
          sums[(row - r) / Stride] += weights[3 * r + s] * v;
    }
  }
  for (int i = 0; i < Rows; ++i) store_row(out + i * out_pitch, with_relu ? relu(sums[i]) : sums[i], left);
}

template <typename T, int Stride>
void block_3x3(const acc_t<T>* in, int64_t pitch, int64_t half, const PlaneFilter<T>& filter, T* out, int64_t rows,
               int64_t cols) {
  const bool with_relu = filter.with_relu;
  const vec_t<T> start = broadcast<T>(filter.bias);
  vec_t<T> weights[9];
  for (int tap = 0; tap < 9; ++tap) weights[tap] = broadcast<T>(to_acc(filter.weights[filter.turned ? 8 - tap : tap]));
  for (int64_t j = 0; j < cols; j += lanes<T>) {
    int64_t i = 0;
    const auto tile = [&](auto height) {
      tile_3x3<T, Stride, height.value>(in + i * Stride * pitch + j, pitch, half, weights, start, with_relu,
                                        out + i * cols + j, cols, cols - j);
      i += height.value;
    };
    if constexpr (vector_bytes == 64)  // with its 32 registers
      while (i + 8 <= rows) tile(std::integral_constant<int, 8>());
    while (i + 4 <= rows) tile(std::integral_constant<int, 4>());
    while (i + 2 <= rows) tile(std::integral_constant<int, 2>());
    while (i < rows) tile(std::integral_constant<int, 1>());
  }
}

// Rows i0 … i1 − 1 of outputs, out_cols wide.
template <typename T, int Stride>
void gather_plane(const Plane<T>& in, const PlaneReader<T>& reader, acc_t<T>* memory, const PlaneFilter<T>& filter,
                  T* out, int64_t i0, int64_t i1, int64_t out_cols) {
  stage_rows(reader.staged, in.data, i0 * Stride - in.pad_h, (i1 - i0 - 1) * Stride + 3, memory + reader.layout.row,
             memory + reader.layout.stage);
  block_3x3<T, Stride>(memory + reader.layout.stage, reader.staged.pitch, reader.staged.half, filter,
                       out + i0 * out_cols, i1 - i0, out_cols);
}

// dgrad of stride 2 and padding 1: rows 2i and 2i + 1 of dx, H × W, for i = i0 … i1 − 1.
template <typename T>
void double_plane(const Plane<T>& dy, const PlaneReader<T>& reader, acc_t<T>* memory, const PlaneFilter<T>& filter,
                  T* dx, int64_t i0, int64_t i1, int64_t H, int64_t W) {
  vec_t<T> weights[9];
  for (int tap = 0; tap < 9; ++tap) weights[tap] = broadcast<T>(to_acc(filter.weights[tap]));
  const int64_t pitch = reader.staged.pitch;
  stage_rows(reader.staged, dy.data, i0, i1 - i0 + 1, memory + reader.layout.row, memory + reader.layout.stage);
  for (int64_t j = 0; 2 * j < W; j += lanes<T>) {
    const acc_t<T>* from = memory + reader.layout.stage + j;
    for (int64_t i = i0; i < i1; ++i, from += pitch)
      store_doubled<T>(weights, load(from), load(from + 1), load(from + pitch), load(from + pitch + 1),
                       dx + 2 * i * W + 2 * j, W, W - 2 * j, 2 * i + 1 < H);
  }
}

// sums[tap] += Σ dy · in, sums[9] += Σ dy; rows of dy are padded to whole vectors. What `in` holds past a row is masked
// out, since NaN · 0 would not vanish.
template <typename T, int Stride>
void add_products_3x3(const acc_t<T>* dy, int64_t dy_pitch, int64_t rows, int64_t cols, const acc_t<T>* in,
                      int64_t pitch, int64_t half, acc_t<T>* sums) {
  vec_t<T> v[10];
  for (int tap = 0; tap < 10; ++tap) v[tap] = load(sums + tap * lanes<T>);
  for (int64_t j = 0; j < cols; j += lanes<T>) {
    mask_t<T> inside;
    for (int lane = 0; lane < lanes<T>; ++lane) inside[lane] = j + lane < cols ? -1 : 0;
    // The products of a row of `in` with the rows of dy that read it; `all`: none of these is missing.
    const auto add = [&](int64_t row, auto phase, auto all) __attribute__((always_inline)) {
      vec_t<T> x[3];
      for (int s = 0; s < 3; ++s)
        x[s] = (vec_t<T>)((mask_t<T>)load(in + row * pitch + tap_column<Stride>(s, half) + j) & inside);
      for (int r = phase.value; r < 3; r += Stride) {
        const int64_t i = (row - r) / Stride;
        if (!all.value && (row < r || i >= rows)) continue;
        const vec_t<T> d = load(dy + i * dy_pitch + j);
        for (int s = 0; s < 3; ++s) v[3 * r + s] += d * x[s];
        if (r == 0) v[9] += d;
      }
    };
    const std::false_type edge;
    const std::true_type whole;
    const std::integral_constant<int, 0> first;
    const std::integral_constant<int, 1> second;
    const int64_t in_rows = (rows - 1) * Stride + 3;
    if constexpr (Stride == 1) {
      int64_t row = 0;
      for (; row < min_of<int64_t>(2, in_rows); ++row) add(row, first, edge);
      for (; row < rows; ++row) add(row, first, whole);
      for (; row < in_rows; ++row) add(row, first, edge);
    } else {
      add(0, first, edge);
      for (int64_t i = 0; i + 1 < rows; ++i) {
        add(2 * i + 1, second, whole);
        add(2 * i + 2, first, whole);
      }
      add(in_rows - 2, second, whole);
      add(in_rows - 1, first, edge);
    }
  }
  for (int tap = 0; tap < 10; ++tap) store(sums + tap * lanes<T>, v[tap]);
}

// sums[tap] += Σ dy · x, sums[9] += Σ dy over a plane.
template <typename T, int Stride>
void add_plane(const Plane<T>& x, const PlaneReader<T>& reader, acc_t<T>* memory, const T* dy, int64_t dy_rows,
               int64_t dy_cols, acc_t<T>* sums) {
  const int64_t pitch = ceil_div(dy_cols, lanes<T>) * lanes<T>;
  acc_t<T>*x_rows = memory + reader.layout.stage, *dy_block = memory + reader.layout.dy;
  for (int64_t i0 = 0; i0 < dy_rows; i0 += reader.block_rows) {
    const int64_t rows = min_of(reader.block_rows, dy_rows - i0);
    for (int64_t i = 0; i < rows; ++i) copy_strided<true>(dy + (i0 + i) * dy_cols, 1, dy_block + i * pitch, dy_cols);
    stage_rows(reader.staged, x.data, i0 * Stride - x.pad_h, (rows - 1) * Stride + 3, memory + reader.layout.row,
               x_rows);
    add_products_3x3<T, Stride>(dy_block, pitch, rows, dy_cols, x_rows, reader.staged.pitch, reader.staged.half, sums);
  }
}

}  // namespace
}  // namespace fastconv::cpu
