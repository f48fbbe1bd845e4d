// BatchNorm: y = (x − mean)·invstd·weight + bias, with the mean and 1/sqrt(var + eps) of each channel's N·L values.
// Backward, with x̂ = (x − mean)·invstd and ⟨·⟩ the mean over a channel:
//   dbias = Σ dy, dweight = Σ dy·x̂, dx = weight·invstd·(dy − ⟨dy⟩ − x̂·⟨dy·x̂⟩), or weight·invstd·dy in evaluation.
//
// Three kernels: gather the sums of each channel; merge the pieces of those that were split; apply them to each value.
// Moments are gathered in batches of values in registers: the batch's mean and Σ (x − mean)² by two passes, then merged
// into the thread's, the threads' into the block's, the blocks' into the channel's, always in the same order (Chan,
// Golub, LeVeque: Updating formulae, 1979). Equal values come out with a variance of exactly zero. Where squares
// overflow float, the block gathers once more in float64.
#include <algorithm>
#include <type_traits>

#include "channel_tiles.cuh"

namespace fastconv::cuda {
namespace {

constexpr int merge_threads = 64;

// Blocks on a multiprocessor, for the compiler's choice of registers.
template <int channels>
constexpr int least_blocks = channels > 1 ? 2 : 3;

// ---- Sums of values and their reduction ----

template <typename A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;  // m2 = Σ (x − mean)²

  // share = other.count / (count + other.count)
  __device__ __forceinline__ void merge(A other_count, A other_mean, A other_m2, A share) {
    const A delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * (delta * (count * share));  // in this order a count of 0 stops an overflow
    count += other_count;
  }
  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count > 0) merge(other.count, other.mean, other.m2, other.count / (count + other.count));
  }
  __device__ __forceinline__ Moments<double> in_double() const { return {double(count), double(mean), double(m2)}; }
};

template <typename A>
struct GradientSums {
  A dy = 0, dyx = 0;  // Σ dy, Σ dy·x̂

  __device__ __forceinline__ void merge(const GradientSums& other) {
    dy += other.dy;
    dyx += other.dyx;
  }
  __device__ __forceinline__ GradientSums<double> in_double() const { return {double(dy), double(dyx)}; }
};

// Of n values, a power of two, in pairs: equal values add up exactly.
template <int n, typename A>
__device__ __forceinline__ A sum_of(const A* values) {
  if constexpr (n == 1)
    return values[0];
  else
    return sum_of<n / 2>(values) + sum_of<n / 2>(values + n / 2);
}

