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
  int count;            // elements of dx in this chunk
  int first_row, rows;  // of dx, of each image
  int first, P, Q;      // the first pixel that the windows hold
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

// Pixels first … first + count − 1 of the planes of images image … image + images − 1. (Of dx in dgrad: rows.)
struct Chunk {
  int64_t image, images, first, count;
  int64_t size() const { return images * count; }
};

// The matrices of one chunk that a convolution multiplies.
struct Im2col {
  Conv2dProblem p;
  Conv2dPlan plan;
  Stream stream;
  Im2colChunks chunks;
  bool nchw;
  int64_t channels, filters, taps;  // of one group
  int64_t plane;                    // P·Q
  char* matrix;                     // the workspace
  char* sums;
  char* row_sums;

  Im2col(const Conv2dProblem& problem, const Conv2dPlan& plan, void* workspace, Stream stream)
      : p(normalized(problem)),
        plan(plan),
        stream(stream),
        chunks(im2col_chunks(p, plan.direction, plan.split)),
        nchw(p.layout == Layout::NCHW),
        channels(p.channels_per_group()),
        filters(p.filters_per_group()),
        taps(channels * p.R * p.S),
        plane(p.P * p.Q),
        matrix(static_cast<char*>(workspace)),
        sums(matrix + chunks.matrix_bytes),
        row_sums(sums + chunks.sums_bytes) {}

  template <typename F>
  Status for_each_chunk(int64_t whole, F&& f) const {
    for (int64_t image = 0; image < p.N; image += chunks.images) {
      for (int64_t first = 0; first < whole; first += chunks.part) {
        const Chunk chunk = {image, std::min(chunks.images, p.N - image), first, std::min(chunks.part, whole - first)};
        if (Status s = f(chunk); !s.ok()) return s;
      }
    }
    return {};
  }

  // A chunk's pixels of y, dy or, where the windows are x itself, x and dx: tensors of C channels with P × Q pixels.
  int64_t start(const Chunk& chunk, int64_t C) const { return chunk.image * C * plane + chunk.first * (nchw ? 1 : C); }
  Index pixel_index(const Chunk& chunk, int64_t C) const {
    if (nchw && chunk.images > 1) return {1, C * plane, Divisor(plane)};
    return {nchw ? 1 : C, 0, {}};
  }
  Index channel_index() const { return {nchw ? plane : 1, 0, {}}; }
  int64_t group_stride(int64_t C) const { return C / p.groups * (nchw ? plane : 1); }

  // Views of (i, k) of the product.
  template <typename T>
  Matrix pixels_by_channels(const T* tensor, const Chunk& chunk, int64_t C) const {
    return {tensor + start(chunk, C), pixel_index(chunk, C), channel_index(), group_stride(C), !nchw, false};
  }
  Matrix filters_by_taps(const void* w) const { return {w, {taps, 0, {}}, {1, 0, {}}, filters * taps, true, false}; }
  template <typename T>
  Matrix pixels_by_taps(const T* x, const Chunk& chunk) const {
    if (chunks.identity) return pixels_by_channels(x, chunk, p.C);
    const int64_t pitch = round_up(nchw ? chunk.size() : taps, 4);
    const Index along_row = {1, 0, {}}, along_column = {pitch, 0, {}};
    if (nchw) return {matrix, along_row, along_column, taps * pitch, false, true};
    return {matrix, along_column, along_row, chunk.size() * pitch, true, true};
  }
  static Matrix transposed(const Matrix& m) { return {m.data, m.k, m.i, m.batch_stride, !m.along_k, m.quads}; }

  // A product of something of the pixels with something of the channels, a·bᵀ of NCHW and b·aᵀ of NHWC, so that the
  // rows of the result are contiguous in memory.
  Gemm product(const Matrix& by_channels, int64_t m, const Matrix& by_pixels, int64_t n, int64_t k) const {
    Gemm g = {};
    g.a = nchw ? by_channels : by_pixels;
    g.b = nchw ? by_pixels : by_channels;
    g.m = int(nchw ? m : n);
    g.n = int(nchw ? n : m);
    g.k = int(k);
    g.batches = int(p.groups);
    return g;
  }

