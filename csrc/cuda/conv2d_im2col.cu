// Convolution as a matrix product (im2col, Chellapilla et al. 2006). Of one group, with t counting the taps (c, r, s)
// of a filter in its memory order and m the pixels (n, p, q) of y:
//
//   windows[t][m] = x[n][c][p·stride_h − pad_h + r·dilation_h][q·stride_w − pad_w + s·dilation_w], 0 in the padding
//   fprop   y[k][m]  = Σ_t w[k][t] · windows[t][m] + b[k]
//   dgrad   windows'[t][m] = Σ_k w[k][t] · dy[k][m],  dx[c][h][w] = Σ of the windows'[t][m] that read x[c][h][w]
//   wgrad   dw[k][t] = Σ_m dy[k][m] · windows[t][m],  db[k] = Σ_m dy[k][m]
//
// NCHW stores windows[groups][t][m], NHWC windows[groups][m][t], so that both are written, read and multiplied along
// contiguous memory; rows are padded with zeros to multiples of four. Only one chunk of the pixels is in the workspace
// at a time (plan/conv2d_cuda.h). A 1×1 convolution needs no copy: its windows are x.
#include "../plan/conv2d_cuda.h"
#include "gemm.cuh"
#include "ordered_sum.cuh"

namespace fastconv::cuda {
namespace {

// Where a chunk's windows lie in x, which starts at the chunk's first image.
struct Windows {
  Strides x;
  int H, W, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int first, pixels;  // pixels first … first + pixels − 1 of the images, counted through
  int rows, pitch;    // of the matrix; pitch is a multiple of 4
  int taps;           // of one group
  Divisor image, row, row_quads, filter, filter_row, channels;  // P·Q, Q, pitch / 4, R·S, S, C/groups
};

// windows[c·R·S + r·S + s][m]: a thread copies four pixels.
template <typename T>
__global__ void im2col_nchw_kernel(const __grid_constant__ Windows g, const T* x, T* windows) {
  int m = int(blockIdx.x * blockDim.x + threadIdx.x);
  const int t = g.row_quads.split(m);
  if (t >= g.rows) return;
  m *= 4;
  int s = t;
  const int c = g.filter.split(s), r = g.filter_row.split(s);
  int q = g.first + m;
  int n = g.image.split(q), p = g.row.split(q);
  const int P = int(g.image.d / g.row.d), Q = int(g.row.d);
  Quad<T> quad;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int h = p * g.stride_h - g.pad_h + r * g.dilation_h, w = q * g.stride_w - g.pad_w + s * g.dilation_w;
    const bool inside = m + j < g.pixels && unsigned(h) < unsigned(g.H) && unsigned(w) < unsigned(g.W);
    quad.at[j] = inside ? x[n * g.x.n + c * g.x.c + h * g.x.h + w] : from_acc<T>(0);
    if (++q == Q) {
      q = 0;
      if (++p == P) p = 0, ++n;
    }
  }
  store_quad(windows + int64_t(t) * g.pitch + m, quad);
}

// windows[group][m][(r·S + s)·C/groups + c]: a thread copies four taps, at once if they are four channels of a pixel.
template <typename T>
__global__ void im2col_nhwc_kernel(const __grid_constant__ Windows g, bool quads, const T* x, T* windows) {
  int t = int(blockIdx.x * blockDim.x + threadIdx.x);
  const int row = g.row_quads.split(t);
  if (row >= g.rows) return;
  t *= 4;
  const int group = row / g.pixels, m = row - group * g.pixels;
  int q = g.first + m;
  const int n = g.image.split(q), p = g.row.split(q);
  const auto load = [&](int tap, auto read) {
    int c = tap;
    int s = g.channels.split(c);
    const int r = g.filter_row.split(s);
    const int h = p * g.stride_h - g.pad_h + r * g.dilation_h, w = q * g.stride_w - g.pad_w + s * g.dilation_w;
    if (tap < g.taps && unsigned(h) < unsigned(g.H) && unsigned(w) < unsigned(g.W))
      read(x + n * g.x.n + h * g.x.h + w * g.x.w + int64_t(group) * g.channels.d + c);
  };
  Quad<T> quad;
#pragma unroll
  for (int j = 0; j < 4; ++j) quad.at[j] = from_acc<T>(0);
  if (quads) {
    load(t, [&](const T* from) { quad = load_quad(from); });
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) load(t + j, [&](const T* from) { quad.at[j] = *from; });
  }
  store_quad(windows + int64_t(row) * g.pitch + t, quad);
}

