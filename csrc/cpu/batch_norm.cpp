// BatchNorm: y = (x − mean)·invstd·weight + bias, with the mean and 1/sqrt(var + eps) of each channel's N·L values.
// Backward, with x̂ = (x − mean)·invstd and ⟨·⟩ the mean over a channel:
//   dbias = Σ dy, dweight = Σ dy·x̂, dx = weight·invstd·(dy − ⟨dy⟩ − x̂·⟨dy·x̂⟩), or weight·invstd·dy in evaluation.
//
// A channel's statistics are gathered chunk by chunk, and the chunks merged in order, in float64 (Chan, Golub, LeVeque:
// Updating formulae, 1979). In a chunk, x is shifted by the mean of some samples: s1 = Σ (x − shift), s2 = Σ (x − shift)².
// Where that was too far from the mean, so that s2 − s1²/n would cancel, the chunk is summed again, shifted by its mean;
// and where squares overflow float, once more in float64. Equal values come out with a variance of exactly zero.
//
// NCHW: x[n][c][l]; a chunk is part of a plane, or some small planes. One task gathers a channel and applies it while its
// values are still in the cache. NHWC, and NCHW with few channels: x[row][c]; a chunk is some rows of all channels.
// Pieces of the values are gathered apart, then merged, then applied: three rounds of tasks.
#include "isa.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t chunk_elements = 4096;      // NCHW
constexpr int64_t chunk_rows = 512;           // NHWC
constexpr int64_t block_channels = 256;       // NHWC: whose sums stay in the first-level cache
constexpr int64_t finish_channels = 64;       // of a task that merges pieces
constexpr int64_t eval_elements = 1 << 17;    // of a task in evaluation, where each task derives its coefficients
constexpr int samples = 8;                    // for the shift of a chunk; a power of two, so that equal values add exactly
constexpr double worst_cancellation = 0.25;   // of s2 must be left

// A channel's values so far.
struct Moments {
  double count, mean, m2;  // m2 = Σ (x − mean)²
};
FASTCONV_INLINE void merge(Moments& a, double count, double mean, double m2) {
  const double share = count / (a.count + count), delta = mean - a.mean;
  a.mean += delta * share;
  a.m2 += m2 + delta * delta * share * a.count;
  a.count += count;
}

// Values of a chunk around a shift.
struct Sums {
  double s1, s2;
};
FASTCONV_INLINE bool is_sound(double s1, double s2, double count) {  // false for NaN and ∞ too
  return s2 - s1 * s1 / count >= worst_cancellation * s2 && s2 < __builtin_inf();
}
FASTCONV_INLINE double m2_of(double s1, double s2, double count) {
  const double m2 = s2 - s1 * s1 / count;
  return m2 < 0 ? 0 : m2;
}

// The mean of 8 values, added in pairs.
template <typename V>
FASTCONV_INLINE V mean_of(const V* v) {
  return (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) / samples;
}

// What train is given and gives back for each channel; S is float or double.
template <typename S>
struct Channels {
  const S *weight, *bias;
  S *running_mean, *running_var, *mean, *invstd;
  double momentum, eps;
};

// y = (x − center)·scale + shift
template <typename S>
struct Affine {
  S center, scale, shift;
};

template <typename S>
Affine<S> finish(const Channels<S>& channels, int64_t c, const Moments& m) {
  const double var = m.m2 / m.count, invstd = 1 / __builtin_sqrt(var + channels.eps);
  const double scale = (channels.weight ? channels.weight[c] : 1) * invstd, momentum = channels.momentum;
  channels.mean[c] = S(m.mean);
  channels.invstd[c] = S(invstd);
  if (channels.running_mean) {
    const double unbiased = m.count > 1 ? m.m2 / (m.count - 1) : 0;
    channels.running_mean[c] = S((1 - momentum) * channels.running_mean[c] + momentum * m.mean);
    channels.running_var[c] = S((1 - momentum) * channels.running_var[c] + momentum * unbiased);
  }
  // The part of the mean that S could not hold goes into the shift.
  const double rest = double(channels.mean[c]) - m.mean;
  return {channels.mean[c], S(scale), S((channels.bias ? channels.bias[c] : 0) + rest * scale)};
}

