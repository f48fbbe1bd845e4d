// The backward pass of BatchNorm (batch_norm.cu), with x̂ = (x − mean)·invstd and ⟨·⟩ the mean over a channel:
//   dbias = Σ dy, dweight = Σ dy·x̂, dx = weight·invstd·(dy − ⟨dy⟩ − x̂·⟨dy·x̂⟩), or weight·invstd·dy in evaluation.
// Behind a ReLU, dz takes the place of dy: dy where y was positive, 0 elsewhere. Which is known from x, or from y, as
// in csrc/cpu/batch_norm_gradients.cpp, which says why.
#include <algorithm>
#include <type_traits>

#include "batch_norm_sums.cuh"

namespace fastconv::cuda {
namespace {

template <typename A>
struct GradientSums {
  A dy = 0, dyx = 0;  // Σ dy, Σ dy·x̂

  __device__ __forceinline__ void merge(const GradientSums& other) {
    dy += other.dy;
    dyx += other.dyx;
  }
  __device__ __forceinline__ GradientSums<double> in_double() const { return {double(dy), double(dyx)}; }
};

template <typename S>
struct FinishGradients {
  S *dweight, *dbias;
  __device__ __forceinline__ void operator()(int64_t c, const GradientSums<double>& sums) const {
    dweight[c] = S(sums.dyx);
    dbias[c] = S(sums.dy);
  }
};

template <typename S>
struct Gradient {
  const S *mean, *invstd, *weight, *dweight, *dbias;
  const S* affine;  // null, or scales and then shifts
  S inverse_count;
};

// The sign of z = (x − mean)·scale + shift, computed as forward computed it.
template <typename A, int channels>
struct ReluOfX {
  A scale[channels], shift[channels];

  __device__ __forceinline__ void load(const Gradient<A>& g, int64_t c, int64_t C) {
#pragma unroll
    for (int k = 0; k < channels; ++k) {
      scale[k] = g.affine[c + k];
      shift[k] = g.affine[C + c + k];
    }
  }
  __device__ __forceinline__ bool is_closed(int k, A centred) const { return centred * scale[k] + shift[k] <= A(0); }
};

template <typename T, int width, int channels, Act act>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_gather_gradients(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ dy,
                                const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ dz,
                                const Gradient<acc_t<T>> g, FinishGradients<acc_t<T>> finish,
                                GradientSums<double>* pieces) {
  using A = acc_t<T>;
  auto& shared = shared_memory<ReductionMemory<GradientSums<A>, channels, block_threads>>();
  const ChannelTile<width, channels> tile(tiles);
  GradientSums<A> sums[channels];
  A center[channels], invstd[channels];
  ReluOfX<A, channels> gate = {};
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    center[k] = tile.c < tiles.C ? g.mean[tile.c + k] : A(0);
    invstd[k] = tile.c < tiles.C ? g.invstd[tile.c + k] : A(0);
  }
  if (act == Act::relu && tile.c < tiles.C) gate.load(g, tile.c, tiles.C);
  visit(tile, dy, [&](const auto& batch) {
    auto x_batch = batch, dz_batch = batch;  // the same items of x, and of dz
    constexpr int items = batch.items, n = items * width / channels;
#pragma unroll
    for (int i = 0; i < items; ++i) x_batch.v[i] = load_vec<width>(x + batch.at[i]);
    if constexpr (act == Act::add_relu) {
      auto y_batch = batch;
#pragma unroll
      for (int i = 0; i < items; ++i) y_batch.v[i] = load_vec<width>(y + batch.at[i]);
#pragma unroll
      for (int i = 0; i < items; ++i) {
#pragma unroll
        for (int j = 0; j < width; ++j)
          if (to_acc(y_batch.v[i].at[j]) <= A(0)) dz_batch.v[i].at[j] = from_acc<T>(A(0));
        store_vec(dz + batch.at[i], dz_batch.v[i]);
      }
    }
#pragma unroll
    for (int k = 0; k < channels; ++k) {
      A gradients[n], products[n];
      values_of<channels>(dz_batch, k, gradients);
      values_of<channels>(x_batch, k, products);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const A centred = products[i] - center[k];
        if (act == Act::relu && gate.is_closed(k, centred)) gradients[i] = A(0);
        products[i] = centred * invstd[k] * gradients[i];
      }
      sums[k].merge({sum_of<n>(gradients), sum_of<n>(products)});
    }
  });
  reduce_block(sums, tiles.slot_bits, reinterpret_cast<GradientSums<A>*>(shared.memory));
  if (!tile.is_first_of_channel()) return;
#pragma unroll
  for (int k = 0; k < channels; ++k) hand_over(sums[k].in_double(), tile.c + k, tiles, tile.piece, finish, pieces);
}

