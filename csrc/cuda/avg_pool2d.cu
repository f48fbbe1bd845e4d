// Average pooling: y[n,c,p,q] = Σ x[n,c,h,w] / divisor over the rows h and columns w of window (p, q). A window begins
// at p·stride − pad and is R long, or along an adaptive axis begins at floor(p·H/P) and ends before ceil((p+1)·H/P).
// The divisor is the number of elements in it, with those of the padding or without, or one that is given.
//
// Where windows are small, a thread has an output: NCHW one, NHWC a vector of channels. Where they are large, as in
// global average pooling, threads of a block share a window: NCHW a warp or all of the block, NHWC those that have the
// same channels. Their sums are added in a fixed order.
//
// Backward gathers: dx[h,w] = Σ dy[p,q] / divisor(p,q) over the windows that have element (h, w). Nothing is added
// twice, and nothing need be zero before.
//
// Index is int where every coordinate and offset fits, and int64_t otherwise.
#include <algorithm>

#include "pool2d.cuh"

namespace fastconv::cuda {
namespace {

constexpr int warp_threads = 32;
constexpr int most_slots = 32;  // NHWC: neighbouring vectors of channels in a block that shares its windows

// The elements [begin, end) of a window along one axis, and how many it counts for.
template <typename Index>
struct Window {
  Index begin, end, count;
};

// One of the two axes of a pool.
template <typename Index>
struct Axis {
  Index size, outs, taps, stride, pad;
  bool adaptive, include_pad;
  Divide<Index> by_stride, by_size, by_outs;

  Axis(int64_t size, int64_t outs, int64_t taps, int64_t stride, int64_t pad, bool adaptive, bool include_pad)
      : size(Index(size)),
        outs(Index(outs)),
        taps(Index(taps)),
        stride(Index(stride)),
        pad(Index(pad)),
        adaptive(adaptive),
        include_pad(include_pad),
        by_stride(stride),
        by_size(std::max<int64_t>(size, 1)),
        by_outs(std::max<int64_t>(outs, 1)) {}

  __device__ __forceinline__ Window<Index> window(Index out) const {
    if (adaptive) {
      const Index begin = by_outs.quotient(out * size), end = by_outs.quotient((out + 1) * size + outs - 1);
      return {begin, end, end - begin};
    }
    const Index start = out * stride - pad, begin = max(start, Index(0));
    const Index stop = min(start + taps, size + pad), end = min(stop, size);
    return {begin, end, include_pad ? stop - start : end - begin};
  }
  // The windows [begin, end) that have element i. An adaptive axis is its own inverse.
  __device__ __forceinline__ Window<Index> cover(Index i) const {
    if (adaptive) return {by_size.quotient(i * outs), by_size.quotient((i + 1) * outs + size - 1), 0};
    const Index position = i + pad;
    const Index begin = position < taps ? 0 : by_stride.quotient(position - taps) + 1;
    return {begin, min(by_stride.quotient(position) + 1, outs), 0};
  }
};

template <typename Index>
struct Pool : PoolItems<Index> {
  Axis<Index> rows, columns;
  Index C;
  double divisor;  // 0: the number of elements

