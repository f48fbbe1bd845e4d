// Max pooling: y[n,c,p,q] = max over r, s of x[n,c,h,w] with h = p·stride_h − pad_h + r·dilation_h and w = q·stride_w −
// pad_w + s·dilation_w, over the taps (r, s) that lie inside x. What backward needs to know is kept as one offset
// r·S + s for each output.
//
// A window is scanned in row-major order; a tap is taken if it is greater than all before it or a NaN, so that of equal
// maxima the first counts and of NaNs the last. The scan starts at −∞ with the first tap inside x, which is the answer
// for a window of nothing but −∞. A window without any tap inside x keeps −∞ and offset 0: a position outside x.
//
// Backward gathers: whoever writes an element of dx looks at the windows that cover it, in row-major order, and adds dy
// where the offset names that element. Nothing is added twice, nothing need be zero before, and no offset, even a wrong
// one, leads outside a tensor.
//
// NCHW: a thread has outputs of one row (forward), or neighbours w (backward). NHWC: a vector of channels of a pixel.
// Index is int where every coordinate and offset fits, and int64_t otherwise.
#include <algorithm>

#include "pool2d.cuh"

namespace fastconv::cuda {
namespace {

constexpr int outputs_a_thread = 2;  // NCHW forward: half a row apart, so that neighbours in the warp stay neighbours

template <typename Index>
struct Pool : PoolItems<Index> {
  Index C, H, W, R, S, P, Q, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Divide<Index> by_stride_h, by_stride_w, by_dilation_h, by_dilation_w, by_width;

  explicit Pool(const MaxPool2dProblem& p)
      : C(Index(p.C)),
        H(Index(p.H)),
        W(Index(p.W)),
        R(Index(p.R)),
        S(Index(p.S)),
        P(Index(p.P)),
        Q(Index(p.Q)),
        stride_h(Index(p.stride_h)),
        stride_w(Index(p.stride_w)),
        pad_h(Index(p.pad_h)),
        pad_w(Index(p.pad_w)),
        dilation_h(Index(p.dilation_h)),
        dilation_w(Index(p.dilation_w)),
        by_stride_h(p.stride_h),
        by_stride_w(p.stride_w),
        by_dilation_h(p.dilation_h),
        by_dilation_w(p.dilation_w),
        by_width(p.S) {}
};

bool fits_int(const MaxPool2dProblem& p) {
  constexpr int64_t most = 1 << 30;  // sums of two still fit
  return std::max({p.x_elements(), p.y_elements(), p.H + p.pad_h, p.W + p.pad_w, p.P * p.stride_h, p.Q * p.stride_w,
                   p.R * p.dilation_h, p.S * p.dilation_w, p.R * p.S, p.stride_h, p.stride_w}) < most;
}

bool is_nhwc(const MaxPool2dProblem& p) { return p.layout == Layout::NHWC && p.C > 1; }

template <typename Index>
__device__ __forceinline__ bool is_inside(Index i, Index size) {
  return i >= 0 && i < size;
}

// The argmax of each output, in 1, 2 or 4 bytes; 0 bytes where none is kept.
struct Offsets {
  void* at;
  int bytes;

  __device__ __forceinline__ uint32_t load(int64_t i) const {
    if (bytes == 1) return static_cast<const uint8_t*>(at)[i];
    if (bytes == 2) return static_cast<const uint16_t*>(at)[i];
    return static_cast<const uint32_t*>(at)[i];
  }
  __device__ __forceinline__ void store(int64_t i, uint32_t offset) const {
    if (bytes == 1) static_cast<uint8_t*>(at)[i] = uint8_t(offset);
    if (bytes == 2) static_cast<uint16_t*>(at)[i] = uint16_t(offset);
    if (bytes == 4) static_cast<uint32_t*>(at)[i] = offset;
  }
  template <int n>
  __device__ __forceinline__ Vec<uint32_t, n> load_vec(int64_t i) const {
    Vec<uint32_t, n> offsets;
    if (bytes == 1) {
      const Vec<uint8_t, n> v = cuda::load_vec<n>(static_cast<const uint8_t*>(at) + i);
#pragma unroll
      for (int k = 0; k < n; ++k) offsets.at[k] = v.at[k];
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) offsets.at[k] = load(i + k);
    }
    return offsets;
  }
  template <int n>
  __device__ __forceinline__ void store_vec(int64_t i, const Vec<uint32_t, n>& offsets) const {
    if (bytes == 1) {
      Vec<uint8_t, n> v;
#pragma unroll
      for (int k = 0; k < n; ++k) v.at[k] = uint8_t(offsets.at[k]);
      cuda::store_vec(static_cast<uint8_t*>(at) + i, v);
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) store(i + k, offsets.at[k]);
    }
  }
};