// For Act::none and relu; where add_relu has written dz, none goes on with that.
template <typename T, int width, int channels, Act act>
__global__ void __launch_bounds__(block_threads, least_blocks<channels>)
    batch_norm_apply_gradients(const __grid_constant__ ChannelTiles tiles, const T* __restrict__ dy,
                               const T* __restrict__ x, Gradient<acc_t<T>> g, T* __restrict__ dx) {
  using A = acc_t<T>;
  const ChannelTile<width, channels> tile(tiles);
  static_assert(act != Act::add_relu);
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
  ReluOfX<A, channels> gate = {};
  if (act == Act::relu) gate.load(g, tile.c, tiles.C);
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
        const A centred = to_acc(x_values[i].at[j]) - center[k], x_hat = centred * invstd[k];
        const A dz = act == Act::relu && gate.is_closed(k, centred) ? A(0) : to_acc(batch.v[i].at[j]);
        out.at[j] = from_acc<T>(scale[k] * (dz - mean_dy[k] - x_hat * mean_dyx[k]));
      }
      store_vec(dx + batch.at[i], out);
    }
  });
}

template <Act act, typename T>
Status apply_gradients(const BatchNormProblem& p, const T* dy, const T* x, const Gradient<acc_t<T>>& g, T* dx,
                       Stream stream) {
  return choose_width<T>(p, {dy, x, dx}, [&](auto width, auto channels) {
    const ChannelTiles tiles = tiles_of<width, channels>(p, 0);
    return launch("batch_norm_apply_gradients", batch_norm_apply_gradients<T, width, channels, act>,
                  grid_of<width, channels>(tiles), dim3(block_threads), 0, stream, tiles, dy, x, g, dx);
  });
}

}  // namespace

Status batch_norm_backward(const BatchNormProblem& p, const BatchNormPlan& plan, const void* dy, const void* x,
                           const void* weight, const void* mean, const void* invstd, const void* affine, const void* y,
                           bool training, void* dx, void* dweight, void* dbias, void* dz, void* workspace,
                           Stream stream) {
  if (p.x_elements() == 0) return {};
  return dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using S = acc_t<T>;
    const T *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x), *y_t = static_cast<const T*>(y);
    T *dx_t = static_cast<T*>(dx), *dz_t = static_cast<T*>(dz);
    const Gradient<S> g{static_cast<const S*>(mean),    static_cast<const S*>(invstd), static_cast<const S*>(weight),
                        static_cast<const S*>(dweight), static_cast<const S*>(dbias),  static_cast<const S*>(affine),
                        S(1.0 / double(p.count()))};
    const FinishGradients<S> finish{static_cast<S*>(dweight), static_cast<S*>(dbias)};
    auto* pieces = static_cast<GradientSums<double>*>(workspace);
    Status status = choose_width<T>(p, {dy, x, y, dz}, [&](auto width, auto channels) {
      const ChannelTiles tiles = tiles_of<width, channels>(p, plan.split);
      return choose_act(p, y, [&](auto act) {
        return launch("batch_norm_gather_gradients", batch_norm_gather_gradients<T, width, channels, act>,
                      grid_of<width, channels>(tiles), dim3(block_threads),
                      sizeof(ReductionMemory<GradientSums<S>, channels, block_threads>), stream, tiles, dy_t, x_t, y_t,
                      dz_t, g, finish, pieces);
      });
    });
    if (status.ok()) status = merge(p, plan, pieces, finish, stream);
    if (!status.ok() || !dx) return status;
    const T* gradient = y ? dz_t : dy_t;
    if (!training) return batch_norm_scale(p, gradient, g.invstd, g.weight, dx, stream);
    if (p.relu && !y) return apply_gradients<Act::relu>(p, dy_t, x_t, g, dx_t, stream);
    return apply_gradients<Act::none>(p, gradient, x_t, g, dx_t, stream);
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
                        nullptr,
                        S(1)};
    return apply_gradients<Act::none>(p, static_cast<const T*>(dy), static_cast<const T*>(x), g, static_cast<T*>(dx),
                                      stream);
  });
}

}  // namespace fastconv::cuda