template <int n, typename A>
__device__ __forceinline__ void merge_batch(Moments<A>& moments, const A (&values)[n], A share) {
  const A mean = sum_of<n>(values) * (A(1) / n);
  A squares[n];
#pragma unroll
  for (int i = 0; i < n; ++i) squares[i] = (values[i] - mean) * (values[i] - mean);
  moments.merge(A(n), mean, sum_of<n>(squares), share);
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

// ---- What becomes of a channel's sums; S is the type of the statistics ----

template <typename S>
struct FinishMoments {
  const S *weight, *bias;
  S *running_mean, *running_var, *mean, *invstd, *shift;
  double momentum, eps;
  double* moments;  // not null: rows of `channels` counts, means and m2 are asked for, and nothing else
  int64_t channels;

  __device__ __forceinline__ void operator()(int64_t c, const Moments<double>& m) const {
    if (moments) {
      moments[c] = m.count;
      moments[channels + c] = m.mean;
      moments[2 * channels + c] = m.m2;
      return;
    }
    const double var = m.m2 / m.count, scale = 1 / sqrt(var + eps);
    mean[c] = S(m.mean);
    invstd[c] = S(scale);
    // The part of the mean that S could not hold goes into the shift.
    const double rest = double(S(m.mean)) - m.mean;
    shift[c] = S((bias ? double(bias[c]) : 0) + rest * scale * (weight ? double(weight[c]) : 1));
    if (!running_mean) return;
    const double unbiased = m.count > 1 ? m.m2 / (m.count - 1) : 0;
    running_mean[c] = S((1 - momentum) * double(running_mean[c]) + momentum * m.mean);
    running_var[c] = S((1 - momentum) * double(running_var[c]) + momentum * unbiased);
  }
};

template <typename S>
struct FinishGradients {
  S *dweight, *dbias;
  __device__ __forceinline__ void operator()(int64_t c, const GradientSums<double>& sums) const {
    dweight[c] = S(sums.dyx);
    dbias[c] = S(sums.dy);
  }
};

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

// ---- Gathering ----

template <typename T>
constexpr bool squares_overflow = std::is_same_v<T, float> || std::is_same_v<T, __nv_bfloat16>;

template <typename T, int channels>
using MomentsMemory =
    Shared<block_threads* int(std::max(channels * sizeof(Moments<acc_t<T>>), sizeof(Moments<double>)))>;

template <typename T, int width, int channels>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_gather(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ x,
                      FinishMoments<acc_t<T>> finish, Moments<double>* pieces) {
  using A = acc_t<T>;
  auto& shared = shared_memory<MomentsMemory<T, channels>>();
  const ChannelTile<width, channels> tile(tiles);
  Moments<A> moments[channels];
  visit(tile, x, [&](const auto& batch) {
    constexpr int n = batch.items * width / channels;
    const A share = n / (moments[0].count + n);
#pragma unroll
    for (int k = 0; k < channels; ++k) {
      A values[n];
      values_of<channels>(batch, k, values);
      merge_batch(moments[k], values, share);
    }
  });
  reduce_block(moments, tiles.slot_bits, reinterpret_cast<Moments<A>*>(shared.memory));
  bool finite = true;  // a thread that was merged into another had a part of what that one has
#pragma unroll
  for (int k = 0; k < channels; ++k) finite = finite && moments[k].m2 < A(INFINITY);
  if (!squares_overflow<T> || __syncthreads_and(finite)) {
    if (tile.is_first_of_channel()) {
#pragma unroll
      for (int k = 0; k < channels; ++k)
        hand_over(moments[k].in_double(), tile.c + k, tiles, tile.piece, finish, pieces);
    }
    return;
  }
  if constexpr (squares_overflow<T>) {  // or x has infinities or NaNs, and so will the statistics
#pragma unroll 1
    for (int k = 0; k < channels; ++k) {
      // redundant: with several channels a thread, reduce_block first writes elsewhere than where it last read
      __syncthreads();
      Moments<double> exact[1];
      for (ChannelTile<width, channels> items = tile; items.left > 0; items.advance())
#pragma unroll 1
        for (int j = 0; j < width / channels; ++j) {
          const double value[1] = {double(to_acc(x[items.at + j + k]))};
          merge_batch(exact[0], value, 1 / (exact[0].count + 1));
        }
      reduce_block(exact, tiles.slot_bits, reinterpret_cast<Moments<double>*>(shared.memory));
      if (tile.is_first_of_channel()) hand_over(exact[0], tile.c + k, tiles, tile.piece, finish, pieces);
    }
  }
}

template <typename T, int width, int channels>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_gather_gradients(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ dy,
                                const T* __restrict__ x, const acc_t<T>* __restrict__ mean,
                                const acc_t<T>* __restrict__ invstd, FinishGradients<acc_t<T>> finish,
                                GradientSums<double>* pieces) {
  using A = acc_t<T>;
  auto& shared = shared_memory<ReductionMemory<GradientSums<A>, channels, block_threads>>();
  const ChannelTile<width, channels> tile(tiles);
  GradientSums<A> sums[channels];
  A center[channels], scale[channels];
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    center[k] = tile.c < tiles.C ? mean[tile.c + k] : A(0);
    scale[k] = tile.c < tiles.C ? invstd[tile.c + k] : A(0);
  }
  visit(tile, dy, [&](const auto& batch) {
    auto x_batch = batch;  // the same items of x
    constexpr int items = batch.items, n = items * width / channels;
#pragma unroll
    for (int i = 0; i < items; ++i) x_batch.v[i] = load_vec<width>(x + batch.at[i]);
#pragma unroll
    for (int k = 0; k < channels; ++k) {
      A gradients[n], products[n];
      values_of<channels>(batch, k, gradients);
      values_of<channels>(x_batch, k, products);
#pragma unroll
      for (int i = 0; i < n; ++i) products[i] = (products[i] - center[k]) * scale[k] * gradients[i];
      sums[k].merge({sum_of<n>(gradients), sum_of<n>(products)});
    }
  });
  reduce_block(sums, tiles.slot_bits, reinterpret_cast<GradientSums<A>*>(shared.memory));
  if (!tile.is_first_of_channel()) return;
#pragma unroll
  for (int k = 0; k < channels; ++k) hand_over(sums[k].in_double(), tile.c + k, tiles, tile.piece, finish, pieces);
}

// ---- Applying ----

// y = (x − mean)·scale + shift, where scale = weight·invstd, or weight/sqrt(var + eps) if invstd is null. Null pointers
// are zeros, a null weight ones.
template <typename S>
struct Affine {
  const S *mean, *invstd, *var, *weight, *shift;
  S eps;
};

