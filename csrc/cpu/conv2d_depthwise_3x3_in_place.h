// Depthwise convolution with 3×3 filters of stride 1 or 2 in NCHW where vectors can be loaded in part: planes are read
// where they lie, and what lies outside of a row is loaded as zeros. Each row is read once for up to four rows of
// outputs.
#pragma once

#include "conv2d_depthwise_columns.h"
#include "for_constants.h"

namespace fastconv::cpu {
namespace {

// The lanes of a vector from `first` on that lie in 0 … size − 1.
template <typename T>
FASTCONV_INLINE uint32_t lanes_inside(int64_t first, int64_t size) {
  const int begin = max_of(int(-first), 0), end = min_of(max_of(int(size - first), 0), lanes<T>);
  return begin < end ? ((1u << end) - 1) & ~((1u << begin) - 1) : 0;
}

// The lanes of a mask, and zeros.
FASTCONV_INLINE vec_t<float> load_lanes(const float* p, uint32_t mask) {
  return (vec_t<float>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
}
FASTCONV_INLINE vec_t<double> load_lanes(const double* p, uint32_t mask) {
  return (vec_t<double>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
}
FASTCONV_INLINE vec_t<float> load_lanes(const bfloat16_t* p, uint32_t mask) {
  const __m256i h = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
  return (vec_t<float>)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, h), 16);
}
FASTCONV_INLINE vec_t<float> load_lanes(const float16_t* p, uint32_t mask) {
  return (vec_t<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(__mmask16(mask), p));
}

FASTCONV_INLINE vec_t<float> keep_lanes(vec_t<float> v, uint32_t mask) {
  return (vec_t<float>)_mm512_maskz_mov_ps(__mmask16(mask), (__m512)v);
}
FASTCONV_INLINE vec_t<double> keep_lanes(vec_t<double> v, uint32_t mask) {
  return (vec_t<double>)_mm512_maskz_mov_pd(__mmask8(mask), (__m512d)v);
}

// What a vector of outputs reads of a row: lane 0 the column `first` with tap 0.
struct TapColumns {
  int64_t first;
  uint32_t masks[3], outputs;  // lanes inside: of what is loaded, and of the outputs
};
template <typename T, int Stride>
FASTCONV_INLINE void load_taps(const T* row, const TapColumns& columns, vec_t<T> (&x)[3]) {
  row += columns.first;
  if constexpr (Stride == 1) {
    for_constants<3>([&](auto s) FASTCONV_LAMBDA { x[s.value] = load_lanes(row + s.value, columns.masks[s.value]); });
  } else {
    constexpr std::make_integer_sequence<int, lanes<T>> sequence;
    const vec_t<T> left = load_lanes(row, columns.masks[0]), right = load_lanes(row + lanes<T>, columns.masks[1]);
    x[0] = even_lanes<acc_t<T>>(left, right, sequence);
    x[1] = odd_lanes<acc_t<T>>(left, right, sequence);
    x[2] = next_lanes<acc_t<T>>(x[0], load_lanes(row + 2 * lanes<T>, columns.masks[2]), sequence);
  }
}

// How the planes of a direction are read: the columns of every vector of a row of outputs.
template <typename T>
struct PlaneReader {
  TapColumns vectors[(max_plane_width + 2) / lanes<T> + 1];
  int64_t block_rows;

