// Depthwise convolution: every channel has filters of its own, C/groups = 1. With m = K/C filters a channel:
//
//   fprop  y[n][k][p][q]  = b[k] + Σ_{r,s} x[n][k / m][p·stride_h − pad_h + r·dilation_h][…] · w[k][r][s]
//   dgrad  dx[n][c][h][w] = Σ_{k / m = c} Σ_{r,s} dy[n][k][(h + pad_h − r·dilation_h) / stride_h][…] · w[k][r][s]
//   wgrad  dw[k][r][s]    = Σ_{n,p,q} dy[n][k][p][q] · x[n][k / m][p·stride_h − pad_h + r·dilation_h][…]
//
// An element takes part in few products, so that the time goes to memory: neighbouring threads read neighbouring
// elements, along w in NCHW and along the channels in NHWC, and what windows share comes from the L1 cache.
// fprop and dgrad: a thread computes a strip of four rows. With stride 1, dgrad is fprop with the filter turned round
// and padding (R − 1)·dilation − pad. wgrad: a thread keeps 3 × 3 taps of a channel and walks over the pixels; the
// threads' sums and then the blocks' are added in order.
#include "../plan/conv2d_cuda.h"
#include "index.cuh"
#include "ordered_sum.cuh"

namespace fastconv::cuda {
namespace {

constexpr int strip = 4;  // rows a thread
constexpr int strips_per_thread = 8;
constexpr int staged_filter = 3136;  // elements of filters in shared memory: 64 channels of 7 × 7

struct Depthwise {
  Layout layout;
  bool dgrad, relu;
  bool turned;               // the filter, for dgrad with stride 1
  bool divides;              // dgrad with a stride: rows and columns that are no whole multiples have no source
  bool staged;               // NHWC: the filters of the block's channels are in shared memory
  int channels, multiplier;  // of the output; m
  int out_h, out_w, in_h, in_w, R, S;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t N;
  Strides in, out;
  int channel_lanes;
  int64_t channel_tiles, positions;  // (n, [c of NCHW,] strip, w)
  Divisor width, strips, all_channels, multiples, divide_h, divide_w;
};

template <typename T>
struct DepthwiseShared {
  acc_t<T> filter[staged_filter];  // [tap][channel lane]
};

// The input row or column that an output reads through a tap; negative or too large outside.
__device__ __forceinline__ int source(bool divides, const Divisor& divide, int out, int tap, int stride, int pad,
                                      int dilation) {
  if (!divides) return out * stride - pad + tap * dilation;
  int over = out + pad - tap * dilation;
  if (over < 0) return -1;  // redundant: such quotients are too large for any input, but Divisor does not promise it
  const int at = divide.split(over);
  return over == 0 ? at : -1;
}

// any: every filter, stride and dilation. The others: a 3 × 3 filter without dilation whose stride is 1 or 2, or was 2
// in the fprop that this is the dgrad of.
enum class Window { any, stride_1, stride_2, divide_by_2 };

template <typename T, Window window>
__global__ void __launch_bounds__(depthwise_threads, window != Window::any || sizeof(T) == 8 ? 2 : 3)
    conv2d_depthwise_kernel(const __grid_constant__ Depthwise g, const T* in, const T* w, const T* bias, T* out) {
  using acc = acc_t<T>;
  auto& shared = shared_memory<DepthwiseShared<T>>();
  const int lanes = g.channel_lanes, pixel_lanes = depthwise_threads / lanes;
  const int lane = threadIdx.x % lanes, pixel_lane = threadIdx.x / lanes;
  const int taps = g.R * g.S;

  int64_t rest = blockIdx.x / g.channel_tiles;
  const int first_channel = int(blockIdx.x - rest * g.channel_tiles) * lanes;
  rest *= pixel_lanes * strips_per_thread;
  if (g.staged) {
    for (int i = threadIdx.x; i < lanes * taps; i += depthwise_threads) {
      const int c = i / taps, tap = i - c * taps;
      shared.filter[tap * lanes + c] =
          first_channel + c < g.channels ? to_acc(w[int64_t(first_channel + c) * taps + tap]) : acc(0);
    }
    __syncthreads();
  }
  // The first position of the block, taken apart; a thread adds its own place to it digit by digit.
  const int64_t left = g.positions - rest;
  const int column0 = int(rest % g.out_w);
  rest /= g.out_w;
  const int strip0 = int(rest % g.strips.d);
  rest /= g.strips.d;
  const int channel0 = g.layout == Layout::NCHW ? int(rest % g.channels) : first_channel + lane;
  const int image0 = int(g.layout == Layout::NCHW ? rest / g.channels : rest);
  if (g.layout == Layout::NHWC && channel0 >= g.channels) return;

#pragma unroll 1
  for (int step = 0; step < strips_per_thread; ++step) {  // redundant: the next block does the next step, alike
    const int position = step * pixel_lanes + pixel_lane;
    if (position >= left) return;
    int column = column0 + position;
    int row = strip0 + g.width.split(column);
    int channel = channel0, image = image0;
    if (g.layout == Layout::NCHW) {
      channel += g.strips.split(row);
      image += g.all_channels.split(channel);
    } else {
      image += g.strips.split(row);
    }
    row *= strip;

    acc sums[strip] = {};
    const int parts = g.dgrad ? g.multiplier : 1;
    for (int part = 0; part < parts; ++part) {
      const int filter = g.dgrad ? channel * g.multiplier + part : channel;
      const int in_channel = g.dgrad ? filter : g.multiples.quotient(channel);
      const T* from = in + image * g.in.n + in_channel * g.in.c;
      const T* taps_of_filter = w + int64_t(filter) * taps;
      const auto tap_at = [&](int tap) {
        if (g.turned) tap = taps - 1 - tap;
        return g.staged ? shared.filter[tap * lanes + lane] : to_acc(taps_of_filter[tap]);
      };
      if constexpr (window == Window::stride_1 || window == Window::stride_2) {
        constexpr int stride = window == Window::stride_1 ? 1 : 2, reach = (strip - 1) * stride + 3;
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          const int x = column * stride - g.pad_w + s;
          if (unsigned(x) >= unsigned(g.in_w)) continue;
          acc values[reach];
#pragma unroll
          for (int i = 0; i < reach; ++i) {
            const int y = row * stride - g.pad_h + i;
            values[i] = unsigned(y) < unsigned(g.in_h) ? to_acc(from[y * g.in.h + x * g.in.w]) : acc(0);
          }
#pragma unroll
          for (int r = 0; r < 3; ++r) {
            const acc tap = tap_at(r * 3 + s);
#pragma unroll
            for (int a = 0; a < strip; ++a) sums[a] += values[a * stride + r] * tap;
          }
        }
      } else if constexpr (window == Window::divide_by_2) {
        // Row h reads through taps r of the parity of h + pad_h: the middle one, or the first and the last. A strip
        // starts at an even row, so that three input rows serve it.
        const int odd = g.pad_h & 1, y0 = (row + g.pad_h - odd) / 2 - 1 + odd;
        for (int s = (column + g.pad_w) & 1; s < 3; s += 2) {
          const int x = (column + g.pad_w - s) / 2;
          if (column + g.pad_w < s || x >= g.in_w) continue;
          acc values[3], taps_of_column[3];
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            const int y = y0 + i;
            values[i] = unsigned(y) < unsigned(g.in_h) ? to_acc(from[y * g.in.h + x * g.in.w]) : acc(0);
            taps_of_column[i] = tap_at(i * 3 + s);
          }
          if (odd) {
            sums[0] += values[0] * taps_of_column[1];
            sums[1] += values[1] * taps_of_column[0] + values[0] * taps_of_column[2];
            sums[2] += values[1] * taps_of_column[1];
            sums[3] += values[2] * taps_of_column[0] + values[1] * taps_of_column[2];
          } else {
            sums[0] += values[1] * taps_of_column[0] + values[0] * taps_of_column[2];
            sums[1] += values[1] * taps_of_column[1];
            sums[2] += values[2] * taps_of_column[0] + values[1] * taps_of_column[2];
            sums[3] += values[2] * taps_of_column[1];
          }
        }
      } else {
        for (int s = 0; s < g.S; ++s) {
          const int x = source(g.divides, g.divide_w, column, s, g.stride_w, g.pad_w, g.dilation_w);
          if (unsigned(x) >= unsigned(g.in_w)) continue;
          for (int r = 0; r < g.R; ++r) {
            const acc tap = tap_at(r * g.S + s);
#pragma unroll
            for (int a = 0; a < strip; ++a) {
              const int y = source(g.divides, g.divide_h, row + a, r, g.stride_h, g.pad_h, g.dilation_h);
              if (unsigned(y) < unsigned(g.in_h)) sums[a] += to_acc(from[y * g.in.h + x * g.in.w]) * tap;
            }
          }
        }
      }
    }
    const acc offset = bias ? to_acc(bias[channel]) : acc(0);
    T* to = out + image * g.out.n + channel * g.out.c + row * g.out.h + column * g.out.w;
#pragma unroll
    for (int a = 0; a < strip; ++a)
      if (row + a < g.out_h) to[a * g.out.h] = from_acc<T>(g.relu ? relu(sums[a] + offset) : sums[a] + offset);
  }
}

