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
#include "batch_norm_nchw.h"
#include "batch_norm_nhwc.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t max_group = 16;           // NCHW: channels of a task
constexpr int64_t wide_channels = 1024;     // NHWC: of a task
constexpr int64_t finish_channels = 64;     // of a task that merges pieces
constexpr int64_t eval_elements = 1 << 18;  // of a task in evaluation, where each task derives its coefficients

bool is_nhwc(const BatchNormProblem& p) { return p.L == 1 || (p.layout == Layout::NHWC && p.C > 1); }

// Piece s of `count` things: [begin, end).
struct Piece {
  int64_t begin, end;
};
FASTCONV_INLINE Piece piece_of(int64_t count, int64_t split, int64_t s) {
  return {count / split * s + min_of(s, count % split), count / split * (s + 1) + min_of(s + 1, count % split)};
}

// The workspace of a split: two sums of every piece, then three coefficients a channel.
template <typename S>
struct Workspace {
  double* sums;
  int64_t C;
  S* coefficients;
  Workspace(void* memory, const BatchNormProblem& p, const BatchNormPlan& plan)
      : sums(static_cast<double*>(memory)), C(p.C), coefficients(reinterpret_cast<S*>(sums + 2 * plan.split * p.C)) {}
  double* first(int64_t s) const { return sums + 2 * s * C; }
  double* second(int64_t s) const { return sums + (2 * s + 1) * C; }
  S* coefficient(int i) const { return coefficients + i * C; }
};

// Channels of a task in NCHW. Small planes are applied together with their neighbours in memory.
int64_t group_channels(const BatchNormProblem& p) {
  return max_of<int64_t>(min_of(min_of<int64_t>(max_group, 2048 / p.L), p.C / 32), 1);
}

template <typename T>
void train_nchw(const BatchNormProblem& p, const T* x, T* y, const Channels<acc_t<T>>& channels,
                const Parallel& parallel) {
  const Chunks chunks = chunks_of(p);
  const int64_t stride = p.C * p.L, group = group_channels(p);
  for_each_task(parallel, ceil_div(p.C, group), [&](int, int64_t task) {
    const int64_t first = task * group, n = min_of(group, p.C - first);
    Affine<acc_t<T>> affine[max_group];
    for (int64_t c = 0; c < n; ++c) {
      Moments moments{};
      for (int64_t i = 0; i < chunks.count; ++i) merge_chunk(moments, x + (first + c) * p.L, stride, chunks[i]);
      affine[c] = finish(channels, first + c, moments);
    }
    for_each_plane(chunks, [&](const Chunk& plane) {
      for (int64_t c = 0; c < n; ++c)
        apply_chunk(x + (first + c) * p.L, y + (first + c) * p.L, stride, plane, affine[c]);
    });
  });
}

template <typename T>
void backward_nchw(const BatchNormProblem& p, const T* dy, const T* x, T* dx, const Gradients<acc_t<T>>& g,
                   const Parallel& parallel) {
  const Chunks chunks = chunks_of(p);
  const int64_t stride = p.C * p.L, group = group_channels(p);
  for_each_task(parallel, ceil_div(p.C, group), [&](int, int64_t task) {
    const int64_t first = task * group, n = min_of(group, p.C - first);
    Backward<acc_t<T>> b[max_group];
    for (int64_t c = 0; c < n; ++c) {
      const int64_t begin = (first + c) * p.L;
      Sums sums{};
      for (int64_t i = 0; i < chunks.count; ++i)
        add_gradient_sums(sums, dy + begin, x + begin, stride, chunks[i], g.mean[first + c]);
      b[c] = finish(g, first + c, sums.s1, sums.s2, p.count());
    }
    if (!dx) return;
    for_each_plane(chunks, [&](const Chunk& plane) {
      for (int64_t c = 0; c < n; ++c) {
        const int64_t begin = (first + c) * p.L;
        if (g.training)
          apply_gradient(dy + begin, x + begin, dx + begin, stride, plane, g.mean[first + c], g.invstd[first + c],
                         b[c]);
        else
          apply_chunk(dy + begin, dx + begin, stride, plane, {0, b[c].dy_scale, 0});
      }
    });
  });
}

