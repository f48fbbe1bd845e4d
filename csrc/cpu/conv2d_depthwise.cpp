// Depthwise convolution, groups = C = K: every channel has a filter of its own.
//
//   fprop  y[n,c,p,q]  = bias[c] + Σ_{r,s} w[c,r,s] · x[n,c,h,w]      h = p·stride_h + r·dilation_h − pad_h
//   dgrad  dx[n,c,h,w] = Σ_{r,s} w[c,r,s] · dy[n,c,p,q]               over the (p, q) that read (h, w)
//   wgrad  dw[c,r,s]   = Σ_{n,p,q} dy[n,c,p,q] · x[n,c,h,w]           db[c] = Σ_{n,p,q} dy[n,c,p,q]
//
// There is no reuse across channels, so this is memory traffic: each block is read once, used by all taps, written
// once. NCHW: a block of a plane is staged with its padding in L1, columns a stride apart next to each other; then
// every tap is one vector load at a fixed offset. dgrad does the same for each of the stride² phases of dx. NHWC:
// vectors along the channels; taps in the padding are left out.
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

template <typename T>
FASTCONV_INLINE acc_t<T> sum_lanes(vec_t<T> v) {
  acc_t<T> sum = 0;
  for (int i = 0; i < lanes<T>; ++i) sum += v[i];
  return sum;
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

// ---- NHWC ----

// weights[r][s][c], so that a tap's weights are contiguous along the channels.
template <typename T>
void transpose_weights(const Conv2dProblem& pr, const T* w, acc_t<T>* weights) {
  for (int64_t c = 0; c < pr.C; ++c)
    for (int64_t t = 0; t < pr.R * pr.S; ++t) weights[t * pr.C + c] = to_acc(w[c * pr.R * pr.S + t]);
}

// Calls visit(c, V) for V vectors of channels from c on, then visit_one(c) for each channel that fills no vector.
template <typename T, typename Visit, typename VisitOne>
FASTCONV_INLINE void for_channels(int64_t channels, const Visit& visit, const VisitOne& visit_one) {
  int64_t c = 0;
  for (; c + 2 * lanes<T> <= channels; c += 2 * lanes<T>) visit(c, std::integral_constant<int, 2>());
  for (; c + lanes<T> <= channels; c += lanes<T>) visit(c, std::integral_constant<int, 1>());
  for (; c < channels; ++c) visit_one(c);
}

// `Pixels` neighbouring outputs from (i, j) on, of every channel: out[c] = bias[c] + Σ filter[tap][c] · source[c].
// With one pixel, taps in the padding are left out; with more, the columns of all taps lie inside. ReLU if asked for.
template <typename T, int Pixels>
void window_pixels(const T* source, const Axis& rows, int64_t i, const Axis& cols, int64_t j, int64_t channels,
                   const acc_t<T>* weights, int64_t filter_width, const T* bias, bool with_relu, T* out) {
  const int64_t in_step = cols.step * channels, out_step = cols.out_step * channels;
  const auto for_taps = [&](const auto& visit) {
    for (int64_t a = 0; a < rows.taps; ++a) {
      const int64_t row = i * rows.step + rows.first + a * rows.inc;
      if (row < 0 || row >= rows.source) continue;
      for (int64_t b = 0; b < cols.taps; ++b) {
        const int64_t col = j * cols.step + cols.first + b * cols.inc;
        if (Pixels == 1 && (col < 0 || col >= cols.source)) continue;
        const int64_t tap =
            (rows.filter_first + a * rows.filter_step) * filter_width + cols.filter_first + b * cols.filter_step;
        visit(source + (row * cols.source + col) * channels, weights + tap * channels);
      }
    }
  };
  for_channels<T>(
      channels,
      [&](int64_t c, auto vectors) {
        constexpr int V = decltype(vectors)::value;
        vec_t<T> sums[Pixels][V];
        for (int u = 0; u < V; ++u)
          for (int pixel = 0; pixel < Pixels; ++pixel)
            sums[pixel][u] = bias ? load(bias + c + u * lanes<T>) : vec_t<T>{};
        for_taps([&](const T* in, const acc_t<T>* weight) {
          for (int u = 0; u < V; ++u) {
            const vec_t<T> w = load(weight + c + u * lanes<T>);
            for (int pixel = 0; pixel < Pixels; ++pixel)
              sums[pixel][u] += w * load(in + pixel * in_step + c + u * lanes<T>);
          }
        });
        for (int pixel = 0; pixel < Pixels; ++pixel)
          for (int u = 0; u < V; ++u)
            store(out + pixel * out_step + c + u * lanes<T>, with_relu ? relu(sums[pixel][u]) : sums[pixel][u]);
      },
      [&](int64_t c) {
        for (int pixel = 0; pixel < Pixels; ++pixel) {
          acc_t<T> sum = bias ? to_acc(bias[c]) : 0;
          for_taps([&](const T* in, const acc_t<T>* weight) { sum += weight[c] * to_acc(in[pixel * in_step + c]); });
          out[pixel * out_step + c] = from_acc<T>(with_relu ? relu(sum) : sum);
        }
      });
}

// One row of outputs.
template <typename T>
void window_row_nhwc(const T* source, const Axis& rows, int64_t i, const Axis& cols, int64_t channels,
                     const acc_t<T>* weights, int64_t filter_width, const T* bias, bool with_relu, T* out) {
  const int64_t last = cols.first + (cols.taps - 1) * cols.inc;  // column of the last tap of output 0
  const int64_t low = min_of(cols.first, last), high = max_of(cols.first, last);
  const int64_t begin = min_of(cols.outputs, low < 0 ? ceil_div(-low, cols.step) : 0);
  const int64_t end =
      max_of(begin, min_of(cols.outputs, high < cols.source ? (cols.source - 1 - high) / cols.step + 1 : 0));
  T* to = out + cols.out_first * channels;
  const int64_t out_step = cols.out_step * channels;
  int64_t j = 0;
  const auto one = [&] {
    window_pixels<T, 1>(source, rows, i, cols, j, channels, weights, filter_width, bias, with_relu, to + j * out_step);
    ++j;
  };
  while (j < begin) one();
  for (; j + 4 <= end; j += 4)
    window_pixels<T, 4>(source, rows, i, cols, j, channels, weights, filter_width, bias, with_relu, to + j * out_step);
  while (j < cols.outputs) one();
}

template <typename T>
void fprop_nhwc(const Conv2dProblem& pr, const T* x, const T* w, const T* bias, T* y, acc_t<T>* weights,
                const Parallel& parallel) {
  const Axis rows = fprop_rows(pr), cols = fprop_cols(pr);
  transpose_weights(pr, w, weights);
  for_each_task(parallel, pr.N * pr.P, [&](int, int64_t task) {
    window_row_nhwc(x + task / pr.P * pr.H * pr.W * pr.C, rows, task % pr.P, cols, pr.C, weights, pr.S, bias, pr.relu,
                    y + task * pr.Q * pr.C);
  });
}

template <typename T>
void dgrad_nhwc(const Conv2dProblem& pr, const T* dy, const T* w, T* dx, acc_t<T>* weights, const Parallel& parallel) {
  transpose_weights(pr, w, weights);
  for_each_task(parallel, pr.N * pr.H, [&](int, int64_t task) {
    const int64_t n = task / pr.H, h = task % pr.H;
    const Axis rows = dgrad_rows(pr, h % pr.stride_h);
    for (int64_t b = 0; b < min_of(pr.stride_w, pr.W); ++b)
      window_row_nhwc<T>(dy + n * pr.P * pr.Q * pr.C, rows, h / pr.stride_h, dgrad_cols(pr, b), pr.C, weights, pr.S,
                         nullptr, false, dx + task * pr.W * pr.C);
  });
}

// partial[piece][tap][c], the last of which is the bias: a piece is a share of the rows (n, p).
template <typename T>
void wgrad_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
                const Parallel& parallel) {
  const int64_t taps = pr.R * pr.S, all_rows = pr.N * pr.P;
  for_each_task(parallel, plan.split, [&](int, int64_t piece) {
    acc_t<T>* sums = partial + piece * (taps + 1) * pr.C;
    fill_zero<T>(sums, (taps + 1) * pr.C);
    for (int64_t row = piece * all_rows / plan.split; row < (piece + 1) * all_rows / plan.split; ++row) {
      const T* dy_row = dy + row * pr.Q * pr.C;
      // sum[c] += Σ_q dy[q][c] · in[q][c]; without `in`, Σ_q dy[q][c]
      const auto add_row = [&](acc_t<T>* sum, int64_t begin, int64_t end, const T* in, int64_t in_step) {
        for_channels<T>(
            pr.C,
            [&](int64_t c, auto vectors) {
              constexpr int V = decltype(vectors)::value;
              vec_t<T> v[V];
              for (int u = 0; u < V; ++u) v[u] = load(sum + c + u * lanes<T>);
              for (int64_t q = begin; q < end; ++q) {
                for (int u = 0; u < V; ++u) {
                  const vec_t<T> d = load(dy_row + q * pr.C + c + u * lanes<T>);
                  v[u] += in ? d * load(in + (q - begin) * in_step + c + u * lanes<T>) : d;
                }
              }
              for (int u = 0; u < V; ++u) store(sum + c + u * lanes<T>, v[u]);
            },
            [&](int64_t c) {
              for (int64_t q = begin; q < end; ++q) {
                const acc_t<T> d = to_acc(dy_row[q * pr.C + c]);
                sum[c] += in ? d * to_acc(in[(q - begin) * in_step + c]) : d;
              }
            });
      };
      for (int64_t r = 0; r < pr.R; ++r) {
        const int64_t h = row % pr.P * pr.stride_h + r * pr.dilation_h - pr.pad_h;
        if (h < 0 || h >= pr.H) continue;
        for (int64_t s = 0; s < pr.S; ++s) {
          const int64_t offset = s * pr.dilation_w - pr.pad_w;
          const int64_t begin = offset < 0 ? ceil_div(-offset, pr.stride_w) : 0;
          const int64_t end = min_of(pr.Q, offset < pr.W ? (pr.W - 1 - offset) / pr.stride_w + 1 : 0);
          if (begin >= end) continue;
          add_row(sums + (r * pr.S + s) * pr.C, begin, end,
                  x + ((row / pr.P * pr.H + h) * pr.W + begin * pr.stride_w + offset) * pr.C, pr.stride_w * pr.C);
        }
      }
      add_row(sums + taps * pr.C, 0, pr.Q, nullptr, 0);
    }
  });
}

