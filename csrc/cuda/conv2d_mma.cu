// Implicit GEMM on tensor cores: the products of conv2d_im2col.cu without its matrix of windows, whose elements are
// looked up in x while a tile of them is copied to shared memory. In NHWC, for one group:
//
//   fprop  y[m][n]  = Σ_k windows(m, k) · w[n][k] + bias[n]    m = (n, p, q),  n a filter,   k = (r, s, c)
//   dgrad  dx[m][n] = Σ_k windows'(m, k) · w(k, n)             m = (n, h, w),  n a channel,  k = (r, s, filter)
//   wgrad  dw[m][n] = Σ_k dy[k][m] · windows(k, n)             m a filter,     n = (r, s, c), k = (n, p, q)
//
// windows' are of dy: dgrad is a convolution of dy itself, one for each phase of the strides (plan/conv2d_mma.h), with
// the taps that meet the phase. A problem in NCHW is copied to NHWC first, and its result back.
//
// A block computes a tile of tile × tile results in steps of 64 bytes of the contraction; the copies of the next three
// steps are under way while one is multiplied. What is split goes to partial sums, which are added in order. wgrad's
// bias gradient is one more product, of dy with ones.
#include "../plan/conv2d_mma.h"
#include "mma_tile.cuh"
#include "ordered_sum.cuh"
#include "transpose.cuh"

