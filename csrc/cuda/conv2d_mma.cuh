// The kernel of conv2d_mma.cu, whose comment says what it computes.
#pragma once

#include "conv2d_mma_arguments.cuh"
#include "mma_tile.cuh"
#include "phases.cuh"

namespace fastconv::cuda {

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

// Blocks that share an SM, by the registers of their sums. The split operands of float take more.
template <typename Math, int tile_m, int tile_n>
constexpr int mma_blocks = (tile_m * tile_n == 128 * 128  ? 2
                            : tile_m * tile_n == 128 * 64 ? 3
                                                          : 4) -
                           std::is_same_v<Math, float>;

template <typename Math, Direction direction, int tile_m, int tile_n>
__global__ void __launch_bounds__((MmaWarps<tile_m, tile_n>::threads), (mma_blocks<Math, tile_m, tile_n>))
    conv2d_mma_kernel(const __grid_constant__ ConvMma g) {
  constexpr bool fprop = direction == Direction::fprop, dgrad = direction == Direction::dgrad,
                 wgrad = direction == Direction::wgrad;
  using T = element_t<Math>;
  using Warps = MmaWarps<tile_m, tile_n>;
  using A = OperandTile<T, tile_m, !wgrad>;
  using B = OperandTile<T, tile_n, fprop>;
  constexpr int depth = mma_depth<T>, rows = Warps::rows, columns = Warps::columns;
  auto& shared = shared_memory<MmaShared<tile_m, tile_n>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Warps::along_m * (16 * rows), warp_n = warp / Warps::along_m * (8 * columns);

  // Neighbouring blocks share the larger operand: the index with fewer tiles runs fastest.
  int block = blockIdx.x;
  const bool m_first = g.tiles_m <= g.tiles_n;  // redundant: any order of the blocks gives the same result
  const int fast_tiles = m_first ? g.tiles_m : g.tiles_n, slow_tiles = m_first ? g.tiles_n : g.tiles_m;
  const int fast = block % fast_tiles, slow = block / fast_tiles % slow_tiles;
  block /= fast_tiles * slow_tiles;
  const int split = block % g.splits, group = block / g.splits % g.groups, phase = block / g.splits / g.groups;
  const int m0 = (m_first ? fast : slow) * tile_m, n0 = (m_first ? slow : fast) * tile_n;

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
  if (m0 >= m_end) return;  // redundant: nothing would be stored, only time lost
  const int k_begin = split * g.k_per_split, k_end = min(k_all, k_begin + g.k_per_split);
  const T* data = static_cast<const T*>(windows.data) + int64_t(group) * windows.channels.d;
  const T* other = static_cast<const T*>(g.other) + group * g.other_group;

  const auto at_a = [&](int m, int k) {
    if constexpr (wgrad)
      return other + k * g.other_row + m;
    else
      return window(windows, data, m, k);
  };
  const auto at_b = [&](int n, int k) {
    if constexpr (fprop) return other + n * g.other_row + k;
    if constexpr (wgrad) return window(windows, data, k, n);
    if constexpr (dgrad) {
      int filter = k;
      int s = windows.channels.split(filter);
      const int r = windows.filter_row.split(s);
      const int tap = (phase_h.tap_first + r * g.tap_step_h) * g.S + phase_w.tap_first + s * g.tap_step_w;
      return other + (int64_t(filter) * (g.R * g.S) + tap) * g.other_row + n;
    }
  };
  const auto load_step = [&](int step) {
    const int k = k_begin + step * depth, stage = step % mma_stages;
    if (k < k_end) {  // redundant: past the end, zeros that nobody multiplies
      constexpr int threads = Warps::threads;
      A::template load<threads>(shared.a[stage], m0, m_end, k, k_end, g.piece_a, wgrad ? g.other : windows.data, at_a);
      B::template load<threads>(shared.b[stage], n0, g.n, k, k_end, g.piece_b, wgrad ? windows.data : g.other, at_b);
    }
    ptx::cp_async_commit();  // a group a step, empty past the end, so that waiting counts steps
  };

  using Acc = acc_t<T>;
  Acc sums[rows][columns][4] = {};
  Acc row_sums[1][4] = {};  // of one fragment: each of a row's warps adds up another
  static_assert(!wgrad || rows <= Warps::along_n, "a row's warps are too few for its fragments");
  const int summed = wgrad && (g.db || g.row_sums) && n0 == 0 ? warp / Warps::along_m : rows;
  const int steps = (k_end - k_begin + depth - 1) / depth;  // 0 or less where a split is empty
#pragma unroll
  for (int step = 0; step < mma_stages - 1; ++step) load_step(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<mma_stages - 2>();
    __syncthreads();  // the step is there, and everyone is done with the one before it, whose place load_step takes
    load_step(step + mma_stages - 1);
    const char* stage_a = shared.a[step % mma_stages];
    const char* stage_b = shared.b[step % mma_stages];
#pragma unroll(std::is_same_v<Math, float> ? 1 : 2)
    for (int half = 0; half < 2; ++half) {
      FragmentB<Math> b[columns];
#pragma unroll
      for (int j = 0; j < columns; j += 2) load_b<Math, tile_n, fprop>(b + j, stage_b, warp_n + 8 * j, half);
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        FragmentA<Math> a;
        load_a<Math, tile_m, !wgrad>(a, stage_a, warp_m + 16 * i, half);
        multiply_add<Math>(sums[i], a, b);
        if (wgrad && i == summed) {
          FragmentB<Math> ones[1];
          set_ones<Math>(ones[0]);
          multiply_add<Math>(row_sums, a, ones);
        }
      }
    }
  }