  PlaneReader(const Conv2dProblem& p, const Conv2dPlan& plan)
      : block_rows(plan.tile_k > 0 ? plane_outputs(p, plan.direction) : plan.tile_m) {
    const StagedPlane source = staged_plane(p, plan.direction);
    const int64_t outputs = plan.direction == Direction::dgrad ? p.W : p.Q, step = source.stride == 1 ? 1 : lanes<T>;
    TapColumns* to = vectors;
    for (int64_t j = 0; j < outputs; j += lanes<T>, ++to) {
      to->first = j * source.stride - source.pad_w;
      to->outputs = lanes_inside<T>(j, outputs);
      for_constants<3>([&](auto s) FASTCONV_LAMBDA {
        to->masks[s.value] = lanes_inside<T>(to->first + s.value * step, source.cols);
      });
    }
  }
};

// Calls rows(i, Count) for i0 … i1 − 1 in blocks of 8, 4, 2 and 1.
template <typename Rows>
FASTCONV_INLINE void for_row_blocks(int64_t i0, int64_t i1, const Rows& rows) {
  int64_t i = i0;
  for (; i + 8 <= i1; i += 8) rows(i, std::integral_constant<int, 8>());
  if ((i1 - i) & 4) rows(i, std::integral_constant<int, 4>()), i += 4;
  if ((i1 - i) & 2) rows(i, std::integral_constant<int, 2>()), i += 2;
  if ((i1 - i) & 1) rows(i, std::integral_constant<int, 1>());
}

// Calls use(a, r, x) with the taps' columns of each row that Count rows of outputs from row i on read: for the output
// row a, it is that of tap r.
template <typename T, int Stride, int Count, typename Use>
FASTCONV_INLINE void for_tap_rows(const Plane<T>& in, const TapColumns& columns, int64_t i, const Use& use) {
  const int64_t top = i * Stride - in.pad_h, rows = in.rows, pitch = in.cols;
  const T* from = in.data + top * pitch;
  for_constants<(Count - 1) * Stride + 3>([&](auto row) FASTCONV_LAMBDA {
    if (top + row.value >= 0 && top + row.value < rows) {
      vec_t<T> x[3];
      load_taps<T, Stride>(from, columns, x);
      for_constants<Count>([&](auto a) FASTCONV_LAMBDA {
        constexpr int r = row.value - a.value * Stride;
        if constexpr (r >= 0 && r < 3) use(a, std::integral_constant<int, r>(), x);
      });
    }
    from += pitch;
  });
}

// The filter's weights, a register each.
template <typename T>
FASTCONV_INLINE void broadcast_filter(const PlaneFilter<T>& filter, vec_t<T> (&w)[9]) {
  const T* first = filter.weights + (filter.turned ? 8 : 0);
  const int64_t step = filter.turned ? -1 : 1;
  for_constants<9>([&](auto tap) FASTCONV_LAMBDA { w[tap.value] = broadcast<T>(to_acc(first[tap.value * step])); });
}

// Rows i0 … i1 − 1 of outputs, out_cols wide.
template <typename T, int Stride>
void gather_plane(const Plane<T>& in, const PlaneReader<T>& reader, acc_t<T>*, const PlaneFilter<T>& filter, T* out,
                  int64_t i0, int64_t i1, int64_t out_cols) {
  vec_t<T> w[9];
  broadcast_filter(filter, w);
  const vec_t<T> start = broadcast<T>(filter.bias);
  const bool with_relu = filter.with_relu;
  for_row_blocks(i0, i1, [&](int64_t i, auto count) FASTCONV_LAMBDA {
    const TapColumns* vector = reader.vectors;
    for (int64_t j = 0; j < out_cols; j += lanes<T>, ++vector) {
      const TapColumns columns = *vector;
      vec_t<T> sums[count.value];
      for_constants<count.value>([&](auto a) FASTCONV_LAMBDA { sums[a.value] = start; });
      for_tap_rows<T, Stride, count.value>(in, columns, i, [&](auto a, auto r, const vec_t<T>(&x)[3]) FASTCONV_LAMBDA {
        for_constants<3>([&](auto s) FASTCONV_LAMBDA { sums[a.value] += w[3 * r.value + s.value] * x[s.value]; });
      });
      T* to = out + i * out_cols + j;
      for_constants<count.value>([&](auto a) FASTCONV_LAMBDA {
        store_row(to, with_relu ? relu(sums[a.value]) : sums[a.value], out_cols - j);
        to += out_cols;
      });
    }
  });
}

// dgrad of stride 2 and padding 1: rows 2i and 2i + 1 of dx, H × W, for i = i0 … i1 − 1.
template <typename T>
void double_plane(const Plane<T>& dy, const PlaneReader<T>&, acc_t<T>*, const PlaneFilter<T>& filter, T* dx, int64_t i0,
                  int64_t i1, int64_t H, int64_t W) {
  vec_t<T> w[9];
  broadcast_filter(filter, w);
  for (int64_t i = i0; i < i1; ++i) {
    const bool last = i + 1 == dy.rows;
    for (int64_t j = 0; 2 * j < W; j += lanes<T>) {
      const uint32_t here = lanes_inside<T>(j, dy.cols), right = lanes_inside<T>(j + 1, dy.cols);
      const T *row = dy.data + i * dy.cols + j, *below = row + dy.cols;
      store_doubled<T>(w, load_lanes(row, here), load_lanes(row + 1, right), load_lanes(below, last ? 0 : here),
                       load_lanes(below + 1, last ? 0 : right), dx + 2 * i * W + 2 * j, W, W - 2 * j, 2 * i + 1 < H);
    }
  }
}

// sums[tap] += Σ dy · x, sums[9] += Σ dy over a plane. Where dy has no lane, x has zeros, since NaN · 0 would not
// vanish.
template <typename T, int Stride>
void add_plane(const Plane<T>& x, const PlaneReader<T>& reader, acc_t<T>*, const T* dy, int64_t dy_rows,
               int64_t dy_cols, acc_t<T>* sums) {
  vec_t<T> v[10];
  for_constants<10>([&](auto tap) FASTCONV_LAMBDA { v[tap.value] = load(sums + tap.value * lanes<T>); });
  for_row_blocks(0, dy_rows, [&](int64_t i, auto count) FASTCONV_LAMBDA {
    const TapColumns* vector = reader.vectors;
    for (int64_t j = 0; j < dy_cols; j += lanes<T>, ++vector) {
      const TapColumns columns = *vector;
      vec_t<T> d[count.value];
      const T* from = dy + i * dy_cols + j;
      for_constants<count.value>([&](auto a) FASTCONV_LAMBDA {
        v[9] += d[a.value] = load_lanes(from, columns.outputs);
        from += dy_cols;
      });
      for_tap_rows<T, Stride, count.value>(
          x, columns, i, [&](auto a, auto r, const vec_t<T>(&taps)[3]) FASTCONV_LAMBDA {
            for_constants<3>([&](auto s) FASTCONV_LAMBDA {
              v[3 * r.value + s.value] += d[a.value] * keep_lanes(taps[s.value], columns.outputs);
            });
          });
    }
  });
  for_constants<10>([&](auto tap) FASTCONV_LAMBDA { store(sums + tap.value * lanes<T>, v[tap.value]); });
}

}  // namespace
}  // namespace fastconv::cpu
