// Implicit GEMM: a convolution as a product with a matrix of windows that is never stored. For one group:
//
//   C[m][n] = Σ_k windows(m, k) · matrix(k, n)
//
//           m                  n         k                     windows of   matrix   C
//   fprop   pixel (n, p, q)    filter    tap (c, r, s)         x            w        y
//   dgrad   pixel (n, h, w)    channel   tap (filter, r, s)    dy           w        dx
//   wgrad   tap (c, r, s)      filter    pixel (n, p, q)       x            dy       dw
//
// m and k have three digits each, in the order in which they lie in memory. Where an element lies is linear in them:
// fprop's window starts at the row p·stride_h − pad_h of image n, its tap r is r·dilation_h rows further. So the place
// of windows(m, k) is the sum of one that m gives and one that k gives; outside of the image the element is zero.
#pragma once

#include "../plan/conv2d_implicit_gemm.h"
#include "index.cuh"

namespace fastconv::cuda {

// i = fast + fast.d · (middle + middle.d · slow)
struct Radix {
  Divisor fast, middle;
};
struct Digits {
  int fast, middle, slow;
};
__device__ __forceinline__ Digits digits_of(const Radix& radix, int i) {
  int fast = i;
  int middle = radix.fast.split(fast);
  const int slow = radix.middle.split(middle);
  return {fast, middle, slow};
}

// A place in a tensor, or the way between two: elements, and the rows and columns of an image among them.
struct Place {
  int64_t offset;
  int h, w;
};

// How far one more of each digit leads.
struct Places {
  Place fast, middle, slow;
};
__device__ __forceinline__ Place place_of(const Places& one, const Digits& i) {
  return {i.fast * one.fast.offset + i.middle * one.middle.offset + i.slow * one.slow.offset,
          i.fast * one.fast.h + i.middle * one.middle.h + i.slow * one.slow.h,
          i.fast * one.fast.w + i.middle * one.middle.w + i.slow * one.slow.w};
}

// The same where there are no edges to mind.
struct Offsets {
  int64_t fast, middle, slow;
};
__device__ __forceinline__ int64_t offset_of(const Offsets& one, const Digits& i) {
  return i.fast * one.fast + i.middle * one.middle + i.slow * one.slow;
}

// `along` an index: its neighbours are neighbours in memory. quads: four of them, from a multiple of four on, are
// inside together and a vector (load_quad).
struct ImplicitGemm {
  int m, n, k, groups;
  Radix m_digits, k_digits;

  const void* windows;
  Place first;  // of m = k = 0
  Places windows_m, windows_k;
  int H, W;               // of an image
  int64_t windows_group;  // from one group to the next
  bool windows_along_k, windows_quads;

  const void* matrix;
  int64_t matrix_n;
  Offsets matrix_k;
  int64_t matrix_group;
  bool matrix_along_k, matrix_quads;

  void* out;
  Offsets out_m;
  int64_t out_n, out_group;
  bool out_along_m, out_quads;
  const void* bias;  // of the groups' n; may be null
  bool relu;         // after the bias
};

// Address of windows(m, k), null where it is zero. `windows` is the group's.
template <typename T>
__device__ __forceinline__ const T* window(const ImplicitGemm& g, const T* windows, int m, int k) {
  if (m >= g.m || k >= g.k) return nullptr;
  const Place of_m = place_of(g.windows_m, digits_of(g.m_digits, m));
  const Place of_k = place_of(g.windows_k, digits_of(g.k_digits, k));
  const int h = g.first.h + of_m.h + of_k.h, w = g.first.w + of_m.w + of_k.w;
  if (unsigned(h) >= unsigned(g.H) || unsigned(w) >= unsigned(g.W)) return nullptr;
  return windows + (g.first.offset + of_m.offset + of_k.offset);
}

// The same of matrix(k, n).
template <typename T>
__device__ __forceinline__ const T* matrix_element(const ImplicitGemm& g, const T* matrix, int k, int n) {
  if (n >= g.n || k >= g.k) return nullptr;
  return matrix + (n * g.matrix_n + offset_of(g.matrix_k, digits_of(g.k_digits, k)));
}

// What becomes of a sum before it is stored.
template <typename T>
__device__ __forceinline__ T finished(const ImplicitGemm& g, int group, int n, T sum) {
  if (g.bias) sum += static_cast<const T*>(g.bias)[group * g.n + n];
  return g.relu ? relu(sum) : sum;
}

// sums += column · row, of the rows m … m + 3 and m + half … and the columns n … and n + half ….
template <typename T>
__device__ __forceinline__ void multiply_quads(T (&sums)[8][8], const T* windows, const T* matrix, int m, int n,
                                               int half) {
  T column[8], row[8];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Quad<T> of_m = load_quad(windows + m + h * half), of_n = load_quad(matrix + n + h * half);
#pragma unroll
    for (int j = 0; j < 4; ++j) column[h * 4 + j] = of_m.at[j], row[h * 4 + j] = of_n.at[j];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[i][j] += column[i] * row[j];
  }
}