  // The product as the chunk's pixels of a tensor of C channels.
  template <typename T>
  Status multiply_into(T* tensor, const Chunk& chunk, int64_t C, const T* bias, Gemm g) const {
    g.c = tensor + start(chunk, C);
    g.c_m = nchw ? channel_index() : pixel_index(chunk, C);
    g.c_n = nchw ? pixel_index(chunk, C) : channel_index();
    g.c_batch_stride = group_stride(C);
    g.bias = bias;
    g.relu = p.relu;
    g.bias_batch_stride = int(C / p.groups);
    (nchw ? g.bias_m_stride : g.bias_n_stride) = 1;
    if (plan.split > 1) g.partial = sums;
    if (Status s = run_gemm<T>(g, plan.tile_m, plan.split, stream); !s.ok() || plan.split == 1) return s;
    return add_splits<T>(g);
  }

  template <typename T>
  Status add_splits(const Gemm& g) const {
    OrderedSum s = {};
    s.partial = g.partial, s.splits = plan.split;
    s.batches = g.batches, s.m = g.m, s.n = g.n, s.pitch = round_up_4(g.n);
    s.out = g.c, s.out_m = g.c_m, s.out_n = g.c_n, s.out_batch_stride = g.c_batch_stride;
    s.bias = g.bias, s.bias_batch_stride = g.bias_batch_stride;
    s.bias_m_stride = g.bias_m_stride, s.bias_n_stride = g.bias_n_stride;
    s.relu = g.relu;
    return ordered_sum<T>(s, stream);
  }

  template <typename T>
  Status copy_windows(const T* x, const Chunk& chunk) const {
    if (chunks.identity || taps == 0) return {};
    x += chunk.image * p.C * p.H * p.W;
    Windows g = {};
    g.x = x_strides(p);
    g.H = int(p.H), g.W = int(p.W);
    g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w);
    g.pad_h = int(p.pad_h), g.pad_w = int(p.pad_w);
    g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    g.first = int(chunk.first), g.pixels = int(chunk.size());
    g.rows = int(p.groups * (nchw ? taps : chunk.size()));
    g.pitch = int(round_up(nchw ? chunk.size() : taps, 4));
    g.taps = int(taps);
    g.image = Divisor(plane), g.row = Divisor(p.Q), g.row_quads = Divisor(g.pitch / 4);
    g.filter = Divisor(p.R * p.S), g.filter_row = Divisor(p.S), g.channels = Divisor(channels);
    T* windows = reinterpret_cast<T*>(matrix);
    const dim3 grid(blocks_of(int64_t(g.rows) * (g.pitch / 4)));
    if (nchw) return launch("im2col_nchw_kernel", im2col_nchw_kernel<T>, grid, dim3(256), 0, stream, g, x, windows);
    const bool quads = channels % 4 == 0 && is_aligned(x, quad_alignment<T>);
    return launch("im2col_nhwc_kernel", im2col_nhwc_kernel<T>, grid, dim3(256), 0, stream, g, quads, x, windows);
  }

  // Rows of dx from the windows of a chunk of y.
  template <typename T>
  Status gather_windows(T* dx, const Chunk& rows, const Chunk& chunk) const {
    const int64_t pitch = round_up(nchw ? chunk.size() : taps, 4);
    Gather g = {};
    g.x = x_strides(p);
    g.count = int(rows.size() * p.C * p.W);
    g.first_row = int(rows.first), g.rows = int(rows.count);
    g.first = int(chunk.first), g.P = int(p.P), g.Q = int(p.Q);
    g.R = int(p.R), g.S = int(p.S), g.pad_h = int(p.pad_h), g.pad_w = int(p.pad_w);
    g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    g.pixel_stride = nchw ? 1 : pitch;
    g.tap_stride = nchw ? pitch : channels;
    if (nchw)
      g.channel = {p.R * p.S * pitch, 0, {}};
    else
      g.channel = {1, chunk.size() * pitch, Divisor(channels)};
    g.nchw = nchw;
    g.channels = Divisor(p.C), g.part = Divisor(rows.count), g.width = Divisor(p.W);
    g.stride_h = Divisor(p.stride_h), g.stride_w = Divisor(p.stride_w);
    return launch("col2im_kernel", col2im_kernel<T>, dim3(blocks_of(g.count)), dim3(256), 0, stream, g,
                  reinterpret_cast<const acc_t<T>*>(matrix), dx + rows.image * p.C * p.H * p.W);
  }
};