// The scan of one window.
constexpr uint32_t no_tap = ~0u;
template <typename A>
struct Best {
  A value = -A(INFINITY);
  uint32_t offset = no_tap;

  __device__ __forceinline__ void see(A v, uint32_t tap) {
    if (v > value || v != v || offset == no_tap) {
      value = v;
      offset = tap;
    }
  }
  __device__ __forceinline__ uint32_t kept_offset() const { return offset == no_tap ? 0 : offset; }
};

// Items: inner = columns, each of outputs q = column, column + columns …; middle = p; the rest is n·C + c.
// `taps` is the size of a square window without dilation, 0 for any other: loops of constant length keep their loads in
// flight together.
template <typename T, int taps, typename Index>
__global__ void __launch_bounds__(block_threads, least_blocks<Index>)
    max_pool2d_forward_nchw(const __grid_constant__ Pool<Index> pool, const T* __restrict__ x, T* __restrict__ y,
                            Offsets offsets) {
  if (thread_index() >= pool.items) return;
  Index column = Index(thread_index());
  Index p = pool.inner.split(column);
  const Index plane = pool.middle.split(p), columns = ceil_div(pool.Q, Index(outputs_a_thread));
  const Index R = taps ? taps : pool.R, S = taps ? taps : pool.S;
  const Index dilation_h = taps ? 1 : pool.dilation_h, dilation_w = taps ? 1 : pool.dilation_w;
  const Index h = p * pool.stride_h - pool.pad_h;
  x += plane * pool.H * pool.W;

  Best<acc_t<T>> best[outputs_a_thread];
#pragma unroll(taps ? taps : 1)
  for (Index r = 0; r < R; ++r) {
    if (!is_inside(h + r * dilation_h, pool.H)) continue;
    const T* row = x + (h + r * dilation_h) * pool.W;
#pragma unroll(taps ? taps : 1)
    for (Index s = 0; s < S; ++s)
#pragma unroll
      for (int k = 0; k < outputs_a_thread; ++k) {
        const Index w = (column + k * columns) * pool.stride_w - pool.pad_w + s * dilation_w;
        if (is_inside(w, pool.W)) best[k].see(to_acc(row[w]), uint32_t(r * S + s));
      }
  }
  const Index first = (plane * pool.P + p) * pool.Q;
#pragma unroll
  for (int k = 0; k < outputs_a_thread; ++k) {
    const Index q = column + k * columns;
    if (q >= pool.Q) break;
    y[first + q] = from_acc<T>(best[k].value);
    offsets.store(first + q, best[k].kept_offset());
  }
}

// Items: inner = vectors of `lanes` channels, middle = q, outer = p; the rest is n.
template <typename T, int lanes, int taps, typename Index>
__global__ void __launch_bounds__(block_threads, least_blocks<Index>)
    max_pool2d_forward_nhwc(const __grid_constant__ Pool<Index> pool, const T* __restrict__ x, T* __restrict__ y,
                            Offsets offsets) {
  if (thread_index() >= pool.items) return;
  Index c = Index(thread_index());
  const Index output = c * lanes;
  Index q = pool.inner.split(c);
  Index p = pool.middle.split(q);
  const Index n = pool.outer.split(p);
  const Index R = taps ? taps : pool.R, S = taps ? taps : pool.S;
  const Index dilation_h = taps ? 1 : pool.dilation_h, dilation_w = taps ? 1 : pool.dilation_w;
  const Index h = p * pool.stride_h - pool.pad_h, w = q * pool.stride_w - pool.pad_w;
  x += n * pool.H * pool.W * pool.C + c * lanes;

  Best<acc_t<T>> best[lanes];
#pragma unroll(taps ? taps : 1)
  for (Index r = 0; r < R; ++r) {
    if (!is_inside(h + r * dilation_h, pool.H)) continue;
    const T* row = x + (h + r * dilation_h) * pool.W * pool.C;
#pragma unroll(taps ? taps : 1)
    for (Index s = 0; s < S; ++s) {
      if (!is_inside(w + s * dilation_w, pool.W)) continue;
      const Vec<T, lanes> v = load_vec<lanes>(row + (w + s * dilation_w) * pool.C);
#pragma unroll
      for (int k = 0; k < lanes; ++k) best[k].see(to_acc(v.at[k]), uint32_t(r * S + s));
    }
  }
  Vec<T, lanes> values;
  Vec<uint32_t, lanes> kept;
#pragma unroll
  for (int k = 0; k < lanes; ++k) {
    values.at[k] = from_acc<T>(best[k].value);
    kept.at[k] = best[k].kept_offset();
  }
  store_vec(y + output, values);
  offsets.store_vec(output, kept);
}

