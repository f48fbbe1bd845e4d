// Direct convolution through shared memory.
//
//   fprop  y[n][k][p][q]  = b[k] + Σ_{c,r,s} x[n][c][p·stride_h − pad_h + r·dilation_h][…] · w[k][c][r][s]
//   dgrad  dx[n][c][h][w] = Σ_{k,r,s} dy[n][k][(h + pad_h − r·dilation_h) / stride_h][…] · w[k][c][r][s], where whole
//   wgrad  dw[k][c][r][s] = Σ_{n,p,q} dy[n][k][p][q] · x[n][c][p·stride_h − pad_h + r·dilation_h][…]
//
// fprop and dgrad are one kernel: both gather, at equal distances, from an input along each axis (see DirectAxis in
// plan/conv2d_cuda.h). A block brings the patch of the input that its outputs read, and the taps of its filters, into
// shared memory; then every thread adds up four pixels times four channels. In wgrad a block owns some filters times
// some taps and walks its share of the pixels tile by tile; every thread adds up four filters times four taps over some
// pixels of a tile. The threads' sums, and then the blocks', are added in order.
#include "../plan/conv2d_cuda.h"
#include "index.cuh"
#include "ordered_sum.cuh"

namespace fastconv::cuda {
namespace {

struct Direct {
  DirectTile tile;
  Layout layout;
  bool dgrad, relu;
  int64_t blocks, N;
  int64_t groups, in_channels, out_channels;  // of a group
  int64_t channel_tiles;                      // of a group
  Strides in, out;
  int64_t w_group, w_out, w_in, w_r, w_s;  // strides of w by group, output channel, input channel, tap
  bool out_quads;
  Divisor patch_w, patch_h, images, channels;  // extents of the patch
  Divisor chunk_w, chunk_h, pixels_w, pixels_h;
  // wgrad
  int64_t channel_chunks, row_chunks, column_chunks, pixel_tiles;
  int split, taps, tap_threads, slices;
};

template <typename T>
struct DirectShared {
  acc_t<T> patch[direct_patch];                // [channel][image][row][column]; wgrad: then the threads' sums
  alignas(16) acc_t<T> filter[direct_filter];  // [channel][tap][filter]; wgrad: dy as [pixel][filter]
  int pixel[direct_filter / 4];                // wgrad: where a pixel's window starts in the patch, or −1
};

// The taps that the outputs of a phase meet: tap0, tap0 + tap_step, …; output 0 reads input `first` through tap0.
struct Taps {
  int64_t first, count, tap0;
};
__device__ Taps taps_of_phase(const DirectAxis& axis, int64_t phase, bool dgrad) {
  if (!dgrad) return {-axis.pad, axis.taps, 0};
  // redundant: if none of the first tap_step taps meets the phase, none does
  for (int64_t tap = 0; tap < axis.tap_step && tap < axis.taps; ++tap) {
    const int64_t distance = phase + axis.pad - tap * axis.dilation;
    if (distance % axis.stride == 0) return {distance / axis.stride, (axis.taps - 1 - tap) / axis.tap_step + 1, tap};
  }
  return {0, 0, 0};
}

// Takes the last digit off a mixed-radix number.
__device__ __forceinline__ int64_t take(int64_t& rest, int64_t radix) {
  const int64_t quotient = rest / radix, digit = rest - quotient * radix;
  rest = quotient;
  return digit;
}

// Fills the patch: channels c0 … (of the whole tensor) of images n0 …, from input (h0, w0) on; zeros outside.
template <typename T>
__device__ __forceinline__ void load_patch(const Direct& g, const T* in, acc_t<T>* patch, int64_t n0, int64_t c0,
                                           int channels, int64_t h0, int64_t w0) {
  const int plane = int(g.patch_w.d * g.patch_h.d * g.images.d), total = plane * int(g.channels.d);
  for (int i = threadIdx.x; i < total; i += direct_threads) {
    // Neighbouring threads read neighbouring elements.
    int c = 0, v = i;
    if (g.layout == Layout::NHWC) c = v, v = g.channels.split(c);
    const int at = v;
    int u = g.patch_w.split(v);
    int n = g.patch_h.split(u);
    if (g.layout == Layout::NCHW) c = g.images.split(n);
    const int64_t h = h0 + u * g.tile.h.spacing, w = w0 + v * g.tile.w.spacing;
    const bool inside = c < channels && n0 + n < g.N && h >= 0 && h < g.tile.h.input && w >= 0 && w < g.tile.w.input;
    patch[c * g.tile.plane + (g.layout == Layout::NHWC ? at : at - c * plane)] =
        inside ? to_acc(in[(n0 + n) * g.in.n + (c0 + c) * g.in.c + h * g.in.h + w * g.in.w]) : acc_t<T>(0);
  }
}

template <typename T>
__global__ void __launch_bounds__(direct_threads, sizeof(T) == 8 ? 1 : 2)
    conv2d_direct_kernel(const __grid_constant__ Direct g, const T* in, const T* w, const T* bias, T* out) {
  using acc = acc_t<T>;
  auto& shared = shared_memory<DirectShared<T>>();
  const DirectTile& tile = g.tile;
  const int pixel_threads = direct_threads / (tile.filters / 4);
  const int pixel_thread = threadIdx.x % pixel_threads, filter_thread = threadIdx.x / pixel_threads;
  const int patch_w = int(tile.w.extent), plane = int(tile.plane), filter_pitch = tile.filters + 4;
  const int delta_h = int(tile.h.patch_delta) * patch_w, delta_w = int(tile.w.patch_delta);
  // Where the first tap lies if the taps run backwards.
  // redundant: 0 is the distance of one tap alone, which is the first
  const int64_t back_h = delta_h < 0 ? tile.h.chunk - 1 : 0, back_w = delta_w < 0 ? tile.w.chunk - 1 : 0;

  // redundant: a block beyond the last is of images beyond the last
  for (int64_t block = blockIdx.x; block < g.blocks; block += gridDim.x) {
    // Blocks that share lines of memory are neighbours: the columns of NCHW, the channels of NHWC.
    int64_t rest = block, channel_tile = 0;
    if (g.layout == Layout::NHWC) channel_tile = take(rest, g.groups * g.channel_tiles);
    const int64_t phase_w = take(rest, tile.w.phases), tile_w = take(rest, tile.w.tiles);
    const int64_t phase_h = take(rest, tile.h.phases), tile_h = take(rest, tile.h.tiles);
    if (g.layout == Layout::NCHW) channel_tile = take(rest, g.groups * g.channel_tiles);
    const int64_t n0 = rest * tile.images;
    const int64_t group = channel_tile / g.channel_tiles;
    const int64_t k0 = channel_tile % g.channel_tiles * tile.filters;
    const int64_t i0 = tile_h * tile.h.tile, j0 = tile_w * tile.w.tile;
    const Taps taps_h = taps_of_phase(tile.h, phase_h, g.dgrad), taps_w = taps_of_phase(tile.w, phase_w, g.dgrad);

    int window[4];  // of my pixels; of threads without one, any window in the patch
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      int j = pixel_thread + a * pixel_threads;
      int i = g.pixels_w.split(j);
      int n = g.pixels_h.split(i);
      if (n >= tile.images) n = i = j = 0;
      window[a] = int(n * tile.h.extent * patch_w + i * tile.h.patch_step * patch_w + j * tile.w.patch_step -
                      back_h * delta_h - back_w * delta_w);
    }

    acc sums[4][4] = {};                                             // [pixel][channel]
    for (int64_t c0 = 0; c0 < g.in_channels; c0 += tile.channels) {  // redundant: an empty chunk adds nothing
      const int channels = int(min(g.in_channels - c0, int64_t(tile.channels)));
      for (int64_t r0 = 0; r0 < taps_h.count; r0 += tile.h.chunk) {  // redundant: an empty chunk adds nothing
        const int rows = int(min(taps_h.count - r0, int64_t(tile.h.chunk)));
        for (int64_t s0 = 0; s0 < taps_w.count; s0 += tile.w.chunk) {  // redundant: an empty chunk adds nothing
          const int columns = int(min(taps_w.count - s0, int64_t(tile.w.chunk)));
          __syncthreads();
          load_patch(g, in, shared.patch, n0, group * g.in_channels + c0, channels,
                     i0 * tile.h.step + taps_h.first + (r0 + back_h) * tile.h.delta,
                     j0 * tile.w.step + taps_w.first + (s0 + back_w) * tile.w.delta);
          const int total = tile.filters * tile.channels * tile.h.chunk * tile.w.chunk;
          for (int i = threadIdx.x; i < total; i += direct_threads) {  // redundant: the next element is padding
            int s = i;
            int r = g.chunk_w.split(s);
            int c = g.chunk_h.split(r);
            const int k = g.channels.split(c);
            const bool inside = s < columns && r < rows && c < channels && k0 + k < g.out_channels;
            const int64_t tap_r = taps_h.tap0 + (r0 + r) * tile.h.tap_step;
            const int64_t tap_s = taps_w.tap0 + (s0 + s) * tile.w.tap_step;
            shared.filter[((c * tile.h.chunk + r) * tile.w.chunk + s) * filter_pitch + k] =
                inside
                    ? to_acc(
                          w[group * g.w_group + (k0 + k) * g.w_out + (c0 + c) * g.w_in + tap_r * g.w_r + tap_s * g.w_s])
                    : acc(0);
          }
          __syncthreads();
          for (int c = 0; c < channels; ++c) {
            for (int r = 0; r < rows; ++r) {
              const acc* patch = shared.patch + c * plane + r * delta_h;
              const acc* filter =
                  shared.filter + (c * tile.h.chunk + r) * tile.w.chunk * filter_pitch + filter_thread * 4;
              for (int s = 0; s < columns; ++s, patch += delta_w, filter += filter_pitch) {
                const Quad<acc> f = load_quad(filter);
#pragma unroll
                for (int a = 0; a < 4; ++a) {
                  const acc value = patch[window[a]];
#pragma unroll
                  for (int b = 0; b < 4; ++b) sums[a][b] += value * f.at[b];
                }
              }
            }
          }
        }
      }
    }

    const int64_t k = k0 + filter_thread * 4;
    if (k < g.out_channels) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        int j = pixel_thread + a * pixel_threads;
        int i = g.pixels_w.split(j);
        const int n = g.pixels_h.split(i);
        const int64_t row = phase_h + (i0 + i) * tile.h.phases, column = phase_w + (j0 + j) * tile.w.phases;
        if (n >= tile.images || n0 + n >= g.N || row >= tile.h.output || column >= tile.w.output) continue;
        const int64_t channel = group * g.out_channels + k;
        T* to = out + (n0 + n) * g.out.n + channel * g.out.c + row * g.out.h + column * g.out.w;
        Quad<T> rounded;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (bias && k + b < g.out_channels) sums[a][b] += to_acc(bias[channel + b]);
          rounded.at[b] = from_acc<T>(g.relu ? relu(sums[a][b]) : sums[a][b]);
        }
        if (g.out_quads) {
          store_quad(to, rounded);
          continue;
        }
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (k + b < g.out_channels) to[b * g.out.c] = rounded.at[b];
      }
    }
  }
}