  explicit Pool(const AvgPool2dProblem& p)
      : rows(p.H, p.P, p.R, p.stride_h, p.pad_h, p.adaptive_h, p.count_include_pad),
        columns(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.adaptive_w, p.count_include_pad),
        C(Index(p.C)),
        divisor(double(p.divisor)) {}
  template <typename A>
  __device__ __forceinline__ A divisor_of(Index row_count, Index column_count) const {
    return divisor != 0 ? A(divisor) : A(row_count) * A(column_count);
  }
};

bool fits_int(const AvgPool2dProblem& p) {
  constexpr int64_t most = 1 << 30;  // sums of two still fit
  return std::max({p.x_elements(), p.y_elements(), p.H + p.pad_h, p.W + p.pad_w, p.P * p.stride_h, p.Q * p.stride_w,
                   p.R, p.S, p.stride_h, p.stride_w, p.adaptive_h ? (p.P + 1) * (p.H + 1) : 0,
                   p.adaptive_w ? (p.Q + 1) * (p.W + 1) : 0}) < most;
}

// Items: inner = q, middle = p; the rest is n·C + c.
template <typename T, typename Index>
__global__ void __launch_bounds__(block_threads, least_blocks<Index>)
    avg_pool2d_forward_nchw(const __grid_constant__ Pool<Index> pool, const T* __restrict__ x, T* __restrict__ y) {
  if (thread_index() >= pool.items) return;
  Index q = Index(thread_index());
  const Index output = q;
  Index p = pool.inner.split(q);
  const Index plane = pool.middle.split(p);
  const Window<Index> rows = pool.rows.window(p), columns = pool.columns.window(q);
  x += plane * pool.rows.size * pool.columns.size;
  acc_t<T> sum = 0;
  for (Index h = rows.begin; h < rows.end; ++h)
#pragma unroll 4
    for (Index w = columns.begin; w < columns.end; ++w) sum += to_acc(x[h * pool.columns.size + w]);
  y[output] = from_acc<T>(sum / pool.template divisor_of<acc_t<T>>(rows.count, columns.count));
}

// Items: inner = vectors of `lanes` channels, middle = q, outer = p; the rest is n.
template <typename T, int lanes, typename Index>
__global__ void __launch_bounds__(block_threads, least_blocks<Index>)
    avg_pool2d_forward_nhwc(const __grid_constant__ Pool<Index> pool, const T* __restrict__ x, T* __restrict__ y) {
  if (thread_index() >= pool.items) return;
  Index c = Index(thread_index());
  const Index output = c * lanes;
  Index q = pool.inner.split(c);
  Index p = pool.middle.split(q);
  const Index n = pool.outer.split(p);
  const Window<Index> rows = pool.rows.window(p), columns = pool.columns.window(q);
  x += n * pool.rows.size * pool.columns.size * pool.C + c * lanes;
  acc_t<T> sum[lanes] = {};
  for (Index h = rows.begin; h < rows.end; ++h)
#pragma unroll 4
    for (Index w = columns.begin; w < columns.end; ++w) {
      const Vec<T, lanes> v = load_vec<lanes>(x + (h * pool.columns.size + w) * pool.C);
#pragma unroll
      for (int k = 0; k < lanes; ++k) sum[k] += to_acc(v.at[k]);
    }
  const acc_t<T> divisor = pool.template divisor_of<acc_t<T>>(rows.count, columns.count);
  Vec<T, lanes> mean;
#pragma unroll
  for (int k = 0; k < lanes; ++k) mean.at[k] = from_acc<T>(sum[k] / divisor);
  store_vec(y + output, mean);
}

// Every `step`th element of a window, from number `first` on.
struct Taps {
  int64_t row, column, width, row_step, column_step;
  __device__ __forceinline__ Taps(int64_t width, int64_t first, int64_t step) : width(width) {
    row = first / width, column = first - row * width;
    row_step = step / width, column_step = step - row_step * width;
  }
  __device__ __forceinline__ void advance() {
    row += row_step, column += column_step;
    if (column >= width) column -= width, ++row;
  }
};

template <typename A>
struct WarpSums {
  A of[block_threads / warp_threads];
};

// Items as above; `threads` neighbours, one warp or all of the block, have one.
template <typename T>
__global__ void __launch_bounds__(block_threads, 4)
    avg_pool2d_forward_nchw_shared(const __grid_constant__ Pool<int64_t> pool, int threads, const T* __restrict__ x,
                                   T* __restrict__ y) {
  using A = acc_t<T>;
  auto& shared = shared_memory<WarpSums<A>>();
  const int thread = threadIdx.x % threads, warp = threadIdx.x / warp_threads;
  const int64_t output = thread_index() / threads;
  const bool inside = output < pool.items;
  int64_t q = inside ? output : 0;
  int64_t p = pool.inner.split(q);
  const int64_t plane = pool.middle.split(p);
  const Window<int64_t> rows = pool.rows.window(p), columns = pool.columns.window(q);
  const int64_t W = pool.columns.size, height = inside ? rows.end - rows.begin : 0;
  x += (plane * pool.rows.size + rows.begin) * W + columns.begin;
  A sum = 0;
#pragma unroll 4
  for (Taps at(columns.end - columns.begin, thread, threads); at.row < height; at.advance())
    sum += to_acc(x[at.row * W + at.column]);
#pragma unroll
  for (int lanes = warp_threads / 2; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
  if (threadIdx.x % warp_threads == 0) shared.of[warp] = sum;
  __syncthreads();
  if (thread != 0 || !inside) return;
  for (int i = 1; i < threads / warp_threads; ++i) sum += shared.of[warp + i];
  y[output] = from_acc<T>(sum / pool.template divisor_of<A>(rows.count, columns.count));
}

template <typename A, int lanes>
struct ChannelSums {
  A of[block_threads][lanes];
};

// Items: inner = groups of 2^slot_bits vectors of channels, middle = q, outer = p; the rest is n. A block has one: a
// thread's slot is its vector of channels, and threads of the same slot take every so manieth pixel of the window.
template <typename T, int lanes>
__global__ void __launch_bounds__(block_threads, 4)
    avg_pool2d_forward_nhwc_shared(const __grid_constant__ Pool<int64_t> pool, int slot_bits, const T* __restrict__ x,
                                   T* __restrict__ y) {
  using A = acc_t<T>;
  auto& shared = shared_memory<ChannelSums<A, lanes>>();
  int64_t group = blockIdx.x;
  int64_t q = pool.inner.split(group);
  const int64_t pixel = q;
  int64_t p = pool.middle.split(q);
  const int64_t n = pool.outer.split(p);
  const int slot = threadIdx.x & ((1 << slot_bits) - 1), slice = threadIdx.x >> slot_bits;
  const int64_t c = ((group << slot_bits) + slot) * lanes;
  const Window<int64_t> rows = pool.rows.window(p), columns = pool.columns.window(q);
  const int64_t W = pool.columns.size, height = c < pool.C ? rows.end - rows.begin : 0;
  x += ((n * pool.rows.size + rows.begin) * W + columns.begin) * pool.C + c;
  A sum[lanes] = {};
#pragma unroll 4
  for (Taps at(columns.end - columns.begin, slice, block_threads >> slot_bits); at.row < height; at.advance()) {
    const Vec<T, lanes> v = load_vec<lanes>(x + (at.row * W + at.column) * pool.C);
#pragma unroll
    for (int k = 0; k < lanes; ++k) sum[k] += to_acc(v.at[k]);
  }
#pragma unroll
  for (int k = 0; k < lanes; ++k) shared.of[threadIdx.x][k] = sum[k];
  for (int half = block_threads / 2; half >= 1 << slot_bits; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= half) continue;
#pragma unroll
    for (int k = 0; k < lanes; ++k) {
      sum[k] += shared.of[threadIdx.x + half][k];
      shared.of[threadIdx.x][k] = sum[k];
    }
  }
  if (slice != 0 || c >= pool.C) return;
  const A divisor = pool.template divisor_of<A>(rows.count, columns.count);
  Vec<T, lanes> mean;
#pragma unroll
  for (int k = 0; k < lanes; ++k) mean.at[k] = from_acc<T>(sum[k] / divisor);
  store_vec(y + pixel * pool.C + c, mean);
}

// A division of doubles takes registers.
template <typename T, typename Index>
constexpr int backward_blocks = sizeof(T) == 8 && sizeof(Index) == 4 ? 3 : least_blocks<Index>;

// Items: inner = segments of `lanes` columns of dx, middle = h; the rest is n·C + c.
template <typename T, int lanes, typename Index>
__global__ void __launch_bounds__(block_threads, backward_blocks<T, Index>)
    avg_pool2d_backward_nchw(const __grid_constant__ Pool<Index> pool, const T* __restrict__ dy, T* __restrict__ dx) {
  if (thread_index() >= pool.items) return;
  Index segment = Index(thread_index());
  Index h = pool.inner.split(segment);
  const Index plane = pool.middle.split(h), first = segment * lanes, W = pool.columns.size;
  const Window<Index> rows = pool.rows.cover(h);
  Vec<T, lanes> v;
#pragma unroll
  for (int k = 0; k < lanes; ++k) {
    const Index w = min(first + k, W - 1);
    const Window<Index> columns = pool.columns.cover(w);
    acc_t<T> sum = 0;
    for (Index p = rows.begin; p < rows.end; ++p) {
      const Index row_count = pool.rows.window(p).count;
      const T* row = dy + (plane * pool.rows.outs + p) * pool.columns.outs;
      for (Index q = columns.begin; q < columns.end; ++q)
        sum += to_acc(row[q]) / pool.template divisor_of<acc_t<T>>(row_count, pool.columns.window(q).count);
    }
    v.at[k] = from_acc<T>(sum);
  }
  T* out = dx + (plane * pool.rows.size + h) * W + first;
  if (pool.whole_vectors) return store_vec(out, v);
#pragma unroll
  for (int k = 0; k < lanes; ++k)
    if (first + k < W) out[k] = v.at[k];
}

// Items: inner = vectors of `lanes` channels, middle = w, outer = h; the rest is n.
template <typename T, int lanes, typename Index>
__global__ void __launch_bounds__(block_threads, backward_blocks<T, Index>)
    avg_pool2d_backward_nhwc(const __grid_constant__ Pool<Index> pool, const T* __restrict__ dy, T* __restrict__ dx) {
  if (thread_index() >= pool.items) return;
  Index c = Index(thread_index());
  const Index input = c * lanes;
  Index w = pool.inner.split(c);
  Index h = pool.middle.split(w);
  const Index n = pool.outer.split(h);
  const Window<Index> rows = pool.rows.cover(h), columns = pool.columns.cover(w);
  acc_t<T> sum[lanes] = {};
  for (Index p = rows.begin; p < rows.end; ++p) {
    const Index row_count = pool.rows.window(p).count;
    for (Index q = columns.begin; q < columns.end; ++q) {
      const acc_t<T> share = 1 / pool.template divisor_of<acc_t<T>>(row_count, pool.columns.window(q).count);
      const Index output = ((n * pool.rows.outs + p) * pool.columns.outs + q) * pool.C + c * lanes;
      const Vec<T, lanes> gradient = load_vec<lanes>(dy + output);
#pragma unroll
      for (int k = 0; k < lanes; ++k) sum[k] += to_acc(gradient.at[k]) * share;
    }
  }
  Vec<T, lanes> v;
#pragma unroll
  for (int k = 0; k < lanes; ++k) v.at[k] = from_acc<T>(sum[k]);
  store_vec(dx + input, v);
}

// ---- Launching ----

template <typename T, typename Index>
Status forward(const AvgPool2dProblem& p, const T* x, T* y, Stream stream) {
  Pool<Index> pool(p);
  if (p.layout == Layout::NCHW) {
    pool.divide(p.y_elements(), p.Q, p.P, 1);
    return launch_pool("avg_pool2d_forward_nchw", avg_pool2d_forward_nchw<T, Index>, pool, stream, x, y);
  }
  constexpr int wide = sizeof(Index) == 4 ? 16 / sizeof(T) : 1;
  const int lanes = wide > 1 ? channel_lanes<T>(p.C, x, y) : 1;
  pool.divide(p.y_elements() / lanes, p.C / lanes, p.Q, p.P);
  return launch_pool("avg_pool2d_forward_nhwc",
                     lanes == wide ? avg_pool2d_forward_nhwc<T, wide, Index> : avg_pool2d_forward_nhwc<T, 1, Index>,
                     pool, stream, x, y);
}

template <typename T>
Status forward_shared(const AvgPool2dProblem& p, int threads, const T* x, T* y, Stream stream) {
  Pool<int64_t> pool(p);
  if (p.layout == Layout::NCHW) {
    pool.divide(p.y_elements(), p.Q, p.P, 1);
    const dim3 grid(unsigned(ceil_div(pool.items, block_threads / threads)));
    return launch("avg_pool2d_forward_nchw_shared", avg_pool2d_forward_nchw_shared<T>, grid, dim3(block_threads),
                  sizeof(WarpSums<acc_t<T>>), stream, pool, threads, x, y);
  }
  constexpr int wide = 16 / sizeof(T);
  const int lanes = channel_lanes<T>(p.C, x, y);
  int slot_bits = 0;
  while (1 << slot_bits < most_slots && int64_t{lanes} << slot_bits < p.C) ++slot_bits;
  const int64_t groups = ceil_div(p.C, int64_t{lanes} << slot_bits);
  pool.divide(p.N * p.P * p.Q * groups, groups, p.Q, p.P);
  return launch("avg_pool2d_forward_nhwc_shared",
                lanes == wide ? avg_pool2d_forward_nhwc_shared<T, wide> : avg_pool2d_forward_nhwc_shared<T, 1>,
                dim3(unsigned(pool.items)), dim3(block_threads),
                lanes == wide ? sizeof(ChannelSums<acc_t<T>, wide>) : sizeof(ChannelSums<acc_t<T>, 1>), stream, pool,
                slot_bits, x, y);
}

template <typename T, typename Index>
Status backward(const AvgPool2dProblem& p, const T* dy, T* dx, Stream stream) {
  constexpr int wide = sizeof(Index) == 4 ? 16 / sizeof(T) : 1;
  Pool<Index> pool(p);
  if (p.layout == Layout::NCHW) {
    const int64_t segments = ceil_div(p.W, wide);
    pool.whole_vectors = p.W % wide == 0 && is_aligned(dx, 16);
    pool.divide(p.N * p.C * p.H * segments, segments, p.H, 1);
    return launch_pool("avg_pool2d_backward_nchw", avg_pool2d_backward_nchw<T, wide, Index>, pool, stream, dy, dx);
  }
  const int lanes = wide > 1 ? channel_lanes<T>(p.C, dy, dx) : 1;
  pool.divide(p.x_elements() / lanes, p.C / lanes, p.W, p.H);
  return launch_pool("avg_pool2d_backward_nhwc",
                     lanes == wide ? avg_pool2d_backward_nhwc<T, wide, Index> : avg_pool2d_backward_nhwc<T, 1, Index>,
                     pool, stream, dy, dx);
}

}  // namespace

Status avg_pool2d_forward(const AvgPool2dProblem& problem, const AvgPool2dPlan& plan, const void* x, void* y,
                          Stream stream) {
  if (problem.y_elements() == 0) return {};
  const AvgPool2dProblem p = problem.normalized();
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x_t = static_cast<const T*>(x);
    T* y_t = static_cast<T*>(y);
    if (plan.threads > 1) return forward_shared(p, plan.threads, x_t, y_t, stream);
    return fits_int(p) ? forward<T, int>(p, x_t, y_t, stream) : forward<T, int64_t>(p, x_t, y_t, stream);
  });
}

Status avg_pool2d_backward(const AvgPool2dProblem& problem, const AvgPool2dPlan&, const void* dy, void* dx,
                           Stream stream) {
  if (problem.x_elements() == 0) return {};
  const AvgPool2dProblem p = problem.normalized();
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = fits_int(p) ? backward<T, int> : backward<T, int64_t>;
    return run(p, static_cast<const T*>(dy), static_cast<T*>(dx), stream);
  });
}

}  // namespace fastconv::cuda