// The windows [begin, end) along one axis that reach some of the positions first … last, counted from the padding's
// edge; they may still step over them where there is dilation.
template <typename Index>
struct Windows {
  Index begin, end;
  __device__ __forceinline__ Windows(Index first, Index last, Index taps, Index dilation, Index stride,
                                     const Divide<Index>& by_stride, Index outputs) {
    const Index start = max(first - (taps - 1) * dilation, Index(0));
    begin = by_stride.quotient(start + stride - 1);
    end = min(by_stride.quotient(last) + 1, outputs);
  }
};

// Items: inner = segments of `lanes` columns of dx, middle = h; the rest is n·C + c.
template <typename T, int lanes, typename Index>
__global__ void __launch_bounds__(block_threads, least_blocks<Index>)
    max_pool2d_backward_nchw(const __grid_constant__ Pool<Index> pool, const T* __restrict__ dy, const Offsets offsets,
                             T* __restrict__ dx) {
  if (thread_index() >= pool.items) return;
  Index segment = Index(thread_index());
  Index h = pool.inner.split(segment);
  const Index plane = pool.middle.split(h), w = segment * lanes;
  const Index h_position = h + pool.pad_h, w_position = w + pool.pad_w;
  const Windows<Index> rows(h_position, h_position, pool.R, pool.dilation_h, pool.stride_h, pool.by_stride_h, pool.P);
  const Windows<Index> columns(w_position, w_position + lanes - 1, pool.S, pool.dilation_w, pool.stride_w,
                               pool.by_stride_w, pool.Q);
  acc_t<T> sum[lanes] = {};
  for (Index p = rows.begin; p < rows.end; ++p) {
    const Index rest = h_position - p * pool.stride_h, r = pool.by_dilation_h.quotient(rest);
    if (r * pool.dilation_h != rest) continue;
    const Index first = (plane * pool.P + p) * pool.Q;
    for (Index q = columns.begin; q < columns.end; ++q) {
      const acc_t<T> gradient = to_acc(dy[first + q]);
      const Index s = Index(offsets.load(first + q)) - r * pool.S;
      if (!is_inside(s, pool.S)) continue;  // the maximum is in another row
      const Index lane = q * pool.stride_w + s * pool.dilation_w - w_position;
#pragma unroll
      for (int k = 0; k < lanes; ++k)
        if (lane == k) sum[k] += gradient;
    }
  }
  Vec<T, lanes> v;
#pragma unroll
  for (int k = 0; k < lanes; ++k) v.at[k] = from_acc<T>(sum[k]);
  T* out = dx + (plane * pool.H + h) * pool.W + w;
  if (pool.whole_vectors) return store_vec(out, v);
#pragma unroll
  for (int k = 0; k < lanes; ++k)
    if (w + k < pool.W) out[k] = v.at[k];
}

