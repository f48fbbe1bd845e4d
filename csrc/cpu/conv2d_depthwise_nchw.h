// Depthwise convolution in NCHW, vectors along the columns: a block of a plane is staged with its padding in L1,
// columns a stride apart next to each other; then every tap is one vector load at a fixed offset. dgrad does the same
// for each of the stride² phases of dx.
#pragma once

#include <type_traits>

#include "conv2d_stage.h"
#include "isa.h"

namespace fastconv::cpu {
namespace {

// Where a block's window sums go: element (i, j) to out + i·row + j·col.
template <typename T>
struct Target {
  T* out;
  int64_t row, col;
  bool with_relu;
};

// A tile of Rows × V vectors of outputs, start + Σ_t weights[t] · in[offsets[t]]: enough chains of additions to
// overlap.
template <typename T, int Rows, int V>
FASTCONV_INLINE void window_tile(const acc_t<T>* in, int64_t in_pitch, int64_t taps, const int64_t* offsets,
                                 const acc_t<T>* weights, acc_t<T> start, int64_t width, const Target<T>& to) {
  vec_t<T> sums[Rows][V];
  for (int i = 0; i < Rows; ++i)
    for (int u = 0; u < V; ++u) sums[i][u] = broadcast<T>(start);
  for (int64_t t = 0; t < taps; ++t) {
    const vec_t<T> weight = broadcast<T>(weights[t]);
    for (int i = 0; i < Rows; ++i)
      for (int u = 0; u < V; ++u) sums[i][u] += weight * load(in + i * in_pitch + offsets[t] + u * lanes<T>);
  }
  for (int i = 0; i < Rows; ++i) {
    for (int u = 0; u < V; ++u) {
      const int64_t left = width - u * lanes<T>;
      T* out = to.out + i * to.row + u * lanes<T> * to.col;
      if (to.with_relu) sums[i][u] = relu(sums[i][u]);
      if (to.col == 1 && left >= lanes<T>) {
        store(out, sums[i][u]);
      } else if (to.col == 1 && left > 0) {
        store_first(out, sums[i][u], left);
      } else {
        for (int lane = 0; lane < lanes<T>; ++lane)
          if (lane < left) out[lane * to.col] = from_acc<T>(sums[i][u][lane]);
      }
    }
  }
}

// Every output of a block. `in` may be read up to four vectors past its last row.
template <typename T>
void window_sums(const acc_t<T>* in, int64_t in_pitch, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                 const acc_t<T>* weights, acc_t<T> start, const Target<T>& to) {
  int64_t i = 0;
  const auto tile = [&](auto height, auto vectors, int64_t j) {
    window_tile<T, height.value, vectors.value>(in + i * in_pitch + j, in_pitch, taps, offsets, weights, start,
                                                cols - j,
                                                {to.out + i * to.row + j * to.col, to.row, to.col, to.with_relu});
  };
  std::integral_constant<int, 1> one;
  std::integral_constant<int, 2> two;
  std::integral_constant<int, 4> four;
  if (cols <= lanes<T>)
    for (; i + 4 <= rows; i += 4) tile(four, one, 0);
  if (cols <= 2 * lanes<T>)
    for (; i + 2 <= rows; i += 2) tile(two, two, 0);
  for (; i < rows; ++i) {
    int64_t j = 0;
    for (; j + 2 * lanes<T> < cols; j += 4 * lanes<T>) tile(one, four, j);
    if (j < cols) tile(one, two, j);
  }
}

// One block of one phase of a plane: out[i][j] = start + Σ filter · source.
template <typename T>
void window_block(const T* source, const Axis& rows, int64_t i0, int64_t i_count, const Axis& cols, int64_t j0,
                  int64_t j_count, const T* filter, int64_t filter_width, acc_t<T> start, bool with_relu, T* out,
                  int64_t out_width, char* scratch) {
  const Strips row_strips = make_strips(rows, i_count), col_strips = make_strips(cols, j_count);
  const int64_t taps = rows.taps * cols.taps;
  auto* offsets = reinterpret_cast<int64_t*>(scratch);
  auto* weights = reinterpret_cast<acc_t<T>*>(offsets + taps);
  acc_t<T>* stage = weights + taps;
  for (int64_t a = 0, t = 0; a < rows.taps; ++a) {
    for (int64_t b = 0; b < cols.taps; ++b, ++t) {
      offsets[t] = row_strips.offset(a) * col_strips.elements() + col_strips.offset(b);
      weights[t] = to_acc(
          filter[(rows.filter_first + a * rows.filter_step) * filter_width + cols.filter_first + b * cols.filter_step]);
    }
  }
  stage_plane(source, rows, row_strips, i0, cols, col_strips, j0, stage);
  window_sums<T>(stage, col_strips.elements(), i_count, j_count, taps, offsets, weights, start,
                 {out + (rows.out_first + i0 * rows.out_step) * out_width + cols.out_first + j0 * cols.out_step,
                  rows.out_step * out_width, cols.out_step, with_relu});
}

template <typename T>
void fprop_nchw(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                char* scratch, const Parallel& parallel) {
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  const int64_t row_blocks = ceil_div(pr.P, plan.tile_m), col_blocks = ceil_div(pr.Q, plan.tile_n);
  for_each_task(parallel, pr.N * pr.C * row_blocks * col_blocks, [&](int worker, int64_t task) {
    const int64_t plane = task / col_blocks / row_blocks, c = plane % pr.C;
    const int64_t i0 = task / col_blocks % row_blocks * plan.tile_m, j0 = task % col_blocks * plan.tile_n;
    window_block(x + plane * pr.H * pr.W, rows, i0, min_of<int64_t>(plan.tile_m, pr.P - i0), cols, j0,
                 min_of<int64_t>(plan.tile_n, pr.Q - j0), w + c * pr.R * pr.S, pr.S, bias ? to_acc(bias[c]) : 0,
                 pr.relu, y + plane * pr.P * pr.Q, pr.Q, scratch + worker * plan.scratch_bytes);
  });
}

template <typename T>
void dgrad_nchw(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, char* scratch,
                const Parallel& parallel) {
  // A task is the block of dx that i0 ≤ i < i0 + tile_m, j0 ≤ j < j0 + tile_n make up in all phases together.
  const int64_t row_phases = min_of(pr.stride_h, pr.H), col_phases = min_of(pr.stride_w, pr.W);
  const int64_t row_blocks = ceil_div(ceil_div(pr.H, row_phases), plan.tile_m);
  const int64_t col_blocks = ceil_div(ceil_div(pr.W, col_phases), plan.tile_n);
  for_each_task(parallel, pr.N * pr.C * row_blocks * col_blocks, [&](int worker, int64_t task) {
    const int64_t plane = task / col_blocks / row_blocks, c = plane % pr.C;
    const int64_t i0 = task / col_blocks % row_blocks * plan.tile_m, j0 = task % col_blocks * plan.tile_n;
    for (int64_t a = 0; a < row_phases; ++a) {
      const Axis rows = dgrad_rows(pr, a);
      for (int64_t b = 0; b < col_phases; ++b) {
        const Axis cols = dgrad_cols(pr, b);
        const int64_t i_count = min_of<int64_t>(plan.tile_m, rows.outputs - i0);
        const int64_t j_count = min_of<int64_t>(plan.tile_n, cols.outputs - j0);
        if (i_count <= 0 || j_count <= 0) continue;
        window_block(dy + plane * pr.P * pr.Q, rows, i0, i_count, cols, j0, j_count, w + c * pr.R * pr.S, pr.S,
                     acc_t<T>(0), false, dx + plane * pr.H * pr.W, pr.W, scratch + worker * plan.scratch_bytes);
      }
    }
  });
}

// Σ of the lanes, in halves.
template <typename E, int Half, int... J>
FASTCONV_INLINE vec_t<E> add_halves(vec_t<E> v, std::integer_sequence<int, J...> sequence) {
  v += shuffle<E, (J ^ Half)...>(v, v);
  if constexpr (Half > 1) return add_halves<E, Half / 2>(v, sequence);
  return v;
}
template <typename T>
FASTCONV_INLINE acc_t<T> sum_lanes(vec_t<T> v) {
  return add_halves<acc_t<T>, lanes<T> / 2>(v, std::make_integer_sequence<int, lanes<T>>())[0];
}

// Σ_ij dy[i][j] · in[i][j], rows in_pitch apart in `in`; dy's rows are padded to whole vectors. What `in` holds past a
// row is masked out, since NaN · 0 would not vanish.
template <typename T>
acc_t<T> dot_block(const acc_t<T>* dy, int64_t i_count, int64_t j_count, const acc_t<T>* in, int64_t in_pitch) {
  const int64_t full = j_count / lanes<T> * lanes<T>;
  mask_t<T> tail;
  for (int lane = 0; lane < lanes<T>; ++lane) tail[lane] = full + lane < j_count ? -1 : 0;
  const int64_t dy_pitch = ceil_div(j_count, lanes<T>) * lanes<T>;
  vec_t<T> even[2] = {}, odd[2] = {};
  const auto add_row = [&](int64_t i, vec_t<T>(&sums)[2]) {
    const acc_t<T>*d = dy + i * dy_pitch, *v = in + i * in_pitch;
    int64_t j = 0;
    for (; j + 2 * lanes<T> <= full; j += 2 * lanes<T>) {
      sums[0] += load(d + j) * load(v + j);
      sums[1] += load(d + j + lanes<T>) * load(v + j + lanes<T>);
    }
    if (j < full) sums[0] += load(d + j) * load(v + j);
    if (full < j_count) sums[1] += load(d + full) * (vec_t<T>)((mask_t<T>)load(v + full) & tail);
  };
  int64_t i = 0;
  for (; i + 2 <= i_count; i += 2) {
    add_row(i, even);
    add_row(i + 1, odd);
  }
  if (i < i_count) add_row(i, even);
  return sum_lanes<T>((even[0] + even[1]) + (odd[0] + odd[1]));
}

// partial[piece][c][tap], the last of which is the bias: a piece is a share of the images.
template <typename T>
void wgrad_nchw(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
                char* scratch, const Parallel& parallel) {
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  const int64_t taps = pr.R * pr.S;
  for_each_task(parallel, plan.split * pr.C, [&](int worker, int64_t task) {
    const int64_t piece = task / pr.C, c = task % pr.C;
    acc_t<T>* sums = partial + task * (taps + 1);
    fill_zero<T>(sums, taps + 1);
    auto* dy_block = reinterpret_cast<acc_t<T>*>(scratch + worker * plan.scratch_bytes);
    for (int64_t n = piece * pr.N / plan.split; n < (piece + 1) * pr.N / plan.split; ++n) {
      for (int64_t i0 = 0; i0 < pr.P; i0 += plan.tile_m) {
        for (int64_t j0 = 0; j0 < pr.Q; j0 += plan.tile_n) {
          const int64_t i_count = min_of<int64_t>(plan.tile_m, pr.P - i0);
          const int64_t j_count = min_of<int64_t>(plan.tile_n, pr.Q - j0);
          const int64_t pitch = ceil_div(j_count, lanes<T>) * lanes<T>;
          vec_t<T> bias_sum{};
          for (int64_t i = 0; i < i_count; ++i) {
            acc_t<T>* row = dy_block + i * pitch;
            copy_strided<true>(dy + ((n * pr.C + c) * pr.P + i0 + i) * pr.Q + j0, 1, row, j_count);  // zeros to pitch
            for (int64_t j = 0; j < pitch; j += lanes<T>) bias_sum += load(row + j);
          }
          sums[taps] += sum_lanes<T>(bias_sum);
          const Strips row_strips = make_strips(rows, i_count), col_strips = make_strips(cols, j_count);
          acc_t<T>* stage = dy_block + i_count * pitch;
          stage_plane(x + (n * pr.C + c) * pr.H * pr.W, rows, row_strips, i0, cols, col_strips, j0, stage);
          for (int64_t r = 0; r < pr.R; ++r)
            for (int64_t s = 0; s < pr.S; ++s)
              sums[r * pr.S + s] += dot_block<T>(
                  dy_block, i_count, j_count,
                  stage + row_strips.offset(r) * col_strips.elements() + col_strips.offset(s), col_strips.elements());
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