// What eval is given for each channel.
template <typename S>
struct Parameters {
  const S *weight, *bias, *mean, *var;
  double eps;
};
template <typename S>
Affine<S> affine_of(const Parameters<S>& p, int64_t c) {
  const double invstd = 1 / __builtin_sqrt(p.var[c] + p.eps);
  return {p.mean[c], S(p.weight ? p.weight[c] * invstd : invstd), p.bias ? p.bias[c] : 0};
}

// What backward is given and gives back for each channel.
template <typename S>
struct Gradients {
  const S *weight, *mean, *invstd;
  bool training;
  S *dweight, *dbias;
};

// dx = dy·dy_scale + (x − mean)·invstd·x_scale + shift
template <typename S>
struct Backward {
  S dy_scale, x_scale, shift;
};

// sum_dy = Σ dy, sum_dyx = Σ dy·(x − mean)
template <typename S>
Backward<S> finish(const Gradients<S>& g, int64_t c, double sum_dy, double sum_dyx, int64_t count) {
  const double invstd = g.invstd[c], dweight = sum_dyx * invstd;
  g.dbias[c] = S(sum_dy);
  g.dweight[c] = S(dweight);
  const double scale = (g.weight ? g.weight[c] : 1) * invstd;
  if (!g.training) return {S(scale), 0, 0};
  return {S(scale), S(-scale * dweight / count), S(-scale * sum_dy / count)};
}

template <typename T>
FASTCONV_INLINE double sum_of(vec_t<T> v) {
  double sum = 0;
  for (int i = 0; i < lanes<T>; ++i) sum += v[i];
  return sum;
}

// ---- NCHW ----

// Planes n_begin … n_end of a channel, elements l_begin … l_end of each.
struct Chunk {
  int64_t n_begin, n_end, l_begin, l_end;
  int64_t count() const { return (n_end - n_begin) * (l_end - l_begin); }
};
// A channel's values, cut into chunks.
struct Chunks {
  int64_t N, L, a_plane, planes, count;  // `a_plane` chunks a plane, or `planes` planes a chunk
  FASTCONV_INLINE Chunk operator[](int64_t i) const {
    const int64_t n = i / a_plane * planes, l = i % a_plane * chunk_elements;
    return {n, min_of(n + planes, N), l, min_of(l + chunk_elements, L)};
  }
};
Chunks chunks_of(const BatchNormProblem& p) {
  const int64_t a_plane = ceil_div(p.L, chunk_elements), planes = a_plane > 1 ? 1 : max_of<int64_t>(chunk_elements / p.L, 1);
  return {p.N, p.L, a_plane, planes, ceil_div(p.N, planes) * a_plane};
}

// x points to the channel's first value; its planes are `stride` apart.
template <typename T>
Sums chunk_sums(const T* x, int64_t stride, const Chunk& chunk, acc_t<T> shift) {
  constexpr int unroll = 4;
  const vec_t<T> center = broadcast<T>(shift);
  vec_t<T> s1[unroll] = {}, s2[unroll] = {};
  acc_t<T> rest1 = 0, rest2 = 0;
  const auto add = [&](int k, vec_t<T> v) {
    v -= center;
    s1[k] += v;
    s2[k] += v * v;
  };
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    const T* row = x + n * stride;
    int64_t l = chunk.l_begin;
    for (; l + unroll * lanes<T> <= chunk.l_end; l += unroll * lanes<T>)
      for (int k = 0; k < unroll; ++k) add(k, load(row + l + k * lanes<T>));
    for (; l + lanes<T> <= chunk.l_end; l += lanes<T>) add(0, load(row + l));
    for (; l < chunk.l_end; ++l) {
      const acc_t<T> v = to_acc(row[l]) - shift;
      rest1 += v;
      rest2 += v * v;
    }
  }
  return {sum_of<T>((s1[0] + s1[1]) + (s1[2] + s1[3])) + rest1, sum_of<T>((s2[0] + s2[1]) + (s2[2] + s2[3])) + rest2};
}