// partial[split][k][tap] and bias_partial[split][k] (may be null), taps in the memory order of w. in is x, out is dy.
template <typename T>
__global__ void __launch_bounds__(direct_threads, sizeof(T) == 8 ? 1 : 2)
    conv2d_direct_wgrad_kernel(const __grid_constant__ Direct g, const T* x, const T* dy, acc_t<T>* partial,
                               acc_t<T>* bias_partial) {
  using acc = acc_t<T>;
  auto& shared = shared_memory<DirectShared<T>>();
  const DirectTile& tile = g.tile;
  const int thread = threadIdx.x, filter_threads = tile.filters / 4, patch_w = int(tile.w.extent);
  const int tap_thread = thread % g.tap_threads, filter_thread = thread / g.tap_threads % filter_threads;
  const int slice = thread / (g.tap_threads * filter_threads);
  const int pixels = tile.images * tile.h.tile * tile.w.tile, taps_of_channel = tile.h.chunk * tile.w.chunk;

  int offset[4];  // of my taps from a window's start in the patch
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    int s = min(tap_thread + b * g.tap_threads, g.taps - 1);
    int r = g.chunk_w.split(s);
    const int c = g.chunk_h.split(r);
    offset[b] = int(c * tile.plane + r * tile.h.patch_delta * patch_w + s * tile.w.patch_delta);
  }

  for (int64_t block = blockIdx.x; block < g.blocks; block += gridDim.x) {
    int64_t rest = block;
    const int64_t s0 = take(rest, g.column_chunks) * tile.w.chunk, r0 = take(rest, g.row_chunks) * tile.h.chunk;
    const int64_t c0 = take(rest, g.channel_chunks) * tile.channels, k0 = take(rest, g.channel_tiles) * tile.filters;
    const int64_t group = take(rest, g.groups), split = rest;
    const int channels = int(min(g.in_channels - c0, int64_t(tile.channels)));
    const bool sums_dy = bias_partial && c0 == 0 && r0 == 0 && s0 == 0;

    acc sums[4][4] = {}, bias_sums[4] = {};  // [filter][tap]
    const int64_t begin = g.pixel_tiles * split / g.split, end = g.pixel_tiles * (split + 1) / g.split;
    for (int64_t pixel_tile = begin; pixel_tile < end; ++pixel_tile) {
      int64_t tile_rest = pixel_tile;
      const int64_t j0 = take(tile_rest, tile.w.tiles) * tile.w.tile, i0 = take(tile_rest, tile.h.tiles) * tile.h.tile;
      const int64_t n0 = tile_rest * tile.images;
      __syncthreads();
      load_patch(g, x, shared.patch, n0, group * g.in_channels + c0, channels,
                 i0 * tile.h.step - tile.h.pad + r0 * tile.h.delta, j0 * tile.w.step - tile.w.pad + s0 * tile.w.delta);
      for (int e = thread; e < pixels * tile.filters; e += direct_threads) {
        int k, pixel;
        if (g.layout == Layout::NHWC)
          pixel = e / tile.filters, k = e % tile.filters;
        else
          k = e / pixels, pixel = e % pixels;
        int j = pixel;
        int i = g.pixels_w.split(j);
        const int n = g.pixels_h.split(i);
        const bool inside = n0 + n < g.N && i0 + i < tile.h.output && j0 + j < tile.w.output;
        shared.filter[pixel * tile.filters + k] =
            inside && k0 + k < g.out_channels
                ? to_acc(dy[(n0 + n) * g.out.n + (group * g.out_channels + k0 + k) * g.out.c + (i0 + i) * g.out.h +
                            (j0 + j) * g.out.w])
                : acc(0);
        // No product with x is made outside of y: zero times infinity would spoil the sum.
        if (k == 0)
          shared.pixel[pixel] =
              inside ? int(n * tile.h.extent * patch_w + i * tile.h.patch_step * patch_w + j * tile.w.patch_step) : -1;
      }
      __syncthreads();
      if (slice >= g.slices) continue;  // redundant: sums of such slices are not kept, only take time
      for (int pixel = slice; pixel < pixels; pixel += g.slices) {
        const int window = shared.pixel[pixel];
        if (window < 0) continue;
        const Quad<acc> d = load_quad(shared.filter + pixel * tile.filters + filter_thread * 4);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const acc value = shared.patch[window + offset[b]];
#pragma unroll
          for (int a = 0; a < 4; ++a) sums[a][b] += d.at[a] * value;
        }
        if (sums_dy && tap_thread == 0) {
#pragma unroll
          for (int a = 0; a < 4; ++a) bias_sums[a] += d.at[a];
        }
      }
    }

    // The slices of this block, in order.
    __syncthreads();
    const int block_taps = 4 * g.tap_threads, slice_size = block_taps * tile.filters;
    if (slice < g.slices) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int k = filter_thread * 4 + a;