  // Results (g, 2t), (g, 2t + 1) and (g + 8, …) of each fragment.
#pragma unroll
  for (int i = 0; i < 2 * rows; ++i) {
    const int m = m0 + warp_m + 8 * i + lane / 4;
    if (m >= m_end) continue;
    const int64_t partial_row = (int64_t(split) * g.groups + group) * g.m + m;
    if (wgrad && i / 2 == summed && lane % 4 == 0) {
      const Acc sum = row_sums[0][i % 2 * 2];
      if (g.row_sums)
        static_cast<Acc*>(g.row_sums)[partial_row] = sum;
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
      Vec<Acc, 2> pair = {{sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]}};
      if (g.sums) {
        store_vec(static_cast<Acc*>(g.sums) + partial_row * ((g.n + 3) / 4 * 4) + n, pair);
        continue;
      }
      if (fprop && g.bias) {
        const T* bias = static_cast<const T*>(g.bias) + int64_t(group) * g.n + n;
        pair.at[0] += to_acc(bias[0]);
        if (n + 1 < g.n) pair.at[1] += to_acc(bias[1]);
      }
      if (fprop && g.relu) pair = {{relu(pair.at[0]), relu(pair.at[1])}};
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

template <typename Math, Direction direction, int tile_m, int tile_n>
Status launch_conv2d_mma_tile(const ConvMma& g, Stream stream) {
  const int64_t blocks = int64_t(g.tiles_m) * g.tiles_n * g.splits * g.groups * g.phases;
  return launch("conv2d_mma_kernel", conv2d_mma_kernel<Math, direction, tile_m, tile_n>, dim3(unsigned(blocks)),
                dim3(MmaWarps<tile_m, tile_n>::threads), sizeof(MmaShared<tile_m, tile_n>), stream, g);
}

// The tiles that exist, as plan/conv2d_mma.cpp lists them.
template <typename Math, Direction direction>
Status launch_conv2d_mma_direction(const ConvMma& g, const Conv2dPlan& plan, Stream stream) {
  constexpr bool wgrad = direction == Direction::wgrad;
  const int results = plan.tile_m * plan.tile_n;
  if constexpr (!std::is_same_v<Math, double>)
    if (results == 128 * 128) return launch_conv2d_mma_tile<Math, direction, 128, 128>(g, stream);
  if constexpr (!std::is_same_v<Math, double> && !std::is_same_v<Math, float>) {
    if (results == 128 * 64)
      return launch_conv2d_mma_tile<Math, direction, wgrad ? 64 : 128, wgrad ? 128 : 64>(g, stream);
    if (results == 128 * 16)
      return launch_conv2d_mma_tile<Math, direction, wgrad ? 16 : 128, wgrad ? 128 : 16>(g, stream);
  }
  return launch_conv2d_mma_tile<Math, direction, 64, 64>(g, stream);
}

template <typename Math>
Status launch_conv2d_mma(const ConvMma& g, const Conv2dPlan& plan, Stream stream) {
  switch (plan.direction) {
    case Direction::fprop: return launch_conv2d_mma_direction<Math, Direction::fprop>(g, plan, stream);
    case Direction::dgrad: return launch_conv2d_mma_direction<Math, Direction::dgrad>(g, plan, stream);
    case Direction::wgrad: return launch_conv2d_mma_direction<Math, Direction::wgrad>(g, plan, stream);
  }
  return {"conv2d_mma_kernel", "unknown direction"};
}

}  // namespace fastconv::cuda