template <typename T>
void merge_chunk(Moments& moments, const T* x, int64_t stride, const Chunk& chunk) {
  const double count = double(chunk.count());
  acc_t<T> sample[samples];
  for (int i = 0; i < samples; ++i)
    sample[i] = to_acc(x[chunk.n_begin * stride + chunk.l_begin + i * (chunk.l_end - chunk.l_begin) / samples]);
  acc_t<T> shift = mean_of(sample);
  Sums sums = chunk_sums(x, stride, chunk, shift);
  if (!is_sound(sums.s1, sums.s2, count)) {
    shift = acc_t<T>(shift + sums.s1 / count);
    sums = chunk_sums(x, stride, chunk, shift);
    if (!is_sound(sums.s1, sums.s2, count)) {
      double sum = 0;
      for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n)
        for (int64_t l = chunk.l_begin; l < chunk.l_end; ++l) sum += to_acc(x[n * stride + l]);
      const double mean = sum / count;
      double m2 = 0;
      for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n)
        for (int64_t l = chunk.l_begin; l < chunk.l_end; ++l) {
          const double d = to_acc(x[n * stride + l]) - mean;
          m2 += d * d;
        }
      return merge(moments, count, mean, m2);
    }
  }
  merge(moments, count, shift + sums.s1 / count, m2_of(sums.s1, sums.s2, count));
}

template <typename T>
void apply_chunk(const T* x, T* y, int64_t stride, const Chunk& chunk, const Affine<acc_t<T>>& a) {
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    const T* from = x + n * stride;
    T* to = y + n * stride;
    int64_t l = chunk.l_begin;
    for (; l + lanes<T> <= chunk.l_end; l += lanes<T>) store(to + l, (load(from + l) - a.center) * a.scale + a.shift);
    for (; l < chunk.l_end; ++l) to[l] = from_acc<T>((to_acc(from[l]) - a.center) * a.scale + a.shift);
  }
}

// Adds Σ dy and Σ dy·(x − mean).
template <typename T>
void add_gradient_sums(Sums& sums, const T* dy, const T* x, int64_t stride, const Chunk& chunk, acc_t<T> mean) {
  constexpr int unroll = 4;
  const vec_t<T> center = broadcast<T>(mean);
  vec_t<T> s1[unroll] = {}, s2[unroll] = {};
  acc_t<T> rest1 = 0, rest2 = 0;
  const auto add = [&](int k, vec_t<T> g, vec_t<T> v) {
    s1[k] += g;
    s2[k] += g * (v - center);
  };
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    const T *g = dy + n * stride, *v = x + n * stride;
    int64_t l = chunk.l_begin;
    for (; l + unroll * lanes<T> <= chunk.l_end; l += unroll * lanes<T>)
      for (int k = 0; k < unroll; ++k) add(k, load(g + l + k * lanes<T>), load(v + l + k * lanes<T>));
    for (; l + lanes<T> <= chunk.l_end; l += lanes<T>) add(0, load(g + l), load(v + l));
    for (; l < chunk.l_end; ++l) {
      rest1 += to_acc(g[l]);
      rest2 += to_acc(g[l]) * (to_acc(v[l]) - mean);
    }
  }
  sums.s1 += sum_of<T>((s1[0] + s1[1]) + (s1[2] + s1[3])) + rest1;
  sums.s2 += sum_of<T>((s2[0] + s2[1]) + (s2[2] + s2[3])) + rest2;
}

template <typename T>
void apply_gradient(const T* dy, const T* x, T* dx, int64_t stride, const Chunk& chunk, acc_t<T> mean, acc_t<T> invstd,
                    const Backward<acc_t<T>>& b) {
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    const T *g = dy + n * stride, *v = x + n * stride;
    T* to = dx + n * stride;
    int64_t l = chunk.l_begin;
    for (; l + lanes<T> <= chunk.l_end; l += lanes<T>)
      store(to + l, load(g + l) * b.dy_scale + ((load(v + l) - mean) * invstd * b.x_scale + b.shift));
    for (; l < chunk.l_end; ++l)
      to[l] = from_acc<T>(to_acc(g[l]) * b.dy_scale + ((to_acc(v[l]) - mean) * invstd * b.x_scale + b.shift));
  }
}

// ---- NHWC ----

// Element (row, channel) is at [row·stride + channel]. Rows are taken four at a time, so that a channel's sums and
// coefficients are loaded once for four values.

