// Depthwise convolution with 3×3 filters of stride 1 or 2 in NCHW, vectors along the columns. Planes are staged with
// their padding; with stride 2 the even columns of a row come first, so that every tap is a vector at a fixed offset.
// All nine weights, or in wgrad all nine sums, stay in registers, and each vector that is loaded serves all of the rows
// of outputs that read it.
#pragma once

#include <type_traits>

#include "conv2d_depthwise_blocks.h"
#include "conv2d_depthwise_nchw.h"

namespace fastconv::cpu {
namespace {

template <typename E, int... J>
FASTCONV_INLINE vec_t<E> odd_lanes(vec_t<E> a, vec_t<E> b, std::integer_sequence<int, J...>) {
  return shuffle<E, 2 * J + 1 ...>(a, b);
}

// Lanes of even and odd by turns; High: the second half of them.
template <typename E, bool High, int... J>
FASTCONV_INLINE vec_t<E> interleave(vec_t<E> even, vec_t<E> odd, std::integer_sequence<int, J...>) {
  return shuffle<E, J / 2 + (High ? lanes<E> / 2 : 0) + (J % 2 ? lanes<E> : 0)...>(even, odd);
}

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

// GCC would load a vector anew for each of its uses.
template <typename V>
FASTCONV_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

// Column offset of tap s in a staged row.
template <int Stride>
FASTCONV_INLINE int64_t tap_column(int64_t s, int64_t half) {
  return Stride == 1 ? s : s == 1 ? half : s / 2;
}

template <typename T>
FASTCONV_INLINE void store_row(T* out, vec_t<T> v, int64_t left) {
  if (left >= lanes<T>)
    store(out, v);
  else
    store_first(out, v, left);
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
      vec_t<T> v = load(in + row * pitch + tap_column<Stride>(s, half));
      keep_in_register(v);
      for (int r = 0; r < 3; ++r)
        if (row >= r && (row - r) % Stride == 0 && (row - r) / Stride < Rows)
          sums[(row - r) / Stride] += weights[3 * r + s] * v;
    }
  }
  for (int i = 0; i < Rows; ++i) store_row(out + i * out_pitch, with_relu ? relu(sums[i]) : sums[i], left);
}

