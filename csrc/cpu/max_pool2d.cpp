// Max pooling: y[n,c,p,q] = max over r, s of x[n, c, p·stride_h − pad_h + r·dilation_h, q·stride_w − pad_w + s·dilation_w],
// over the taps (r, s) that lie inside x. What backward needs to know is kept as one offset r·S + s for each output.
//
// A window is scanned in row-major order; a tap is taken if it is greater than all before it or a NaN, so that of equal
// maxima the first counts and of NaNs the last. The scan starts at −∞ with the first tap inside x, which is the answer
// for a window of nothing but −∞. A window without any tap inside x keeps −∞ and offset 0: a position outside x.
//
// NCHW runs along the columns q of an output row (or w of a row of dx), NHWC along the channels of an output pixel.
// A last vector may hang over into what follows: the lanes beyond are garbage, and are written again afterwards by
// whoever computes what follows. It never reads beyond the tensor and never writes beyond its task; where it would, the
// rest is done one element at a time.
#include "isa.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t task_elements = 1 << 14;    // outputs (or elements of dx) of a task
constexpr int64_t segment_columns = 1 << 12;  // NCHW: a row longer than this is done in segments

// The type of an offset where no gradient is needed.
struct NoOffset {};
template <typename Offset>
constexpr bool is_kept = true;
template <>
constexpr bool is_kept<NoOffset> = false;

// The index range of the taps with 0 ≤ start + tap·dilation < size.
struct Taps {
  int64_t begin, end;
};
FASTCONV_INLINE Taps taps_inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  int64_t begin = 0, end = taps;
  if (start < 0) begin = min_of(ceil_div(-start, dilation), taps);
  if (start + (taps - 1) * dilation >= size) end = start < size ? ceil_div(size - start, dilation) : 0;
  return {begin, max_of(begin, end)};
}

// Windows that cover a coordinate: number out − i·out_step by its tap first + i·tap_step, for i in [begin, end).
struct Cover {
  int64_t out, out_step, tap, tap_step, begin, end;
};

// All solutions of out·stride + tap·dilation = position with 0 ≤ tap < taps; out may lie outside of the output.
// A position that is j·stride further on has the same taps, and windows that are j further on.
Cover cover(int64_t position, int64_t stride, int64_t dilation, int64_t taps) {
  int64_t gcd = stride;
  for (int64_t a = dilation; a != 0;) {
    const int64_t rest = gcd % a;
    gcd = a;
    a = rest;
  }
  const int64_t tap_step = stride / gcd;
  int64_t tap = 0;
  while (tap < min_of(taps, tap_step) && (position - tap * dilation) % stride != 0) ++tap;
  if (tap >= min_of(taps, tap_step)) return {0, 1, 0, 1, 0, 0};
  return {(position - tap * dilation) / stride, dilation / gcd, tap, tap_step, 0, ceil_div(taps - tap, tap_step)};
}

// The same, j windows further on and without those outside [0, outs).
FASTCONV_INLINE Cover clip(Cover c, int64_t j, int64_t outs) {
  c.out += j;
  if (c.out >= outs) c.begin = min_of(ceil_div(c.out - outs + 1, c.out_step), c.end);
  while (c.end > c.begin && c.out < (c.end - 1) * c.out_step) --c.end;
  return c;
}

// Vectors of strided elements. Two-strided ones come in an order of their own, which in_order() undoes.