// s1, s2 = Σ (x − shift), Σ (x − shift)² of each channel.
template <typename T>
void row_sums(const T* x, int64_t stride, int64_t rows, int64_t channels, const acc_t<T>* shift, acc_t<T>* s1,
              acc_t<T>* s2) {
  for (int64_t c = 0; c < channels; ++c) s1[c] = s2[c] = 0;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, x += 4 * stride) {
    int64_t c = 0;
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      const vec_t<T> center = load(shift + c), a = load(x + c) - center, b = load(x + stride + c) - center;
      const vec_t<T> d = load(x + 2 * stride + c) - center, e = load(x + 3 * stride + c) - center;
      store(s1 + c, load(s1 + c) + ((a + b) + (d + e)));
      store(s2 + c, load(s2 + c) + ((a * a + b * b) + (d * d + e * e)));
    }
    for (; c < channels; ++c)
      for (int64_t k = 0; k < 4; ++k) {
        const acc_t<T> v = to_acc(x[k * stride + c]) - shift[c];
        s1[c] += v;
        s2[c] += v * v;
      }
  }
  for (; row < rows; ++row, x += stride)
    for (int64_t c = 0; c < channels; ++c) {
      const acc_t<T> v = to_acc(x[c]) - shift[c];
      s1[c] += v;
      s2[c] += v * v;
    }
}

// The mean and m2 of one channel, in float64.
template <typename T>
Moments exact_moments(const T* x, int64_t stride, int64_t rows) {
  double sum = 0, m2 = 0;
  for (int64_t row = 0; row < rows; ++row) sum += to_acc(x[row * stride]);
  const double mean = sum / rows;
  for (int64_t row = 0; row < rows; ++row) {
    const double d = to_acc(x[row * stride]) - mean;
    m2 += d * d;
  }
  return {double(rows), mean, m2};
}

// The mean and m2 of `rows` rows of `channels` channels.
template <typename T>
void row_moments(const T* x, int64_t stride, int64_t rows, int64_t channels, double* mean, double* m2) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += chunk_rows)
    for (int64_t first = 0; first < channels; first += block_channels) {
      const int64_t chunk = min_of(chunk_rows, rows - begin), n = min_of(block_channels, channels - first);
      const T* block = x + begin * stride + first;
      acc_t<T> shift[block_channels], s1[block_channels], s2[block_channels];
      const auto sums_are_sound = [&] {
        row_sums(block, stride, chunk, n, shift, s1, s2);
        int unsound = 0;
        for (int64_t i = 0; i < n; ++i) unsound |= !is_sound(s1[i], s2[i], chunk);
        return unsound == 0;
      };
      for (int64_t i = 0; i < n; ++i) {
        acc_t<T> sample[samples];
        for (int k = 0; k < samples; ++k) sample[k] = to_acc(block[k * chunk / samples * stride + i]);
        shift[i] = mean_of(sample);
      }
      bool sound = sums_are_sound();
      if (!sound) {
        for (int64_t i = 0; i < n; ++i)
          if (!is_sound(s1[i], s2[i], chunk)) shift[i] = acc_t<T>(shift[i] + double(s1[i]) / chunk);
        sound = sums_are_sound();
      }
      const double inverse = 1.0 / chunk, share = double(chunk) / (begin + chunk), weight = share * begin;
      for (int64_t i = 0; i < n; ++i) {  // merge() with the same counts for all
        const double d1 = s1[i], chunk_mean = shift[i] + d1 * inverse, rest = s2[i] - d1 * d1 * inverse;
        const double delta = chunk_mean - mean[first + i];
        mean[first + i] += delta * share;
        m2[first + i] += (rest < 0 ? 0 : rest) + delta * delta * weight;
      }
      if (sound) continue;
      for (int64_t i = 0; i < n; ++i)
        if (!is_sound(s1[i], s2[i], chunk)) {  // that merge was in vain: all rows so far once more
          const Moments exact = exact_moments(x + first + i, stride, begin + chunk);
          mean[first + i] = exact.mean;
          m2[first + i] = exact.m2;
        }
    }
}

