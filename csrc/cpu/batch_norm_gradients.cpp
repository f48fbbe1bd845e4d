// The backward pass of BatchNorm (batch_norm.cpp), in evaluation too, and of the ReLU behind it.
//
// With z = x̂·weight + bias (+ residual) and y = ReLU(z), dz is dy where y is positive and 0 elsewhere, and takes the
// place of dy in the formulas. Where y was positive is known
//   without a residual from the sign of z, found again from x and the affine: x is read anyway, so this moves no bytes
//     (a bit mask, written once and read twice: 1 % more of what forward and backward move in float32, 2 % in float16);
//   with a residual from y, which the next layer keeps anyway. It is read once: the first pass writes dz, which has to
//     be written as the residual's gradient, and the second reads that. So y is one of the 11 tensors that forward and
//     backward move, in every dtype. A bit mask would save most of that and cost a tensor of its own, which would have
//     to end in whole bytes for each plane or row; finding z again would keep the residual in memory and read it;
//   in evaluation from y, too, since the running statistics may have changed.
#include "batch_norm_pieces.h"

namespace fastconv::cpu {
namespace {

// That a call reads and writes.
template <Act act>
constexpr int tensors = act == Act::add_relu ? 5 : 3;

// The affine that forward applied to channel c; without a ReLU, its center alone.
template <Act act, typename S>
Affine<S> affine_of(const Gradients<S>& g, int64_t c, int64_t C) {
  if constexpr (act == Act::relu) return {g.mean[c], g.affine[c], g.affine[C + c]};
  return {g.mean[c], 0, 0};
}

// y and dz are null but for add_relu.
template <Act act, typename T>
void backward_nchw(const BatchNormProblem& p, const T* dy, const T* x, const T* y, T* dz, T* dx,
                   const Gradients<acc_t<T>>& g, const Parallel& parallel) {
  constexpr Act rest = act == Act::add_relu ? Act::none : act;  // what is left to do once dz is written
  const Chunks chunks = chunks_of(p);
  const int64_t stride = p.C * p.L, group = group_channels(p);
  const bool past_caches = goes_past_caches(p, tensors<act>);
  for_each_task(parallel, ceil_div(p.C, group), [&](int, int64_t task) {
    const int64_t first = task * group, n = min_of(group, p.C - first);
    Backward<acc_t<T>> b[max_group];
    if (p.L < short_plane) {
      prefetch_planes(x + first * p.L, stride, p.N, n * p.L);
      prefetch_planes(dy + first * p.L, stride, p.N, n * p.L);
    }
    for (int64_t c = 0; c < n; ++c) {
      const int64_t begin = (first + c) * p.L;
      Sums sums{};
      for (int64_t i = 0; i < chunks.count; ++i)
        add_gradient_sums<act>(sums, dy + begin, x + begin, y + begin, dz + begin, stride, chunks[i],
                               affine_of<act>(g, first + c, p.C));
      b[c] = finish(g, first + c, sums.s1, sums.s2, p.count());
    }
    if (!dx) return;
    const T* from = act == Act::add_relu ? dz : dy;
    for_each_plane(chunks, [&](const Chunk& plane) {
      for (int64_t c = 0; c < n; ++c) {
        const int64_t begin = (first + c) * p.L;
        if (g.training)
          apply_gradient<rest>(from + begin, x + begin, dx + begin, stride, plane, affine_of<act>(g, first + c, p.C),
                               g.invstd[first + c], b[c], past_caches);
        else
          apply_chunk(from + begin, dx + begin, stride, plane, {0, b[c].dy_scale, 0}, past_caches);
      }
    });
  });
}

template <Act act, typename T>
void backward_split(const BatchNormProblem& p, const BatchNormPlan& plan, const T* dy, const T* x, const T* y, T* dz,
                    T* dx, const Gradients<acc_t<T>>& g, void* memory, const Parallel& parallel) {
  constexpr Act rest = act == Act::add_relu ? Act::none : act;
  const Workspace<acc_t<T>> workspace(memory, p, plan);
  const Pieces pieces(p, plan);
  acc_t<T>*dy_scale = workspace.coefficient(0), *x_scale = workspace.coefficient(1), *shift = workspace.coefficient(2);
  const int64_t C = p.C, stride = p.C * p.L;
  const bool past_caches = goes_past_caches(p, tensors<act>);
  AffineRow<acc_t<T>> affine{g.mean, nullptr, nullptr};
  if (act == Act::relu) affine.scale = g.affine, affine.shift = g.affine + C;
  for_each_piece<false>(
      pieces, parallel,
      [&](int64_t s, int64_t begin, int64_t end, int64_t first, int64_t n) {
        const int64_t i = begin * C + first;
        row_gradient_sums<act>(dy + i, x + i, y + i, dz + i, C, end - begin, n, affine.from(first),
                               workspace.first(s) + first, workspace.second(s) + first);
      },
      [&](int64_t s, int64_t begin, int64_t end, int64_t c) {
        Sums sums{};
        const int64_t plane = c * p.L;
        for (int64_t i = begin; i < end; ++i)
          add_gradient_sums<act>(sums, dy + plane, x + plane, y + plane, dz + plane, stride, pieces.chunks[i],
                                 affine_of<act>(g, c, C));
        workspace.first(s)[c] = sums.s1;
        workspace.second(s)[c] = sums.s2;
      });
  for_each_task(parallel, ceil_div(C, finish_channels), [&](int, int64_t task) {
    const int64_t begin = task * finish_channels, n = min_of(finish_channels, C - begin);
    Sums sums[finish_channels] = {};
    for (int64_t s = 0; s < plan.split; ++s)
      for (int64_t i = 0; i < n; ++i) {
        sums[i].s1 += workspace.first(s)[begin + i];
        sums[i].s2 += workspace.second(s)[begin + i];
      }
    for (int64_t i = 0; i < n; ++i) {
      const Backward<acc_t<T>> b = finish(g, begin + i, sums[i].s1, sums[i].s2, p.count());
      dy_scale[begin + i] = b.dy_scale;
      x_scale[begin + i] = b.x_scale;
      shift[begin + i] = b.shift;
    }
  });
  if (!dx) return;
  const T* from = act == Act::add_relu ? dz : dy;
  for_each_piece<true>(
      pieces, parallel,
      [&](int64_t, int64_t begin, int64_t end, int64_t first, int64_t n) {
        const int64_t i = begin * C + first, rows = end - begin;
        if (g.training)
          apply_gradient_rows<rest>(from + i, x + i, dx + i, C, rows, n, affine.from(first),
                                    {g.invstd + first, dy_scale + first, x_scale + first, shift + first}, past_caches);
        else  // shift is zero
          apply_rows<Act::none, T>(from + i, nullptr, dx + i, C, rows, n,
                                   {shift + first, dy_scale + first, shift + first}, past_caches);
      },
      [&](int64_t, int64_t begin, int64_t end, int64_t c) {
        const Backward<acc_t<T>> b{dy_scale[c], x_scale[c], shift[c]};
        const int64_t first = c * p.L;
        for (int64_t i = begin; i < end; ++i)
          if (g.training)
            apply_gradient<rest>(from + first, x + first, dx + first, stride, pieces.chunks[i], affine_of<act>(g, c, C),
                                 g.invstd[c], b, past_caches);
          else
            apply_chunk(from + first, dx + first, stride, pieces.chunks[i], {0, b.dy_scale, 0}, past_caches);
      });
}

template <typename T>
void apply_gradients_nchw(const BatchNormProblem& p, const T* dy, const T* x, T* dx, const GradientMeans<acc_t<T>>& g,
                          const Parallel& parallel) {
  const bool past_caches = goes_past_caches(p, tensors<Act::none>);
  for_each_unit(p, parallel, [&](int64_t c, int64_t begin, const Chunk& chunk) {
    apply_gradient<Act::none>(dy + begin, x + begin, dx + begin, 0, chunk, {g.mean[c], 0, 0}, g.invstd[c],
                              backward_of(g, c), past_caches);
  });
}

template <typename T>
void apply_gradients_nhwc(const BatchNormProblem& p, const T* dy, const T* x, T* dx, const GradientMeans<acc_t<T>>& g,
                          const Parallel& parallel) {
  const bool past_caches = goes_past_caches(p, tensors<Act::none>);
  for_each_rows(p, parallel, [&](int64_t first, int64_t n, int64_t row, int64_t rows) {
    acc_t<T> dy_scale[wide_channels], x_scale[wide_channels], shift[wide_channels];
    for (int64_t i = 0; i < n; ++i) {
      const Backward<acc_t<T>> b = backward_of(g, first + i);
      dy_scale[i] = b.dy_scale;
      x_scale[i] = b.x_scale;
      shift[i] = b.shift;
    }
    const int64_t begin = row * p.C + first;
    apply_gradient_rows<Act::none>(dy + begin, x + begin, dx + begin, p.C, rows, n, {g.mean + first, nullptr, nullptr},
                                   {g.invstd + first, dy_scale, x_scale, shift}, past_caches);
  });
}

void backward(const BatchNormProblem& p, const BatchNormPlan& plan, const void* dy, const void* x, const void* weight,
              const void* mean, const void* invstd, const void* affine, const void* y, bool training, void* dx,
              void* dweight, void* dbias, void* dz, void* workspace, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Gradients<acc_t<T>> g{in<T>(weight), in<T>(mean),     in<T>(invstd), in<T>(affine),
                                training,      out<T>(dweight), out<T>(dbias)};
    const T *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x), *y_t = static_cast<const T*>(y);
    T *dx_t = static_cast<T*>(dx), *dz_t = static_cast<T*>(dz);
    dispatch_act(act_of(p, y), [&](auto act) {
      if (is_nhwc(p) || plan.split > 1)
        return backward_split<act>(p, plan, dy_t, x_t, y_t, dz_t, dx_t, g, workspace, parallel);
      backward_nchw<act>(p, dy_t, x_t, y_t, dz_t, dx_t, g, parallel);
    });
  });
}

void apply_gradients(const BatchNormProblem& p, const BatchNormPlan&, const void* dy, const void* x, const void* weight,
                     const void* mean, const void* invstd, const void* means, void* dx, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const GradientMeans<acc_t<T>> g{in<T>(weight), in<T>(mean), in<T>(invstd), in<T>(means), in<T>(means) + p.C};
    const T *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x);
    T* dx_t = static_cast<T*>(dx);
    if (is_nhwc(p)) return apply_gradients_nhwc(p, dy_t, x_t, dx_t, g, parallel);
    apply_gradients_nchw(p, dy_t, x_t, dx_t, g, parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const BatchNormGradientKernels batch_norm_gradients;
const BatchNormGradientKernels batch_norm_gradients = {backward, apply_gradients};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
