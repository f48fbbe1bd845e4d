// BatchNorm of x[row][c]: sums and coefficients applied along the channels, row by row.
#pragma once

#include "batch_norm_statistics.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t chunk_rows = 512;
constexpr int64_t wide_channels = 1024;  // of a task: their sums stay in the first-level cache

// Element (row, channel) is at [row·stride + channel]. Rows are taken four at a time, so that a channel's sums and
// coefficients are loaded once for four values; they lie far apart, since four streams come from memory faster than
// one.

// What is asked of memory ahead of its use.
FASTCONV_INLINE int64_t prefetch_rows(int64_t stride) { return max_of<int64_t>(prefetch_elements / stride, 1); }

// s1, s2 = Σ (x − shift), Σ (x − shift)² of each channel.
template <typename T>
void row_sums(const T* x, int64_t stride, int64_t rows, int64_t channels, const acc_t<T>* shift, acc_t<T>* s1,
              acc_t<T>* s2) {
  for (int64_t c = 0; c < channels; ++c) s1[c] = s2[c] = 0;
  const int64_t quarter = rows / 4, step = quarter * stride, ahead = prefetch_rows(stride) * stride;
  for (int64_t row = 0; row < quarter; ++row, x += stride) {
    int64_t c = 0;
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      for (int k = 0; k < 4; ++k) prefetch(x + k * step + ahead + c);
      const vec_t<T> center = load(shift + c), a = load(x + c) - center, b = load(x + step + c) - center;
      const vec_t<T> d = load(x + 2 * step + c) - center, e = load(x + 3 * step + c) - center;
      store(s1 + c, load(s1 + c) + ((a + b) + (d + e)));
      store(s2 + c, load(s2 + c) + ((a * a + b * b) + (d * d + e * e)));
    }
    for (; c < channels; ++c)
      for (int64_t k = 0; k < 4; ++k) {
        const acc_t<T> v = to_acc(x[k * step + c]) - shift[c];
        s1[c] += v;
        s2[c] += v * v;
      }
  }
  x += 3 * step;
  for (int64_t row = 4 * quarter; row < rows; ++row, x += stride)
    for (int64_t c = 0; c < channels; ++c) {
      const acc_t<T> v = to_acc(x[c]) - shift[c];
      s1[c] += v;
      s2[c] += v * v;
    }
}

// shift = the mean of some rows.
template <typename T>
void sample_rows(const T* x, int64_t stride, int64_t rows, int64_t channels, acc_t<T>* shift) {
  const T* from[samples];
  for (int k = 0; k < samples; ++k) from[k] = x + k * rows / samples * stride;
  int64_t c = 0;
  for (; c + lanes<T> <= channels; c += lanes<T>) {
    vec_t<T> sample[samples];
    for (int k = 0; k < samples; ++k) sample[k] = load(from[k] + c);
    store(shift + c, mean_of(sample));
  }
  for (; c < channels; ++c) {
    acc_t<T> sample[samples];
    for (int k = 0; k < samples; ++k) sample[k] = to_acc(from[k][c]);
    shift[c] = mean_of(sample);
  }
}