// The pieces that a split cuts each channel into: of the rows in NHWC, where a task has many channels, and of the
// chunks in NCHW, where it has one.
struct Pieces {
  bool nhwc;
  int64_t C, rows, split;
  Chunks chunks;
  Pieces(const BatchNormProblem& p, const BatchNormPlan& plan)
      : nhwc(is_nhwc(p)), C(p.C), rows(p.count()), split(plan.split), chunks(chunks_of(p)) {}
  Piece operator[](int64_t s) const { return piece_of(nhwc ? rows : chunks.count, split, s); }
  int64_t count(int64_t s) const {
    const Piece piece = (*this)[s];
    if (nhwc) return piece.end - piece.begin;
    int64_t count = 0;
    for (int64_t i = piece.begin; i < piece.end; ++i) count += chunks[i].count();
    return count;
  }
};

// Runs rows(s, begin, end, first, n) for n channels in NHWC, chunks(s, begin, end, c) for one in NCHW, for every piece.
template <typename Rows, typename OneChannel>
void for_each_piece(const Pieces& pieces, const Parallel& parallel, const Rows& rows, const OneChannel& chunks) {
  const int64_t width = pieces.nhwc ? wide_channels : 1, ranges = ceil_div(pieces.C, width);
  for_each_task(parallel, pieces.split * ranges, [&](int, int64_t task) {
    const int64_t s = task / ranges, first = task % ranges * width;
    const Piece piece = pieces[s];
    if (pieces.nhwc)
      rows(s, piece.begin, piece.end, first, min_of(width, pieces.C - first));
    else
      chunks(s, piece.begin, piece.end, first);
  });
}