namespace fastconv::cuda {
namespace {

// Along one axis, output i reads input i·step + first + tap·delta.
struct WindowAxis {
  int size, step, first, delta;
};

// windows(pixel, tap) of an NHWC tensor, for the pixels (n, i, j) of its outputs and the taps (r, s, channel).
struct Windows {
  const void* data;
  WindowAxis h, w;
  int64_t pitch;                 // elements between neighbouring pixels
  Divisor image, row;            // outputs of an image, and of a row of it
  Divisor filter_row, channels;  // taps of a row of the filter, and channels of a group
};

struct ConvMma {
  Windows windows;
  const void* other;  // fprop, dgrad: w; wgrad: dy
  void* out;
  const void* bias;  // null, or fprop's
  void* db;          // null, or wgrad's, in the elements' type
  float* sums;       // null, or partial sums instead of out; row_sums likewise of db
  float* row_sums;
  int m, n, k, groups, phases, splits, k_per_split, tiles_m, tiles_n;
  int64_t out_pitch;  // elements between the rows of out
  bool vectors_a, vectors_b, out_pairs;
  // Of dgrad: of dx and of the filters.
  int H, W, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tap_step_h, tap_step_w, phases_w;
};

template <typename T>
__device__ __forceinline__ const T* window(const Windows& g, const T* data, int pixel, int tap) {
  int j = pixel, c = tap;
  const int n = g.image.split(j), i = g.row.split(j);
  int s = g.channels.split(c);
  const int r = g.filter_row.split(s);
  const int h = i * g.h.step + g.h.first + r * g.h.delta, w = j * g.w.step + g.w.first + s * g.w.delta;
  if (unsigned(h) >= unsigned(g.h.size) || unsigned(w) >= unsigned(g.w.size)) return nullptr;
  return data + ((int64_t(n) * g.h.size + h) * g.w.size + w) * g.pitch + c;
}

// Which outputs of dx make up a phase, and which taps they meet: r = tap_first + i·tap_step reads dy's row
// first + h / stride − i·dilation / gcd(stride, dilation).
struct PhaseAxis {
  int outputs, first, taps, tap_first;
};
__device__ __forceinline__ PhaseAxis phase_axis(int phase, int size, int stride, int pad, int dilation, int taps,
                                                int tap_step) {
  const int outputs = (size - phase + stride - 1) / stride;
  for (int tap = 0; tap < min(taps, tap_step); ++tap) {
    const int distance = phase + pad - tap * dilation;
    if (distance % stride == 0) return {outputs, distance / stride, (taps - 1 - tap) / tap_step + 1, tap};
  }
  return {outputs, 0, 0, 0};
}

template <typename T, Direction direction, int tile>
__global__ void __launch_bounds__(mma_threads<tile>, tile == 128 ? 2 : 4)
    conv2d_mma_kernel(const __grid_constant__ ConvMma g) {
  constexpr bool fprop = direction == Direction::fprop, dgrad = direction == Direction::dgrad,
                 wgrad = direction == Direction::wgrad;
  using A = OperandTile<T, tile, !wgrad>;
  using B = OperandTile<T, tile, fprop>;
  constexpr int depth = mma_depth<T>, rows = tile / 32, columns = 4;  // fragments of a warp: 16 rows, 8 columns each
  auto& shared = shared_memory<MmaShared<tile>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % 2 * (tile / 2), warp_n = warp / 2 * 32;

  // Neighbouring blocks share the larger operand: the index with fewer tiles runs fastest.
  int block = blockIdx.x;
  const bool m_first = g.tiles_m <= g.tiles_n;
  const int fast_tiles = m_first ? g.tiles_m : g.tiles_n, slow_tiles = m_first ? g.tiles_n : g.tiles_m;
  const int fast = block % fast_tiles, slow = block / fast_tiles % slow_tiles;
  block /= fast_tiles * slow_tiles;
  const int split = block % g.splits, group = block / g.splits % g.groups, phase = block / g.splits / g.groups;
  const int m0 = (m_first ? fast : slow) * tile, n0 = (m_first ? slow : fast) * tile;

  Windows windows = g.windows;
  PhaseAxis phase_h = {}, phase_w = {};
  int m_end = g.m, k_all = g.k;
  if constexpr (dgrad) {
    phase_h = phase_axis(phase / g.phases_w, g.H, g.stride_h, g.pad_h, g.dilation_h, g.R, g.tap_step_h);
    phase_w = phase_axis(phase % g.phases_w, g.W, g.stride_w, g.pad_w, g.dilation_w, g.S, g.tap_step_w);
    windows.h.first = phase_h.first, windows.w.first = phase_w.first;
    if (g.stride_h > 1 || g.stride_w > 1) {  // redundant: without strides the host has found the same numbers
      windows.image = Divisor(phase_h.outputs * phase_w.outputs);
      windows.row = Divisor(phase_w.outputs);
      windows.filter_row = Divisor(max(phase_w.taps, 1));
      m_end = g.m / int(g.windows.image.d) * int(windows.image.d);
      k_all = phase_h.taps * phase_w.taps * int(windows.channels.d);
    }
  }
  if (m0 >= m_end) return;
  const int k_begin = split * g.k_per_split, k_end = min(k_all, k_begin + g.k_per_split);
  const T* data = static_cast<const T*>(windows.data) + int64_t(group) * windows.channels.d;
  const T* other = static_cast<const T*>(g.other);

  const auto at_a = [&](int m, int k) {
    if constexpr (wgrad)
      return other + int64_t(k) * (int64_t(g.m) * g.groups) + int64_t(group) * g.m + m;
    else
      return window(windows, data, m, k);
  };
  const auto at_b = [&](int n, int k) {
    if constexpr (fprop) return other + (int64_t(group) * g.n + n) * g.k + k;
    if constexpr (wgrad) return window(windows, data, k, n);
    if constexpr (dgrad) {
      int filter = k;
      int s = windows.channels.split(filter);
      const int r = windows.filter_row.split(s);
      const int tap = (phase_h.tap_first + r * g.tap_step_h) * g.S + phase_w.tap_first + s * g.tap_step_w;
      return other + ((int64_t(group) * windows.channels.d + filter) * (g.R * g.S) + tap) * g.n + n;
    }
  };
  const auto load_step = [&](int step) {
    const int k = k_begin + step * depth, stage = step % mma_stages;
    if (k < k_end) {
      A::load(shared.a[stage], m0, m_end, k, k_end, g.vectors_a, wgrad ? g.other : windows.data, at_a);
      B::load(shared.b[stage], n0, g.n, k, k_end, g.vectors_b, wgrad ? windows.data : g.other, at_b);
    }
    ptx::cp_async_commit();  // a group a step, empty past the end, so that waiting counts steps
  };

  float sums[rows][columns][4] = {};
  float row_sums[4] = {};  // of one fragment: each of a row's warps adds up another
  const int summed = wgrad && (g.db || g.row_sums) && n0 == 0 ? warp / 2 : rows;
  const int steps = k_begin < k_end ? (k_end - k_begin + depth - 1) / depth : 0;
#pragma unroll
  for (int step = 0; step < mma_stages - 1; ++step) load_step(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<mma_stages - 2>();
    __syncthreads();  // the step is there, and everyone is done with the one before it, whose place load_step takes
    load_step(step + mma_stages - 1);
    const char* stage_a = shared.a[step % mma_stages];
    const char* stage_b = shared.b[step % mma_stages];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[columns / 2][4];
#pragma unroll
      for (int j = 0; j < columns / 2; ++j) load_b<T, tile, fprop>(b[j], stage_b, warp_n + 16 * j, half);
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        uint32_t a[4];
        load_a<T, tile, !wgrad>(a, stage_a, warp_m + 16 * i, half);
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(sums[i][j], a, column);
        }
        if (wgrad && i == summed) {
          uint32_t ones[2];
          set_ones<T>(ones);
          multiply_add<T>(row_sums, a, ones);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

  // Results (g, 2t), (g, 2t + 1) and (g + 8, …) of each fragment.
#pragma unroll
  for (int i = 0; i < 2 * rows; ++i) {
    const int m = m0 + warp_m + 8 * i + lane / 4;
    if (m >= m_end) continue;
    const int64_t partial_row = (int64_t(split) * g.groups + group) * g.m + m;
    if (wgrad && i / 2 == summed && lane % 4 == 0) {
      const float sum = row_sums[i % 2 * 2];
      if (g.row_sums)
        g.row_sums[partial_row] = sum;
      else
        static_cast<T*>(g.db)[group * g.m + m] = from_acc<T>(sum);
    }
    int64_t row = m;
    if constexpr (dgrad) {
      int w = m;
      const int image = windows.image.split(w), h = windows.row.split(w);
      row = (int64_t(image) * g.H + phase / g.phases_w + h * g.stride_h) * g.W + phase % g.phases_w + w * g.stride_w;
    }
    if constexpr (wgrad) row += int64_t(group) * g.m;
    T* out = static_cast<T*>(g.out) + row * g.out_pitch + (wgrad ? 0 : int64_t(group) * g.n);
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const int n = n0 + warp_n + 8 * j + lane % 4 * 2;
      if (n >= g.n) continue;
      Vec<float, 2> pair = {{sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]}};
      if (g.sums) {
        store_vec(g.sums + partial_row * ((g.n + 3) / 4 * 4) + n, pair);
        continue;
      }
      if (fprop && g.bias) {
        const T* bias = static_cast<const T*>(g.bias) + int64_t(group) * g.n + n;
        pair.at[0] += to_acc(bias[0]);
        if (n + 1 < g.n) pair.at[1] += to_acc(bias[1]);
      }
      const Vec<T, 2> rounded = {{from_acc<T>(pair.at[0]), from_acc<T>(pair.at[1])}};
      if (g.out_pairs) {
        store_vec(out + n, rounded);
      } else {
        out[n] = rounded.at[0];
        if (n + 1 < g.n) out[n + 1] = rounded.at[1];
      }
    }
  }
}

WindowAxis fprop_axis(int64_t size, int64_t stride, int64_t pad, int64_t dilation) {
  return {int(size), int(stride), int(-pad), int(dilation)};
}

// A call: the normalized problem, and where in the workspace things lie.
struct Call {
  Conv2dProblem p;
  const Conv2dPlan& plan;
  Stream stream;
  MmaWorkspace at;
  char* workspace;