// sum_dy = Σ dy, sum_dyx = Σ dy·(x − mean) of `rows` rows of `channels` channels.
template <typename T>
void row_gradient_sums(const T* dy, const T* x, int64_t stride, int64_t rows, int64_t channels, const acc_t<T>* mean,
                       double* sum_dy, double* sum_dyx) {
  for (int64_t c = 0; c < channels; ++c) sum_dy[c] = sum_dyx[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += chunk_rows)
    for (int64_t first = 0; first < channels; first += block_channels) {
      const int64_t end = min_of(begin + chunk_rows, rows), n = min_of(block_channels, channels - first);
      const acc_t<T>* center = mean + first;
      acc_t<T> s1[block_channels] = {}, s2[block_channels] = {};
      int64_t row = begin;
      for (; row + 4 <= end; row += 4) {
        const T *g = dy + row * stride + first, *v = x + row * stride + first;
        int64_t c = 0;
        for (; c + lanes<T> <= n; c += lanes<T>) {
          const vec_t<T> m = load(center + c), g0 = load(g + c), g1 = load(g + stride + c);
          const vec_t<T> g2 = load(g + 2 * stride + c), g3 = load(g + 3 * stride + c);
          store(s1 + c, load(s1 + c) + ((g0 + g1) + (g2 + g3)));
          const vec_t<T> low = g0 * (load(v + c) - m) + g1 * (load(v + stride + c) - m);
          const vec_t<T> high = g2 * (load(v + 2 * stride + c) - m) + g3 * (load(v + 3 * stride + c) - m);
          store(s2 + c, load(s2 + c) + (low + high));
        }
        for (; c < n; ++c)
          for (int64_t k = 0; k < 4; ++k) {
            s1[c] += to_acc(g[k * stride + c]);
            s2[c] += to_acc(g[k * stride + c]) * (to_acc(v[k * stride + c]) - center[c]);
          }
      }
      for (; row < end; ++row)
        for (int64_t c = 0; c < n; ++c) {
          const acc_t<T> g = to_acc(dy[row * stride + first + c]);
          s1[c] += g;
          s2[c] += g * (to_acc(x[row * stride + first + c]) - center[c]);
        }
      for (int64_t c = 0; c < n; ++c) {
        sum_dy[first + c] += s1[c];
        sum_dyx[first + c] += s2[c];
      }
    }
}

// y = (x − center)·scale + shift. Row after row: several at a time would use the same few cache sets where the stride is
// a power of two.
template <typename T>
void apply_rows(const T* x, T* y, int64_t stride, int64_t rows, int64_t channels, const acc_t<T>* center,
                const acc_t<T>* scale, const acc_t<T>* shift) {
  for (int64_t row = 0; row < rows; ++row, x += stride, y += stride) {
    int64_t c = 0;
    for (; c + lanes<T> <= channels; c += lanes<T>)
      store(y + c, (load(x + c) - load(center + c)) * load(scale + c) + load(shift + c));
    for (; c < channels; ++c) y[c] = from_acc<T>((to_acc(x[c]) - center[c]) * scale[c] + shift[c]);
  }
}

// dx = dy·dy_scale + (x − mean)·invstd·x_scale + shift
template <typename T>
void apply_gradient_rows(const T* dy, const T* x, T* dx, int64_t stride, int64_t rows, int64_t channels,
                         const acc_t<T>* mean, const acc_t<T>* invstd, const acc_t<T>* dy_scale,
                         const acc_t<T>* x_scale, const acc_t<T>* shift) {
  for (int64_t row = 0; row < rows; ++row, x += stride, dy += stride, dx += stride) {
    int64_t c = 0;
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      const vec_t<T> x_hat = (load(x + c) - load(mean + c)) * load(invstd + c);
      store(dx + c, load(dy + c) * load(dy_scale + c) + (x_hat * load(x_scale + c) + load(shift + c)));
    }
    for (; c < channels; ++c) {
      const acc_t<T> x_hat = (to_acc(x[c]) - mean[c]) * invstd[c];
      dx[c] = from_acc<T>(to_acc(dy[c]) * dy_scale[c] + (x_hat * x_scale[c] + shift[c]));
    }
  }
}

// ---- The rounds of tasks ----

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

template <typename T>
void train_nchw(const BatchNormProblem& p, const T* x, T* y, const Channels<acc_t<T>>& channels, const Parallel& parallel) {
  const Chunks chunks = chunks_of(p);
  for_each_task(parallel, p.C, [&](int, int64_t c) {
    Moments moments{};
    for (int64_t i = 0; i < chunks.count; ++i) merge_chunk(moments, x + c * p.L, p.C * p.L, chunks[i]);
    const Affine<acc_t<T>> affine = finish(channels, c, moments);
    // Backwards: the last values are the likeliest to be in the cache still.
    for (int64_t i = chunks.count; i-- > 0;) apply_chunk(x + c * p.L, y + c * p.L, p.C * p.L, chunks[i], affine);
  });
}

