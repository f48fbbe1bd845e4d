// BatchNorm of x[n][c][l]: sums and coefficients applied along the planes of one channel, chunk by chunk.
#pragma once

#include "batch_norm_statistics.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t chunk_elements = 4096;

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
  const int64_t a_plane = ceil_div(p.L, chunk_elements);
  const int64_t planes = a_plane > 1 ? 1 : max_of<int64_t>(chunk_elements / p.L, 1);
  return {p.N, p.L, a_plane, planes, ceil_div(p.N, planes) * a_plane};
}

// Calls f for the same values again, in chunks of one plane or part of one.
template <typename F>
FASTCONV_INLINE void for_each_plane(const Chunks& chunks, const F& f) {
  for (int64_t i = 0; i < chunks.count; ++i) {
    const Chunk chunk = chunks[i];
    for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) f(Chunk{n, n + 1, chunk.l_begin, chunk.l_end});
  }
}

// x points to the channel's first value; its planes are `stride` apart.
template <typename T>
Sums chunk_sums(const T* x, int64_t stride, const Chunk& chunk, acc_t<T> shift) {
  constexpr int unroll = 4;
  const vec_t<T> center = broadcast<T>(shift);
  vec_t<T> s1[unroll] = {}, s2[unroll] = {};
  double rest1 = 0, rest2 = 0;  // of the columns beyond the last whole vector
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
  double rest1 = 0, rest2 = 0;  // of the columns beyond the last whole vector
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

}  // namespace
}  // namespace fastconv::cpu
