// Convolution, as on the first slide: every output is h = Σ x·w + b over the window it sees. One thread an output.
//
//   y[n][k][p][q] = b[k] + Σ_{c,r,s} x[n][g·C/groups + c][p·stride_h − pad_h + r·dilation_h][q·stride_w − …]
//                                    · w[k][c][r][s],    g = k / (K/groups), x = 0 in the padding.
#include "index.cuh"

namespace fastconv::cuda {
namespace {

template <typename T>
__global__ void conv2d_direct_naive_kernel(const Conv2dProblem p, const Strides xs, const Strides ws, const Strides ys,
                                           const T* x, const T* w, const T* bias, T* y) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.N * p.K * p.P * p.Q) return;
  // Neighbouring threads take neighbouring outputs in memory.
  int64_t n, k, h, v;  // the output (n, k, row h, column v)
  if (p.layout == Layout::NCHW)
    v = i % p.Q, i /= p.Q, h = i % p.P, i /= p.P, k = i % p.K, n = i / p.K;
  else
    k = i % p.K, i /= p.K, v = i % p.Q, i /= p.Q, h = i % p.P, n = i / p.P;

  const int64_t channels = p.C / p.groups, first_channel = k / (p.K / p.groups) * channels;
  acc_t<T> sum = bias ? to_acc(bias[k]) : acc_t<T>(0);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < p.R; ++r) {
      const int64_t row = h * p.stride_h - p.pad_h + r * p.dilation_h;
      if (row < 0 || row >= p.H) continue;
      for (int64_t s = 0; s < p.S; ++s) {
        const int64_t column = v * p.stride_w - p.pad_w + s * p.dilation_w;
        if (column < 0 || column >= p.W) continue;
        sum += to_acc(x[n * xs.n + (first_channel + c) * xs.c + row * xs.h + column * xs.w]) *
               to_acc(w[k * ws.n + c * ws.c + r * ws.h + s * ws.w]);
      }
    }
  }
  y[n * ys.n + k * ys.c + h * ys.h + v * ys.w] = from_acc<T>(p.relu ? relu(sum) : sum);
}

}  // namespace

Status conv2d_direct_naive_fprop(const Conv2dProblem& p, const Conv2dPlan&, const void* x, const void* w,
                                 const void* bias, void* y, void*, Stream stream) {
  if (p.y_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch("conv2d_direct_naive_kernel", conv2d_direct_naive_kernel<T>,
                  dim3(unsigned(ceil_div(p.y_elements(), 256))), dim3(256), 0, stream, p, x_strides(p), w_strides(p),
                  y_strides(p), static_cast<const T*>(x), static_cast<const T*>(w), static_cast<const T*>(bias),
                  static_cast<T*>(y));
  });
}

}  // namespace fastconv::cuda