// Items: inner = vectors of `lanes` channels, middle = w, outer = h; the rest is n.
template <typename T, int lanes, typename Index>
__global__ void __launch_bounds__(block_threads, least_blocks<Index>)
    max_pool2d_backward_nhwc(const __grid_constant__ Pool<Index> pool, const T* __restrict__ dy, const Offsets offsets,
                             T* __restrict__ dx) {
  if (thread_index() >= pool.items) return;
  Index c = Index(thread_index());
  const Index input = c * lanes;
  Index w = pool.inner.split(c);
  Index h = pool.middle.split(w);
  const Index n = pool.outer.split(h), h_position = h + pool.pad_h, w_position = w + pool.pad_w;
  const Windows<Index> rows(h_position, h_position, pool.R, pool.dilation_h, pool.stride_h, pool.by_stride_h, pool.P);
  const Windows<Index> columns(w_position, w_position, pool.S, pool.dilation_w, pool.stride_w, pool.by_stride_w,
                               pool.Q);
  acc_t<T> sum[lanes] = {};
  for (Index p = rows.begin; p < rows.end; ++p) {
    const Index h_rest = h_position - p * pool.stride_h, r = pool.by_dilation_h.quotient(h_rest);
    if (r * pool.dilation_h != h_rest) continue;
    for (Index q = columns.begin; q < columns.end; ++q) {
      const Index w_rest = w_position - q * pool.stride_w, s = pool.by_dilation_w.quotient(w_rest);
      if (s * pool.dilation_w != w_rest) continue;
      const Index output = ((n * pool.P + p) * pool.Q + q) * pool.C + c * lanes;
      const Vec<uint32_t, lanes> offset = offsets.load_vec<lanes>(output);
      const Vec<T, lanes> gradient = load_vec<lanes>(dy + output);
#pragma unroll
      for (int k = 0; k < lanes; ++k)
        if (offset.at[k] == uint32_t(r * pool.S + s)) sum[k] += to_acc(gradient.at[k]);
    }
  }
  Vec<T, lanes> v;
#pragma unroll
  for (int k = 0; k < lanes; ++k) v.at[k] = from_acc<T>(sum[k]);
  store_vec(dx + input, v);
}

// Where the maximum of an output lies: its plane (n·C + c, or n in NHWC), channel (0 in NCHW) and position h·W + w, −1
// if that is outside x.
// Items: inner = channels (1 in NCHW), middle = q, outer = p; the rest is the plane.
struct Maximum {
  int64_t channel, plane, position;
  __device__ __forceinline__ Maximum(const Pool<int64_t>& pool, const Offsets& offsets, int64_t i)
      : channel(i), position(-1) {
    int64_t q = pool.inner.split(channel);
    int64_t p = pool.middle.split(q);
    plane = pool.outer.split(p);
    int64_t s = offsets.load(i);
    const int64_t r = pool.by_width.split(s);
    const int64_t h = p * pool.stride_h - pool.pad_h + r * pool.dilation_h;
    const int64_t w = q * pool.stride_w - pool.pad_w + s * pool.dilation_w;
    if (r < pool.R && is_inside(h, pool.H) && is_inside(w, pool.W)) position = h * pool.W + w;
  }
};

__global__ void __launch_bounds__(block_threads)
    max_pool2d_indices_kernel(const __grid_constant__ Pool<int64_t> pool, const Offsets offsets,
                              int64_t* __restrict__ indices) {
  const int64_t i = thread_index();
  if (i >= pool.items) return;
  const Maximum maximum(pool, offsets, i);
  indices[i] = max(maximum.position, int64_t{0});
}

template <typename T>
__global__ void __launch_bounds__(block_threads)
    max_pool2d_gather_kernel(const __grid_constant__ Pool<int64_t> pool, const T* __restrict__ x, const Offsets offsets,
                             T* __restrict__ y) {
  const int64_t i = thread_index();
  if (i >= pool.items) return;
  const Maximum maximum(pool, offsets, i);
  const int64_t channels = pool.inner.d;
  y[i] = maximum.position < 0 ? from_acc<T>(0)
                              : x[(maximum.plane * pool.H * pool.W + maximum.position) * channels + maximum.channel];
}

Offsets offsets_of(const MaxPool2dProblem& p, const void* offsets) {
  return {const_cast<void*>(offsets), offsets ? p.offset_bytes : 0};
}

template <typename T>
int channel_lanes(const MaxPool2dProblem& p, const void* a, const void* b, const void* offsets) {
  return is_aligned(offsets, 16 / sizeof(T)) ? cuda::channel_lanes<T>(p.C, a, b) : 1;
}