struct DepthwiseWgrad {
  int K, P, Q, H, W, R, S;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Strides x, y;
  int channel_lanes, split;
  int tap_rows, tap_columns;  // chunks of 3 × 3 taps
  int64_t pixels;             // N·P·Q
  Divisor width, height, multiples;
};

template <typename T>
struct DepthwiseWgradShared {
  acc_t<T> sums[10][depthwise_threads];  // nine taps, and db
};

// partial[split][k][r][s] and bias_partial[split][k], which may be null
template <typename T>
__global__ void __launch_bounds__(depthwise_threads)
    conv2d_depthwise_wgrad_kernel(const __grid_constant__ DepthwiseWgrad g, const T* x, const T* dy, acc_t<T>* partial,
                                  acc_t<T>* bias_partial) {
  using acc = acc_t<T>;
  auto& shared = shared_memory<DepthwiseWgradShared<T>>();
  const int lanes = g.channel_lanes, pixel_lanes = depthwise_threads / lanes;
  const int pixel_lane = threadIdx.x / lanes;
  int block = blockIdx.x;
  const int s0 = block % g.tap_columns * 3;
  block /= g.tap_columns;
  const int r0 = block % g.tap_rows * 3;
  block /= g.tap_rows;
  const int split = block % g.split, k = block / g.split * lanes + threadIdx.x % lanes;

  acc sums[9] = {}, bias_sum = 0;
  if (k < g.K) {
    const T* dy_channel = dy + k * g.y.c;
    const T* x_channel = x + g.multiples.quotient(k) * g.x.c;
    const int64_t begin = g.pixels * split / g.split + pixel_lane, end = g.pixels * (split + 1) / g.split;
    int q = int(begin % g.Q), p = int(begin / g.Q % g.P), n = int(begin / g.Q / g.P);
    for (int64_t pixel = begin; pixel < end; pixel += pixel_lanes) {
      const acc d = to_acc(dy_channel[n * g.y.n + p * g.y.h + q * g.y.w]);
      bias_sum += d;
      const int h0 = p * g.stride_h - g.pad_h + r0 * g.dilation_h, w0 = q * g.stride_w - g.pad_w + s0 * g.dilation_w;
      const T* image = x_channel + n * g.x.n;
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const int h = h0 + r * g.dilation_h;
        // redundant: sums of taps beyond the filter are not kept
        const bool row_inside = r0 + r < g.R && unsigned(h) < unsigned(g.H);
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          const int w = w0 + s * g.dilation_w;
          // redundant: sums of taps beyond the filter are not kept
          if (row_inside && s0 + s < g.S && unsigned(w) < unsigned(g.W))
            sums[r * 3 + s] += d * to_acc(image[h * g.x.h + w * g.x.w]);
        }
      }
      q += pixel_lanes;
      p += g.width.split(q);
      n += g.height.split(p);
    }
  }

  // The pixel lanes of each channel, in a tree of fixed shape.
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) shared.sums[tap][threadIdx.x] = sums[tap];
  shared.sums[9][threadIdx.x] = bias_sum;
  for (int half = pixel_lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (pixel_lane < half)
      for (int tap = 0; tap < 10; ++tap) shared.sums[tap][threadIdx.x] += shared.sums[tap][threadIdx.x + half * lanes];
  }
  if (pixel_lane != 0 || k >= g.K) return;
  const int64_t row = int64_t(split) * g.K + k;
  for (int tap = 0; tap < 9; ++tap) {
    const int r = r0 + tap / 3, s = s0 + tap % 3;
    if (r < g.R && s < g.S) partial[(row * g.R + r) * g.S + s] = shared.sums[tap][threadIdx.x];
  }
  if (bias_partial && r0 == 0 && s0 == 0) bias_partial[row] = shared.sums[9][threadIdx.x];
}