// Where a block's results lie: of all m, or of those of a phase of the strides.
template <typename T>
struct OutputTile {
  T* data;  // of the group
  Radix m_digits;
  int m_end, group;
};

// Stores the sums of those rows and columns.
template <typename T>
__device__ __forceinline__ void store_sums(const ImplicitGemm& g, const OutputTile<T>& out, T (&sums)[8][8], int m,
                                           int n, int half) {
  // Lines of the output run along the second index of `sums`.
  if (g.out_along_m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < i; ++j) {
        const T sum = sums[i][j];
        sums[i][j] = sums[j][i];
        sums[j][i] = sum;
      }
    }
  }
  const int line0 = g.out_along_m ? n : m, lines = g.out_along_m ? g.n : out.m_end;
  const int first0 = g.out_along_m ? m : n, end = g.out_along_m ? out.m_end : g.n;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int line = line0 + i / 4 * half + i % 4;
    if (line >= lines) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first = first0 + h * half;
      const auto address = [&](int at) {
        const int64_t m_offset = offset_of(g.out_m, digits_of(out.m_digits, g.out_along_m ? at : line));
        return out.data + m_offset + (g.out_along_m ? line : at) * g.out_n;
      };
      Quad<T> quad;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < end) quad.at[j] = finished(g, out.group, g.out_along_m ? line : first + j, sums[i][h * 4 + j]);
      if (g.out_quads && first < end) {
        store_quad(address(first), quad);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < end) *address(first + j) = quad.at[j];
    }
  }
}

// Taps are counted as they lie in memory: s before r before c in NCHW, c before s before r in NHWC.
__host__ __device__ inline Radix tap_digits(bool nchw, int64_t channels, int64_t rows, int64_t columns) {
  // redundant: 1 is itself either way
  const auto divisor = [](int64_t d) { return Divisor(d < 1 ? 1 : d); };
  return nchw ? Radix{divisor(columns), divisor(rows)} : Radix{divisor(channels), divisor(columns)};
}

// Host: what a channel, a row and a column of taps are worth, in that order.
template <typename Ordered, typename V>
Ordered in_order(bool nchw, const V& channel, const V& row, const V& column) {
  return nchw ? Ordered{column, row, channel} : Ordered{channel, column, row};
}

// Host: whether the pixels of NCHW, or the channels of a group of NHWC, are quads.
template <typename T>
bool in_quads(const T* tensor, bool nchw, int64_t plane, int64_t channels) {
  return is_aligned(tensor, quad_alignment<T>) && (nchw ? plane : channels) % 4 == 0;
}