// The mean and m2 of every piece of every channel.
template <typename T>
void gather_moments(const BatchNormProblem& p, const Pieces& pieces, const T* x, const Workspace<acc_t<T>>& workspace,
                    const Parallel& parallel) {
  const int64_t C = p.C, stride = p.C * p.L;
  for_each_piece(
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

template <typename T>
void train_split(const BatchNormProblem& p, const BatchNormPlan& plan, const T* x, T* y,
                 const Channels<acc_t<T>>& channels, void* memory, const Parallel& parallel) {
  const Workspace<acc_t<T>> workspace(memory, p, plan);
  const Pieces pieces(p, plan);
  acc_t<T>*scale = workspace.coefficient(0), *shift = workspace.coefficient(1);
  const int64_t C = p.C, stride = p.C * p.L;
  gather_moments(p, pieces, x, workspace, parallel);
  for_each_merged(pieces, workspace, parallel, [&](int64_t c, const Moments& moments) {
    const Affine<acc_t<T>> a = finish(channels, c, moments);
    scale[c] = a.scale;
    shift[c] = a.shift;
  });
  for_each_piece(
      pieces, parallel,
      [&](int64_t, int64_t begin, int64_t end, int64_t first, int64_t n) {
        apply_rows(x + begin * C + first, y + begin * C + first, C, end - begin, n, channels.mean + first,
                   scale + first, shift + first);
      },
      [&](int64_t, int64_t begin, int64_t end, int64_t c) {
        for (int64_t i = begin; i < end; ++i)
          apply_chunk(x + c * p.L, y + c * p.L, stride, pieces.chunks[i], {channels.mean[c], scale[c], shift[c]});
      });
}

template <typename T>
void backward_split(const BatchNormProblem& p, const BatchNormPlan& plan, const T* dy, const T* x, T* dx,
                    const Gradients<acc_t<T>>& g, void* memory, const Parallel& parallel) {
  const Workspace<acc_t<T>> workspace(memory, p, plan);
  const Pieces pieces(p, plan);
  acc_t<T>*dy_scale = workspace.coefficient(0), *x_scale = workspace.coefficient(1), *shift = workspace.coefficient(2);
  const int64_t C = p.C, stride = p.C * p.L;
  for_each_piece(
      pieces, parallel,
      [&](int64_t s, int64_t begin, int64_t end, int64_t first, int64_t n) {
        row_gradient_sums(dy + begin * C + first, x + begin * C + first, C, end - begin, n, g.mean + first,
                          workspace.first(s) + first, workspace.second(s) + first);
      },
      [&](int64_t s, int64_t begin, int64_t end, int64_t c) {
        Sums sums{};
        for (int64_t i = begin; i < end; ++i)
          add_gradient_sums(sums, dy + c * p.L, x + c * p.L, stride, pieces.chunks[i], g.mean[c]);
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
  for_each_piece(
      pieces, parallel,
      [&](int64_t, int64_t begin, int64_t end, int64_t first, int64_t n) {
        const int64_t i = begin * C + first, rows = end - begin;
        if (g.training)
          apply_gradient_rows(dy + i, x + i, dx + i, C, rows, n, g.mean + first, g.invstd + first, dy_scale + first,
                              x_scale + first, shift + first);
        else
          apply_rows(dy + i, dx + i, C, rows, n, shift + first, dy_scale + first, shift + first);  // shift is zero
      },
      [&](int64_t, int64_t begin, int64_t end, int64_t c) {
        const Backward<acc_t<T>> b{dy_scale[c], x_scale[c], shift[c]};
        const int64_t first = c * p.L;
        for (int64_t i = begin; i < end; ++i)
          if (g.training)
            apply_gradient(dy + first, x + first, dx + first, stride, pieces.chunks[i], g.mean[c], g.invstd[c], b);
          else
            apply_chunk(dy + first, dx + first, stride, pieces.chunks[i], {0, b.dy_scale, 0});
      });
}

// In NCHW calls f(c, begin, chunk), the chunk in the plane that begins there: a whole plane, or a part of a long one.
template <typename F>
void for_each_unit(const BatchNormProblem& p, const Parallel& parallel, const F& f) {
  const int64_t a_plane = ceil_div(p.L, chunk_elements), units = p.N * p.C * a_plane;
  const int64_t units_per_task = ceil_div(eval_elements, min_of(p.L, chunk_elements));
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    for (int64_t i = task * units_per_task; i < min_of((task + 1) * units_per_task, units); ++i) {
      const int64_t plane = i / a_plane, begin = i % a_plane * chunk_elements;
      f(plane % p.C, plane * p.L, Chunk{0, 1, begin, min_of(begin + chunk_elements, p.L)});
    }
  });
}

// In NHWC calls f(first, n, row, rows) for some rows of n channels.
template <typename F>
void for_each_rows(const BatchNormProblem& p, const Parallel& parallel, const F& f) {
  const int64_t C = p.C, blocks = ceil_div(C, wide_channels);
  const int64_t rows_per_task = ceil_div(eval_elements, min_of(C, wide_channels));
  for_each_task(parallel, ceil_div(p.count(), rows_per_task) * blocks, [&](int, int64_t task) {
    const int64_t first = task % blocks * wide_channels, n = min_of(wide_channels, C - first);
    const int64_t row = task / blocks * rows_per_task, rows = min_of(rows_per_task, p.count() - row);
    f(first, n, row, rows);
  });
}

template <typename T>
void eval_nchw(const BatchNormProblem& p, const T* x, T* y, const Parameters<acc_t<T>>& parameters,
               const Parallel& parallel) {
  for_each_unit(p, parallel, [&](int64_t c, int64_t begin, const Chunk& chunk) {
    apply_chunk(x + begin, y + begin, 0, chunk, affine_of(parameters, c));
  });
}

template <typename T>
void eval_nhwc(const BatchNormProblem& p, const T* x, T* y, const Parameters<acc_t<T>>& parameters,
               const Parallel& parallel) {
  for_each_rows(p, parallel, [&](int64_t first, int64_t n, int64_t row, int64_t rows) {
    acc_t<T> center[wide_channels], scale[wide_channels], shift[wide_channels];
    for (int64_t i = 0; i < n; ++i) {
      const Affine<acc_t<T>> a = affine_of(parameters, first + i);
      center[i] = a.center;
      scale[i] = a.scale;
      shift[i] = a.shift;
    }
    const int64_t begin = row * p.C + first;
    apply_rows(x + begin, y + begin, p.C, rows, n, center, scale, shift);
  });
}

template <typename T>
void apply_gradients_nchw(const BatchNormProblem& p, const T* dy, const T* x, T* dx, const GradientMeans<acc_t<T>>& g,
                          const Parallel& parallel) {
  for_each_unit(p, parallel, [&](int64_t c, int64_t begin, const Chunk& chunk) {
    apply_gradient(dy + begin, x + begin, dx + begin, 0, chunk, g.mean[c], g.invstd[c], backward_of(g, c));
  });
}

template <typename T>
void apply_gradients_nhwc(const BatchNormProblem& p, const T* dy, const T* x, T* dx, const GradientMeans<acc_t<T>>& g,
                          const Parallel& parallel) {
  for_each_rows(p, parallel, [&](int64_t first, int64_t n, int64_t row, int64_t rows) {
    acc_t<T> dy_scale[wide_channels], x_scale[wide_channels], shift[wide_channels];
    for (int64_t i = 0; i < n; ++i) {
      const Backward<acc_t<T>> b = backward_of(g, first + i);
      dy_scale[i] = b.dy_scale;
      x_scale[i] = b.x_scale;
      shift[i] = b.shift;
    }
    const int64_t begin = row * p.C + first;
    apply_gradient_rows(dy + begin, x + begin, dx + begin, p.C, rows, n, g.mean + first, g.invstd + first, dy_scale,
                        x_scale, shift);
  });
}

template <typename T>
const acc_t<T>* in(const void* values) {
  return static_cast<const acc_t<T>*>(values);
}
template <typename T>
acc_t<T>* out(void* values) {
  return static_cast<acc_t<T>*>(values);
}

void train(const BatchNormProblem& p, const BatchNormPlan& plan, const void* x, const void* weight, const void* bias,
           void* running_mean, void* running_var, double momentum, double eps, void* y, void* mean, void* invstd,
           void* workspace, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Channels<acc_t<T>> channels{
        in<T>(weight), in<T>(bias), out<T>(running_mean), out<T>(running_var), out<T>(mean), out<T>(invstd),
        momentum,      eps};
    const T* x_t = static_cast<const T*>(x);
    T* y_t = static_cast<T*>(y);
    if (is_nhwc(p) || plan.split > 1) return train_split(p, plan, x_t, y_t, channels, workspace, parallel);
    train_nchw(p, x_t, y_t, channels, parallel);
  });
}

