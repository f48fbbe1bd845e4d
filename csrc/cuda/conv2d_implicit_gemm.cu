// Implicit GEMM, the rung of use: two buffers, filled by asynchronous copies, for all three directions.
//
//   fprop, dgrad, wgrad: C[m][n] = Σ_k windows(m, k) · matrix(k, n), see implicit_gemm.cuh
//
// What it adds to the vectors: while one step of k is multiplied out of one buffer of shared memory, the copies of the
// next one into the other are under way (cp.async), past the registers; one barrier a step. Since cp.async cannot
// transpose a vector, what is contiguous along k comes element by element. The places of the tile's windows are worked
// out once and kept in shared memory.
//
// dgrad with strides is a convolution of dy for each phase of the strides (phases.cuh), all in one launch. wgrad's bias
// gradient, the sums of dy, is added up on the way. Where there are too few tiles, the contraction is cut into
// `splits`, whose sums are added in order (ordered_sum.cuh).
//
// A block computes tile × tile results, 8 × 8 a thread, in steps of 8 of k. Of a result with a contraction of k:
//
//   operations   2·k
//   from memory  2·k / tile elements, of float32 k / 16 bytes with the tile of 128
//   floor        the multiply-adds of the SMs: 4 loads of 16 bytes and 64 multiply-adds a thread and k, beside them
//   some
//                8 to 16 asynchronous copies in 8 of k
#include <climits>
#include <numeric>

#include "implicit_gemm.cuh"
#include "ordered_sum.cuh"
#include "phases.cuh"

namespace fastconv::cuda {
namespace {

constexpr int depth = implicit_gemm_depth;

// Of dgrad, along one axis of dx.
struct StridedAxis {
  int size, phases, stride, pad, dilation, taps, tap_step;
  int64_t dy, dx, w;  // elements to the next row (or column) of each