// The way back: an element of dx adds up, in the order of (r, s), the windows' elements that were read from it.
struct Gather {
  Strides x;
  int count;               // elements of dx in this chunk
  int first_row, rows;     // of dx, of each image
  int first, P, Q;         // the first pixel that the windows hold
  int R, S, pad_h, pad_w, dilation_h, dilation_w;
  int64_t pixel_stride, tap_stride;  // of the windows; tap (r, s) is at (r·S + s)·tap_stride
  Index channel;
  bool nchw;
  Divisor channels, part, width, stride_h, stride_w;  // C, rows, W
};

template <typename T>
__global__ void col2im_kernel(const __grid_constant__ Gather g, const acc_t<T>* windows, T* dx) {
  int rest = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (rest >= g.count) return;
  int n, c, h, w;
  if (g.nchw) {
    w = rest, rest = g.width.split(w);
    h = rest, rest = g.part.split(h);
    c = rest, n = g.channels.split(c);
  } else {
    c = rest, rest = g.channels.split(c);
    w = rest, rest = g.width.split(w);
    h = rest, n = g.part.split(h);
  }
  h += g.first_row;
  const acc_t<T>* from = windows + g.channel.offset(c);
  acc_t<T> sum = 0;
  for (int r = 0; r < g.R; ++r) {
    int over_h = h + g.pad_h - r * g.dilation_h;
    if (over_h < 0) break;
    const int p = g.stride_h.split(over_h);
    if (over_h != 0 || p >= g.P) continue;
    for (int s = 0; s < g.S; ++s) {
      int over_w = w + g.pad_w - s * g.dilation_w;
      if (over_w < 0) break;
      const int q = g.stride_w.split(over_w);
      if (over_w != 0 || q >= g.Q) continue;
      const int64_t pixel = (int64_t(n) * g.P + p) * g.Q + q - g.first;
      sum += from[(r * g.S + s) * g.tap_stride + pixel * g.pixel_stride];
    }
  }
  dx[n * g.x.n + c * g.x.c + h * g.x.h + w * g.x.w] = from_acc<T>(sum);
}

unsigned blocks_of(int64_t threads) { return unsigned(ceil_div(threads, 256)); }

// The matrices, of one chunk, that a convolution multiplies.
struct Im2col {
  Conv2dProblem p;
  Im2colChunks chunks;
  bool nchw;
  int64_t channels, filters, taps;  // of one group
  char* matrix;                     // the workspace
  char* sums;
  char* row_sums;

  Im2col(const Conv2dProblem& problem, const Conv2dPlan& plan, void* workspace)
      : p(normalized(problem)),
        chunks(im2col_chunks(p, plan.direction, plan.split)),
        nchw(p.layout == Layout::NCHW),
        channels(p.channels_per_group()),
        filters(p.filters_per_group()),
        taps(channels * p.R * p.S),
        matrix(static_cast<char*>(workspace)),
        sums(matrix + chunks.matrix_bytes),
        row_sums(sums + chunks.sums_bytes) {}

  // f(first image, images, first of the part, length of the part)
  template <typename F>
  Status for_each_chunk(int64_t whole, F&& f) const {
    for (int64_t image = 0; image < p.N; image += chunks.images)
      for (int64_t first = 0; first < whole; first += chunks.part)
        if (Status s = f(image, std::min(chunks.images, p.N - image), first, std::min(chunks.part, whole - first));
            !s.ok())
          return s;
    return {};
  }

  // x, y and their gradients as (pixel, channel).
  Index pixel_index(int64_t all_channels, int64_t plane, int64_t images) const {
    Index index;
    index.stride = nchw ? 1 : all_channels;
    if (nchw && images > 1) index.outer_stride = all_channels * plane, index.inner = Divisor(plane);
    return index;
  }
  Index channel_index(int64_t plane) const { return {nchw ? plane : 1, 0, {}}; }
  int64_t group_stride(int64_t group_channels, int64_t plane) const { return group_channels * (nchw ? plane : 1); }

