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

// Asks memory for `length` values of each plane of a few channels: of runs so short the processor foresees none.
template <typename T>
FASTCONV_INLINE void prefetch_planes(const T* x, int64_t stride, int64_t N, int64_t length) {
  for (int64_t n = 0; n < N; ++n) prefetch_lines<false>(x + n * stride, length);
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
      for (int k = 0; k < unroll; ++k) {
        prefetch(row + l + k * lanes<T> + prefetch_elements);
        add(k, load(row + l + k * lanes<T>));
      }
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

// residual is read for add_relu only, and has the place of x.
template <Act act, typename T>
void apply_chunk(const T* x, const T* residual, T* y, int64_t stride, const Chunk& chunk, const Affine<acc_t<T>>& a,
                 bool past_caches) {
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    const T *from = x + n * stride, *add = act == Act::add_relu ? residual + n * stride : nullptr;
    T* to = y + n * stride;
    int64_t l = chunk.l_begin;
    const bool past = past_caches && is_aligned(to + l);
    for (; l + lanes<T> <= chunk.l_end; l += lanes<T>) {
      vec_t<T> z = (load(from + l) - a.center) * a.scale + a.shift;
      if constexpr (act == Act::add_relu) z += load(add + l);
      store_to(to + l, act == Act::none ? z : relu(z), past);
    }
    for (; l < chunk.l_end; ++l) {
      acc_t<T> z = (to_acc(from[l]) - a.center) * a.scale + a.shift;
      if constexpr (act == Act::add_relu) z += to_acc(add[l]);
      to[l] = from_acc<T>(act == Act::none ? z : relu(z));
    }
  }
  end_stores(past_caches);
}
template <typename T>
void apply_chunk(const T* x, T* y, int64_t stride, const Chunk& chunk, const Affine<acc_t<T>>& a, bool past_caches) {
  apply_chunk<Act::none, T>(x, nullptr, y, stride, chunk, a, past_caches);
}

// Adds Σ dz and Σ dz·(x − mean). dz is dy for none; for relu, dy where the affine of x is positive; for add_relu, dy
// where y is positive, and is written.
template <Act act, typename T>
void add_gradient_sums(Sums& sums, const T* dy, const T* x, const T* y, T* dz, int64_t stride, const Chunk& chunk,
                       const Affine<acc_t<T>>& a) {
  constexpr int unroll = 4;
  const vec_t<T> center = broadcast<T>(a.center);
  vec_t<T> s1[unroll] = {}, s2[unroll] = {};
  double rest1 = 0, rest2 = 0;  // of the columns beyond the last whole vector
  const auto add = [&](int k, int64_t i) {
    prefetch(x + i + prefetch_elements);
    prefetch(dy + i + prefetch_elements);
    const vec_t<T> v = load(x + i);
    vec_t<T> g = load(dy + i);
    if constexpr (act == Act::relu) g = gradient_of_relu(g, (v - a.center) * a.scale + a.shift);
    if constexpr (act == Act::add_relu) {
      g = gradient_of_relu(g, load(y + i));
      store(dz + i, g);
    }
    s1[k] += g;
    s2[k] += g * (v - center);
  };
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    int64_t i = n * stride + chunk.l_begin;
    const int64_t end = n * stride + chunk.l_end;
    for (; i + unroll * lanes<T> <= end; i += unroll * lanes<T>)
      for (int k = 0; k < unroll; ++k) add(k, i + k * lanes<T>);
    for (; i + lanes<T> <= end; i += lanes<T>) add(0, i);
    for (; i < end; ++i) {
      const acc_t<T> v = to_acc(x[i]);
      acc_t<T> g = to_acc(dy[i]);
      if constexpr (act == Act::relu) g = gradient_of_relu(g, (v - a.center) * a.scale + a.shift);
      if constexpr (act == Act::add_relu) {
        g = gradient_of_relu(g, to_acc(y[i]));
        dz[i] = from_acc<T>(g);
      }
      rest1 += g;
      rest2 += g * (v - a.center);
    }
  }
  sums.s1 += sum_of<T>((s1[0] + s1[1]) + (s1[2] + s1[3])) + rest1;
  sums.s2 += sum_of<T>((s2[0] + s2[1]) + (s2[2] + s2[3])) + rest2;
}

// For none and relu; where add_relu has written dz, none goes on with that.
template <Act act, typename T>
void apply_gradient(const T* dy, const T* x, T* dx, int64_t stride, const Chunk& chunk, const Affine<acc_t<T>>& a,
                    acc_t<T> invstd, const Backward<acc_t<T>>& b, bool past_caches) {
  static_assert(act != Act::add_relu);
  const auto of = [&](auto g, auto v) {
    if constexpr (act == Act::relu) g = gradient_of_relu(g, (v - a.center) * a.scale + a.shift);
    return g * b.dy_scale + ((v - a.center) * invstd * b.x_scale + b.shift);
  };
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    const T *g = dy + n * stride, *v = x + n * stride;
    T* to = dx + n * stride;
    int64_t l = chunk.l_begin;
    const bool past = past_caches && is_aligned(to + l);
    for (; l + lanes<T> <= chunk.l_end; l += lanes<T>) store_to(to + l, of(load(g + l), load(v + l)), past);
    for (; l < chunk.l_end; ++l) to[l] = from_acc<T>(of(to_acc(g[l]), to_acc(v[l])));
  }
  end_stores(past_caches);
}

}  // namespace
}  // namespace fastconv::cpu
