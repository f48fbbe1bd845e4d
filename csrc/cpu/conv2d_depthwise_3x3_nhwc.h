// Depthwise convolution with 3×3 filters of stride 1 or 2 in NHWC, vectors along the channels. A tile is a few outputs
// of a vector of channels in two rows: each pixel that it reads is loaded once and multiplied into all of the sums that
// it belongs to, and the nine weights stay in registers. Taps in the padding are left out.
#pragma once

#include "conv2d_depthwise_blocks.h"
#include "conv2d_depthwise_nhwc.h"
#include "for_constants.h"

namespace fastconv::cpu {
namespace {

// What outputs read along an axis: output `out` of a tile reads its input `in` with tap(out, in), if that is 0, 1 or 2.
template <int Stride>
struct Gathering {  // fprop, and dgrad of stride 1
  static constexpr int inputs(int outputs) { return (outputs - 1) * Stride + 3; }
  static constexpr int tap(int out, int in) { return in - out * Stride; }
  static int64_t first(int64_t out, int64_t pad) { return out * Stride - pad; }
  static int64_t input(int64_t out, int64_t tap, int64_t pad) { return first(out, pad) + tap; }
};
struct Doubling {  // dgrad of stride 2 and padding 1: outputs 2i and 2i + 1 read inputs i and i + 1
  static constexpr int inputs(int outputs) { return (outputs + 1) / 2 + 1; }
  static constexpr int tap(int out, int in) { return out + 1 - 2 * in; }
  static int64_t first(int64_t out, int64_t) { return out / 2; }
  static int64_t input(int64_t out, int64_t tap, int64_t) { return (out + 1 - tap) % 2 ? -1 : (out + 1 - tap) / 2; }
};
constexpr bool is_tap(int tap) { return tap >= 0 && tap < 3; }

// An image of either side: rows and columns of `channels` elements.
template <typename T>
struct PixelRows {
  T* data;
  int64_t rows, cols, channels;
  T* at(int64_t row, int64_t col) const { return data + (row * cols + col) * channels; }
};

// A tile's vector of channels: its first input, which all columns but not all rows of lie inside, and its first output,
// or of dy. Whole rows are `pitch` apart, pixels `step`.
template <typename In, typename Out>
struct Tile3x3 {
  const In* in;
  Out* out;
  int64_t step, in_pitch, out_pitch;
  int64_t first_row, end_row;  // of the rows that lie inside
};

// Calls use(v, row, col) for its inputs that lie inside.
template <typename Reads, int Rows, int Cols, typename In, typename Out, typename Use>
FASTCONV_INLINE void for_inputs(const Tile3x3<In, Out>& tile, const Use& use) {
  const int64_t step = tile.step;
  const In* from = tile.in;
  for_constants<Reads::inputs(Rows)>([&](auto row) FASTCONV_LAMBDA {
    if (row.value >= tile.first_row && row.value < tile.end_row)
      for_constants<Reads::inputs(Cols)>([&](auto col)
                                             FASTCONV_LAMBDA { use(load(from + col.value * step), row, col); });
    from += tile.in_pitch;
  });
}

// Calls f(a, b) with the constants a < Rows and b < Cols, so that arrays that are indexed by them stay in registers.
template <int Rows, int Cols, typename F>
FASTCONV_INLINE void for_tile(const F& f) {
  for_constants<Rows>([&](auto a) FASTCONV_LAMBDA { for_constants<Cols>([&](auto b) FASTCONV_LAMBDA { f(a, b); }); });
}

// Not inlined: the loop over the channels would keep an address for every load.
template <typename T, typename Reads, int Rows, int Cols>
__attribute__((noinline)) void gather_tile(const Tile3x3<T, T>& tile, const acc_t<T>* weights, const T* bias,
                                           bool with_relu) {
  vec_t<T> w[9], sums[Rows][Cols];
  for_constants<9>([&](auto tap) FASTCONV_LAMBDA { w[tap.value] = load(weights + tap.value * lanes<T>); });
  const vec_t<T> start = bias ? load(bias) : vec_t<T>{};
  for_tile<Rows, Cols>([&](auto a, auto b) FASTCONV_LAMBDA { sums[a.value][b.value] = start; });
  for_inputs<Reads, Rows, Cols>(tile, [&](vec_t<T> v, auto row, auto col) FASTCONV_LAMBDA {
    for_tile<Rows, Cols>([&](auto a, auto b) FASTCONV_LAMBDA {
      constexpr int r = Reads::tap(a.value, row.value), s = Reads::tap(b.value, col.value);
      if constexpr (is_tap(r) && is_tap(s)) sums[a.value][b.value] += w[3 * r + s] * v;
    });
  });
  if (with_relu)
    for_tile<Rows, Cols>([&](auto a, auto b)
                             FASTCONV_LAMBDA { sums[a.value][b.value] = relu(sums[a.value][b.value]); });
  T* const out = tile.out;
  const int64_t step = tile.step, pitch = tile.out_pitch;
  for_tile<Rows, Cols>([&](auto a, auto b)
                           FASTCONV_LAMBDA { store(out + a.value * pitch + b.value * step, sums[a.value][b.value]); });
}

// sums[tap][lane] += Σ dy · x, the last tap of which is Σ dy.
template <typename T, int Stride, int Rows, int Cols>
__attribute__((noinline)) void add_tile(const Tile3x3<T, const T>& tile, acc_t<T>* sums) {
  using Reads = Gathering<Stride>;
  vec_t<T> v[10], d[Rows][Cols];
  for_constants<10>([&](auto tap) FASTCONV_LAMBDA { v[tap.value] = load(sums + tap.value * lanes<T>); });
  for_tile<Rows, Cols>([&](auto a, auto b) FASTCONV_LAMBDA {
    d[a.value][b.value] = load(tile.out + a.value * tile.out_pitch + b.value * tile.step);
    v[9] += d[a.value][b.value];
  });
  for_inputs<Reads, Rows, Cols>(tile, [&](vec_t<T> x, auto row, auto col) FASTCONV_LAMBDA {
    for_tile<Rows, Cols>([&](auto a, auto b) FASTCONV_LAMBDA {
      constexpr int r = Reads::tap(a.value, row.value), s = Reads::tap(b.value, col.value);
      if constexpr (is_tap(r) && is_tap(s)) v[3 * r + s] += d[a.value][b.value] * x;
    });
  });
  for_constants<10>([&](auto tap) FASTCONV_LAMBDA { store(sums + tap.value * lanes<T>, v[tap.value]); });
}

// Calls tile(j, Cols) for tiles whose columns all read inside, and others(j0, j1) for the columns on either side.
template <typename Reads, typename Tile, typename Others>
FASTCONV_INLINE void for_tiles(int64_t outputs, int64_t inputs, int64_t pad, const Tile& tile, const Others& others) {
  int64_t j = 0;
  const auto fits = [&](int count) {
    return j + count <= outputs && Reads::first(j, pad) + Reads::inputs(count) <= inputs;
  };
  while (j < outputs && Reads::first(j, pad) < 0) ++j;
  others(0, j);
  for (; fits(4); j += 4) tile(j, std::integral_constant<int, 4>());
  for (; fits(2); j += 2) tile(j, std::integral_constant<int, 2>());
  others(j, outputs);
}

template <typename T>
struct Filter3x3 {
  const acc_t<T>* weights;  // [block][tap][lane]
  const T* bias;
  bool with_relu;
  int64_t pad_h, pad_w;
};

// The taps of one output that lie inside.
template <typename T>
struct InnerTaps {
  int count = 0;
  const T* in[9];
  int tap[9];
};
template <typename Reads, typename T>
InnerTaps<T> inner_taps(const PixelRows<const T>& in, int64_t i, int64_t j, int64_t pad_h, int64_t pad_w) {
  InnerTaps<T> taps;
  for (int tap = 0; tap < 9; ++tap) {
    const int64_t row = Reads::input(i, tap / 3, pad_h), col = Reads::input(j, tap % 3, pad_w);
    if (row < 0 || row >= in.rows || col < 0 || col >= in.cols) continue;
    taps.in[taps.count] = in.at(row, col);
    taps.tap[taps.count++] = tap;
  }
  return taps;
}

// Calls visit(c, count, whole) for vectors of the channels c0 … c1 − 1.
template <typename T, typename Visit>
FASTCONV_INLINE void for_vectors(int64_t c0, int64_t c1, const Visit& visit) {
  int64_t c = c0;
  for (; c + lanes<T> <= c1; c += lanes<T>) visit(c, lanes<T>, std::true_type());
  if (c < c1) visit(c, c1 - c, std::false_type());
}
template <typename T>
FASTCONV_INLINE vec_t<T> load_channels(const T* p, int64_t, std::true_type) {
  return load(p);
}
template <typename T>
FASTCONV_INLINE vec_t<T> load_channels(const T* p, int64_t count, std::false_type) {
  return load_first(p, count);
}

// One output of channels c0 … c1 − 1, whose taps may lie outside.
template <typename T, typename Reads>
__attribute__((noinline)) void gather_one(const PixelRows<const T>& in, const PixelRows<T>& out,
                                          const Filter3x3<T>& filter, int64_t i, int64_t j, int64_t c0, int64_t c1) {
  const InnerTaps<T> taps = inner_taps<Reads>(in, i, j, filter.pad_h, filter.pad_w);
  T* to = out.at(i, j);
  for_vectors<T>(c0, c1, [&](int64_t c, int64_t count, auto whole) {
    vec_t<T> sum = filter.bias ? load_channels(filter.bias + c, count, whole) : vec_t<T>{};
    for (int t = 0; t < taps.count; ++t)
      sum += load(filter.weights + c * 9 + taps.tap[t] * lanes<T>) * load_channels(taps.in[t] + c, count, whole);
    if (filter.with_relu) sum = relu(sum);
    if (whole.value)
      store(to + c, sum);
    else
      store_first(to + c, sum, count);
  });
}

// Rows outputs below each other, from row i on, of channels c0 … c1 − 1.
template <typename T, typename Reads, int Rows>
void gather_rows(const PixelRows<const T>& in, const PixelRows<T>& out, const Filter3x3<T>& filter, int64_t i,
                 int64_t c0, int64_t c1) {
  const int64_t top = Reads::first(i, filter.pad_h), whole = c1 - (c1 - c0) % lanes<T>;
  const auto some = [&](int64_t j0, int64_t j1, int64_t from) {
    for (int64_t j = j0; j < j1 && from < c1; ++j)
      for (int64_t a = i; a < i + Rows; ++a) gather_one<T, Reads>(in, out, filter, a, j, from, c1);
  };
  for_tiles<Reads>(
      out.cols, in.cols, filter.pad_w,
      [&](int64_t j, auto cols) {
        Tile3x3<T, T> tile{in.at(top, Reads::first(j, filter.pad_w)) + c0,
                           out.at(i, j) + c0,
                           in.channels,
                           in.cols * in.channels,
                           out.cols * out.channels,
                           -top,
                           in.rows - top};
        for (int64_t c = c0; c < whole; c += lanes<T>, tile.in += lanes<T>, tile.out += lanes<T>)
          gather_tile<T, Reads, Rows, cols.value>(tile, filter.weights + c * 9, filter.bias ? filter.bias + c : nullptr,
                                                  filter.with_relu);
        some(j, j + cols.value, whole);
      },
      [&](int64_t j0, int64_t j1) { some(j0, j1, c0); });
}

// A task is tile_m rows of an image and tile_n of its channels.
template <typename T, typename Reads>
void gather_3x3_nhwc(const Conv2dPlan& plan, int64_t images, const PixelRows<const T>& in, const PixelRows<T>& out,
                     const Filter3x3<T>& filter, const Parallel& parallel) {
  const int64_t row_blocks = ceil_div(out.rows, plan.tile_m), parts = ceil_div(out.channels, plan.tile_n);
  for_each_task(parallel, images * row_blocks * parts, [&](int, int64_t task) {
    const int64_t n = task / parts / row_blocks, c0 = task % parts * plan.tile_n;
    const int64_t c1 = min_of(out.channels, c0 + plan.tile_n);
    const PixelRows<const T> source{in.at(n * in.rows, 0), in.rows, in.cols, in.channels};
    const PixelRows<T> target{out.at(n * out.rows, 0), out.rows, out.cols, out.channels};
    int64_t i = task / parts % row_blocks * plan.tile_m;
    const int64_t end = min_of(out.rows, i + plan.tile_m);
    for (; i + 2 <= end; i += 2) gather_rows<T, Reads, 2>(source, target, filter, i, c0, c1);
    if (i < end) gather_rows<T, Reads, 1>(source, target, filter, i, c0, c1);
  });
}

template <typename T>
void fprop_3x3_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                    acc_t<T>* weights, const Parallel& parallel) {
  transpose_weights(pr, w, weights);
  const auto run = pr.stride_h == 1 ? gather_3x3_nhwc<T, Gathering<1>> : gather_3x3_nhwc<T, Gathering<2>>;
  run(plan, pr.N, {x, pr.H, pr.W, pr.C}, {y, pr.P, pr.Q, pr.C}, {weights, bias, pr.relu, pr.pad_h, pr.pad_w}, parallel);
}

template <typename T>
void dgrad_3x3_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, acc_t<T>* weights,
                    const Parallel& parallel) {
  transpose_weights(pr, w, weights);
  const bool unit = pr.stride_h == 1;  // fprop with the filter turned around
  if (unit) {
    for (acc_t<T>* block = weights; block < weights + pr.C * 9; block += 9 * lanes<T>)
      for (int tap = 0; tap < 4; ++tap) {
        const vec_t<T> first = load(block + tap * lanes<T>);
        store(block + tap * lanes<T>, load(block + (8 - tap) * lanes<T>));
        store(block + (8 - tap) * lanes<T>, first);
      }
  }
  const auto run = unit ? gather_3x3_nhwc<T, Gathering<1>> : gather_3x3_nhwc<T, Doubling>;
  run(plan, pr.N, {dy, pr.P, pr.Q, pr.C}, {dx, pr.H, pr.W, pr.C}, {weights, nullptr, false, 2 - pr.pad_h, 2 - pr.pad_w},
      parallel);
}

