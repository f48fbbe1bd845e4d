// BatchNorm: y = (x − mean)·invstd·weight + bias, with the mean and 1/sqrt(var + eps) of each channel's N·L values.
// and then, if asked for, a residual and ReLU. The backward pass is in batch_norm_gradients.cu.
//
// Three kernels: gather the sums of each channel; merge the pieces of those that were split; apply them to each value.
// Moments are gathered in batches of values in registers: the batch's mean and Σ (x − mean)² by two passes, then merged
// into the thread's, the threads' into the block's, the blocks' into the channel's, always in the same order (Chan,
// Golub, LeVeque: Updating formulae, 1979). Equal values come out with a variance of exactly zero. Where squares
// overflow float, the block gathers once more in float64.
#include <algorithm>
#include <type_traits>

#include "batch_norm_sums.cuh"

namespace fastconv::cuda {
namespace {

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

template <int n, typename A>
__device__ __forceinline__ void merge_batch(Moments<A>& moments, const A (&values)[n], A share) {
  const A mean = sum_of<n>(values) * (A(1) / n);
  A squares[n];
#pragma unroll
  for (int i = 0; i < n; ++i) squares[i] = (values[i] - mean) * (values[i] - mean);
  moments.merge(A(n), mean, sum_of<n>(squares), share);
}

template <typename S>
struct FinishMoments {
  const S *weight, *bias;
  S *running_mean, *running_var, *mean, *invstd;
  S *scale, *shift;  // scale may be null
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
    const double var = m.m2 / m.count, inverse = 1 / sqrt(var + eps);
    mean[c] = S(m.mean);
    invstd[c] = S(inverse);
    if (scale) scale[c] = weight ? weight[c] * invstd[c] : invstd[c];
    // The part of the mean that S could not hold goes into the shift.
    const double rest = double(S(m.mean)) - m.mean;
    shift[c] = S((bias ? double(bias[c]) : 0) + rest * inverse * (weight ? double(weight[c]) : 1));
    if (!running_mean) return;
    const double unbiased = m.count > 1 ? m.m2 / (m.count - 1) : 0;
    running_mean[c] = S((1 - momentum) * double(running_mean[c]) + momentum * m.mean);
    running_var[c] = S((1 - momentum) * double(running_var[c]) + momentum * unbiased);
  }
};

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

// y = (x − mean)·scale + shift, where scale = weight·invstd, or weight/sqrt(var + eps) if invstd is null. Null pointers
// are zeros, a null weight ones.
template <typename S>
struct Affine {
  const S *mean, *invstd, *var, *weight, *shift;
  S eps;
};

template <typename T, int width, int channels, Act act>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_apply(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ x, Affine<acc_t<T>> affine,
                     const T* __restrict__ residual, T* __restrict__ y) {
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
    [[maybe_unused]] Vec<T, width> add[items];
    if constexpr (act == Act::add_relu) {
#pragma unroll
      for (int i = 0; i < items; ++i) add[i] = load_vec<width>(residual + batch.at[i]);
    }
#pragma unroll
    for (int i = 0; i < items; ++i) {
      Vec<T, width> out;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const int k = channels == 1 ? 0 : j;
        A z = (to_acc(batch.v[i].at[j]) - center[k]) * scale[k] + shift[k];
        if constexpr (act == Act::add_relu) z += to_acc(add[i].at[j]);
        out.at[j] = from_acc<T>(act == Act::none ? z : relu(z));
      }
      store_vec(y + batch.at[i], out);
    }
  });
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
Status apply(const BatchNormProblem& p, const T* x, const Affine<acc_t<T>>& affine, const T* residual, T* y,
             Stream stream) {
  return choose_width<T>(p, {x, residual, y}, [&](auto width, auto channels) {
    const ChannelTiles tiles = tiles_of<width, channels>(p, 0);
    return choose_act(p, residual, [&](auto act) {
      return launch("batch_norm_apply", batch_norm_apply<T, width, channels, act>, grid_of<width, channels>(tiles),
                    dim3(block_threads), 0, stream, tiles, x, affine, residual, y);
    });
  });
}

}  // namespace

Status batch_norm_train(const BatchNormProblem& p, const BatchNormPlan& plan, const void* x, const void* weight,
                        const void* bias, void* running_mean, void* running_var, double momentum, double eps,
                        const void* residual, void* y, void* mean, void* invstd, void* affine, void* workspace,
                        Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    auto* pieces = static_cast<Moments<double>*>(workspace);
    S* scale = static_cast<S*>(affine);
    S* shift = scale ? scale + p.C : reinterpret_cast<S*>(pieces + (plan.split > 1 ? plan.split * p.C : 0));
    const FinishMoments<S> finish{static_cast<const S*>(weight),
                                  static_cast<const S*>(bias),
                                  static_cast<S*>(running_mean),
                                  static_cast<S*>(running_var),
                                  static_cast<S*>(mean),
                                  static_cast<S*>(invstd),
                                  scale,
                                  shift,
                                  momentum,
                                  eps,
                                  nullptr,
                                  p.C};
    const Status status = gather(p, plan, static_cast<const T*>(x), finish, pieces, stream);
    if (!status.ok()) return status;
    const Affine<S> coefficients{finish.mean, finish.invstd, nullptr, finish.weight, shift, S(0)};
    return apply(p, static_cast<const T*>(x), coefficients, static_cast<const T*>(residual), static_cast<T*>(y),
                 stream);
  });
}

Status batch_norm_eval(const BatchNormProblem& p, const BatchNormPlan&, const void* x, const void* weight,
                       const void* bias, const void* mean, const void* var, double eps, const void* residual, void* y,
                       Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    const Affine<S> affine{static_cast<const S*>(mean), nullptr,
                           static_cast<const S*>(var),  static_cast<const S*>(weight),
                           static_cast<const S*>(bias), S(eps)};
    return apply(p, static_cast<const T*>(x), affine, static_cast<const T*>(residual), static_cast<T*>(y), stream);
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

Status batch_norm_scale(const BatchNormProblem& problem, const void* dy, const void* invstd, const void* weight,
                        void* dx, Stream stream) {
  BatchNormProblem p = problem;
  p.relu = false;
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    const Affine<S> affine{nullptr, static_cast<const S*>(invstd), nullptr, static_cast<const S*>(weight), nullptr,
                           S(0)};
    return apply<T>(p, static_cast<const T*>(dy), affine, nullptr, static_cast<T*>(dx), stream);
  });
}

}  // namespace fastconv::cuda