#pragma unroll
        for (int b = 0; b < 4; ++b)
          shared.patch[slice * slice_size + k * block_taps + tap_thread + b * g.tap_threads] = sums[a][b];
        if (tap_thread == 0) shared.filter[slice * tile.filters + k] = bias_sums[a];
      }
    }
    __syncthreads();
    for (int e = thread; e < slice_size; e += direct_threads) {
      const int k = e / block_taps, tap = e % block_taps;
      int s = tap;
      int r = g.chunk_w.split(s);
      const int c = g.chunk_h.split(r);
      if (k0 + k >= g.out_channels || tap >= channels * taps_of_channel || r0 + r >= tile.h.taps ||
          s0 + s >= tile.w.taps)
        continue;
      acc sum = shared.patch[e];
      for (int i = 1; i < g.slices; ++i) sum += shared.patch[i * slice_size + e];
      partial[(split * g.groups + group) * g.w_group + (k0 + k) * g.w_out + (c0 + c) * g.w_in + (r0 + r) * g.w_r +
              (s0 + s) * g.w_s] = sum;
    }
    if (sums_dy && thread < tile.filters && k0 + thread < g.out_channels) {
      acc sum = shared.filter[thread];
      for (int i = 1; i < g.slices; ++i) sum += shared.filter[i * tile.filters + thread];
      bias_partial[(split * g.groups + group) * g.out_channels + k0 + thread] = sum;
    }
  }
}