// is_sound() for all channels, in their own precision.
template <typename S>
bool all_sound(const S* s1, const S* s2, int64_t channels, S count) {
  int unsound = 0;
  for (int64_t c = 0; c < channels; ++c)
    unsound |= !(s2[c] - s1[c] / count * s1[c] >= S(worst_cancellation) * s2[c]) | !(s2[c] < S(__builtin_inf()));
  return unsound == 0;
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

// The mean and m2 of `rows` rows of at most wide_channels channels.
template <typename T>
void row_moments(const T* x, int64_t stride, int64_t rows, int64_t channels, double* mean, double* m2) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
    const int64_t count = min_of(chunk_rows, rows - begin);
    const T* chunk = x + begin * stride;
    acc_t<T> shift[wide_channels], s1[wide_channels], s2[wide_channels];
    const auto sums_are_sound = [&] {
      row_sums(chunk, stride, count, channels, shift, s1, s2);
      return all_sound(s1, s2, channels, acc_t<T>(count));
    };
    sample_rows(chunk, stride, count, channels, shift);
    bool sound = sums_are_sound();
    if (!sound) {
      for (int64_t c = 0; c < channels; ++c)
        if (!is_sound(s1[c], s2[c], count)) shift[c] = acc_t<T>(shift[c] + double(s1[c]) / count);
      sound = sums_are_sound();
    }
    const double inverse = 1.0 / count, share = double(count) / (begin + count), weight = share * begin;
    for (int64_t c = 0; c < channels; ++c) {  // merge() with the same counts for all
      const double d1 = s1[c], chunk_mean = shift[c] + d1 * inverse, rest = s2[c] - d1 * d1 * inverse;
      const double delta = chunk_mean - mean[c];
      mean[c] += delta * share;
      m2[c] += (rest < 0 ? 0 : rest) + delta * delta * weight;
    }
    if (sound) continue;
    for (int64_t c = 0; c < channels; ++c)
      if (!is_sound(s1[c], s2[c], count)) {  // that merge was in vain: all rows so far once more
        const Moments exact = exact_moments(x + c, stride, begin + count);
        mean[c] = exact.mean;
        m2[c] = exact.m2;
      }
  }
}

// The affine of neighbouring channels; scale and shift are null where they are not asked for.
template <typename S>
struct AffineRow {
  const S *center, *scale, *shift;
  AffineRow from(int64_t c) const { return {center + c, scale ? scale + c : nullptr, shift ? shift + c : nullptr}; }
};

// sum_dy = Σ dz, sum_dyx = Σ dz·(x − mean) of `rows` rows of at most wide_channels channels; dz as in
// add_gradient_sums.
template <Act act, typename T>
void row_gradient_sums(const T* dy, const T* x, const T* y, T* dz, int64_t stride, int64_t rows, int64_t channels,
                       const AffineRow<acc_t<T>>& a, double* sum_dy, double* sum_dyx) {
  for (int64_t c = 0; c < channels; ++c) sum_dy[c] = sum_dyx[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
    const int64_t end = min_of(begin + chunk_rows, rows);
    acc_t<T> s1[wide_channels], s2[wide_channels];
    for (int64_t c = 0; c < channels; ++c) s1[c] = s2[c] = 0;
    const auto add_one = [&](int64_t i, int64_t c) {
      const acc_t<T> v = to_acc(x[i + c]);
      acc_t<T> g = to_acc(dy[i + c]);
      if constexpr (act == Act::relu) g = gradient_of_relu(g, (v - a.center[c]) * a.scale[c] + a.shift[c]);
      if constexpr (act == Act::add_relu) {
        g = gradient_of_relu(g, to_acc(y[i + c]));
        dz[i + c] = from_acc<T>(g);
      }
      s1[c] += g;
      s2[c] += g * (v - a.center[c]);
    };
    const int64_t quarter = (end - begin) / 4, step = quarter * stride, ahead = prefetch_rows(stride) * stride;
    for (int64_t row = begin; row < begin + quarter; ++row) {
      const int64_t i = row * stride;
      int64_t c = 0;
      for (; c + lanes<T> <= channels; c += lanes<T>) {
        const vec_t<T> m = load(a.center + c);
        vec_t<T> g[4], v[4];
        for (int k = 0; k < 4; ++k) {
          const int64_t at = i + k * step + c;
          prefetch(dy + at + ahead);
          prefetch(x + at + ahead);
          g[k] = load(dy + at);
          v[k] = load(x + at);
          if constexpr (act == Act::relu)
            g[k] = gradient_of_relu(g[k], (v[k] - m) * load(a.scale + c) + load(a.shift + c));
          if constexpr (act == Act::add_relu) {
            g[k] = gradient_of_relu(g[k], load(y + at));
            store(dz + at, g[k]);
          }
        }
        store(s1 + c, load(s1 + c) + ((g[0] + g[1]) + (g[2] + g[3])));
        const vec_t<T> low = g[0] * (v[0] - m) + g[1] * (v[1] - m), high = g[2] * (v[2] - m) + g[3] * (v[3] - m);
        store(s2 + c, load(s2 + c) + (low + high));
      }
      for (; c < channels; ++c)
        for (int64_t k = 0; k < 4; ++k) add_one(i + k * step, c);
    }
    for (int64_t row = begin + 4 * quarter; row < end; ++row)
      for (int64_t c = 0; c < channels; ++c) add_one(row * stride, c);
    for (int64_t c = 0; c < channels; ++c) {
      sum_dy[c] += s1[c];
      sum_dyx[c] += s2[c];
    }
  }
}