template <typename T>
Status gather(const Conv2dProblem& problem, const Conv2dPlan& plan, const T* in, const T* w, const T* bias, T* out,
              Stream stream) {
  const Conv2dProblem p = normalized(problem);
  Depthwise g = {};
  g.layout = p.layout;
  g.dgrad = plan.direction == Direction::dgrad;
  g.relu = p.relu;
  g.turned = g.dgrad && p.stride_h == 1 && p.stride_w == 1;
  g.divides = g.dgrad && !g.turned;
  g.multiplier = int(p.filters_per_group());
  g.channels = int(g.dgrad ? p.C : p.K);
  g.out_h = int(g.dgrad ? p.H : p.P), g.out_w = int(g.dgrad ? p.W : p.Q);
  g.in_h = int(g.dgrad ? p.P : p.H), g.in_w = int(g.dgrad ? p.Q : p.W);
  g.R = int(p.R), g.S = int(p.S);
  g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w);
  g.pad_h = int(g.turned ? (p.R - 1) * p.dilation_h - p.pad_h : p.pad_h);
  g.pad_w = int(g.turned ? (p.S - 1) * p.dilation_w - p.pad_w : p.pad_w);
  g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
  g.N = p.N;
  g.in = g.dgrad ? y_strides(p) : x_strides(p);
  g.out = g.dgrad ? x_strides(p) : y_strides(p);
  g.channel_lanes = depthwise_channel_lanes(p);
  g.staged =
      p.layout == Layout::NHWC && (!g.dgrad || g.multiplier == 1) && g.channel_lanes * p.R * p.S <= staged_filter;
  const int64_t strips = pieces(g.out_h, strip);
  const bool nchw = p.layout == Layout::NCHW;
  g.channel_tiles = nchw ? 1 : pieces(g.channels, g.channel_lanes);
  g.positions = p.N * (nchw ? g.channels : 1) * strips * g.out_w;
  g.width = Divisor(g.out_w), g.strips = Divisor(strips), g.all_channels = Divisor(g.channels);
  g.multiples = Divisor(g.multiplier);
  g.divide_h = Divisor(p.stride_h), g.divide_w = Divisor(p.stride_w);

  const bool fixed =
      p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1 && p.stride_h == p.stride_w && p.stride_h <= 2;
  auto* kernel = !fixed            ? conv2d_depthwise_kernel<T, Window::any>
                 : g.divides       ? conv2d_depthwise_kernel<T, Window::divide_by_2>
                 : p.stride_h == 2 ? conv2d_depthwise_kernel<T, Window::stride_2>
                                   : conv2d_depthwise_kernel<T, Window::stride_1>;
  const int64_t blocks = g.channel_tiles * pieces(g.positions, depthwise_threads / g.channel_lanes * strips_per_thread);
  return launch("conv2d_depthwise_kernel", kernel, dim3(unsigned(blocks)), dim3(depthwise_threads),
                g.staged ? sizeof(DepthwiseShared<T>) : 0, stream, g, in, w, bias, out);
}

}  // namespace