#if defined(__AVX512F__)
FASTCONV_INLINE vfloat even(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
FASTCONV_INLINE vec_t<double> even(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
template <typename V>
FASTCONV_INLINE V in_order(V v) {
  return v;
}
FASTCONV_INLINE vfloat low_pairs(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
FASTCONV_INLINE vfloat high_pairs(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
FASTCONV_INLINE vec_t<double> low_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
FASTCONV_INLINE vec_t<double> high_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif defined(__AVX2__)
FASTCONV_INLINE vfloat even(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14); }
FASTCONV_INLINE vec_t<double> even(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 4, 2, 6);
}
template <typename V>
FASTCONV_INLINE V in_order(V v) {
  const vec_t<double> pairs = (vec_t<double>)v;
  return (V)__builtin_shufflevector(pairs, pairs, 0, 2, 1, 3);
}
FASTCONV_INLINE vfloat low_pairs(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
FASTCONV_INLINE vfloat high_pairs(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
FASTCONV_INLINE vec_t<double> low_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
FASTCONV_INLINE vec_t<double> high_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#else
FASTCONV_INLINE vfloat even(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
FASTCONV_INLINE vec_t<double> even(vec_t<double> a, vec_t<double> b) { return __builtin_shufflevector(a, b, 0, 2); }
template <typename V>
FASTCONV_INLINE V in_order(V v) {
  return v;
}
FASTCONV_INLINE vfloat low_pairs(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
FASTCONV_INLINE vfloat high_pairs(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
FASTCONV_INLINE vec_t<double> low_pairs(vec_t<double> a, vec_t<double> b) { return __builtin_shufflevector(a, b, 0, 2); }
FASTCONV_INLINE vec_t<double> high_pairs(vec_t<double> a, vec_t<double> b) {
  return __builtin_shufflevector(a, b, 1, 3);
}
#endif

// `stride` is 1, 2 or, for any other, 0: then it is `step`.
template <int stride, typename T>
FASTCONV_INLINE vec_t<T> load_strided(const T* p, int64_t step) {
  if constexpr (stride == 1) {
    return load(p);
  } else if constexpr (stride == 2) {
    return even(load(p), load(p + lanes<T>));
  } else {
    vec_t<T> v;
    for (int i = 0; i < lanes<T>; ++i) v[i] = to_acc(p[i * step]);
    return v;
  }
}
template <int stride>
FASTCONV_INLINE int64_t elements_read(int64_t lanes, int64_t step) {
  return stride == 0 ? (lanes - 1) * step + 1 : stride * lanes;
}

template <typename T, typename Offset>
struct OffsetVector {
  typedef Offset type __attribute__((vector_size(lanes<T> * sizeof(Offset))));
};
template <typename T, typename Offset>
FASTCONV_INLINE void store_offsets(Offset* offsets, int64_t i, mask_t<T> v) {
  if constexpr (is_kept<Offset>) {
    const auto narrow = __builtin_convertvector(v, typename OffsetVector<T, Offset>::type);
    memcpy(offsets + i, &narrow, sizeof narrow);
  }
}
template <typename T, typename Offset>
FASTCONV_INLINE mask_t<T> load_offsets(const Offset* offsets) {
  typename OffsetVector<T, Offset>::type narrow;
  memcpy(&narrow, offsets, sizeof narrow);
  return __builtin_convertvector(narrow, mask_t<T>);
}

template <typename T>
FASTCONV_INLINE mask_t<T> all_taps(int64_t tap) {
  if constexpr (sizeof(acc_t<T>) == 4)
    return mask_t<T>{} + int32_t(tap);
  else
    return mask_t<T>{} + tap;
}

// The scan of `lanes` windows at once.
template <typename T>
struct Best {
  vec_t<T> value;
  mask_t<T> offset;

  FASTCONV_INLINE void take(vec_t<T> v, int64_t tap) {
    const mask_t<T> better = (v > value) | (v != v);
    value = better ? v : value;
    offset = better ? all_taps<T>(tap) : offset;
  }
};
template <typename T>
FASTCONV_INLINE Best<T> nothing_yet(int64_t first_tap) {
  return {broadcast<T>(-__builtin_inf()), all_taps<T>(first_tap)};
}

// One window of one channel. Element (h, w) of the plane is plane[(h·W + w)·pixel].
template <typename T, typename Offset>
__attribute__((noinline)) void forward_window(const MaxPool2dProblem& p, const T* plane, int64_t pixel, int64_t out_row, int64_t out_column, T* y,
                    Offset* offsets, int64_t i) {
  const int64_t h = out_row * p.stride_h - p.pad_h, w = out_column * p.stride_w - p.pad_w;
  const Taps rows = taps_inside(h, p.dilation_h, p.R, p.H), cols = taps_inside(w, p.dilation_w, p.S, p.W);
  acc_t<T> best = -__builtin_inf();
  int64_t offset = rows.begin < rows.end && cols.begin < cols.end ? rows.begin * p.S + cols.begin : 0;
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t s = cols.begin; s < cols.end; ++s) {
      const acc_t<T> v = to_acc(plane[((h + r * p.dilation_h) * p.W + w + s * p.dilation_w) * pixel]);
      if (v > best || v != v) {
        best = v;
        offset = r * p.S + s;
      }
    }
  y[i] = from_acc<T>(best);
  if constexpr (is_kept<Offset>) offsets[i] = Offset(offset);
}

// y[i …] = the windows [begin, end) of one output row. Windows [inner_begin, inner_end) have every column inside x.
// `taps` is the size of a square window without dilation, or 0 for any other window.
template <int stride, int taps, typename T, typename Offset>
FASTCONV_INLINE void forward_segment(const MaxPool2dProblem& p, const T* plane, const T* x_end, int64_t out_row,
                                     int64_t begin, int64_t end, int64_t inner_begin, int64_t inner_end, T* y,
                                     Offset* offsets, int64_t i, int64_t task_end) {
  const int64_t R = taps ? taps : p.R, S = taps ? taps : p.S;
  const int64_t dilation_h = taps ? 1 : p.dilation_h, dilation_w = taps ? 1 : p.dilation_w;
  const int64_t h = out_row * p.stride_h - p.pad_h;
  const Taps rows = taps_inside(h, dilation_h, R, p.H);
  inner_begin = max_of(inner_begin, begin);
  inner_end = min_of(inner_end, end);
  if (rows.begin == rows.end || inner_begin >= inner_end) inner_begin = inner_end = end;

  int64_t q = inner_begin;
  if (q < inner_end) {
    const int64_t step = stride ? stride : p.stride_w;
    const int64_t reach = (h + (rows.end - 1) * dilation_h) * p.W - p.pad_w + (S - 1) * dilation_w +
                          elements_read<stride>(lanes<T>, step);
    const int64_t last_read = (x_end - plane - reach) / step;       // q ≤ last_read stays inside the tensor,
    const int64_t last_write = task_end - i + begin - lanes<T>;     // q ≤ last_write inside the task
    const int64_t last = min_of(inner_end - 1, reach > x_end - plane ? -1 : min_of(last_read, last_write));
    const auto scan = [&](int64_t r_begin, int64_t r_end) {
      for (; q <= last; q += lanes<T>) {
        Best<T> best = nothing_yet<T>(r_begin * S);
        const T* row = plane + (h + r_begin * dilation_h) * p.W + q * step - p.pad_w;
        for (int64_t r = r_begin; r < r_end; ++r, row += dilation_h * p.W)
          for (int64_t s = 0; s < S; ++s) best.take(load_strided<stride>(row + s * dilation_w, step), r * S + s);
        if (stride == 2) best = {in_order(best.value), in_order(best.offset)};
        store(y + i + q - begin, best.value);
        store_offsets<T>(offsets, i + q - begin, best.offset);
      }
    };
    if (taps && rows.begin == 0 && rows.end == taps)
      scan(0, taps);  // of constant length: unrolled
    else
      scan(rows.begin, rows.end);
  }
  for (int64_t e = begin; e < inner_begin; ++e) forward_window(p, plane, 1, out_row, e, y, offsets, i + e - begin);
  for (int64_t e = min_of(q, inner_end); e < end; ++e)
    forward_window(p, plane, 1, out_row, e, y, offsets, i + e - begin);
}

template <int stride, int taps, typename T, typename Offset>
void forward_nchw(const MaxPool2dProblem& p, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const int64_t segments = ceil_div(p.Q, segment_columns), units = p.N * p.C * p.P * segments;
  const int64_t units_per_task = ceil_div(task_elements, min_of(p.Q, segment_columns));
  const int64_t inner_begin = ceil_div(p.pad_w, p.stride_w);
  const int64_t room = p.W - 1 - (p.S - 1) * p.dilation_w + p.pad_w;
  const int64_t inner_end = room < 0 ? 0 : room / p.stride_w + 1;
  const auto first_output = [&](int64_t unit) { return unit / segments * p.Q + unit % segments * segment_columns; };
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const int64_t unit_end = min_of((task + 1) * units_per_task, units);
    for (int64_t unit = task * units_per_task; unit < unit_end; ++unit) {
      const int64_t row = unit / segments, begin = unit % segments * segment_columns;
      forward_segment<stride, taps>(p, x + row / p.P * p.H * p.W, x + p.x_elements(), row % p.P, begin,
                                    min_of(begin + segment_columns, p.Q), inner_begin, inner_end, y, offsets,
                                    first_output(unit), first_output(unit_end));
    }
  });
}

template <int taps, typename T, typename Offset>
void forward_nhwc(const MaxPool2dProblem& p, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const int64_t R = taps ? taps : p.R, S = taps ? taps : p.S, C = p.C;
  const int64_t dilation_h = taps ? 1 : p.dilation_h, dilation_w = taps ? 1 : p.dilation_w;
  const int64_t pixels = p.N * p.P * p.Q, pixels_per_task = ceil_div(task_elements, C);
  for_each_task(parallel, ceil_div(pixels, pixels_per_task), [&](int, int64_t task) {
    const int64_t pixel_end = min_of((task + 1) * pixels_per_task, pixels);
    for (int64_t pixel = task * pixels_per_task; pixel < pixel_end; ++pixel) {
      const int64_t out_column = pixel % p.Q, out_row = pixel / p.Q % p.P;
      const T* image = x + pixel / (p.P * p.Q) * p.H * p.W * C;
      const int64_t h = out_row * p.stride_h - p.pad_h, w = out_column * p.stride_w - p.pad_w;
      const Taps rows = taps_inside(h, dilation_h, R, p.H), cols = taps_inside(w, dilation_w, S, p.W);
      const bool empty = rows.begin == rows.end || cols.begin == cols.end;
      const int64_t first = ((h + rows.begin * dilation_h) * p.W + w + cols.begin * dilation_w) * C;
      const int64_t span = ((rows.end - 1 - rows.begin) * dilation_h * p.W + (cols.end - 1 - cols.begin) * dilation_w) * C;
      const int64_t room = empty ? 0 : min_of(x + p.x_elements() - (image + first + span), (pixel_end - pixel) * C);
      const auto scan = [&](int64_t r_count, int64_t s_count) {
        for (int64_t c = 0; c < C; c += lanes<T>) {
          if (c + lanes<T> > C) {
            if (C >= lanes<T>) {
              c = C - lanes<T>;  // once more some of those before, for a whole vector
            } else if (lanes<T> > room) {
              for (; c < C; ++c) forward_window(p, image + c, C, out_row, out_column, y, offsets, pixel * C + c);
              break;
            }
          }
          Best<T> best = nothing_yet<T>(rows.begin * S + cols.begin);
          const T* row = image + first + c;
          for (int64_t r = 0; r < r_count; ++r, row += dilation_h * p.W * C)
            for (int64_t s = 0; s < s_count; ++s)
              best.take(load(row + s * dilation_w * C), (rows.begin + r) * S + cols.begin + s);
          store(y + pixel * C + c, best.value);
          store_offsets<T>(offsets, pixel * C + c, best.offset);
        }
      };
      if (empty)
        for (int64_t c = 0; c < C; ++c) forward_window(p, image, C, out_row, out_column, y, offsets, pixel * C + c);
      else if (taps && rows.end - rows.begin == taps && cols.end - cols.begin == taps)
        scan(taps, taps);  // of constant length: unrolled
      else
        scan(rows.end - rows.begin, cols.end - cols.begin);
    }
  });
}

template <typename T, typename Offset>
void forward_as(const MaxPool2dProblem& p, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const bool plain = p.R == p.S && p.dilation_h == 1 && p.dilation_w == 1;
  if (p.layout == Layout::NHWC && p.C > 1) {
    if constexpr (sizeof(Offset) == 1) {
      if (plain && p.R == 2) return forward_nhwc<2>(p, x, y, offsets, parallel);
      if (plain && p.R == 3) return forward_nhwc<3>(p, x, y, offsets, parallel);
    }
    return forward_nhwc<0>(p, x, y, offsets, parallel);
  }
  if constexpr (sizeof(Offset) == 1) {
    if (p.stride_w == 2) {
      if (plain && p.R == 2) return forward_nchw<2, 2>(p, x, y, offsets, parallel);
      if (plain && p.R == 3) return forward_nchw<2, 3>(p, x, y, offsets, parallel);
      return forward_nchw<2, 0>(p, x, y, offsets, parallel);
    }
    if (p.stride_w == 1) return forward_nchw<1, 0>(p, x, y, offsets, parallel);
  }
  forward_nchw<0, 0>(p, x, y, offsets, parallel);  // windows of more than 256 taps are rarely many
}

// One element of dx: the windows in `rows` × `cols` that took it. Element (p, q) of the plane is dy[(p·Q + q)·pixel].
template <typename T, typename Offset>
__attribute__((noinline)) acc_t<T> gradient(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, int64_t pixel, const Cover& rows,
                  const Cover& cols) {
  acc_t<T> sum = 0;
  for (int64_t a = rows.begin; a < rows.end; ++a)
    for (int64_t b = cols.begin; b < cols.end; ++b) {
      const int64_t i = ((rows.out - a * rows.out_step) * p.Q + cols.out - b * cols.out_step) * pixel;
      if (offsets[i] == (rows.tap + a * rows.tap_step) * p.S + cols.tap + b * cols.tap_step) sum += to_acc(dy[i]);
    }
  return sum;
}

// `lanes` elements of dx whose windows lie side by side in memory; dy and offsets point to window (0, 0) of the first.
template <typename T, typename Offset>
FASTCONV_INLINE vec_t<T> gradients(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, int64_t pixel,
                                   const Cover& rows, const Cover& cols) {
  vec_t<T> sum{};
  for (int64_t a = rows.begin; a < rows.end; ++a)
    for (int64_t b = cols.begin; b < cols.end; ++b) {
      const int64_t i = ((rows.out - a * rows.out_step) * p.Q + cols.out - b * cols.out_step) * pixel;
      const int64_t tap = (rows.tap + a * rows.tap_step) * p.S + cols.tap + b * cols.tap_step;
      const mask_t<T> taken = load_offsets<T>(offsets + i) == all_taps<T>(tap);
      sum += (vec_t<T>)((mask_t<T>)load(dy + i) & taken);
    }
  return sum;
}

template <typename T>
FASTCONV_INLINE void store_interleaved(T* p, vec_t<T> a, vec_t<T> b) {
  store(p, low_pairs(a, b));
  store(p + lanes<T>, high_pairs(a, b));
}

// dx[i …] = the elements [begin, end) of row h. Columns w = phase + j·stride_w share their taps, and their windows lie
// side by side: vectors run along j. `last_window` is the last index of dy, from here, at which a vector may start.
template <int stride, typename T, typename Offset>
FASTCONV_INLINE void backward_segment(const MaxPool2dProblem& p, const T* dy, const Offset* offsets,
                                      int64_t last_window, int64_t h, int64_t begin, int64_t end, T* dx, int64_t i,
                                      int64_t task_end) {
  const Cover rows = clip(cover(h + p.pad_h, p.stride_h, p.dilation_h, p.R), 0, p.P);
  dx += i - begin;
  task_end += begin - i;
  // Within [inner_begin, inner_end) all windows of a phase exist, and [.., vector_end) may be read as vectors.
  int64_t inner_begin = 0, inner_end = 0, vector_end = 0;
  const auto set_inner = [&](const Cover& cols) {
    inner_begin = max_of(inner_begin, max_of<int64_t>(cols.end - 1, 0) * cols.out_step - cols.out);
    inner_end = min_of(inner_end, p.Q - cols.out);
    vector_end = min_of(vector_end, last_window + 1 - rows.out * p.Q - cols.out);
  };
  // This element alone.
  const auto single = [&](const Cover& cols, int64_t j, int64_t w) {
    dx[w] = from_acc<T>(gradient(p, dy, offsets, 1, rows, clip(cols, j, p.Q)));
  };
  if constexpr (stride == 2) {
    const Cover even_cols = cover(p.pad_w, 2, p.dilation_w, p.S), odd_cols = cover(p.pad_w + 1, 2, p.dilation_w, p.S);
    inner_begin = begin / 2;
    inner_end = end / 2;
    vector_end = (task_end - 2 * lanes<T>) / 2 + 1;
    set_inner(even_cols);
    set_inner(odd_cols);
    int64_t j = min_of(inner_begin, inner_end);
    for (int64_t w = begin; w < min_of(2 * j, end); ++w) single(w % 2 ? odd_cols : even_cols, w / 2, w);
    for (; j < min_of(inner_end, vector_end); j += lanes<T>)
      store_interleaved(dx + 2 * j, gradients(p, dy + j, offsets + j, 1, rows, even_cols),
                        gradients(p, dy + j, offsets + j, 1, rows, odd_cols));
    for (int64_t w = 2 * min_of(j, inner_end); w < end; ++w) single(w % 2 ? odd_cols : even_cols, w / 2, w);
  } else {
    const int64_t step = stride ? stride : p.stride_w;
    for (int64_t phase = 0; phase < step; ++phase) {
      const Cover cols = cover(phase + p.pad_w, step, p.dilation_w, p.S);
      const int64_t j_begin = begin > phase ? ceil_div(begin - phase, step) : 0;
      const int64_t j_end = end > phase ? ceil_div(end - phase, step) : 0;
      inner_begin = j_begin;
      inner_end = j_end;
      vector_end = stride == 1 ? task_end - lanes<T> + 1 : j_end;
      set_inner(cols);
      int64_t j = min_of(inner_begin, inner_end);
      for (int64_t e = j_begin; e < min_of(j, j_end); ++e) single(cols, e, phase + e * step);
      for (; j < min_of(inner_end, vector_end); j += lanes<T>) {
        const vec_t<T> sum = gradients(p, dy + j, offsets + j, 1, rows, cols);
        if constexpr (stride == 1)
          store(dx + j, sum);
        else
          for (int64_t e = 0; e < min_of<int64_t>(lanes<T>, inner_end - j); ++e)
            dx[phase + (j + e) * step] = from_acc<T>(sum[e]);
      }
      for (int64_t e = max_of(min_of(j, inner_end), j_begin); e < j_end; ++e) single(cols, e, phase + e * step);
    }
  }
}

template <int stride, typename T, typename Offset>
void backward_nchw(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, T* dx, const Parallel& parallel) {
  const int64_t segments = ceil_div(p.W, segment_columns), units = p.N * p.C * p.H * segments;
  const int64_t units_per_task = ceil_div(task_elements, min_of(p.W, segment_columns));
  const auto first_element = [&](int64_t unit) { return unit / segments * p.W + unit % segments * segment_columns; };
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    const int64_t unit_end = min_of((task + 1) * units_per_task, units);
    for (int64_t unit = task * units_per_task; unit < unit_end; ++unit) {
      const int64_t row = unit / segments, begin = unit % segments * segment_columns;
      const int64_t plane = row / p.H * p.P * p.Q;
      backward_segment<stride>(p, dy + plane, offsets + plane, p.y_elements() - plane - lanes<T>, row % p.H, begin,
                               min_of(begin + segment_columns, p.W), dx, first_element(unit), first_element(unit_end));
    }
  });
}

template <typename T, typename Offset>
void backward_nhwc(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, T* dx, const Parallel& parallel) {
  const int64_t C = p.C, pixels = p.N * p.H * p.W, pixels_per_task = ceil_div(task_elements, C);
  for_each_task(parallel, ceil_div(pixels, pixels_per_task), [&](int, int64_t task) {
    const int64_t pixel_end = min_of((task + 1) * pixels_per_task, pixels);
    for (int64_t pixel = task * pixels_per_task; pixel < pixel_end; ++pixel) {
      const Cover rows = clip(cover(pixel / p.W % p.H + p.pad_h, p.stride_h, p.dilation_h, p.R), 0, p.P);
      const Cover cols = clip(cover(pixel % p.W + p.pad_w, p.stride_w, p.dilation_w, p.S), 0, p.Q);
      const int64_t image = pixel / (p.H * p.W) * p.P * p.Q * C;
      // The last window is the first one's: out falls as the taps rise.
      const int64_t last = ((rows.out - rows.begin * rows.out_step) * p.Q + cols.out - cols.begin * cols.out_step) * C;
      const int64_t room = min_of(p.y_elements() - image - last, (pixel_end - pixel) * C);
      for (int64_t c = 0; c < C; c += lanes<T>) {
        if (c + lanes<T> > C) {
          if (C >= lanes<T>) {
            c = C - lanes<T>;  // once more some of those before, for a whole vector
          } else if (lanes<T> > room) {
            for (; c < C; ++c)
              dx[pixel * C + c] = from_acc<T>(gradient(p, dy + image + c, offsets + image + c, C, rows, cols));
            break;
          }
        }
        store(dx + pixel * C + c, gradients(p, dy + image + c, offsets + image + c, C, rows, cols));
      }
    }
  });
}

template <typename T, typename Offset>
void backward_as(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, T* dx, const Parallel& parallel) {
  if (p.layout == Layout::NHWC && p.C > 1) return backward_nhwc(p, dy, offsets, dx, parallel);
  if constexpr (sizeof(Offset) == 1) {
    if (p.stride_w == 1) return backward_nchw<1>(p, dy, offsets, dx, parallel);
    if (p.stride_w == 2) return backward_nchw<2>(p, dy, offsets, dx, parallel);
  }
  backward_nchw<0>(p, dy, offsets, dx, parallel);
}

// Calls visit(i, index, plane) for every output i: the element it names is index·pixel from x + plane, or index is −1.
// Offsets may come from anyone, so one that names no element of x is like that of a window without any.
template <typename Offset, typename Visit>
void for_each_index(const MaxPool2dProblem& p, const Offset* offsets, const Parallel& parallel, const Visit& visit) {
  const bool nhwc = p.layout == Layout::NHWC;
  const int64_t inner = nhwc ? p.C : 1, total = p.y_elements();  // y is planes × P × Q × inner
  for_each_task(parallel, ceil_div(total, task_elements), [&](int, int64_t task) {
    int64_t i = task * task_elements;
    int64_t c = i % inner, out_column = i / inner % p.Q, out_row = i / inner / p.Q % p.P;
    int64_t plane = i / inner / p.Q / p.P;
    for (const int64_t end = min_of(i + task_elements, total); i < end; ++i) {
      const int64_t offset = offsets[i], r = offset / p.S, s = offset % p.S;
      const int64_t h = out_row * p.stride_h - p.pad_h + r * p.dilation_h;
      const int64_t w = out_column * p.stride_w - p.pad_w + s * p.dilation_w;
      const bool inside = r < p.R && h >= 0 && h < p.H && w >= 0 && w < p.W;
      visit(i, inside ? h * p.W + w : -1, plane * p.H * p.W * inner + c);
      if (++c < inner) continue;
      c = 0;
      if (++out_column < p.Q) continue;
      out_column = 0;
      if (++out_row < p.P) continue;
      out_row = 0;
      ++plane;
    }
  });
}

// Calls f(Offset{}) with the offsets' type.
template <typename F>
FASTCONV_INLINE void dispatch_offsets(const MaxPool2dProblem& p, F&& f) {
  switch (p.offset_bytes()) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    default: return f(uint32_t{});
  }
}

void forward(const MaxPool2dProblem& p, const MaxPool2dPlan&, const void* x, void* y, void* offsets,
             const Parallel& parallel) {
  if (p.y_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x_t = static_cast<const T*>(x);
    T* y_t = static_cast<T*>(y);
    if (!offsets) return forward_as(p, x_t, y_t, static_cast<NoOffset*>(nullptr), parallel);
    dispatch_offsets(p, [&](auto o) { forward_as(p, x_t, y_t, static_cast<decltype(o)*>(offsets), parallel); });
  });
}