// y = (x − center)·scale + shift. Row after row: several at a time would share a few cache sets where the stride is a
// power of two.
template <Act act, typename T>
void apply_rows(const T* x, const T* residual, T* y, int64_t stride, int64_t rows, int64_t channels,
                const AffineRow<acc_t<T>>& a, bool past_caches) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row * stride;
    const bool past = past_caches && is_aligned(y + i);
    int64_t c = 0;
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      vec_t<T> z = (load(x + i + c) - load(a.center + c)) * load(a.scale + c) + load(a.shift + c);
      if constexpr (act == Act::add_relu) z += load(residual + i + c);
      store_to(y + i + c, act == Act::none ? z : relu(z), past);
    }
    for (; c < channels; ++c) {
      acc_t<T> z = (to_acc(x[i + c]) - a.center[c]) * a.scale[c] + a.shift[c];
      if constexpr (act == Act::add_relu) z += to_acc(residual[i + c]);
      y[i + c] = from_acc<T>(act == Act::none ? z : relu(z));
    }
  }
  end_stores(past_caches);
}

// The coefficients of Backward for neighbouring channels.
template <typename S>
struct BackwardRow {
  const S *invstd, *dy_scale, *x_scale, *shift;
};

// dx = dz·dy_scale + (x − mean)·invstd·x_scale + shift, for none and relu as in apply_gradient.
template <Act act, typename T>
void apply_gradient_rows(const T* dy, const T* x, T* dx, int64_t stride, int64_t rows, int64_t channels,
                         const AffineRow<acc_t<T>>& a, const BackwardRow<acc_t<T>>& b, bool past_caches) {
  static_assert(act != Act::add_relu);
  for (int64_t row = 0; row < rows; ++row, x += stride, dy += stride, dx += stride) {
    const bool past = past_caches && is_aligned(dx);
    int64_t c = 0;
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      prefetch(x + c + prefetch_elements);
      prefetch(dy + c + prefetch_elements);
      const vec_t<T> centred = load(x + c) - load(a.center + c), x_hat = centred * load(b.invstd + c);
      vec_t<T> g = load(dy + c);
      if constexpr (act == Act::relu) g = gradient_of_relu(g, centred * load(a.scale + c) + load(a.shift + c));
      store_to(dx + c, g * load(b.dy_scale + c) + (x_hat * load(b.x_scale + c) + load(b.shift + c)), past);
    }
    for (; c < channels; ++c) {
      const acc_t<T> centred = to_acc(x[c]) - a.center[c], x_hat = centred * b.invstd[c];
      acc_t<T> g = to_acc(dy[c]);
      if constexpr (act == Act::relu) g = gradient_of_relu(g, centred * a.scale[c] + a.shift[c]);
      dx[c] = from_acc<T>(g * b.dy_scale[c] + (x_hat * b.x_scale[c] + b.shift[c]));
    }
  }
  end_stores(past_caches);
}

}  // namespace
}  // namespace fastconv::cpu