  __host__ __device__ PhaseAxis phase(int i) const {
    return phase_axis(i, size, stride, pad, dilation, taps, tap_step);
  }
};

struct Call {
  ImplicitGemm gemm;
  int tiles_m, tiles_n, splits, k_per_split;
  void* sums;         // null, or partial sums [splits][groups][m][n rounded up to 4] instead of the result
  void* column_sums;  // null, or wgrad's sums of the matrix's columns: db, or [splits][groups][n] of its parts
  // Of dgrad; elsewhere there is one phase.
  StridedAxis h, w;
  int phases, images, filters;
  bool nchw;
};

// What a phase changes.
struct Phase {
  Radix m_digits, k_digits;
  int m, k;
  Place first;
  int64_t matrix, out;  // where they begin
};
__host__ __device__ inline Phase phase_of(const Call& call, int phase) {
  const int phase_h = phase / call.w.phases, phase_w = phase % call.w.phases;
  const PhaseAxis h = call.h.phase(phase_h), w = call.w.phase(phase_w);
  return {{Divisor(w.outputs), Divisor(h.outputs)},
          tap_digits(call.nchw, call.filters, h.taps, w.taps),
          call.images * h.outputs * w.outputs,
          call.filters * h.taps * w.taps,
          {h.first * call.h.dy + w.first * call.w.dy, h.first, w.first},
          h.tap_first * call.h.w + w.tap_first * call.w.w,
          phase_h * call.h.dx + phase_w * call.w.dx};
}

template <typename T, int tile>
struct Shared {
  alignas(16) T windows[2][depth][tile + 4];  // [k][m]
  alignas(16) T matrix[2][depth][tile + 4];   // [k][n]
  Place rows[tile];                           // of m
  Phase phase;                                // here and not in registers, which the sums need
};

// The elements of a panel [depth][tile] that a thread copies: from (k, i) on, every so many.
struct Share {
  int k, k_step, i, i_step;
};
template <int tile, int chunk>
__device__ __forceinline__ Share share_of(bool along_k, bool chunks) {
  constexpr int threads = tile * tile / 64, row_chunks = tile / chunk;
  const int thread = threadIdx.x;
  if (along_k) return {thread % depth, depth, thread / depth, threads / depth};
  if (chunks) return {thread / row_chunks, threads / row_chunks, thread % row_chunks * chunk, tile};
  return {thread / 32, threads / 32, thread % 32, 32};
}

// Asks for an element, or for the 16 bytes from it on; zeros where it is not inside. `readable` is any such address.
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from, bool inside, bool chunk, const T* readable) {
  if (!inside) from = readable;
  if (chunk)
    ptx::cp_async_16(to, from, inside ? 16 : 0);
  else if constexpr (sizeof(T) == 8)
    ptx::cp_async_8(to, from, inside ? 8 : 0);
  else
    ptx::cp_async_4(to, from, inside ? 4 : 0);
}

template <typename T, int tile>
__global__ void __launch_bounds__(tile* tile / 64, tile == 128      ? 2
                                                   : sizeof(T) == 8 ? 4
                                                                    : 6)
    conv2d_implicit_gemm_kernel(const __grid_constant__ Call call) {
  constexpr int threads = tile * tile / 64, half = tile / 2, chunk = 16 / sizeof(T);
  const ImplicitGemm& g = call.gemm;
  auto& shared = shared_memory<Shared<T, tile>>();
  const int thread = threadIdx.x;

  // Neighbouring blocks share the larger factor: the index with fewer tiles runs fastest.
  int block = blockIdx.x;
  const bool m_first = call.tiles_m <= call.tiles_n;  // redundant: any order of the blocks gives the same result
  const int fast_tiles = m_first ? call.tiles_m : call.tiles_n, slow_tiles = m_first ? call.tiles_n : call.tiles_m;
  const int fast = block % fast_tiles, slow = block / fast_tiles % slow_tiles;
  block /= fast_tiles * slow_tiles;
  const int split = block % call.splits, group = block / call.splits % g.groups;
  const int phase = block / call.splits / g.groups;
  const int m0 = (m_first ? fast : slow) * tile, n0 = (m_first ? slow : fast) * tile;

  const T* windows = static_cast<const T*>(g.windows) + group * g.windows_group;
  const T* matrix = static_cast<const T*>(g.matrix) + group * g.matrix_group;
  if (thread == 0)
    shared.phase = call.phases > 1 ? phase_of(call, phase) : Phase{g.m_digits, g.k_digits, g.m, g.k, g.first, 0, 0};
  __syncthreads();
  const int m_end = shared.phase.m;
  if (m0 >= m_end) return;  // redundant: a phase has fewer pixels than the first, and this block would store none
  matrix += shared.phase.matrix;
  const int k_begin = split * call.k_per_split, k_end = min(shared.phase.k, k_begin + call.k_per_split);

  for (int i = thread; i < tile; i += threads) {
    const Place first = shared.phase.first, row = place_of(g.windows_m, digits_of(shared.phase.m_digits, m0 + i));
    shared.rows[i] = {first.offset + row.offset, first.h + row.h, first.w + row.w};
  }
  __syncthreads();

  const bool windows_chunks = g.windows_quads && !g.windows_along_k;
  const bool matrix_chunks = g.matrix_quads && !g.matrix_along_k;
  const auto copy_step = [&](int k0, int buffer) {
    const Share a = share_of<tile, chunk>(g.windows_along_k, windows_chunks);
#pragma unroll 1
    for (int k = a.k; k < depth; k += a.k_step) {
      const Place tap = place_of(g.windows_k, digits_of(shared.phase.k_digits, k0 + k));
      for (int i = a.i; i < tile; i += a.i_step) {
        const Place row = shared.rows[i];
        const bool inside = k0 + k < k_end && m0 + i < m_end && unsigned(row.h + tap.h) < unsigned(g.H) &&
                            unsigned(row.w + tap.w) < unsigned(g.W);
        copy_async(&shared.windows[buffer][k][i], windows + (row.offset + tap.offset), inside, windows_chunks,
                   static_cast<const T*>(g.windows));
      }
    }
    const Share b = share_of<tile, chunk>(g.matrix_along_k, matrix_chunks);
#pragma unroll 1
    for (int k = b.k; k < depth; k += b.k_step) {
      const T* line = matrix + offset_of(g.matrix_k, digits_of(shared.phase.k_digits, k0 + k));
      for (int i = b.i; i < tile; i += b.i_step)  // redundant: padding follows the last element of a row
        copy_async(&shared.matrix[buffer][k][i], line + (n0 + i) * g.matrix_n, k0 + k < k_end && n0 + i < g.n,
                   matrix_chunks, static_cast<const T*>(g.matrix));
    }
    ptx::cp_async_commit();
  };

  // Neighbouring threads store neighbouring results.
  const int fast_thread = thread % (tile / 8) * 4, slow_thread = thread / (tile / 8) * 4;
  const int my_m = g.out_along_m ? fast_thread : slow_thread, my_n = g.out_along_m ? slow_thread : fast_thread;
  const bool sum_columns = call.column_sums && m0 == 0 && thread < tile;
  T sums[8][8] = {};
  T column_sum = 0;
  if (k_begin < k_end) copy_step(k_begin, 0);
  int buffer = 0;
#pragma unroll 1
  for (int k0 = k_begin; k0 < k_end; k0 += depth, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the step is there, and everyone is done with the other buffer
    if (k0 + depth < k_end) copy_step(k0 + depth, buffer ^ 1);
#pragma unroll 2  // more at once would take the last registers
    for (int k = 0; k < depth; ++k)
      multiply_quads(sums, shared.windows[buffer][k], shared.matrix[buffer][k], my_m, my_n, half);
    if (sum_columns) {
#pragma unroll
      for (int k = 0; k < depth; ++k) column_sum += shared.matrix[buffer][k][thread];
    }
  }

  const int64_t part = int64_t(split) * g.groups + group;
  if (sum_columns && n0 + thread < g.n) static_cast<T*>(call.column_sums)[part * g.n + n0 + thread] = column_sum;
  if (!call.sums) {
    T* data = static_cast<T*>(g.out) + group * g.out_group + shared.phase.out;
    return store_sums(g, OutputTile<T>{data, shared.phase.m_digits, m_end, group}, sums, m0 + my_m, n0 + my_n, half);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int m = m0 + my_m + i / 4 * half + i % 4;
    if (m >= g.m) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = n0 + my_n + h * half;
      const Quad<T> quad = {{sums[i][h * 4], sums[i][h * 4 + 1], sums[i][h * 4 + 2], sums[i][h * 4 + 3]}};
      if (n < g.n) store_quad(static_cast<T*>(call.sums) + (part * g.m + m) * ((g.n + 3) / 4 * 4) + n, quad);
    }
  }
}