template <typename T, int width, int channels>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_apply(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ x, Affine<acc_t<T>> affine,
                     T* __restrict__ y) {
  using A = acc_t<T>;
  const ChannelTile<width, channels> tile(tiles);
  if (tile.left <= 0) return;
  A center[channels], scale[channels], shift[channels];
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    const int64_t c = tile.c + k;
    center[k] = affine.mean ? affine.mean[c] : A(0);
    scale[k] = affine.invstd ? affine.invstd[c] : 1 / sqrt(affine.var[c] + affine.eps);
    if (affine.weight) scale[k] *= affine.weight[c];
    shift[k] = affine.shift ? affine.shift[c] : A(0);
  }
  visit(tile, x, [&](const auto& batch) {
    constexpr int items = batch.items;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      Vec<T, width> out;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const int k = channels == 1 ? 0 : j;
        out.at[j] = from_acc<T>((to_acc(batch.v[i].at[j]) - center[k]) * scale[k] + shift[k]);
      }
      store_vec(y + batch.at[i], out);
    }
  });
}

template <typename S>
struct Gradient {
  const S *mean, *invstd, *weight, *dweight, *dbias;
  S inverse_count;
};

template <typename T, int width, int channels>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_apply_gradients(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ dy,
                               const T* __restrict__ x, Gradient<acc_t<T>> g, T* __restrict__ dx) {
  using A = acc_t<T>;
  const ChannelTile<width, channels> tile(tiles);
  if (tile.left <= 0) return;
  A center[channels], invstd[channels], scale[channels], mean_dy[channels], mean_dyx[channels];
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    const int64_t c = tile.c + k;
    center[k] = g.mean[c];
    invstd[k] = g.invstd[c];
    scale[k] = g.weight ? g.weight[c] * invstd[k] : invstd[k];
    mean_dy[k] = g.dbias[c] * g.inverse_count;
    mean_dyx[k] = g.dweight[c] * g.inverse_count;
  }
  visit(tile, dy, [&](const auto& batch) {
    constexpr int items = batch.items;
    Vec<T, width> x_values[items];
#pragma unroll
    for (int i = 0; i < items; ++i) x_values[i] = load_vec<width>(x + batch.at[i]);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      Vec<T, width> out;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const int k = channels == 1 ? 0 : j;
        const A x_hat = (to_acc(x_values[i].at[j]) - center[k]) * invstd[k];
        out.at[j] = from_acc<T>(scale[k] * (to_acc(batch.v[i].at[j]) - mean_dy[k] - x_hat * mean_dyx[k]));
      }
      store_vec(dx + batch.at[i], out);
    }
  });
}

// ---- Launching ----

template <typename Value, typename Finish>
Status merge(const BatchNormProblem& p, const BatchNormPlan& plan, const Value* pieces, const Finish& finish,
             Stream stream) {
  if (plan.split == 1) return {};
  return launch("batch_norm_merge", batch_norm_merge<Value, Finish>, dim3(unsigned(p.C)), dim3(merge_threads),
                sizeof(ReductionMemory<Value, 1, merge_threads>), stream, pieces, plan.split, finish);
}

template <typename T>
Status gather(const BatchNormProblem& p, const BatchNormPlan& plan, const T* x, const FinishMoments<acc_t<T>>& finish,
              Moments<double>* pieces, Stream stream) {
  const Status status = choose_width<T>(p, {x}, [&](auto width, auto channels) {
    const ChannelTiles tiles = tiles_of<width, channels>(p, plan.split);
    return launch("batch_norm_gather", batch_norm_gather<T, width, channels>, grid_of<width, channels>(tiles),
                  dim3(block_threads), sizeof(MomentsMemory<T, channels>), stream, tiles, x, finish, pieces);
  });
  return status.ok() ? merge(p, plan, pieces, finish, stream) : status;
}

template <typename T>
Status apply_gradients(const BatchNormProblem& p, const T* dy, const T* x, const Gradient<acc_t<T>>& g, T* dx,
                       Stream stream) {
  return choose_width<T>(p, {dy, x, dx}, [&](auto width, auto channels) {
    const ChannelTiles tiles = tiles_of<width, channels>(p, 0);
    return launch("batch_norm_apply_gradients", batch_norm_apply_gradients<T, width, channels>,
                  grid_of<width, channels>(tiles), dim3(block_threads), 0, stream, tiles, dy, x, g, dx);
  });
}

template <typename T>
Status apply(const BatchNormProblem& p, const T* x, const Affine<acc_t<T>>& affine, T* y, Stream stream) {
  return choose_width<T>(p, {x, y}, [&](auto width, auto channels) {
    const ChannelTiles tiles = tiles_of<width, channels>(p, 0);
    return launch("batch_norm_apply", batch_norm_apply<T, width, channels>, grid_of<width, channels>(tiles),
                  dim3(block_threads), 0, stream, tiles, x, affine, y);
  });
}

}  // namespace