template <typename T>
void backward_nchw(const BatchNormProblem& p, const T* dy, const T* x, T* dx, const Gradients<acc_t<T>>& g,
                   const Parallel& parallel) {
  const Chunks chunks = chunks_of(p);
  const int64_t stride = p.C * p.L;
  for_each_task(parallel, p.C, [&](int, int64_t c) {
    const int64_t first = c * p.L;
    Sums sums{};
    for (int64_t i = 0; i < chunks.count; ++i)
      add_gradient_sums(sums, dy + first, x + first, stride, chunks[i], g.mean[c]);
    const Backward<acc_t<T>> b = finish(g, c, sums.s1, sums.s2, p.count());
    if (!dx) return;
    for (int64_t i = chunks.count; i-- > 0;)
      if (g.training)
        apply_gradient(dy + first, x + first, dx + first, stride, chunks[i], g.mean[c], g.invstd[c], b);
      else
        apply_chunk(dy + first, dx + first, stride, chunks[i], {0, b.dy_scale, 0});
  });
}

// The pieces that a split cuts each channel into: of the rows in NHWC, where a task has all channels, and of the chunks
// in NCHW, where it has one.
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

// Runs rows(s, begin, end) in NHWC, a_channel(s, c, begin, end) in NCHW, for every piece.
template <typename Rows, typename Channel>
void for_each_piece(const Pieces& pieces, const Parallel& parallel, const Rows& rows, const Channel& a_channel) {
  for_each_task(parallel, pieces.nhwc ? pieces.split : pieces.split * pieces.C, [&](int, int64_t task) {
    const int64_t s = pieces.nhwc ? task : task / pieces.C;
    const Piece piece = pieces[s];
    if (pieces.nhwc)
      rows(s, piece.begin, piece.end);
    else
      a_channel(s, task % pieces.C, piece.begin, piece.end);
  });
}

template <typename T>
void train_split(const BatchNormProblem& p, const BatchNormPlan& plan, const T* x, T* y,
                 const Channels<acc_t<T>>& channels, void* memory, const Parallel& parallel) {
  const Workspace<acc_t<T>> workspace(memory, p, plan);
  const Pieces pieces(p, plan);
  acc_t<T> *scale = workspace.coefficient(0), *shift = workspace.coefficient(1);
  const int64_t C = p.C, stride = p.C * p.L;
  for_each_piece(
      pieces, parallel,
      [&](int64_t s, int64_t begin, int64_t end) {
        row_moments(x + begin * C, C, end - begin, C, workspace.first(s), workspace.second(s));
      },
      [&](int64_t s, int64_t c, int64_t begin, int64_t end) {
        Moments moments{};
        for (int64_t i = begin; i < end; ++i) merge_chunk(moments, x + c * p.L, stride, pieces.chunks[i]);
        workspace.first(s)[c] = moments.mean;
        workspace.second(s)[c] = moments.m2;
      });
  for_each_task(parallel, ceil_div(C, finish_channels), [&](int, int64_t task) {
    const int64_t begin = task * finish_channels, n = min_of(finish_channels, C - begin);
    Moments moments[finish_channels] = {};
    for (int64_t s = 0; s < plan.split; ++s)
      if (const double count = double(pieces.count(s)))
        for (int64_t i = 0; i < n; ++i)
          merge(moments[i], count, workspace.first(s)[begin + i], workspace.second(s)[begin + i]);
    for (int64_t i = 0; i < n; ++i) {
      const Affine<acc_t<T>> a = finish(channels, begin + i, moments[i]);
      scale[begin + i] = a.scale;
      shift[begin + i] = a.shift;
    }
  });
  for_each_piece(
      pieces, parallel,
      [&](int64_t, int64_t begin, int64_t end) {
        apply_rows(x + begin * C, y + begin * C, C, end - begin, C, channels.mean, scale, shift);
      },
      [&](int64_t, int64_t c, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          apply_chunk(x + c * p.L, y + c * p.L, stride, pieces.chunks[i], {channels.mean[c], scale[c], shift[c]});
      });
}