template <typename T, int Stride>
void block_3x3(const acc_t<T>* in, int64_t pitch, int64_t half, const vec_t<T> (&filter)[9], vec_t<T> start,
               bool with_relu, T* out, int64_t rows, int64_t cols) {
  vec_t<T> weights[9];
  for (int tap = 0; tap < 9; ++tap) weights[tap] = filter[tap];  // in registers, whatever is stored
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

// Calls block(plane, worker's memory, first row, rows) for all blocks. A task is tile_k planes, or a part of one.
template <typename E, typename Block>
void for_plane_blocks(const Conv2dPlan& plan, int64_t planes, int64_t rows, char* scratch, const Parallel& parallel,
                      const Block& block) {
  const int64_t task_rows = plan.tile_k > 0 ? rows : plan.tile_m, parts = ceil_div(rows, task_rows);
  const int64_t task_planes = max_of<int64_t>(plan.tile_k, 1);
  for_each_task(parallel, ceil_div(planes, task_planes) * parts, [&](int worker, int64_t task) {
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    const int64_t plane0 = task / parts * task_planes, begin = task % parts * task_rows;
    for (int64_t plane = plane0; plane < min_of(planes, plane0 + task_planes); ++plane)
      for (int64_t i = begin; i < min_of(rows, begin + task_rows); i += plan.tile_m)
        block(plane, memory, i, min_of<int64_t>(plan.tile_m, rows - i));
  });
}

template <typename T>
void fprop_3x3(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
               char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const StagedPlane staged = staged_plane(pr, Direction::fprop);
  const PlaneScratch layout = plane_scratch(pr, plan);
  for_plane_blocks<E>(plan, pr.N * pr.C, pr.P, scratch, parallel,
                      [&](int64_t plane, E* memory, int64_t i0, int64_t rows) {
                        const int64_t c = plane % pr.C;
                        E* stage = memory + layout.stage;
                        stage_rows(staged, x + plane * pr.H * pr.W, i0 * staged.stride - pr.pad_h,
                                   (rows - 1) * staged.stride + 3, memory + layout.row, stage);
                        vec_t<T> weights[9];
                        for (int tap = 0; tap < 9; ++tap) weights[tap] = broadcast<T>(to_acc(w[9 * c + tap]));
                        const auto run = staged.stride == 1 ? block_3x3<T, 1> : block_3x3<T, 2>;
                        run(stage, staged.pitch, staged.half, weights, broadcast<T>(bias ? to_acc(bias[c]) : 0),
                            pr.relu, y + (plane * pr.P + i0) * pr.Q, rows, pr.Q);
                      });
}

// dx of stride 2 and padding 1, rows 2i and 2i + 1, from rows i and i + 1 of dy; likewise for columns. The even and the
// odd columns are interleaved on their way out.
template <typename T>
void block_3x3_doubled(const acc_t<T>* in, int64_t pitch, const vec_t<T> (&filter)[9], T* out, int64_t rows,
                       int64_t cols) {
  vec_t<T> weights[9];
  for (int tap = 0; tap < 9; ++tap) weights[tap] = filter[tap];
  constexpr std::make_integer_sequence<int, lanes<T>> sequence;
  for (int64_t j = 0; 2 * j < cols; j += lanes<T>) {
    for (int64_t i = 0; 2 * i < rows; ++i) {
      const acc_t<T>* from = in + i * pitch + j;
      const vec_t<T> a = load(from), b = load(from + 1), c = load(from + pitch), d = load(from + pitch + 1);
      const vec_t<T> even = weights[4] * a, odd = weights[5] * a + weights[3] * b;
      T* to = out + 2 * i * cols + 2 * j;
      const auto put = [&](T* row, vec_t<T> left, vec_t<T> right) {
        store_row(row, interleave<acc_t<T>, false>(left, right, sequence), cols - 2 * j);
        if (cols - 2 * j > lanes<T>)
          store_row(row + lanes<T>, interleave<acc_t<T>, true>(left, right, sequence), cols - 2 * j - lanes<T>);
      };
      put(to, even, odd);
      if (2 * i + 1 < rows)
        put(to + cols, weights[7] * a + weights[1] * c,
            (weights[8] * a + weights[6] * b) + (weights[2] * c + weights[0] * d));
    }
  }
}

template <typename T>
void dgrad_3x3(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, char* scratch,
               const Parallel& parallel) {
  using E = acc_t<T>;
  const StagedPlane staged = staged_plane(pr, Direction::dgrad);
  const PlaneScratch layout = plane_scratch(pr, plan);
  const int64_t stride = pr.stride_h, all_rows = plane_outputs(pr, Direction::dgrad);
  for_plane_blocks<E>(
      plan, pr.N * pr.C, all_rows, scratch, parallel, [&](int64_t plane, E* memory, int64_t i0, int64_t rows) {
        const T* filter = w + 9 * (plane % pr.C);
        E* stage = memory + layout.stage;
        stage_rows(staged, dy + plane * pr.P * pr.Q, i0 - staged.pad_h, rows + 2, memory + layout.row, stage);
        vec_t<T> weights[9];
        T* out = dx + (plane * pr.H + i0 * stride) * pr.W;
        if (stride == 1) {  // fprop with the filter turned around
          for (int tap = 0; tap < 9; ++tap) weights[tap] = broadcast<T>(to_acc(filter[8 - tap]));
          block_3x3<T, 1>(stage, staged.pitch, 0, weights, vec_t<T>{}, false, out, rows, pr.W);
        } else {
          for (int tap = 0; tap < 9; ++tap) weights[tap] = broadcast<T>(to_acc(filter[tap]));
          block_3x3_doubled<T>(stage, staged.pitch, weights, out, min_of(2 * rows, pr.H - 2 * i0), pr.W);
        }
      });
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

// partial[piece][c][tap], the last of which is the bias: a piece is a share of the images.
template <typename T>
void wgrad_3x3(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
               char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const StagedPlane staged = staged_plane(pr, Direction::wgrad);
  const PlaneScratch layout = plane_scratch(pr, plan);
  const int64_t dy_pitch = ceil_div(pr.Q, lanes<T>) * lanes<T>;
  for_each_task(parallel, plan.split * pr.C, [&](int worker, int64_t task) {
    const int64_t piece = task / pr.C, c = task % pr.C;
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    E sums[10 * lanes<T>] = {};
    for (int64_t n = piece * pr.N / plan.split; n < (piece + 1) * pr.N / plan.split; ++n) {
      const int64_t plane = n * pr.C + c;
      for (int64_t i0 = 0; i0 < pr.P; i0 += plan.tile_m) {
        const int64_t rows = min_of<int64_t>(plan.tile_m, pr.P - i0);
        for (int64_t i = 0; i < rows; ++i)
          copy_strided<true>(dy + (plane * pr.P + i0 + i) * pr.Q, 1, memory + layout.dy + i * dy_pitch, pr.Q);
        stage_rows(staged, x + plane * pr.H * pr.W, i0 * staged.stride - pr.pad_h, (rows - 1) * staged.stride + 3,
                   memory + layout.row, memory + layout.stage);
        const auto run = staged.stride == 1 ? add_products_3x3<T, 1> : add_products_3x3<T, 2>;
        run(memory + layout.dy, dy_pitch, rows, pr.Q, memory + layout.stage, staged.pitch, staged.half, sums);
      }
    }
    for (int tap = 0; tap < 10; ++tap) partial[task * 10 + tap] = sum_lanes<T>(load(sums + tap * lanes<T>));
  });
}

}  // namespace
}  // namespace fastconv::cpu