void backward(const MaxPool2dProblem& p, const MaxPool2dPlan&, const void* dy, const void* offsets, void* dx,
              const Parallel& parallel) {
  if (p.x_elements() == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_offsets(p, [&](auto o) {
      backward_as(p, static_cast<const T*>(dy), static_cast<const decltype(o)*>(offsets), static_cast<T*>(dx),
                  parallel);
    });
  });
}

void indices(const MaxPool2dProblem& p, const void* offsets, int64_t* indices, const Parallel& parallel) {
  dispatch_offsets(p, [&](auto o) {
    for_each_index(p, static_cast<const decltype(o)*>(offsets), parallel,
                   [&](int64_t i, int64_t index, int64_t) { indices[i] = max_of<int64_t>(index, 0); });
  });
}

void gather(const MaxPool2dProblem& p, const void* x, const void* offsets, void* y, const Parallel& parallel) {
  const int64_t pixel = p.layout == Layout::NHWC ? p.C : 1;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_offsets(p, [&](auto o) {
      for_each_index(p, static_cast<const decltype(o)*>(offsets), parallel,
                     [&](int64_t i, int64_t index, int64_t plane) {
                       T* out = static_cast<T*>(y) + i;
                       *out = index < 0 ? T{} : static_cast<const T*>(x)[plane + index * pixel];
                     });
    });
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const MaxPool2dKernels max_pool2d;
const MaxPool2dKernels max_pool2d = {forward, backward, indices, gather};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