// sums[block][tap][lane] += the products of one output, whose taps may lie outside, for the channels c0 … c1 − 1.
template <typename T, int Stride>
__attribute__((noinline)) void add_one(const PixelRows<const T>& x, int64_t pad_h, int64_t pad_w,
                                       const PixelRows<const T>& dy, int64_t i, int64_t j, int64_t c0, int64_t c1,
                                       acc_t<T>* sums) {
  const InnerTaps<T> taps = inner_taps<Gathering<Stride>>(x, i, j, pad_h, pad_w);
  const T* from = dy.at(i, j);
  for_vectors<T>(c0, c1, [&](int64_t c, int64_t count, auto whole) {
    const vec_t<T> d = load_channels(from + c, count, whole);
    const auto add = [&](int tap, vec_t<T> v) {
      acc_t<T>* sum = sums + c * 10 + tap * lanes<T>;
      store(sum, load(sum) + v);
    };
    for (int t = 0; t < taps.count; ++t) add(taps.tap[t], d * load_channels(taps.in[t] + c, count, whole));
    add(9, d);
  });
}

// Those of Rows rows of outputs, from row i on.
template <typename T, int Stride, int Rows>
void add_rows(const PixelRows<const T>& x, int64_t pad_h, int64_t pad_w, const PixelRows<const T>& dy, int64_t i,
              int64_t c0, int64_t c1, acc_t<T>* sums) {
  using Reads = Gathering<Stride>;
  const int64_t top = Reads::first(i, pad_h), whole = c1 - (c1 - c0) % lanes<T>;
  const auto some = [&](int64_t j0, int64_t j1, int64_t from) {
    for (int64_t j = j0; j < j1 && from < c1; ++j)
      for (int64_t a = i; a < i + Rows; ++a) add_one<T, Stride>(x, pad_h, pad_w, dy, a, j, from, c1, sums);
  };
  for_tiles<Reads>(
      dy.cols, x.cols, pad_w,
      [&](int64_t j, auto cols) {
        Tile3x3<T, const T> tile{x.at(top, Reads::first(j, pad_w)) + c0,
                                 dy.at(i, j) + c0,
                                 x.channels,
                                 x.cols * x.channels,
                                 dy.cols * dy.channels,
                                 -top,
                                 x.rows - top};
        for (int64_t c = c0; c < whole; c += lanes<T>, tile.in += lanes<T>, tile.out += lanes<T>)
          add_tile<T, Stride, Rows, cols.value>(tile, sums + c * 10);
        some(j, j + cols.value, whole);
      },
      [&](int64_t j0, int64_t j1) { some(j0, j1, c0); });
}