  Call(const Conv2dProblem& problem, const Conv2dPlan& plan, void* workspace, Stream stream)
      : p(normalized(problem)),
        plan(plan),
        stream(stream),
        at(mma_workspace(p, plan.direction, plan.split)),
        workspace(static_cast<char*>(workspace)) {}

  // Where x, w or y is kept in NHWC: in place if the copy that begins and ends there has no bytes.
  template <typename T>
  T* place(T* tensor, int64_t begin, int64_t end) const {
    return begin == end ? tensor : reinterpret_cast<T*>(workspace + begin);
  }
  template <typename T>
  T* x(T* tensor) const {
    return place(tensor, at.x, at.w);
  }
  template <typename T>
  T* w(T* tensor) const {
    return place(tensor, at.w, at.y);
  }
  template <typename T>
  T* y(T* tensor) const {
    return place(tensor, at.y, at.end);
  }

  // NCHW to NHWC, of a tensor that has a copy.
  template <typename T>
  Status copy_in(const T* from, const T* to, int64_t images, int64_t channels, int64_t plane) const {
    return from == to ? Status{} : transpose(from, const_cast<T*>(to), images, channels, plane, stream);
  }
  template <typename T>
  Status copy_out(const T* from, T* to, int64_t images, int64_t channels, int64_t plane) const {
    return from == to ? Status{} : transpose(from, to, images, plane, channels, stream);
  }