template <typename T>
Status fprop(const Im2col& c, const T* x, const T* w, const T* bias, T* y) {
  return c.for_each_chunk(c.plane, [&](const Chunk& chunk) {
    if (Status s = c.copy_windows(x, chunk); !s.ok()) return s;
    return c.multiply_into(
        y, chunk, c.p.K, bias,
        c.product(c.filters_by_taps(w), c.filters, c.pixels_by_taps(x, chunk), chunk.size(), c.taps));
  });
}

template <typename T>
Status dgrad(const Im2col& c, const T* dy, const T* w, T* dx) {
  const Conv2dProblem& p = c.p;
  const auto product = [&](const Chunk& chunk) {
    return c.product(Im2col::transposed(c.filters_by_taps(w)), c.taps, c.pixels_by_channels(dy, chunk, p.K),
                     chunk.size(), c.filters);
  };
  if (c.chunks.identity)
    return c.for_each_chunk(
        c.plane, [&](const Chunk& chunk) { return c.multiply_into<T>(dx, chunk, p.C, nullptr, product(chunk)); });
  return c.for_each_chunk(p.H, [&](const Chunk& rows) {
    // The rows of y whose windows reach these rows of dx; those of several images must be whole to be counted through.
    const int64_t last = (rows.first + rows.count - 1 + p.pad_h) / p.stride_h;
    const int64_t first = pieces(std::max<int64_t>(rows.first + p.pad_h - (p.R - 1) * p.dilation_h, 0), p.stride_h);
    Chunk chunk = {rows.image, rows.images, 0, c.plane};
    if (rows.count < p.H) {
      chunk.first = std::min(first, p.P) * p.Q;
      chunk.count = std::max<int64_t>(std::min(last + 1, p.P) * p.Q - chunk.first, 0);
    }
    Gemm g = product(chunk);
    g.partial = c.matrix;
    if (Status s = run_gemm<T>(g, c.plan.tile_m, 1, c.stream); !s.ok()) return s;
    return c.gather_windows(dx, rows, chunk);
  });
}

template <typename T>
Status wgrad(const Im2col& c, const T* dy, const T* x, T* dw, T* db) {
  Gemm g = {};
  g.m = int(c.filters);
  g.n = int(c.taps);
  g.batches = int(c.p.groups);
  g.partial = c.sums;
  g.row_sums = db ? c.row_sums : nullptr;
  const auto add_chunk = [&](const Chunk& chunk) {
    if (Status s = c.copy_windows(x, chunk); !s.ok()) return s;
    g.a = Im2col::transposed(c.pixels_by_channels(dy, chunk, c.p.K));
    g.b = Im2col::transposed(c.pixels_by_taps(x, chunk));
    g.k = int(chunk.size());
    Status s = run_gemm<T>(g, c.plan.tile_m, c.plan.split, c.stream);
    g.accumulate = true;
    return s;
  };
  Status s = c.p.N * c.plane > 0 ? c.for_each_chunk(c.plane, add_chunk)
                                 : run_gemm<T>(g, c.plan.tile_m, c.plan.split, c.stream);  // an empty sum
  if (!s.ok()) return s;

  g.c = dw;
  g.c_m.stride = c.taps;
  g.c_n.stride = 1;
  g.c_batch_stride = c.filters * c.taps;
  if (s = c.add_splits<T>(g); !s.ok() || !db) return s;
  return ordered_sum<T>(c.row_sums, c.plan.split, c.p.K, db, c.stream);
}

}  // namespace

Status conv2d_im2col_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w,
                           const void* bias, void* y, void* workspace, Stream stream) {
  if (p.y_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return fprop(Im2col(p, plan, workspace, stream), static_cast<const T*>(x), static_cast<const T*>(w),
                 static_cast<const T*>(bias), static_cast<T*>(y));
  });
}

Status conv2d_im2col_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
                           void* workspace, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return dgrad(Im2col(p, plan, workspace, stream), static_cast<const T*>(dy), static_cast<const T*>(w),
                 static_cast<T*>(dx));
  });
}

Status conv2d_im2col_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dw,
                           void* db, void* workspace, Stream stream) {
  if (p.w_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return wgrad(Im2col(p, plan, workspace, stream), static_cast<const T*>(dy), static_cast<const T*>(x),
                 static_cast<T*>(dw), static_cast<T*>(db));
  });
}

}  // namespace fastconv::cuda