template <typename T, int taps, typename Index>
Status forward(const MaxPool2dProblem& p, const T* x, T* y, const Offsets& offsets, Stream stream) {
  Pool<Index> pool(p);
  if (!is_nhwc(p)) {
    const int64_t columns = ceil_div(p.Q, outputs_a_thread);
    pool.divide(p.N * p.C * p.P * columns, columns, p.P, 1);
    return launch_pool("max_pool2d_forward_nchw", max_pool2d_forward_nchw<T, taps, Index>, pool, stream, x, y, offsets);
  }
  constexpr int wide = sizeof(Index) == 4 ? 16 / sizeof(T) : 1;
  const int lanes = wide > 1 ? channel_lanes<T>(p, x, y, offsets.at) : 1;
  pool.divide(p.y_elements() / lanes, p.C / lanes, p.Q, p.P);
  return launch_pool(
      "max_pool2d_forward_nhwc",
      lanes == wide ? max_pool2d_forward_nhwc<T, wide, taps, Index> : max_pool2d_forward_nhwc<T, 1, taps, Index>, pool,
      stream, x, y, offsets);
}

template <typename T, typename Index>
Status backward(const MaxPool2dProblem& p, const T* dy, const Offsets& offsets, T* dx, Stream stream) {
  constexpr int wide = sizeof(Index) == 4 ? 16 / sizeof(T) : 1;
  Pool<Index> pool(p);
  if (!is_nhwc(p)) {
    const int64_t segments = ceil_div(p.W, wide);
    pool.whole_vectors = p.W % wide == 0 && is_aligned(dx, 16);
    pool.divide(p.N * p.C * p.H * segments, segments, p.H, 1);
    return launch_pool("max_pool2d_backward_nchw", max_pool2d_backward_nchw<T, wide, Index>, pool, stream, dy, offsets,
                       dx);
  }
  const int lanes = wide > 1 ? channel_lanes<T>(p, dy, dx, offsets.at) : 1;
  pool.divide(p.x_elements() / lanes, p.C / lanes, p.W, p.H);
  return launch_pool("max_pool2d_backward_nhwc",
                     lanes == wide ? max_pool2d_backward_nhwc<T, wide, Index> : max_pool2d_backward_nhwc<T, 1, Index>,
                     pool, stream, dy, offsets, dx);
}

// One item an output, in the order of y.
Pool<int64_t> pool_by_output(const MaxPool2dProblem& p) {
  Pool<int64_t> pool(p);
  pool.divide(p.y_elements(), is_nhwc(p) ? p.C : 1, p.Q, p.P);
  return pool;
}

}  // namespace

Status max_pool2d_forward(const MaxPool2dProblem& p, const MaxPool2dPlan&, const void* x, void* y, void* offsets,
                          Stream stream) {
  if (p.y_elements() == 0) return {};
  const bool plain = p.R == p.S && p.dilation_h == 1 && p.dilation_w == 1;
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto kernel) {
      return kernel(p, static_cast<const T*>(x), static_cast<T*>(y), offsets_of(p, offsets), stream);
    };
    if (!fits_int(p)) return run(forward<T, 0, int64_t>);
    if (plain && p.R == 2) return run(forward<T, 2, int>);
    if (plain && p.R == 3) return run(forward<T, 3, int>);
    return run(forward<T, 0, int>);
  });
}

Status max_pool2d_backward(const MaxPool2dProblem& p, const MaxPool2dPlan&, const void* dy, const void* offsets,
                           void* dx, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = fits_int(p) ? backward<T, int> : backward<T, int64_t>;
    return run(p, static_cast<const T*>(dy), offsets_of(p, offsets), static_cast<T*>(dx), stream);
  });
}

Status max_pool2d_indices(const MaxPool2dProblem& p, const void* offsets, int64_t* indices, Stream stream) {
  if (p.y_elements() == 0) return {};
  return launch_pool("max_pool2d_indices_kernel", max_pool2d_indices_kernel, pool_by_output(p), stream,
                     offsets_of(p, offsets), indices);
}

Status max_pool2d_gather(const MaxPool2dProblem& p, const void* x, const void* offsets, void* y, Stream stream) {
  if (p.y_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_pool("max_pool2d_gather_kernel", max_pool2d_gather_kernel<T>, pool_by_output(p), stream,
                       static_cast<const T*>(x), offsets_of(p, offsets), static_cast<T*>(y));
  });
}

}  // namespace fastconv::cuda