  ConvMma arguments(int depth) const {
    const MmaProduct product = mma_product(p, plan.direction);
    ConvMma g = {};
    g.m = int(product.m), g.n = int(product.n), g.k = int(product.k);
    g.groups = int(product.groups), g.phases = int(product.phases);
    g.splits = plan.split;
    g.k_per_split = int(round_up(pieces(product.k, plan.split), depth));
    g.tiles_m = int(pieces(product.m, plan.tile_m)), g.tiles_n = int(pieces(product.n, plan.tile_n));
    g.windows.h = fprop_axis(p.H, p.stride_h, p.pad_h, p.dilation_h);
    g.windows.w = fprop_axis(p.W, p.stride_w, p.pad_w, p.dilation_w);
    g.windows.pitch = p.C;
    g.windows.image = Divisor(std::max<int64_t>(p.P * p.Q, 1)), g.windows.row = Divisor(std::max<int64_t>(p.Q, 1));
    g.windows.filter_row = Divisor(p.S);
    g.windows.channels = Divisor(std::max<int64_t>(p.channels_per_group(), 1));
    if (plan.split > 1) g.sums = reinterpret_cast<float*>(workspace + at.sums);
    return g;
  }

  void set_phases(ConvMma& g) const {
    const int64_t common_h = std::gcd(p.stride_h, p.dilation_h), common_w = std::gcd(p.stride_w, p.dilation_w);
    const int64_t phases_h = std::clamp<int64_t>(p.H, 1, p.stride_h);
    g.phases_w = int(std::clamp<int64_t>(p.W, 1, p.stride_w));
    g.H = int(p.H), g.W = int(p.W), g.R = int(p.R), g.S = int(p.S);
    g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w), g.pad_h = int(p.pad_h), g.pad_w = int(p.pad_w);
    g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    g.tap_step_h = int(p.stride_h / common_h), g.tap_step_w = int(p.stride_w / common_w);
    g.windows.h = {int(p.P), 1, 0, int(-p.dilation_h / common_h)};
    g.windows.w = {int(p.Q), 1, 0, int(-p.dilation_w / common_w)};
    g.windows.pitch = p.K;
    g.windows.row = Divisor(pieces(p.W, g.phases_w));
    g.windows.image = Divisor(pieces(p.H, phases_h) * pieces(p.W, g.phases_w));
    g.windows.filter_row = Divisor(pieces(p.S, g.tap_step_w));
    g.windows.channels = Divisor(p.filters_per_group());
  }