Status batch_norm_train(const BatchNormProblem& p, const BatchNormPlan& plan, const void* x, const void* weight,
                        const void* bias, void* running_mean, void* running_var, double momentum, double eps, void* y,
                        void* mean, void* invstd, void* workspace, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    auto* pieces = static_cast<Moments<double>*>(workspace);
    S* shift = reinterpret_cast<S*>(pieces + (plan.split > 1 ? plan.split * p.C : 0));
    const FinishMoments<S> finish{static_cast<const S*>(weight),
                                  static_cast<const S*>(bias),
                                  static_cast<S*>(running_mean),
                                  static_cast<S*>(running_var),
                                  static_cast<S*>(mean),
                                  static_cast<S*>(invstd),
                                  shift,
                                  momentum,
                                  eps,
                                  nullptr,
                                  p.C};
    const Status status = gather(p, plan, static_cast<const T*>(x), finish, pieces, stream);
    if (!status.ok()) return status;
    const Affine<S> affine{finish.mean, finish.invstd, nullptr, finish.weight, shift, S(0)};
    return apply(p, static_cast<const T*>(x), affine, static_cast<T*>(y), stream);
  });
}

Status batch_norm_eval(const BatchNormProblem& p, const BatchNormPlan&, const void* x, const void* weight,
                       const void* bias, const void* mean, const void* var, double eps, void* y, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    const Affine<S> affine{static_cast<const S*>(mean), nullptr,
                           static_cast<const S*>(var),  static_cast<const S*>(weight),
                           static_cast<const S*>(bias), S(eps)};
    return apply(p, static_cast<const T*>(x), affine, static_cast<T*>(y), stream);
  });
}

Status batch_norm_backward(const BatchNormProblem& p, const BatchNormPlan& plan, const void* dy, const void* x,
                           const void* weight, const void* mean, const void* invstd, bool training, void* dx,
                           void* dweight, void* dbias, void* workspace, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    const T *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x);
    T* dx_t = static_cast<T*>(dx);
    const Gradient<S> g{static_cast<const S*>(mean),    static_cast<const S*>(invstd), static_cast<const S*>(weight),
                        static_cast<const S*>(dweight), static_cast<const S*>(dbias),  S(1.0 / double(p.count()))};
    const FinishGradients<S> finish{static_cast<S*>(dweight), static_cast<S*>(dbias)};
    auto* pieces = static_cast<GradientSums<double>*>(workspace);
    Status status = choose_width<T>(p, {dy, x}, [&](auto width, auto channels) {
      const ChannelTiles tiles = tiles_of<width, channels>(p, plan.split);
      return launch("batch_norm_gather_gradients", batch_norm_gather_gradients<T, width, channels>,
                    grid_of<width, channels>(tiles), dim3(block_threads),
                    sizeof(ReductionMemory<GradientSums<S>, channels, block_threads>), stream, tiles, dy_t, x_t, g.mean,
                    g.invstd, finish, pieces);
    });
    if (status.ok()) status = merge(p, plan, pieces, finish, stream);
    if (!status.ok() || !dx) return status;
    if (!training) return apply(p, dy_t, {nullptr, g.invstd, nullptr, g.weight, nullptr, S(0)}, dx_t, stream);
    return apply_gradients(p, dy_t, x_t, g, dx_t, stream);
  });
}

Status batch_norm_moments(const BatchNormProblem& p, const BatchNormPlan& plan, const void* x, double* moments,
                          void* workspace, Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    FinishMoments<acc_t<T>> finish{};
    finish.moments = moments;
    finish.channels = p.C;
    return gather(p, plan, static_cast<const T*>(x), finish, static_cast<Moments<double>*>(workspace), stream);
  });
}

Status batch_norm_backward_apply(const BatchNormProblem& p, const BatchNormPlan&, const void* dy, const void* x,
                                 const void* weight, const void* mean, const void* invstd, const void* means, void* dx,
                                 Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    const S *mean_dy = static_cast<const S*>(means), *mean_dyx = mean_dy + p.C;
    const Gradient<S> g{static_cast<const S*>(mean),
                        static_cast<const S*>(invstd),
                        static_cast<const S*>(weight),
                        mean_dyx,
                        mean_dy,
                        S(1)};
    return apply_gradients(p, static_cast<const T*>(dy), static_cast<const T*>(x), g, static_cast<T*>(dx), stream);
  });
}

}  // namespace fastconv::cuda