// dx = windows of dy · w, phase by phase.
template <typename T>
Call dgrad_call(const Conv2dProblem& p, const T* dy, const T* w, T* dx) {
  Call call = {};
  ImplicitGemm& g = call.gemm;
  const Strides xs = x_strides(p), ws = w_strides(p), ys = y_strides(p);
  const bool nchw = p.layout == Layout::NCHW;
  const int64_t filters = p.filters_per_group(), channels = p.channels_per_group();
  const int64_t common_h = std::gcd(p.stride_h, p.dilation_h), common_w = std::gcd(p.stride_w, p.dilation_w);
  const int back_h = int(-p.dilation_h / common_h), back_w = int(-p.dilation_w / common_w);
  const int step_h = int(p.stride_h / common_h), step_w = int(p.stride_w / common_w);
  call.h = {int(p.H),
            int(std::clamp<int64_t>(p.H, 1, p.stride_h)),
            int(p.stride_h),
            int(p.pad_h),
            int(p.dilation_h),
            int(p.R),
            step_h,
            ys.h,
            xs.h,
            ws.h};
  call.w = {int(p.W),
            int(std::clamp<int64_t>(p.W, 1, p.stride_w)),
            int(p.stride_w),
            int(p.pad_w),
            int(p.dilation_w),
            int(p.S),
            step_w,
            ys.w,
            xs.w,
            ws.w};
  call.phases = call.h.phases * call.w.phases;
  call.images = int(p.N), call.filters = int(filters), call.nchw = nchw;

  const Phase phase = phase_of(call, 0);  // the first has the most pixels; if it is the only one, the kernel's
  g.m = phase.m, g.n = int(channels), g.k = phase.k, g.groups = int(p.groups);
  g.m_digits = phase.m_digits, g.k_digits = phase.k_digits, g.first = phase.first;
  g.windows = dy, g.H = int(p.P), g.W = int(p.Q), g.windows_group = filters * ys.c;
  g.windows_m = {{ys.w, 0, 1}, {ys.h, 1, 0}, {ys.n, 0, 0}};
  g.windows_k =
      in_order<Places>(nchw, Place{ys.c, 0, 0}, Place{back_h * ys.h, back_h, 0}, Place{back_w * ys.w, 0, back_w});
  g.windows_along_k = !nchw;
  g.windows_quads = in_quads(dy, nchw, p.P * p.Q, filters) && (!nchw || is_identity(p));
  g.matrix = w + (call.phases > 1 ? 0 : phase.matrix), g.matrix_n = ws.c, g.matrix_group = filters * ws.n;
  g.matrix_k = in_order<Offsets>(nchw, ws.n, step_h * ws.h, step_w * ws.w);
  g.matrix_along_k = nchw && p.R * p.S > 1;  // redundant: either way of sharing out the copies is right
  g.matrix_quads = !g.matrix_along_k && is_aligned(w, quad_alignment<T>) && channels % 4 == 0;
  g.out = dx, g.out_m = {p.stride_w * xs.w, p.stride_h * xs.h, xs.n}, g.out_n = xs.c, g.out_group = channels * xs.c;
  g.out_along_m = nchw;
  g.out_quads = in_quads(dx, nchw, p.H * p.W, channels) && (!nchw || call.phases == 1);
  return call;
}