  template <typename T>
  Matrix pixels_by_channels(const T* data, int64_t first, int64_t all_channels, int64_t plane, int64_t images) const {
    Matrix view;
    view.data = data + first * (nchw ? 1 : all_channels);
    view.i = pixel_index(all_channels, plane, images);
    view.k = channel_index(plane);
    view.batch_stride = group_stride(all_channels / p.groups, plane);
    view.along_k = !nchw;
    return view;
  }
  Matrix filters_by_taps(const void* w) const {
    Matrix view;
    view.data = w;
    view.i.stride = taps;
    view.k.stride = 1;
    view.batch_stride = filters * taps;
    view.along_k = true;
    return view;
  }
  // (pixel, tap): copied into the workspace, or x itself.
  template <typename T>
  Matrix pixels_by_taps(const T* x, int64_t first, int64_t pixels, int64_t images) const {
    if (chunks.identity) return pixels_by_channels(x, first, p.C, p.P * p.Q, images);
    const int64_t pitch = round_up(nchw ? pixels : taps, 4);
    Matrix view;
    view.data = matrix;
    view.i.stride = nchw ? 1 : pitch;
    view.k.stride = nchw ? pitch : 1;
    view.batch_stride = nchw ? taps * pitch : pixels * pitch;
    view.along_k = !nchw;
    view.quads = true;
    return view;
  }

  template <typename T>
  Status copy_windows(const T* x, int64_t first, int64_t pixels, Stream stream) const {
    if (chunks.identity || taps == 0) return {};
    Windows g = {};
    g.x = x_strides(p);
    g.H = int(p.H), g.W = int(p.W);
    g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w);
    g.pad_h = int(p.pad_h), g.pad_w = int(p.pad_w);
    g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    g.first = int(first), g.pixels = int(pixels);
    g.rows = int(nchw ? p.groups * taps : p.groups * pixels);
    g.pitch = int(round_up(nchw ? pixels : taps, 4));
    g.taps = int(taps);
    g.image = Divisor(p.P * p.Q), g.row = Divisor(p.Q), g.row_quads = Divisor(g.pitch / 4);
    g.filter = Divisor(p.R * p.S), g.filter_row = Divisor(p.S), g.channels = Divisor(channels);
    T* windows = reinterpret_cast<T*>(matrix);
    const dim3 grid(blocks_of(int64_t(g.rows) * (g.pitch / 4)));
    if (nchw)
      return launch("im2col_nchw_kernel", im2col_nchw_kernel<T>, grid, dim3(256), 0, stream, g, x, windows);
    const bool quads = channels % 4 == 0 && is_aligned(x, quad_alignment<T>);
    return launch("im2col_nhwc_kernel", im2col_nhwc_kernel<T>, grid, dim3(256), 0, stream, g, quads, x, windows);
  }

  // Adds up the partial sums of a product.
  template <typename T>
  Status add_splits(const Gemm& g, int splits, Stream stream) const {
    OrderedSum s = {};
    s.partial = g.partial, s.splits = splits;
    s.batches = g.batches, s.m = g.m, s.n = g.n, s.pitch = round_up_4(g.n);
    s.out = g.c, s.out_m = g.c_m, s.out_n = g.c_n, s.out_batch_stride = g.c_batch_stride;
    s.bias = g.bias, s.bias_batch_stride = g.bias_batch_stride;
    s.bias_m_stride = g.bias_m_stride, s.bias_n_stride = g.bias_n_stride;
    return ordered_sum<T>(s, stream);
  }

  // Σ_k of pixels(m, k)·channels(j, k) into y or dx, as (pixel, channel): y[m][j] of NHWC, y[j][m] of NCHW.
  template <typename T>
  Status product(const Matrix& by_pixels, int64_t pixels, const Matrix& by_channels, int64_t group_channels, int64_t k,
                 const T* bias, T* out, int64_t first, int64_t all_channels, int64_t plane, int64_t images,
                 const Conv2dPlan& plan, Stream stream) const {
    Gemm g = {};
    g.a = nchw ? by_channels : by_pixels;
    g.b = nchw ? by_pixels : by_channels;
    g.m = int(nchw ? group_channels : pixels);
    g.n = int(nchw ? pixels : group_channels);
    g.k = int(k);
    g.batches = int(p.groups);
    g.c = out + first * (nchw ? 1 : all_channels);
    const Index pixel = pixel_index(all_channels, plane, images), channel = channel_index(plane);
    g.c_m = nchw ? channel : pixel;
    g.c_n = nchw ? pixel : channel;
    g.c_batch_stride = group_stride(group_channels, plane);
    g.bias = bias;
    g.bias_batch_stride = int(group_channels);
    (nchw ? g.bias_m_stride : g.bias_n_stride) = 1;
    if (plan.split > 1) g.partial = sums;
    if (Status s = run_gemm<T>(g, plan.tile_m, plan.split, stream); !s.ok() || plan.split == 1) return s;
    return add_splits<T>(g, plan.split, stream);
  }
};

