// BatchNorm: y = (x − mean)·invstd·weight + bias, with the mean and 1/sqrt(var + eps) of each channel's N·L values.
// Backward, with x̂ = (x − mean)·invstd and ⟨·⟩ the mean over a channel:
//   dbias = Σ dy, dweight = Σ dy·x̂, dx = weight·invstd·(dy − ⟨dy⟩ − x̂·⟨dy·x̂⟩), or weight·invstd·dy in evaluation.
//
// A channel's statistics are gathered chunk by chunk, and the chunks merged in order, in float64 (Chan, Golub, LeVeque:
// Updating formulae and a pairwise algorithm for computing sample variances, 1979). A chunk is summed around the mean
// of a few samples: s1 = Σ (x − shift), s2 = Σ (x − shift)². Where that was so far from the mean that s2 − s1²/n would
// cancel, it is summed again around its mean; where squares overflow float, once more in float64. Equal values come out
// with a variance of exactly zero.
//
// NCHW: x[n][c][l]. A chunk is a part of a plane, or some small planes. A task gathers a channel and applies it while
// its values are still in the cache.
// NHWC: x[row][c]. A chunk is some rows. Pieces of all values are gathered apart, then merged, then applied, in three
// rounds of tasks; likewise NCHW where there are few channels. All of it depends on the problem only.
#include "batch_norm_pieces.h"

namespace fastconv::cpu {
namespace {

// That a call reads and writes.
template <Act act>
constexpr int tensors = act == Act::add_relu ? 3 : 2;

template <Act act, typename T>
void train_nchw(const BatchNormProblem& p, const T* x, const T* residual, T* y, const Channels<acc_t<T>>& channels,
                const Parallel& parallel) {
  const Chunks chunks = chunks_of(p);
  const int64_t stride = p.C * p.L, group = group_channels(p);
  const bool past_caches = goes_past_caches(p, tensors<act>);
  for_each_task(parallel, ceil_div(p.C, group), [&](int, int64_t task) {
    const int64_t first = task * group, n = min_of(group, p.C - first);
    Affine<acc_t<T>> affine[max_group];
    if (p.L < short_plane) prefetch_planes(x + first * p.L, stride, p.N, n * p.L);
    for (int64_t c = 0; c < n; ++c) {
      Moments moments{};
      for (int64_t i = 0; i < chunks.count; ++i) merge_chunk(moments, x + (first + c) * p.L, stride, chunks[i]);
      affine[c] = finish(channels, first + c, moments);
    }
    for_each_plane(chunks, [&](const Chunk& plane) {
      for (int64_t c = 0; c < n; ++c) {
        const int64_t begin = (first + c) * p.L;
        apply_chunk<act>(x + begin, residual + begin, y + begin, stride, plane, affine[c], past_caches);
      }
    });
  });
}

// The mean and m2 of every piece of every channel.
template <typename T>
void gather_moments(const BatchNormProblem& p, const Pieces& pieces, const T* x, const Workspace<acc_t<T>>& workspace,
                    const Parallel& parallel) {
  const int64_t C = p.C, stride = p.C * p.L;
  for_each_piece<false>(
      pieces, parallel,
      [&](int64_t s, int64_t begin, int64_t end, int64_t first, int64_t n) {
        row_moments(x + begin * C + first, C, end - begin, n, workspace.first(s) + first, workspace.second(s) + first);
      },
      [&](int64_t s, int64_t begin, int64_t end, int64_t c) {
        Moments moments{};
        for (int64_t i = begin; i < end; ++i) merge_chunk(moments, x + c * p.L, stride, pieces.chunks[i]);
        workspace.first(s)[c] = moments.mean;
        workspace.second(s)[c] = moments.m2;
      });
}

// Calls f(c, moments) for every channel, with those of its pieces merged.
template <typename S, typename F>
void for_each_merged(const Pieces& pieces, const Workspace<S>& workspace, const Parallel& parallel, const F& f) {
  for_each_task(parallel, ceil_div(pieces.C, finish_channels), [&](int, int64_t task) {
    const int64_t begin = task * finish_channels, n = min_of(finish_channels, pieces.C - begin);
    Moments moments[finish_channels] = {};
    for (int64_t s = 0; s < pieces.split; ++s)
      if (const double count = double(pieces.count(s)))
        for (int64_t i = 0; i < n; ++i)
          merge(moments[i], count, workspace.first(s)[begin + i], workspace.second(s)[begin + i]);
    for (int64_t i = 0; i < n; ++i) f(begin + i, moments[i]);
  });
}

template <Act act, typename T>
void train_split(const BatchNormProblem& p, const BatchNormPlan& plan, const T* x, const T* residual, T* y,
                 const Channels<acc_t<T>>& channels, void* memory, const Parallel& parallel) {
  const Workspace<acc_t<T>> workspace(memory, p, plan);
  const Pieces pieces(p, plan);
  acc_t<T>*scale = workspace.coefficient(0), *shift = workspace.coefficient(1);
  const int64_t C = p.C, stride = p.C * p.L;
  const bool past_caches = goes_past_caches(p, tensors<act>);
  gather_moments(p, pieces, x, workspace, parallel);
  for_each_merged(pieces, workspace, parallel, [&](int64_t c, const Moments& moments) {
    const Affine<acc_t<T>> a = finish(channels, c, moments);
    scale[c] = a.scale;
    shift[c] = a.shift;
  });
  for_each_piece<true>(
      pieces, parallel,
      [&](int64_t, int64_t begin, int64_t end, int64_t first, int64_t n) {
        const int64_t i = begin * C + first;
        apply_rows<act>(x + i, residual + i, y + i, C, end - begin, n,
                        AffineRow<acc_t<T>>{channels.mean, scale, shift}.from(first), past_caches);
      },
      [&](int64_t, int64_t begin, int64_t end, int64_t c) {
        for (int64_t i = begin; i < end; ++i)
          apply_chunk<act>(x + c * p.L, residual + c * p.L, y + c * p.L, stride, pieces.chunks[i],
                           {channels.mean[c], scale[c], shift[c]}, past_caches);
      });
}

template <Act act, typename T>
void eval_nchw(const BatchNormProblem& p, const T* x, const T* residual, T* y, const Parameters<acc_t<T>>& parameters,
               const Parallel& parallel) {
  const bool past_caches = goes_past_caches(p, tensors<act>);
  for_each_unit(p, parallel, [&](int64_t c, int64_t begin, const Chunk& chunk) {
    apply_chunk<act>(x + begin, residual + begin, y + begin, 0, chunk, affine_of(parameters, c), past_caches);
  });
}

template <Act act, typename T>
void eval_nhwc(const BatchNormProblem& p, const T* x, const T* residual, T* y, const Parameters<acc_t<T>>& parameters,
               const Parallel& parallel) {
  const bool past_caches = goes_past_caches(p, tensors<act>);
  for_each_rows(p, parallel, [&](int64_t first, int64_t n, int64_t row, int64_t rows) {
    acc_t<T> center[wide_channels], scale[wide_channels], shift[wide_channels];
    for (int64_t i = 0; i < n; ++i) {
      const Affine<acc_t<T>> a = affine_of(parameters, first + i);
      center[i] = a.center;
      scale[i] = a.scale;
      shift[i] = a.shift;
    }
    const int64_t begin = row * p.C + first;
    apply_rows<act>(x + begin, residual + begin, y + begin, p.C, rows, n, {center, scale, shift}, past_caches);
  });
}

void train(const BatchNormProblem& p, const BatchNormPlan& plan, const void* x, const void* weight, const void* bias,
           void* running_mean, void* running_var, double momentum, double eps, const void* residual, void* y,
           void* mean, void* invstd, void* affine, void* workspace, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Channels<acc_t<T>> channels{in<T>(weight),
                                      in<T>(bias),
                                      out<T>(running_mean),
                                      out<T>(running_var),
                                      out<T>(mean),
                                      out<T>(invstd),
                                      out<T>(affine),
                                      p.C,
                                      momentum,
                                      eps};
    const T *x_t = static_cast<const T*>(x), *residual_t = static_cast<const T*>(residual);
    T* y_t = static_cast<T*>(y);
    dispatch_act(act_of(p, residual), [&](auto act) {
      if (is_nhwc(p) || plan.split > 1)
        return train_split<act>(p, plan, x_t, residual_t, y_t, channels, workspace, parallel);
      train_nchw<act>(p, x_t, residual_t, y_t, channels, parallel);
    });
  });
}

