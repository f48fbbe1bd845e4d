// dgrad of a stem, by the products of every pixel of dy with every tap:
//
//   C[t][pixel] = Σ_k filters[k][t] · dy[k][pixel]     t = (r, s, c)
//   dx[c][p·stride − pad + r][q·stride − pad + s] += C[t][(p, q)]
//
// dx has few channels, and its own windows would be of many: here the contraction is over the filters alone, and the
// sums over the taps that follow are few. A task owns some rows of dx and takes from a row of dy only the taps that
// reach them, so that nothing is computed twice. Columns are added up by phases, col mod stride, as rows without gaps.
#pragma once

#include "conv2d_stem_taps.h"
#include "conv2d_wgrad_out.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// rows[k][t] of filter k
template <typename T>
void pack_stem_taps(const Conv2dProblem& p, const T* w, int64_t k, acc_t<T>* row) {
  const int64_t depth = stem_depth(p), taps = p.R * p.S;
  if (p.layout == Layout::NHWC) return convert_row(w + k * depth, depth, row);
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) row[tap * p.C + c] = to_acc(w[k * depth + c * taps + tap]);
}

// panels[panel][k][lane] of `pixels` neighbouring pixels of image n and filters k0 … k0 + k_count − 1
template <typename T>
void pack_stem_dy(const Conv2dProblem& p, const T* dy, int64_t n, int64_t pixel, int64_t pixels, int64_t k0,
                  int64_t k_count, acc_t<T>* panels) {
  constexpr int64_t cols = panel_cols<acc_t<T>>;
  const int64_t plane = p.P * p.Q;
  if (p.layout == Layout::NHWC) {
    for (int64_t i = 0; i < pixels; i += cols, panels += k_count * cols)
      transpose(dy + (n * plane + pixel + i) * p.K + k0, p.K, min_of(cols, pixels - i), k_count, panels, cols);
    return;
  }
  for (int64_t k = 0; k < k_count; ++k) {
    const T* from = dy + (n * p.K + k0 + k) * plane + pixel;
    acc_t<T>* to = panels + k * cols;
    for (int64_t i = 0; i < pixels; i += cols, to += k_count * cols)
      copy_strided(from + i, 1, to, min_of(cols, pixels - i));
  }
}

// sums[i] += values[i]
template <typename E>
FASTCONV_INLINE void add_row(const E* values, int64_t count, E* sums) {
  int64_t i = 0;
  for (; i + lanes<E> <= count; i += lanes<E>) store(sums + i, load(sums + i) + load(values + i));
  if (i < count) store_first(sums + i, load_first(sums + i, count - i) + load_first(values + i, count - i), count - i);
}

// One row of dx from its sums, [channel][phase][col / stride].
template <typename T>
void write_stem_row(const Conv2dProblem& p, const StemStrips& strips, const acc_t<T>* sums, int64_t n, int64_t h,
                    T* dx) {
  for (int64_t c = 0; c < p.C; ++c, sums += strips.plane_row()) {
    T* out = p.layout == Layout::NHWC ? dx + (n * p.H + h) * p.W * p.C + c : dx + ((n * p.C + c) * p.H + h) * p.W;
    const int64_t pitch = p.layout == Layout::NHWC ? p.C : 1;
    if (p.stride_w == 1 && pitch == 1) {
      convert_row(sums + p.pad_w, p.W, out);
      continue;
    }
    for (int64_t phase = 0; phase < p.stride_w; ++phase) {
      const int64_t from = max_of<int64_t>(0, ceil_div(p.pad_w - phase, p.stride_w));
      const acc_t<T>* values = sums + phase * strips.phase_row;
      for (int64_t i = from, w = from * p.stride_w + phase - p.pad_w; w < p.W; ++i, w += p.stride_w)
        out[w * pitch] = from_acc<T>(values[i]);
    }
  }
}

template <typename T>
void stem_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, acc_t<T>* workspace,
                char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int64_t cols = panel_cols<E>;
  const int64_t row_taps = p.S * p.C;
  const int64_t depth = stem_depth(p);
  for_each_task(parallel, p.K, [&](int, int64_t k) { pack_stem_taps(p, w, k, workspace + k * depth); });
  const StemStrips strips = stem_strips(p);
  const StemDgradScratch layout = stem_dgrad_scratch(p);
  for_each_task(parallel, p.N * strips.count, [&](int worker, int64_t task) {
    const int64_t n = task / strips.count, h0 = task % strips.count * strips.rows;
    const int64_t h1 = min_of(p.H, h0 + strips.rows), dx_row = p.C * strips.plane_row();
    E* sums = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    E *b = sums + layout.b, *c = sums + layout.c;
    fill_zero<T>(sums, (h1 - h0) * dx_row);
    // The taps r of row p of dy that reach rows h0 … h1 − 1 of dx.
    const auto first_tap = [&](int64_t row) { return max_of<int64_t>(0, h0 + p.pad_h - row * p.stride_h); };
    const auto end_tap = [&](int64_t row) { return min_of(p.R, h1 + p.pad_h - row * p.stride_h); };
    const int64_t first_row = max_of<int64_t>(0, ceil_div(h0 + p.pad_h - p.R + 1, p.stride_h));
    const int64_t end_row = min_of(p.P, (h1 - 1 + p.pad_h) / p.stride_h + 1);
    for (int64_t row = first_row, count; row < end_row; row += count) {
      const int64_t r0 = first_tap(row), r1 = end_tap(row);
      if (r0 >= r1) {  // a row between strides
        count = 1;
        continue;
      }
      for (count = 1; count < strips.dy_rows && row + count < end_row; ++count)
        if (first_tap(row + count) != r0 || end_tap(row + count) != r1) break;
      const int64_t pixels = count * p.Q, panels = ceil_div(pixels, cols), c_row = panels * cols;
      const int64_t next_row = row + count, next_rows = min_of(strips.dy_rows, end_row - next_row);
      StemAhead next = stem_ahead(p, dy, n, next_row * p.Q, next_rows * p.Q);
      if (next_rows == 0) next.rows = 0;
      for (int64_t k0 = 0; k0 < p.K; k0 += strips.depth) {
        const int64_t k_count = min_of(strips.depth, p.K - k0);
        pack_stem_dy(p, dy, n, row * p.Q, pixels, k0, k_count, b);
        const StemSteps steps{1, k_count, 0, depth, 0, cols};
        for (int64_t panel = 0; panel < panels; ++panel)
          multiply_stem_taps(steps, (r1 - r0) * row_taps, workspace + k0 * depth + r0 * row_taps,
                             b + panel * k_count * cols, cols, c + panel * cols, c_row, k0 > 0, next);
      }
      // s outside: what has just been stored is not loaded again at another offset.
      for (int64_t s = 0; s < p.S; ++s) {
        const int64_t col = s % p.stride_w * strips.phase_row + s / p.stride_w;
        for (int64_t r = r0; r < r1; ++r) {
          const E* from = c + ((r - r0) * p.S + s) * p.C * c_row;
          E* to = sums + (row * p.stride_h - p.pad_h + r - h0) * dx_row + col;
          for (int64_t ch = 0; ch < p.C; ++ch)
            for (int64_t i = 0; i < count; ++i)
              add_row(from + ch * c_row + i * p.Q, p.Q, to + i * p.stride_h * dx_row + ch * strips.plane_row());
        }
      }
    }
    for (int64_t h = h0; h < h1; ++h) write_stem_row(p, strips, sums + (h - h0) * dx_row, n, h, dx);
  });
}

}  // namespace
}  // namespace fastconv::cpu