template <typename T>
Status fprop(const Im2col& c, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y, Stream stream) {
  const Conv2dProblem& p = c.p;
  const int64_t plane = p.P * p.Q;
  return c.for_each_chunk(plane, [&](int64_t image, int64_t images, int64_t first, int64_t count) {
    const T* x_chunk = x + image * p.C * p.H * p.W;
    const int64_t pixels = images * count;
    if (Status s = c.copy_windows(x_chunk, first, pixels, stream); !s.ok()) return s;
    return c.product(c.pixels_by_taps(x_chunk, first, pixels, images), pixels, c.filters_by_taps(w), c.filters, c.taps,
                     bias, y + image * p.K * plane, first, p.K, plane, images, plan, stream);
  });
}

template <typename T>
Status dgrad(const Im2col& c, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, Stream stream) {
  const Conv2dProblem& p = c.p;
  const int64_t plane = p.P * p.Q;
  Matrix taps_by_filters = c.filters_by_taps(w);
  std::swap(taps_by_filters.i, taps_by_filters.k);
  taps_by_filters.along_k = false;
  if (c.chunks.identity)
    return c.for_each_chunk(plane, [&](int64_t image, int64_t images, int64_t first, int64_t count) {
      const Matrix pixels_by_filters =
          c.pixels_by_channels(dy + image * p.K * plane, first, p.K, plane, images);
      return c.product<T>(pixels_by_filters, images * count, taps_by_filters, c.channels, c.filters, nullptr,
                          dx + image * p.C * plane, first, p.C, plane, images, plan, stream);
    });

  return c.for_each_chunk(p.H, [&](int64_t image, int64_t images, int64_t first_row, int64_t rows) {
    // The rows of y whose windows reach these rows of dx.
    const int64_t first_reach = first_row + p.pad_h - (p.R - 1) * p.dilation_h;
    const int64_t first_p = first_reach > 0 ? std::min(pieces(first_reach, p.stride_h), p.P) : 0;
    const int64_t end_p = std::max(std::min((first_row + rows - 1 + p.pad_h) / p.stride_h + 1, p.P), first_p);
    const int64_t first = rows == p.H ? 0 : first_p * p.Q;
    const int64_t count = rows == p.H ? plane : (end_p - first_p) * p.Q, pixels = images * count;
    const int64_t pitch = round_up(c.nchw ? pixels : c.taps, 4);

    Gemm g = {};
    const Matrix pixels_by_filters = c.pixels_by_channels(dy + image * p.K * plane, first, p.K, plane, images);
    g.a = c.nchw ? taps_by_filters : pixels_by_filters;
    g.b = c.nchw ? pixels_by_filters : taps_by_filters;
    g.m = int(c.nchw ? c.taps : pixels);
    g.n = int(c.nchw ? pixels : c.taps);
    g.k = int(c.filters);
    g.batches = int(p.groups);
    g.partial = c.matrix;
    if (Status s = run_gemm<T>(g, plan.tile_m, 1, stream); !s.ok()) return s;

    Gather back = {};
    back.x = x_strides(p);
    back.count = int(images * p.C * rows * p.W);
    back.first_row = int(first_row), back.rows = int(rows);
    back.first = int(first), back.P = int(p.P), back.Q = int(p.Q);
    back.R = int(p.R), back.S = int(p.S), back.pad_h = int(p.pad_h), back.pad_w = int(p.pad_w);
    back.dilation_h = int(p.dilation_h), back.dilation_w = int(p.dilation_w);
    back.pixel_stride = c.nchw ? 1 : pitch;
    back.tap_stride = c.nchw ? pitch : c.channels;
    if (c.nchw)
      back.channel.stride = p.R * p.S * pitch;
    else
      back.channel = {1, pixels * pitch, Divisor(c.channels)};
    back.nchw = c.nchw;
    back.channels = Divisor(p.C), back.part = Divisor(rows), back.width = Divisor(p.W);
    back.stride_h = Divisor(p.stride_h), back.stride_w = Divisor(p.stride_w);
    return launch("col2im_kernel", col2im_kernel<T>, dim3(blocks_of(back.count)), dim3(256), 0, stream, back,
                  reinterpret_cast<const acc_t<T>*>(c.matrix), dx + image * p.C * p.H * p.W);
  });
}