// Host: what fprop and wgrad share, the windows of x by pixel and by tap. p is normalized.
struct WindowsOfX {
  Radix pixel_digits, tap_digits;
  Place first;
  Places pixel, tap;
};
inline WindowsOfX windows_of_x(const Conv2dProblem& p) {
  const bool nchw = p.layout == Layout::NCHW;
  const Strides x = x_strides(p);
  const Place row = {p.dilation_h * x.h, int(p.dilation_h), 0}, column = {p.dilation_w * x.w, 0, int(p.dilation_w)};
  WindowsOfX windows;
  windows.pixel_digits = {Divisor(p.Q), Divisor(p.P)};
  windows.tap_digits = tap_digits(nchw, p.channels_per_group(), p.R, p.S);
  windows.first = {-p.pad_h * x.h - p.pad_w * x.w, int(-p.pad_h), int(-p.pad_w)};
  windows.pixel = {{p.stride_w * x.w, 0, int(p.stride_w)}, {p.stride_h * x.h, int(p.stride_h), 0}, {x.n, 0, 0}};
  windows.tap = in_order<Places>(nchw, Place{x.c, 0, 0}, row, column);
  return windows;
}

// Host: y = windows of x · w + bias. p is normalized.
template <typename T>
ImplicitGemm fprop_gemm(const Conv2dProblem& p, const T* x, const T* w, const T* bias, T* y) {
  const bool nchw = p.layout == Layout::NCHW;
  const WindowsOfX windows = windows_of_x(p);
  const Strides ys = y_strides(p), ws = w_strides(p);
  const int64_t channels = p.channels_per_group();
  ImplicitGemm g = {};
  g.m = int(p.N * p.P * p.Q), g.n = int(p.filters_per_group()), g.k = int(channels * p.R * p.S);
  g.groups = int(p.groups);
  g.m_digits = windows.pixel_digits, g.k_digits = windows.tap_digits;

  g.windows = x, g.first = windows.first, g.windows_m = windows.pixel, g.windows_k = windows.tap;
  g.H = int(p.H), g.W = int(p.W), g.windows_group = channels * x_strides(p).c;
  g.windows_along_k = !nchw;
  g.windows_quads = in_quads(x, nchw, p.H * p.W, channels) && (!nchw || is_identity(p));

  g.matrix = w, g.matrix_n = ws.n, g.matrix_k = in_order<Offsets>(nchw, ws.c, ws.h, ws.w);
  g.matrix_group = g.n * ws.n;
  g.matrix_along_k = true;
  g.matrix_quads = is_aligned(w, quad_alignment<T>) && g.k % 4 == 0;

  g.out = y, g.out_m = {ys.w, ys.h, ys.n}, g.out_n = ys.c, g.out_group = g.n * ys.c;
  g.out_along_m = nchw;
  g.out_quads = in_quads(y, nchw, p.P * p.Q, g.n);
  g.bias = bias, g.relu = p.relu;
  return g;
}

// Host: the element types that implicit GEMM multiplies on CUDA cores. The plan has refused the others.
template <typename F>
Status dispatch_implicit_gemm(DType dtype, F&& f) {
  if (dtype == DType::float32) return f(float{});
  if (dtype == DType::float64) return f(double{});
  return {"conv2d_implicit_gemm", "float16 and bfloat16 have no kernel"};
}

// Host: launches a rung's kernel, one block for tile × tile outputs of a group.
template <typename T>
Status launch_fprop(const char* name, void (*kernel)(ImplicitGemm, int, int), int tile, int threads,
                    size_t shared_bytes, const Conv2dProblem& p, const void* x, const void* w, const void* bias,
                    void* y, Stream stream) {
  if (p.y_elements() == 0) return {};
  const ImplicitGemm g = fprop_gemm(normalized(p), static_cast<const T*>(x), static_cast<const T*>(w),
                                    static_cast<const T*>(bias), static_cast<T*>(y));
  const int tiles_m = int(ceil_div(g.m, tile)), tiles_n = int(ceil_div(g.n, tile));
  const int64_t blocks = int64_t(tiles_m) * tiles_n * g.groups;
  return launch(name, kernel, dim3(unsigned(blocks)), dim3(threads), shared_bytes, stream, g, tiles_m, tiles_n);
}

}  // namespace fastconv::cuda