void eval(const BatchNormProblem& p, const BatchNormPlan&, const void* x, const void* weight, const void* bias,
          const void* mean, const void* var, double eps, const void* residual, void* y, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Parameters<acc_t<T>> parameters{in<T>(weight), in<T>(bias), in<T>(mean), in<T>(var), eps};
    const T *x_t = static_cast<const T*>(x), *residual_t = static_cast<const T*>(residual);
    T* y_t = static_cast<T*>(y);
    dispatch_act(act_of(p, residual), [&](auto act) {
      if (is_nhwc(p)) return eval_nhwc<act>(p, x_t, residual_t, y_t, parameters, parallel);
      eval_nchw<act>(p, x_t, residual_t, y_t, parameters, parallel);
    });
  });
}

void moments(const BatchNormProblem& p, const BatchNormPlan& plan, const void* x, double* moments, void* memory,
             const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  double *mean = moments + p.C, *m2 = mean + p.C;
  for (int64_t c = 0; c < p.C; ++c) moments[c] = double(p.count());
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Pieces pieces(p, plan);
    // What is gathered of a single piece is what is asked for.
    const Workspace<acc_t<T>> workspace(plan.split > 1 ? memory : mean, p, plan);
    gather_moments(p, pieces, static_cast<const T*>(x), workspace, parallel);
    if (plan.split == 1) return;
    for_each_merged(pieces, workspace, parallel, [&](int64_t c, const Moments& merged) {
      mean[c] = merged.mean;
      m2[c] = merged.m2;
    });
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const BatchNormKernels batch_norm;
const BatchNormKernels batch_norm = {train, eval, moments};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