void eval(const BatchNormProblem& p, const BatchNormPlan&, const void* x, const void* weight, const void* bias,
          const void* mean, const void* var, double eps, void* y, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Parameters<acc_t<T>> parameters{in<T>(weight), in<T>(bias), in<T>(mean), in<T>(var), eps};
    if (is_nhwc(p)) return eval_nhwc(p, static_cast<const T*>(x), static_cast<T*>(y), parameters, parallel);
    eval_nchw(p, static_cast<const T*>(x), static_cast<T*>(y), parameters, parallel);
  });
}

void backward(const BatchNormProblem& p, const BatchNormPlan& plan, const void* dy, const void* x, const void* weight,
              const void* mean, const void* invstd, bool training, void* dx, void* dweight, void* dbias,
              void* workspace, const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Gradients<acc_t<T>> g{in<T>(weight), in<T>(mean), in<T>(invstd), training, out<T>(dweight), out<T>(dbias)};
    const T *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x);
    T* dx_t = static_cast<T*>(dx);
    if (is_nhwc(p) || plan.split > 1) return backward_split(p, plan, dy_t, x_t, dx_t, g, workspace, parallel);
    backward_nchw(p, dy_t, x_t, dx_t, g, parallel);
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
extern const BatchNormKernels batch_norm;
const BatchNormKernels batch_norm = {train, eval, backward, moments, apply_gradients};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