// dw and db from the pieces, added in order.
template <typename T>
void reduce_wgrad(const Conv2dProblem& pr, const Conv2dPlan& plan, const acc_t<T>* partial, T* dw, T* db) {
  const int64_t taps = pr.R * pr.S, piece_elements = (taps + 1) * pr.C;
  const int64_t c_step = pr.layout == Layout::NCHW ? taps + 1 : 1, tap_step = pr.layout == Layout::NCHW ? 1 : pr.C;
  for (int64_t c = 0; c < pr.C; ++c) {
    for (int64_t t = 0; t <= taps; ++t) {
      acc_t<T> sum = 0;
      for (int64_t piece = 0; piece < plan.split; ++piece)
        sum += partial[piece * piece_elements + c * c_step + t * tap_step];
      if (t < taps)
        dw[c * taps + t] = from_acc<T>(sum);
      else if (db)
        db[c] = from_acc<T>(sum);
    }
  }
}

// ---- the table ----

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::NCHW)
      fprop_nchw(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (char*)scratch, parallel);
    else
      fprop_nhwc(problem, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (acc_t<T>*)workspace, parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::NCHW)
      dgrad_nchw(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (char*)scratch, parallel);
    else
      dgrad_nhwc(problem, (const T*)dy, (const T*)w, (T*)dx, (acc_t<T>*)workspace, parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x, void* dw, void* db,
           void* workspace, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    auto* partial = (acc_t<T>*)workspace;
    if (problem.layout == Layout::NCHW)
      wgrad_nchw(problem, plan, (const T*)dy, (const T*)x, partial, (char*)scratch, parallel);
    else
      wgrad_nhwc(problem, plan, (const T*)dy, (const T*)x, partial, parallel);
    reduce_wgrad(problem, plan, partial, (T*)dw, (T*)db);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_depthwise;
const Conv2dKernels conv2d_depthwise = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