Status conv2d_depthwise_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w,
                              const void* bias, void* y, void*, Stream stream) {
  if (p.y_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return gather(p, plan, static_cast<const T*>(x), static_cast<const T*>(w), static_cast<const T*>(bias),
                  static_cast<T*>(y), stream);
  });
}

Status conv2d_depthwise_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
                              void*, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return gather(p, plan, static_cast<const T*>(dy), static_cast<const T*>(w), static_cast<const T*>(nullptr),
                  static_cast<T*>(dx), stream);
  });
}

Status conv2d_depthwise_wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x,
                              void* dw, void* db, void* workspace, Stream stream) {
  if (problem.w_elements() == 0) return {};
  const Conv2dProblem p = normalized(problem);
  DepthwiseWgrad g = {};
  g.K = int(p.K), g.P = int(p.P), g.Q = int(p.Q), g.H = int(p.H), g.W = int(p.W), g.R = int(p.R), g.S = int(p.S);
  g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w);
  g.pad_h = int(p.pad_h), g.pad_w = int(p.pad_w);
  g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
  g.x = x_strides(p), g.y = y_strides(p);
  g.channel_lanes = depthwise_channel_lanes(p);
  g.split = plan.split;
  g.tap_rows = int(pieces(p.R, 3)), g.tap_columns = int(pieces(p.S, 3));
  g.pixels = p.N * p.P * p.Q;
  g.width = Divisor(std::max<int64_t>(p.Q, 1)), g.height = Divisor(std::max<int64_t>(p.P, 1));
  g.multiples = Divisor(p.filters_per_group());
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    acc_t<T>* partial = static_cast<acc_t<T>*>(workspace);
    acc_t<T>* bias_partial = db ? partial + g.split * p.w_elements() : nullptr;
    if (Status s = launch("conv2d_depthwise_wgrad_kernel", conv2d_depthwise_wgrad_kernel<T>,
                          dim3(unsigned(depthwise_wgrad_blocks(p) * g.split)), dim3(depthwise_threads),
                          sizeof(DepthwiseWgradShared<T>), stream, g, static_cast<const T*>(x),
                          static_cast<const T*>(dy), partial, bias_partial);
        !s.ok())
      return s;
    if (Status s = ordered_sum<T>(partial, g.split, p.w_elements(), dw, stream); !s.ok() || !db) return s;
    return ordered_sum<T>(bias_partial, g.split, p.K, db, stream);
  });
}

}  // namespace fastconv::cuda