template <typename T>
Status wgrad(const Im2col& c, const Conv2dPlan& plan, const T* dy, const T* x, T* dw, T* db, Stream stream) {
  const Conv2dProblem& p = c.p;
  const int64_t plane = p.P * p.Q;
  Gemm g = {};
  g.m = int(c.filters);
  g.n = int(c.taps);
  g.batches = int(p.groups);
  g.partial = c.sums;
  g.row_sums = db ? c.row_sums : nullptr;
  const auto add_chunk = [&](int64_t image, int64_t images, int64_t first, int64_t count) {
    const T* x_chunk = x + image * p.C * p.H * p.W;
    const int64_t pixels = images * count;
    if (Status s = c.copy_windows(x_chunk, first, pixels, stream); !s.ok()) return s;
    g.a = c.pixels_by_channels(dy + image * p.K * plane, first, p.K, plane, images);
    g.b = c.pixels_by_taps(x_chunk, first, pixels, images);
    for (Matrix* matrix : {&g.a, &g.b}) {
      std::swap(matrix->i, matrix->k);
      matrix->along_k = !matrix->along_k;
    }
    g.k = int(pixels);
    Status s = run_gemm<T>(g, plan.tile_m, plan.split, stream);
    g.accumulate = true;
    return s;
  };
  if (p.N == 0 || plane == 0) {  // an empty sum
    if (Status s = run_gemm<T>(g, plan.tile_m, plan.split, stream); !s.ok()) return s;
  } else if (Status s = c.for_each_chunk(plane, add_chunk); !s.ok()) {
    return s;
  }

  g.c = dw;
  g.c_m.stride = c.taps;
  g.c_n.stride = 1;
  g.c_batch_stride = c.filters * c.taps;
  if (Status s = c.add_splits<T>(g, plan.split, stream); !s.ok() || !db) return s;
  return ordered_sum<T>(c.row_sums, plan.split, p.K, db, stream);
}

}  // namespace

Status conv2d_im2col_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w,
                           const void* bias, void* y, void* workspace, Stream stream) {
  if (p.y_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return fprop(Im2col(p, plan, workspace), plan, static_cast<const T*>(x), static_cast<const T*>(w),
                 static_cast<const T*>(bias), static_cast<T*>(y), stream);
  });
}

Status conv2d_im2col_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
                           void* workspace, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return dgrad(Im2col(p, plan, workspace), plan, static_cast<const T*>(dy), static_cast<const T*>(w),
                 static_cast<T*>(dx), stream);
  });
}

Status conv2d_im2col_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dw,
                           void* db, void* workspace, Stream stream) {
  if (p.w_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return wgrad(Im2col(p, plan, workspace), plan, static_cast<const T*>(dy), static_cast<const T*>(x),
                 static_cast<T*>(dw), static_cast<T*>(db), stream);
  });
}

}  // namespace fastconv::cuda