// dw = windows of x by taps · dy.
template <typename T>
Call wgrad_call(const Conv2dProblem& p, const T* dy, const T* x, T* dw) {
  Call call = {};
  ImplicitGemm& g = call.gemm;
  const bool nchw = p.layout == Layout::NCHW;
  const WindowsOfX windows = windows_of_x(p);
  const Strides ys = y_strides(p), ws = w_strides(p);
  const int64_t channels = p.channels_per_group();
  g.m = int(channels * p.R * p.S), g.n = int(p.filters_per_group()), g.k = int(p.N * p.P * p.Q);
  g.groups = int(p.groups);
  g.m_digits = windows.tap_digits, g.k_digits = windows.pixel_digits;
  g.windows = x, g.first = windows.first, g.windows_m = windows.tap, g.windows_k = windows.pixel;
  g.H = int(p.H), g.W = int(p.W), g.windows_group = channels * x_strides(p).c;
  g.windows_along_k = nchw;
  g.windows_quads = in_quads(x, nchw, p.H * p.W, channels) && (!nchw || is_identity(p));
  g.matrix = dy, g.matrix_n = ys.c, g.matrix_k = {ys.w, ys.h, ys.n}, g.matrix_group = g.n * ys.c;
  g.matrix_along_k = nchw;
  g.matrix_quads = in_quads(dy, nchw, p.P * p.Q, g.n);
  g.out = dw, g.out_m = in_order<Offsets>(nchw, ws.c, ws.h, ws.w), g.out_n = ws.n, g.out_group = g.n * ws.n;
  g.out_along_m = true;
  g.out_quads = is_aligned(dw, quad_alignment<T>) && g.m % 4 == 0;
  call.phases = 1;
  return call;
}

