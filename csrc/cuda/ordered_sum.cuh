// Adds up partial results in the order of their splits: what makes a split contraction the same in every run.
#pragma once

#include "index.cuh"

namespace fastconv::cuda {

// out(batch, m, n) = bias + Σ_split partial[split][batch][m][n], where a row of the partial sums is `pitch` long.
// A flat array of n sums has one batch and one row.
struct OrderedSum {
  const void* partial;  // of the accumulation type
  int splits;
  int64_t batches, m, n, pitch;
  void* out;
  Index out_m, out_n;
  int64_t out_batch_stride;
  const void* bias;  // may be null
  int64_t bias_batch_stride, bias_m_stride, bias_n_stride;
};

template <typename T>
__global__ void ordered_sum_kernel(const __grid_constant__ OrderedSum s) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.batches * s.m * s.n) return;
  const int64_t row = i / s.n, n = i - row * s.n, batch = row / s.m, m = row - batch * s.m;
  const acc_t<T>* partial = static_cast<const acc_t<T>*>(s.partial) + row * s.pitch + n;
  acc_t<T> sum = partial[0];
  for (int split = 1; split < s.splits; ++split) sum += partial[split * s.batches * s.m * s.pitch];
  if (s.bias)
    sum += to_acc(
        static_cast<const T*>(s.bias)[batch * s.bias_batch_stride + m * s.bias_m_stride + n * s.bias_n_stride]);
  static_cast<T*>(s.out)[batch * s.out_batch_stride + s.out_m.offset(m) + s.out_n.offset(n)] = from_acc<T>(sum);
}

template <typename T>
Status ordered_sum(const OrderedSum& s, Stream stream) {
  const int64_t count = s.batches * s.m * s.n;
  if (count == 0) return {};
  return launch("ordered_sum_kernel", ordered_sum_kernel<T>, dim3(unsigned(ceil_div(count, 256))), dim3(256), 0,
                stream, s);
}

// out[i] = Σ_split partial[split][i]
template <typename T>
Status ordered_sum(const void* partial, int splits, int64_t n, void* out, Stream stream) {
  OrderedSum s = {};
  s.partial = partial, s.splits = splits;
  s.batches = s.m = 1, s.n = s.pitch = n;
  s.out = out, s.out_n.stride = 1;
  return ordered_sum<T>(s, stream);
}

}  // namespace fastconv::cuda
