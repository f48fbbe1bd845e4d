// BatchNorm: what the forward and the backward kernels share.
#pragma once

#include "channel_tiles.cuh"

namespace fastconv::cuda {

// dx = dy·invstd·weight, where weight may be null.
Status batch_norm_scale(const BatchNormProblem&, const void* dy, const void* invstd, const void* weight, void* dx,
                        Stream);

namespace {

// What follows x̂·weight + bias: nothing, ReLU, or a residual and then ReLU.
enum class Act { none, relu, add_relu };

// Calls run with that as a constant. other: the residual in forward, y in backward, or null.
template <typename Run>
Status choose_act(const BatchNormProblem& p, const void* other, const Run& run) {
  if (!p.relu) return run(std::integral_constant<Act, Act::none>());
  if (!other) return run(std::integral_constant<Act, Act::relu>());
  return run(std::integral_constant<Act, Act::add_relu>());
}

constexpr int merge_threads = 64;

// Blocks on a multiprocessor, for the compiler's choice of registers.
template <int channels>
constexpr int least_blocks = channels > 1 ? 2 : 3;

// Of n values, a power of two, in pairs: equal values add up exactly.
template <int n, typename A>
__device__ __forceinline__ A sum_of(const A* values) {
  if constexpr (n == 1)
    return values[0];
  else
    return sum_of<n / 2>(values) + sum_of<n / 2>(values + n / 2);
}

// Merges the values of the block's threads into those of its first 2^slot_bits threads: thread t takes in t + half, and
// t + half is done. Before the memory is used again, the block must meet.
template <int n, typename Value>
__device__ __forceinline__ void reduce_block(Value (&values)[n], int slot_bits, Value* shared) {
  const unsigned t = threadIdx.x, threads = blockDim.x;
  for (unsigned half = threads / 2; half >> slot_bits > 0; half /= 2) {
    if (t >= half && t < 2 * half) {  // redundant: the others' values are not read, or are there already
#pragma unroll
      for (int i = 0; i < n; ++i) shared[i * threads + t] = values[i];
    }
    __syncthreads();
    if (t < half) {
#pragma unroll
      for (int i = 0; i < n; ++i) values[i].merge(shared[i * threads + t + half]);
    }
  }
}

template <int bytes>
struct alignas(16) Shared {
  unsigned char memory[bytes];
};
template <typename Value, int n, int threads>
using ReductionMemory = Shared<n * threads* int(sizeof(Value))>;

// Finishes a channel that has one piece, or leaves its piece for batch_norm_merge.
template <typename Value, typename Finish>
__device__ __forceinline__ void hand_over(const Value& value, int64_t c, const ChannelTiles& tiles, unsigned piece,
                                          const Finish& finish, Value* pieces) {
  if (tiles.pieces == 1)
    finish(c, value);
  else
    pieces[c * tiles.pieces + piece] = value;
}

// A block a channel: each thread merges pieces in order, then the threads are merged.
template <typename Value, typename Finish>
__global__ void __launch_bounds__(merge_threads, 8) batch_norm_merge(const Value* pieces, int split, Finish finish) {
  auto& shared = shared_memory<ReductionMemory<Value, 1, merge_threads>>();
  const int64_t c = blockIdx.x;
  Value value[1] = {};
  for (int piece = threadIdx.x; piece < split; piece += merge_threads) value[0].merge(pieces[c * split + piece]);
  reduce_block(value, 0, reinterpret_cast<Value*>(shared.memory));
  if (threadIdx.x == 0) finish(c, value[0]);
}

template <typename Value, typename Finish>
Status merge(const BatchNormProblem& p, const BatchNormPlan& plan, const Value* pieces, const Finish& finish,
             Stream stream) {
  if (plan.split == 1) return {};
  return launch("batch_norm_merge", batch_norm_merge<Value, Finish>, dim3(unsigned(p.C)), dim3(merge_threads),
                sizeof(ReductionMemory<Value, 1, merge_threads>), stream, pieces, plan.split, finish);
}

}  // namespace
}  // namespace fastconv::cuda
