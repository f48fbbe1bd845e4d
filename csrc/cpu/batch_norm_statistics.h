// BatchNorm: how a channel's sums are merged, and what becomes of them.
#pragma once

#include "past_caches.h"

namespace fastconv::cpu {
namespace {

constexpr int samples = 8;                   // for a chunk's shift; a power of two, so that equal values add exactly
constexpr double worst_cancellation = 0.25;  // of s2 must be left

constexpr int64_t prefetch_elements = 2048;  // asked of memory before they are used

// Asks for a line that is read later: into the second cache, for the first can wait for a few lines only.
FASTCONV_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

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
  S* affine;  // null, or what becomes of it: C scales, then C shifts
  int64_t C;
  double momentum, eps;
};

// y = (x − center)·scale + shift
template <typename S>
struct Affine {
  S center, scale, shift;
};

// What is made of that: y itself, ReLU(y), or ReLU(y + residual).
enum class Act { none, relu, add_relu };

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
  const Affine<S> a{channels.mean[c], S(scale), S((channels.bias ? channels.bias[c] : 0) + rest * scale)};
  if (channels.affine) {
    channels.affine[c] = a.scale;
    channels.affine[channels.C + c] = a.shift;
  }
  return a;
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
  const S *weight, *mean, *invstd, *affine;
  bool training;
  S *dweight, *dbias;
};

// dz, the gradient in front of the ReLU: dy, but 0 where z, what the ReLU was given or gave, is not positive. A NaN in
// z lets dy pass, as in torch.
template <typename V>
FASTCONV_INLINE V gradient_of_relu(V dy, V z) {
  return z <= 0 ? V{} : dy;
}

// dx = dz·dy_scale + (x − mean)·invstd·x_scale + shift
template <typename S>
struct Backward {
  S dy_scale, x_scale, shift;
};

// sum_dy = Σ dz, sum_dyx = Σ dz·(x − mean)
template <typename S>
Backward<S> finish(const Gradients<S>& g, int64_t c, double sum_dy, double sum_dyx, int64_t count) {
  const double invstd = g.invstd[c], dweight = sum_dyx * invstd;
  g.dbias[c] = S(sum_dy);
  g.dweight[c] = S(dweight);
  const double scale = (g.weight ? g.weight[c] : 1) * invstd;
  if (!g.training) return {S(scale), 0, 0};
  return {S(scale), S(-scale * dweight / count), S(-scale * sum_dy / count)};
}

// What apply_gradients is given for each channel.
template <typename S>
struct GradientMeans {
  const S *weight, *mean, *invstd, *mean_dy, *mean_dyx;
};
template <typename S>
Backward<S> backward_of(const GradientMeans<S>& g, int64_t c) {
  const double scale = double(g.weight ? g.weight[c] : 1) * g.invstd[c];
  return {S(scale), S(-scale * g.mean_dyx[c]), S(-scale * g.mean_dy[c])};
}

template <typename T>
FASTCONV_INLINE double sum_of(vec_t<T> v) {
  double sum = 0;
  for (int i = 0; i < lanes<T>; ++i) sum += v[i];
  return sum;
}

}  // namespace
}  // namespace fastconv::cpu