// C[m] at m·stride or, if m counts the pixels of images whose planes are not adjacent, on two levels.
Index out_index(const Conv2dProblem& p, Direction direction) {
  if (direction == Direction::wgrad) return {1, 0, {}};
  const bool fprop = direction == Direction::fprop;
  const int64_t plane = fprop ? p.P * p.Q : p.H * p.W, channels = fprop ? p.K : p.C;
  if (p.layout == Layout::NHWC) return {channels, 0, {}};
  return {1, channels * plane, Divisor(plane)};
}

template <typename T, int tile>
Status run_tile(const Call& call, Stream stream) {
  const int64_t blocks = int64_t(call.tiles_m) * call.tiles_n * call.splits * call.gemm.groups * call.phases;
  return launch("conv2d_implicit_gemm_kernel", conv2d_implicit_gemm_kernel<T, tile>, dim3(unsigned(blocks)),
                dim3(tile * tile / 64), sizeof(Shared<T, tile>), stream, call);
}

// Fills in what the plan says, launches, and adds up what was split. db may be null.
template <typename T>
Status run(Call call, const Conv2dProblem& p, const Conv2dPlan& plan, T* db, void* workspace, Stream stream) {
  ImplicitGemm& g = call.gemm;
  call.splits = plan.split;
  call.k_per_split = int(round_up(pieces(g.k, plan.split), depth));
  if (call.phases > 1) call.k_per_split = INT_MAX;
  call.tiles_m = int(pieces(g.m, plan.tile_m)), call.tiles_n = int(pieces(g.n, plan.tile_n));
  call.column_sums = db;
  if (plan.split > 1) {
    call.sums = workspace;
    if (db)
      call.column_sums =
          static_cast<char*>(workspace) + implicit_gemm_workspace(p, plan.direction, plan.split).sums_bytes;
  }
  const auto launch_tile = [&] {
    if constexpr (sizeof(T) == 4)
      if (plan.tile_m == 128) return run_tile<T, 128>(call, stream);
    return run_tile<T, 64>(call, stream);
  };
  if (Status s = launch_tile(); !s.ok() || plan.split == 1) return s;

  OrderedSum s = {};
  s.partial = call.sums, s.splits = plan.split;
  s.batches = g.groups, s.m = g.m, s.n = g.n, s.pitch = round_up(g.n, 4);
  s.out = g.out, s.out_m = out_index(p, plan.direction), s.out_n.stride = g.out_n, s.out_batch_stride = g.out_group;
  s.bias = g.bias, s.bias_batch_stride = g.n, s.bias_n_stride = 1, s.relu = g.relu;
  if (Status status = ordered_sum<T>(s, stream); !status.ok() || !db) return status;
  return ordered_sum<T>(call.column_sums, plan.split, p.K, db, stream);
}

}  // namespace

Status conv2d_implicit_gemm_fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w,
                                  const void* bias, void* y, void* workspace, Stream stream) {
  if (problem.y_elements() == 0) return {};
  return dispatch_implicit_gemm(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const Conv2dProblem p = normalized(problem);
    Call call = {};
    call.gemm = fprop_gemm(p, static_cast<const T*>(x), static_cast<const T*>(w), static_cast<const T*>(bias),
                           static_cast<T*>(y));
    call.phases = 1;
    return run<T>(call, p, plan, nullptr, workspace, stream);
  });
}

Status conv2d_implicit_gemm_dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w,
                                  void* dx, void* workspace, Stream stream) {
  if (problem.x_elements() == 0) return {};
  return dispatch_implicit_gemm(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const Conv2dProblem p = normalized(problem);
    return run<T>(dgrad_call(p, static_cast<const T*>(dy), static_cast<const T*>(w), static_cast<T*>(dx)), p, plan,
                  nullptr, workspace, stream);
  });
}

Status conv2d_implicit_gemm_wgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* x,
                                  void* dw, void* db, void* workspace, Stream stream) {
  if (problem.w_elements() == 0) return {};
  return dispatch_implicit_gemm(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const Conv2dProblem p = normalized(problem);
    return run<T>(wgrad_call(p, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dw)), p, plan,
                  static_cast<T*>(db), workspace, stream);
  });
}

}  // namespace fastconv::cuda