Direct direct_of(const Conv2dProblem& problem, Direction direction) {
  const Conv2dProblem p = normalized(problem);
  Direct g = {};
  g.tile = direct_tile(p, direction);
  g.layout = p.layout;
  g.dgrad = direction == Direction::dgrad;
  g.relu = p.relu;
  g.N = p.N;
  g.groups = p.groups;
  g.in_channels = g.dgrad ? p.filters_per_group() : p.channels_per_group();
  g.out_channels = g.dgrad ? p.channels_per_group() : p.filters_per_group();
  g.channel_tiles = pieces(g.out_channels, g.tile.filters);
  g.in = g.dgrad ? y_strides(p) : x_strides(p);
  g.out = g.dgrad ? x_strides(p) : y_strides(p);
  const Strides w = w_strides(p);
  g.w_group = p.filters_per_group() * w.n;
  g.w_out = g.dgrad ? w.c : w.n;
  g.w_in = g.dgrad ? w.n : w.c;
  g.w_r = w.h, g.w_s = w.w;
  g.patch_w = Divisor(g.tile.w.extent), g.patch_h = Divisor(g.tile.h.extent);
  g.images = Divisor(g.tile.images), g.channels = Divisor(g.tile.channels);
  g.chunk_w = Divisor(g.tile.w.chunk), g.chunk_h = Divisor(g.tile.h.chunk);
  g.pixels_w = Divisor(g.tile.w.tile), g.pixels_h = Divisor(g.tile.h.tile);
  return g;
}