  template <typename T, Direction direction, int tile>
  Status run_tile(const ConvMma& g) const {
    const int64_t blocks = int64_t(g.tiles_m) * g.tiles_n * g.splits * g.groups * g.phases;
    return launch("conv2d_mma_kernel", conv2d_mma_kernel<T, direction, tile>, dim3(unsigned(blocks)),
                  dim3(mma_threads<tile>), sizeof(MmaShared<tile>), stream, g);
  }
  template <typename T, Direction direction>
  Status run(const ConvMma& g) const {
    return plan.tile_m == 128 ? run_tile<T, direction, 128>(g) : run_tile<T, direction, 64>(g);
  }

  // out = bias + the partial sums of its rows, in order.
  template <typename T>
  Status add_splits(const ConvMma& g) const {
    if (!g.sums) return {};
    OrderedSum s = {};
    s.partial = g.sums, s.splits = g.splits;
    s.batches = g.groups, s.m = g.m, s.n = g.n, s.pitch = round_up(g.n, 4);
    s.out = g.out, s.out_m.stride = g.out_pitch, s.out_n.stride = 1;
    s.out_batch_stride = plan.direction == Direction::wgrad ? int64_t(g.m) * g.n : g.n;
    s.bias = g.bias, s.bias_batch_stride = g.n, s.bias_n_stride = 1;
    return ordered_sum<T>(s, stream);
  }
};

// Whether chunks of `extent` elements, and of rows `pitch` apart, are 16-byte vectors.
template <typename T>
bool in_vectors(const void* data, int64_t extent, int64_t pitch) {
  return is_aligned(data, 16) && extent % mma_chunk<T> == 0 && pitch % mma_chunk<T> == 0;
}
template <typename T>
bool in_pairs(const void* data, int64_t extent, int64_t pitch) {
  return is_aligned(data, 2 * sizeof(T)) && extent % 2 == 0 && pitch % 2 == 0;
}

template <typename T>
Status fprop(const Call& c, const T* x_nchw, const T* w_nchw, const T* bias, T* y_nchw) {
  const Conv2dProblem& p = c.p;
  const T *x = c.x(x_nchw), *w = c.w(w_nchw);
  T* y = c.y(y_nchw);
  ConvMma g = c.arguments(mma_depth<T>);
  g.windows.data = x, g.other = w, g.out = y, g.bias = bias;
  g.out_pitch = p.K;
  g.vectors_a = in_vectors<T>(x, p.channels_per_group(), p.C);
  g.vectors_b = in_vectors<T>(w, g.k, g.k);
  g.out_pairs = in_pairs<T>(y, g.n, p.K);
  if (Status s = c.copy_in(x_nchw, x, p.N, p.C, p.H * p.W); !s.ok()) return s;
  if (Status s = c.copy_in(w_nchw, w, p.K, p.channels_per_group(), p.R * p.S); !s.ok()) return s;
  if (Status s = c.run<T, Direction::fprop>(g); !s.ok()) return s;
  if (Status s = c.add_splits<T>(g); !s.ok()) return s;
  return c.copy_out(y, y_nchw, p.N, p.K, p.P * p.Q);
}

