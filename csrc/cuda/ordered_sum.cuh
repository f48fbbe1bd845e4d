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
  bool relu;  // of that
};

// A block's threads: 32 neighbouring results times eight runs of the splits.
constexpr int sum_results = 32, sum_runs = 8;

template <typename T>
struct OrderedSumShared {
  acc_t<T> run[sum_runs][sum_results];
};

template <typename T>
__global__ void __launch_bounds__(sum_results* sum_runs) ordered_sum_kernel(const __grid_constant__ OrderedSum s) {
  auto& shared = shared_memory<OrderedSumShared<T>>();
  const int result = threadIdx.x % sum_results, run = threadIdx.x / sum_results;
  const int64_t i = int64_t(blockIdx.x) * sum_results + result;
  const bool inside = i < s.batches * s.m * s.n;
  const int64_t row = i / s.n, n = i - row * s.n, batch = row / s.m, m = row - batch * s.m;
  acc_t<T> sum = 0;
  if (inside) {
    const acc_t<T>* partial = static_cast<const acc_t<T>*>(s.partial) + row * s.pitch + n;
    const int64_t split_stride = s.batches * s.m * s.pitch;
    const int end = s.splits * (run + 1) / sum_runs;
#pragma unroll 4
    for (int split = s.splits * run / sum_runs; split < end; ++split) sum += partial[split * split_stride];
  }
  shared.run[run][result] = sum;
  __syncthreads();
  if (run != 0 || !inside) return;
#pragma unroll
  for (int j = 1; j < sum_runs; ++j) sum += shared.run[j][result];
  if (s.bias)
    sum +=
        to_acc(static_cast<const T*>(s.bias)[batch * s.bias_batch_stride + m * s.bias_m_stride + n * s.bias_n_stride]);
  static_cast<T*>(s.out)[batch * s.out_batch_stride + s.out_m.offset(m) + s.out_n.offset(n)] =
      from_acc<T>(s.relu ? relu(sum) : sum);
}

template <typename T>
Status ordered_sum(const OrderedSum& s, Stream stream) {
  const int64_t count = s.batches * s.m * s.n;
  if (count == 0) return {};
  return launch("ordered_sum_kernel", ordered_sum_kernel<T>, dim3(unsigned(ceil_div(count, sum_results))),
                dim3(sum_results * sum_runs), sizeof(OrderedSumShared<T>), stream, s);
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