template <typename T>
void backward_split(const BatchNormProblem& p, const BatchNormPlan& plan, const T* dy, const T* x, T* dx,
                    const Gradients<acc_t<T>>& g, void* memory, const Parallel& parallel) {
  const Workspace<acc_t<T>> workspace(memory, p, plan);
  const Pieces pieces(p, plan);
  acc_t<T> *dy_scale = workspace.coefficient(0), *x_scale = workspace.coefficient(1), *shift = workspace.coefficient(2);
  const int64_t C = p.C, stride = p.C * p.L;
  for_each_piece(
      pieces, parallel,
      [&](int64_t s, int64_t begin, int64_t end) {
        row_gradient_sums(dy + begin * C, x + begin * C, C, end - begin, C, g.mean, workspace.first(s),
                          workspace.second(s));
      },
      [&](int64_t s, int64_t c, int64_t begin, int64_t end) {
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
      [&](int64_t, int64_t begin, int64_t end) {
        const int64_t first = begin * C, rows = end - begin;
        if (g.training)
          apply_gradient_rows(dy + first, x + first, dx + first, C, rows, C, g.mean, g.invstd, dy_scale, x_scale, shift);
        else
          apply_rows(dy + first, dx + first, C, rows, C, shift, dy_scale, shift);  // shift is zero
      },
      [&](int64_t, int64_t c, int64_t begin, int64_t end) {
        const Backward<acc_t<T>> b{dy_scale[c], x_scale[c], shift[c]};
        const int64_t first = c * p.L;
        for (int64_t i = begin; i < end; ++i)
          if (g.training)
            apply_gradient(dy + first, x + first, dx + first, stride, pieces.chunks[i], g.mean[c], g.invstd[c], b);
          else
            apply_chunk(dy + first, dx + first, stride, pieces.chunks[i], {0, b.dy_scale, 0});
      });
}

template <typename T>
void eval_nchw(const BatchNormProblem& p, const T* x, T* y, const Parameters<acc_t<T>>& parameters,
               const Parallel& parallel) {
  // Units of a plane, or of a chunk of a long one.
  const int64_t a_plane = ceil_div(p.L, chunk_elements), units = p.N * p.C * a_plane;
  const int64_t units_per_task = ceil_div(eval_elements, min_of(p.L, chunk_elements));
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    for (int64_t i = task * units_per_task; i < min_of((task + 1) * units_per_task, units); ++i) {
      const int64_t plane = i / a_plane, c = plane % p.C, begin = i % a_plane * chunk_elements;
      const Affine<acc_t<T>> a = affine_of(parameters, c);
      apply_chunk(x + plane * p.L, y + plane * p.L, 0, {0, 1, begin, min_of(begin + chunk_elements, p.L)}, a);
    }
  });
}

template <typename T>
void eval_nhwc(const BatchNormProblem& p, const T* x, T* y, const Parameters<acc_t<T>>& parameters,
               const Parallel& parallel) {
  const int64_t C = p.C, blocks = ceil_div(C, block_channels);
  const int64_t rows_per_task = ceil_div(eval_elements, min_of(C, block_channels));
  for_each_task(parallel, ceil_div(p.count(), rows_per_task) * blocks, [&](int, int64_t task) {
    const int64_t first = task % blocks * block_channels, n = min_of(block_channels, C - first);
    const int64_t row = task / blocks * rows_per_task, rows = min_of(rows_per_task, p.count() - row);
    acc_t<T> center[block_channels], scale[block_channels], shift[block_channels];
    for (int64_t i = 0; i < n; ++i) {
      const Affine<acc_t<T>> a = affine_of(parameters, first + i);
      center[i] = a.center;
      scale[i] = a.scale;
      shift[i] = a.shift;
    }
    apply_rows(x + row * C + first, y + row * C + first, C, rows, n, center, scale, shift);
  });
}

// ---- The table ----

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
    const Channels<acc_t<T>> channels{in<T>(weight), in<T>(bias), out<T>(running_mean), out<T>(running_var),
                                      out<T>(mean),  out<T>(invstd), momentum,          eps};
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

}  // namespace

namespace FASTCONV_ISA {
extern const BatchNormKernels batch_norm;
const BatchNormKernels batch_norm = {train, eval, backward};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