template <typename T>
Status dgrad(const Call& c, const T* dy_nchw, const T* w_nchw, T* dx_nchw) {
  const Conv2dProblem& p = c.p;
  const T *dy = c.y(dy_nchw), *w = c.w(w_nchw);
  T* dx = c.x(dx_nchw);
  ConvMma g = c.arguments(mma_depth<T>);
  c.set_phases(g);
  g.windows.data = dy, g.other = w, g.out = dx;
  g.out_pitch = p.C;
  g.vectors_a = in_vectors<T>(dy, p.filters_per_group(), p.K);
  g.vectors_b = in_vectors<T>(w, g.n, g.n);
  g.out_pairs = in_pairs<T>(dx, g.n, p.C);
  if (Status s = c.copy_in(dy_nchw, dy, p.N, p.K, p.P * p.Q); !s.ok()) return s;
  if (Status s = c.copy_in(w_nchw, w, p.K, p.channels_per_group(), p.R * p.S); !s.ok()) return s;
  if (Status s = c.run<T, Direction::dgrad>(g); !s.ok()) return s;
  if (Status s = c.add_splits<T>(g); !s.ok()) return s;
  return c.copy_out(dx, dx_nchw, p.N, p.C, p.H * p.W);
}

template <typename T>
Status wgrad(const Call& c, const T* dy_nchw, const T* x_nchw, T* dw_nchw, T* db) {
  const Conv2dProblem& p = c.p;
  const T *dy = c.y(dy_nchw), *x = c.x(x_nchw);
  T* dw = c.w(dw_nchw);
  ConvMma g = c.arguments(mma_depth<T>);
  g.windows.data = x, g.other = dy, g.out = dw, g.db = db;
  if (db && g.sums) g.row_sums = reinterpret_cast<float*>(c.workspace + c.at.row_sums);
  g.out_pitch = g.n;
  g.vectors_a = in_vectors<T>(dy, p.filters_per_group(), p.K);
  g.vectors_b = in_vectors<T>(x, p.channels_per_group(), p.C);
  g.out_pairs = in_pairs<T>(dw, g.n, g.n);
  if (Status s = c.copy_in(dy_nchw, dy, p.N, p.K, p.P * p.Q); !s.ok()) return s;
  if (Status s = c.copy_in(x_nchw, x, p.N, p.C, p.H * p.W); !s.ok()) return s;
  if (Status s = c.run<T, Direction::wgrad>(g); !s.ok()) return s;
  if (Status s = c.add_splits<T>(g); !s.ok()) return s;
  if (g.row_sums)
    if (Status s = ordered_sum<T>(g.row_sums, g.splits, p.K, db, c.stream); !s.ok()) return s;
  return c.copy_out(dw, dw_nchw, p.K, p.channels_per_group(), p.R * p.S);
}

// The element types that tensor cores multiply; float32 only as tf32. The plan has refused the others.
template <typename F>
Status dispatch_mma(const Conv2dProblem& p, F&& f) {
  switch (p.dtype) {
    case DType::float16: return f(__half{});
    case DType::bfloat16: return f(__nv_bfloat16{});
    case DType::float32: return f(float{});
    default: return {"conv2d_mma", "float64 has no kernel"};
  }
}

}  // namespace

Status conv2d_mma_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
                        void* y, void* workspace, Stream stream) {
  if (p.y_elements() == 0) return {};
  return dispatch_mma(p, [&](auto element) {
    using T = decltype(element);
    return fprop(Call(p, plan, workspace, stream), static_cast<const T*>(x), static_cast<const T*>(w),
                 static_cast<const T*>(bias), static_cast<T*>(y));
  });
}

Status conv2d_mma_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
                        void* workspace, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch_mma(p, [&](auto element) {
    using T = decltype(element);
    return dgrad(Call(p, plan, workspace, stream), static_cast<const T*>(dy), static_cast<const T*>(w),
                 static_cast<T*>(dx));
  });
}

Status conv2d_mma_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dw,
                        void* db, void* workspace, Stream stream) {
  if (p.w_elements() == 0) return {};
  return dispatch_mma(p, [&](auto element) {
    using T = decltype(element);
    return wgrad(Call(p, plan, workspace, stream), static_cast<const T*>(dy), static_cast<const T*>(x),
                 static_cast<T*>(dw), static_cast<T*>(db));
  });
}

}  // namespace fastconv::cuda