// partial[piece][block][tap][lane], the last tap of which is the bias: a piece is a share of the rows (n, p), and a
// task is tile_n channels of one.
template <typename T, int Stride>
void wgrad_3x3_nhwc(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
                    const Parallel& parallel) {
  const int64_t all_rows = pr.N * pr.P, parts = ceil_div(pr.C, plan.tile_n);
  const int64_t piece_elements = ceil_div(pr.C, lanes<T>) * lanes<T> * 10;
  for_each_task(parallel, plan.split * parts, [&](int, int64_t task) {
    const int64_t piece = task / parts, c0 = task % parts * plan.tile_n, c1 = min_of(pr.C, c0 + plan.tile_n);
    acc_t<T>* sums = partial + piece * piece_elements;
    fill_zero<T>(sums + c0 * 10, ceil_div(c1 - c0, lanes<T>) * lanes<T> * 10);
    const int64_t end = (piece + 1) * all_rows / plan.split;
    for (int64_t row = piece * all_rows / plan.split; row < end;) {
      const int64_t n = row / pr.P, p = row % pr.P;
      const PixelRows<const T> x_image{x + n * pr.H * pr.W * pr.C, pr.H, pr.W, pr.C};
      const PixelRows<const T> dy_image{dy + n * pr.P * pr.Q * pr.C, pr.P, pr.Q, pr.C};
      const bool two = row + 2 <= end && p + 2 <= pr.P;
      const auto add = two ? add_rows<T, Stride, 2> : add_rows<T, Stride, 1>;
      add(x_image, pr.pad_h, pr.pad_w, dy_image, p, c0, c1, sums);
      row += two ? 2 : 1;
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