unsigned grid_of(int64_t blocks) { return unsigned(std::min<int64_t>(blocks, INT32_MAX)); }

Status gather(const Conv2dProblem& p, const Conv2dPlan& plan, const void* in, const void* w, const void* bias,
              void* out, Stream stream) {
  Direct g = direct_of(p, plan.direction);
  g.blocks = g.groups * g.channel_tiles * g.tile.h.phases * g.tile.h.tiles * g.tile.w.phases * g.tile.w.tiles *
             pieces(g.N, g.tile.images);
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    g.out_quads = g.out.c == 1 && g.out_channels % 4 == 0 && is_aligned(out, quad_alignment<T>);
    return launch("conv2d_direct_kernel", conv2d_direct_kernel<T>, dim3(grid_of(g.blocks)), dim3(direct_threads),
                  sizeof(DirectShared<T>), stream, g, static_cast<const T*>(in), static_cast<const T*>(w),
                  static_cast<const T*>(bias), static_cast<T*>(out));
  });
}

}  // namespace

Status conv2d_direct_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w,
                           const void* bias, void* y, void*, Stream stream) {
  if (p.y_elements() == 0) return {};
  return gather(p, plan, x, w, bias, y, stream);
}

Status conv2d_direct_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
                           void*, Stream stream) {
  if (p.x_elements() == 0) return {};
  return gather(p, plan, dy, w, nullptr, dx, stream);
}

Status conv2d_direct_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dw,
                           void* db, void* workspace, Stream stream) {
  if (p.w_elements() == 0) return {};
  Direct g = direct_of(p, plan.direction);
  const DirectTile& tile = g.tile;
  g.channel_chunks = pieces(g.in_channels, tile.channels);
  g.row_chunks = pieces(p.R, tile.h.chunk);
  g.column_chunks = pieces(p.S, tile.w.chunk);
  g.pixel_tiles = p.y_elements() == 0 ? 0 : pieces(p.N, tile.images) * tile.h.tiles * tile.w.tiles;
  g.split = plan.split;
  g.taps = tile.channels * tile.h.chunk * tile.w.chunk;
  g.tap_threads = int(pieces(g.taps, 4));
  g.slices = direct_threads / (g.tap_threads * (tile.filters / 4));
  g.blocks = direct_wgrad_blocks(p, tile) * g.split;
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    acc_t<T>* partial = static_cast<acc_t<T>*>(workspace);
    acc_t<T>* bias_partial = db ? partial + g.split * p.w_elements() : nullptr;
    if (Status s = launch("conv2d_direct_wgrad_kernel", conv2d_direct_wgrad_kernel<T>, dim3(grid_of(g.blocks)),
                          dim3(direct_threads), sizeof(DirectShared<T>), stream, g, static_cast<const T*>(x),
                          static_cast<const T*>(dy), partial, bias_partial);
        !s.ok())
      return s;
    if (Status s = ordered_sum<T>(partial, g.split, p.w_elements(), dw, stream); !s.ok() || !db) return s;
    return ordered_sum<T>(bias_partial, g.split, p.K, db, stream);
  });
}

}  // namespace fastconv::cuda
