// Direct convolution: the definition as loops, any stride, padding, dilation, groups and dtype.
//
//   fprop  y[n,k,p,q]  = bias[k] + Σ_{c,r,s} w[k,c,r,s] · x[n,c,h,w]      h = p·stride_h + r·dilation_h − pad_h
//   dgrad  dx[n,c,h,w] = Σ_{k,r,s} w[k,c,r,s] · dy[n,k,p,q]               over the (p, q) that read (h, w)
//   wgrad  dw[k,c,r,s] = Σ_{n,p,q} dy[n,k,p,q] · x[n,c,h,w]               db[k] = Σ_{n,p,q} dy[n,k,p,q]
//
// Taps that fall into the padding are left out of the loops, never multiplied by zero. Vectors run along the dimension
// that is contiguous in memory: the columns of a row in NCHW, the channels of a pixel in NHWC. A task owns its outputs
// (a row, a pixel row or a filter), so the sums have one order whatever the number of threads.
#include "isa.h"

namespace fastconv::cpu {
namespace {

struct Range {
  int64_t begin, end;
};

// The outputs i of 0 … outputs−1 whose tap reads inside an axis of `size`: 0 ≤ i·stride + offset < size.
FASTCONV_INLINE Range outputs_inside(int64_t outputs, int64_t size, int64_t stride, int64_t offset) {
  const int64_t begin = offset < 0 ? ceil_div(-offset, stride) : 0;
  const int64_t end = offset < size ? (size - 1 - offset) / stride + 1 : 0;
  return {begin, max_of(begin, min_of(outputs, end))};
}

// The output that reads position h through tap r, or −1: h = p·stride + r·dilation − pad.
FASTCONV_INLINE int64_t output_reading(int64_t h, int64_t r, int64_t outputs, int64_t stride, int64_t pad,
                                       int64_t dilation) {
  const int64_t from_tap = h + pad - r * dilation;
  if (from_tap < 0 || from_tap % stride != 0) return -1;
  return from_tap / stride < outputs ? from_tap / stride : -1;
}

// sum[i·sum_step] += factor · v[i·v_step]
template <typename T>
void add_scaled(int64_t count, acc_t<T> factor, const T* v, int64_t v_step, acc_t<T>* sum, int64_t sum_step) {
  int64_t i = 0;
  if (v_step == 1 && sum_step == 1)
    for (; i + lanes<T> <= count; i += lanes<T>) store(sum + i, load(sum + i) + broadcast<T>(factor) * load(v + i));
  for (; i < count; ++i) sum[i * sum_step] += factor * to_acc(v[i * v_step]);
}

// Σ a[i] · b[i·b_step]
template <typename T>
acc_t<T> dot(int64_t count, const T* a, const T* b, int64_t b_step) {
  vec_t<T> sums{};
  int64_t i = 0;
  if (b_step == 1)
    for (; i + lanes<T> <= count; i += lanes<T>) sums += load(a + i) * load(b + i);
  acc_t<T> sum = 0;
  for (int lane = 0; lane < lanes<T>; ++lane) sum += sums[lane];
  for (; i < count; ++i) sum += to_acc(a[i]) * to_acc(b[i * b_step]);
  return sum;
}

template <typename T>
void convert_row(int64_t count, const acc_t<T>* row, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_acc<T>(row[i]);
}

// ---- NCHW: one output row at a time, vectors along the row ----

template <typename T>
void fprop_nchw(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                char* scratch, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group();
  for_each_task(parallel, pr.N * pr.K * pr.P, [&](int worker, int64_t task) {
    const int64_t p = task % pr.P, k = task / pr.P % pr.K, n = task / pr.P / pr.K;
    auto* row = reinterpret_cast<acc_t<T>*>(scratch + worker * plan.scratch_bytes);
    for (int64_t q = 0; q < pr.Q; ++q) row[q] = bias ? to_acc(bias[k]) : 0;
    for (int64_t c = 0; c < cg; ++c) {
      const T* plane = x + (n * pr.C + k / pr.filters_per_group() * cg + c) * pr.H * pr.W;
      const T* filter = w + (k * cg + c) * pr.R * pr.S;
      for (int64_t r = 0; r < pr.R; ++r) {
        const int64_t h = p * pr.stride_h + r * pr.dilation_h - pr.pad_h;
        if (h < 0 || h >= pr.H) continue;
        for (int64_t s = 0; s < pr.S; ++s) {
          const int64_t offset = s * pr.dilation_w - pr.pad_w;
          const Range q = outputs_inside(pr.Q, pr.W, pr.stride_w, offset);
          if (q.begin == q.end) continue;
          add_scaled(q.end - q.begin, to_acc(filter[r * pr.S + s]), plane + h * pr.W + q.begin * pr.stride_w + offset,
                     pr.stride_w, row + q.begin, 1);
        }
      }
    }
    if (pr.relu)
      for (int64_t q = 0; q < pr.Q; ++q) row[q] = relu(row[q]);
    convert_row(pr.Q, row, y + task * pr.Q);
  });
}

template <typename T>
void dgrad_nchw(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, char* scratch,
                const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group();
  for_each_task(parallel, pr.N * pr.C * pr.H, [&](int worker, int64_t task) {
    const int64_t h = task % pr.H, c = task / pr.H % pr.C, n = task / pr.H / pr.C;
    auto* row = reinterpret_cast<acc_t<T>*>(scratch + worker * plan.scratch_bytes);
    for (int64_t i = 0; i < pr.W; ++i) row[i] = 0;
    for (int64_t k = c / cg * kg; k < (c / cg + 1) * kg; ++k) {
      const T* plane = dy + (n * pr.K + k) * pr.P * pr.Q;
      const T* filter = w + (k * cg + c % cg) * pr.R * pr.S;
      for (int64_t r = 0; r < pr.R; ++r) {
        const int64_t p = output_reading(h, r, pr.P, pr.stride_h, pr.pad_h, pr.dilation_h);
        if (p < 0) continue;
        for (int64_t s = 0; s < pr.S; ++s) {
          const int64_t offset = s * pr.dilation_w - pr.pad_w;
          const Range q = outputs_inside(pr.Q, pr.W, pr.stride_w, offset);
          if (q.begin == q.end) continue;
          add_scaled(q.end - q.begin, to_acc(filter[r * pr.S + s]), plane + p * pr.Q + q.begin, 1,
                     row + q.begin * pr.stride_w + offset, pr.stride_w);
        }
      }
    }
    convert_row(pr.W, row, dx + task * pr.W);
  });
}

template <typename T>
void wgrad_nchw(const Conv2dProblem& pr, const T* dy, const T* x, T* dw, T* db, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group();
  for_each_task(parallel, pr.K * cg, [&](int, int64_t task) {
    const int64_t c = task % cg, k = task / cg;
    for (int64_t r = 0; r < pr.R; ++r) {
      const Range p = outputs_inside(pr.P, pr.H, pr.stride_h, r * pr.dilation_h - pr.pad_h);
      for (int64_t s = 0; s < pr.S; ++s) {
        const int64_t offset = s * pr.dilation_w - pr.pad_w;
        const Range q = outputs_inside(pr.Q, pr.W, pr.stride_w, offset);
        acc_t<T> sum = 0;
        for (int64_t n = 0; n < pr.N && q.begin < q.end; ++n) {
          const T* dy_plane = dy + (n * pr.K + k) * pr.P * pr.Q;
          const T* x_plane = x + (n * pr.C + k / pr.filters_per_group() * cg + c) * pr.H * pr.W;
          for (int64_t i = p.begin; i < p.end; ++i) {
            const int64_t h = i * pr.stride_h + r * pr.dilation_h - pr.pad_h;
            sum += dot(q.end - q.begin, dy_plane + i * pr.Q + q.begin,
                       x_plane + h * pr.W + q.begin * pr.stride_w + offset, pr.stride_w);
          }
        }
        dw[(task * pr.R + r) * pr.S + s] = from_acc<T>(sum);
      }
    }
    if (db == nullptr || c != 0) return;
    acc_t<T> sum = 0;
    for (int64_t n = 0; n < pr.N; ++n) {
      acc_t<T> image = 0;
      for (int64_t i = 0; i < pr.P * pr.Q; ++i) image += to_acc(dy[(n * pr.K + k) * pr.P * pr.Q + i]);
      sum += image;
    }
    db[k] = from_acc<T>(sum);
  });
}

// ---- NHWC: one pixel at a time, vectors along its channels ----

template <typename T>
void fprop_nhwc(const Conv2dProblem& pr, const T* x, const T* w, const T* bias, T* y, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), vector_end = cg - cg % lanes<T>;
  for_each_task(parallel, pr.N * pr.P, [&](int, int64_t task) {
    const int64_t p = task % pr.P, n = task / pr.P;
    for (int64_t q = 0; q < pr.Q; ++q) {
      for (int64_t k = 0; k < pr.K; ++k) {
        vec_t<T> sums{};
        acc_t<T> sum = bias ? to_acc(bias[k]) : 0;
        for (int64_t r = 0; r < pr.R; ++r) {
          const int64_t h = p * pr.stride_h + r * pr.dilation_h - pr.pad_h;
          if (h < 0 || h >= pr.H) continue;
          for (int64_t s = 0; s < pr.S; ++s) {
            const int64_t col = q * pr.stride_w + s * pr.dilation_w - pr.pad_w;
            if (col < 0 || col >= pr.W) continue;
            const T* pixel = x + ((n * pr.H + h) * pr.W + col) * pr.C + k / pr.filters_per_group() * cg;
            const T* filter = w + ((k * pr.R + r) * pr.S + s) * cg;
            for (int64_t c = 0; c < vector_end; c += lanes<T>) sums += load(filter + c) * load(pixel + c);
            for (int64_t c = vector_end; c < cg; ++c) sum += to_acc(filter[c]) * to_acc(pixel[c]);
          }
        }
        for (int lane = 0; lane < lanes<T>; ++lane) sum += sums[lane];
        y[(task * pr.Q + q) * pr.K + k] = from_acc<T>(pr.relu ? relu(sum) : sum);
      }
    }
  });
}

template <typename T>
void dgrad_nhwc(const Conv2dProblem& pr, const T* dy, const T* w, T* dx, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group();
  for_each_task(parallel, pr.N * pr.H, [&](int, int64_t task) {
    const int64_t h = task % pr.H, n = task / pr.H;
    // Σ over the taps and filters that reach (h, col): visit(weight of channel 0 of the group, dy value).
    const auto each_term = [&](int64_t col, int64_t group, const auto& visit) {
      for (int64_t r = 0; r < pr.R; ++r) {
        const int64_t p = output_reading(h, r, pr.P, pr.stride_h, pr.pad_h, pr.dilation_h);
        for (int64_t s = 0; s < pr.S && p >= 0; ++s) {
          const int64_t q = output_reading(col, s, pr.Q, pr.stride_w, pr.pad_w, pr.dilation_w);
          if (q < 0) continue;
          const T* pixel = dy + ((n * pr.P + p) * pr.Q + q) * pr.K;
          for (int64_t k = group * kg; k < (group + 1) * kg; ++k)
            visit(w + ((k * pr.R + r) * pr.S + s) * cg, to_acc(pixel[k]));
        }
      }
    };
    for (int64_t col = 0; col < pr.W; ++col) {
      for (int64_t group = 0; group < pr.groups; ++group) {
        T* out = dx + (task * pr.W + col) * pr.C + group * cg;
        int64_t c = 0;
        for (; c + lanes<T> <= cg; c += lanes<T>) {
          vec_t<T> sums{};
          each_term(col, group, [&](const T* filter, acc_t<T> d) { sums += broadcast<T>(d) * load(filter + c); });
          store(out + c, sums);
        }
        for (; c < cg; ++c) {
          acc_t<T> sum = 0;
          each_term(col, group, [&](const T* filter, acc_t<T> d) { sum += d * to_acc(filter[c]); });
          out[c] = from_acc<T>(sum);
        }
      }
    }
  });
}

template <typename T>
void wgrad_nhwc(const Conv2dProblem& pr, const T* dy, const T* x, T* dw, T* db, const Parallel& parallel) {
  const int64_t cg = pr.channels_per_group();
  for_each_task(parallel, pr.K * pr.R, [&](int, int64_t task) {
    const int64_t r = task % pr.R, k = task / pr.R;
    const Range p = outputs_inside(pr.P, pr.H, pr.stride_h, r * pr.dilation_h - pr.pad_h);
    for (int64_t s = 0; s < pr.S; ++s) {
      const int64_t offset = s * pr.dilation_w - pr.pad_w;
      const Range q = outputs_inside(pr.Q, pr.W, pr.stride_w, offset);
      // Σ over the outputs whose tap (r, s) is inside: visit(channel 0 of the pixel's group, dy value).
      const auto each_term = [&](const auto& visit) {
        for (int64_t n = 0; n < pr.N; ++n) {
          for (int64_t i = p.begin; i < p.end; ++i) {
            const int64_t h = i * pr.stride_h + r * pr.dilation_h - pr.pad_h;
            for (int64_t j = q.begin; j < q.end; ++j)
              visit(x + ((n * pr.H + h) * pr.W + j * pr.stride_w + offset) * pr.C + k / pr.filters_per_group() * cg,
                    to_acc(dy[((n * pr.P + i) * pr.Q + j) * pr.K + k]));
          }
        }
      };
      T* out = dw + (task * pr.S + s) * cg;
      int64_t c = 0;
      for (; c + lanes<T> <= cg; c += lanes<T>) {
        vec_t<T> sums{};
        each_term([&](const T* pixel, acc_t<T> d) { sums += broadcast<T>(d) * load(pixel + c); });
        store(out + c, sums);
      }
      for (; c < cg; ++c) {
        acc_t<T> sum = 0;
        each_term([&](const T* pixel, acc_t<T> d) { sum += d * to_acc(pixel[c]); });
        out[c] = from_acc<T>(sum);
      }
    }
    if (db == nullptr || r != 0) return;
    acc_t<T> sum = 0;
    for (int64_t i = 0; i < pr.N * pr.P * pr.Q; ++i) sum += to_acc(dy[i * pr.K + k]);
    db[k] = from_acc<T>(sum);
  });
}

// ---- the table ----

void fprop(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
           void* y, void*, void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::NCHW)
      fprop_nchw(problem, plan, (const T*)x, (const T*)w, (const T*)bias, (T*)y, (char*)scratch, parallel);
    else
      fprop_nhwc(problem, (const T*)x, (const T*)w, (const T*)bias, (T*)y, parallel);
  });
}

void dgrad(const Conv2dProblem& problem, const Conv2dPlan& plan, const void* dy, const void* w, void* dx, void*,
           void* scratch, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::NCHW)
      dgrad_nchw(problem, plan, (const T*)dy, (const T*)w, (T*)dx, (char*)scratch, parallel);
    else
      dgrad_nhwc(problem, (const T*)dy, (const T*)w, (T*)dx, parallel);
  });
}

void wgrad(const Conv2dProblem& problem, const Conv2dPlan&, const void* dy, const void* x, void* dw, void* db, void*,
           void*, const Parallel& parallel) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.layout == Layout::NCHW)
      wgrad_nchw(problem, (const T*)dy, (const T*)x, (T*)dw, (T*)db, parallel);
    else
      wgrad_nhwc(problem, (const T*)dy, (const T*)x, (T*)dw, (T*)db, parallel);
  });
}

}  // namespace

namespace FASTCONV_ISA {
extern const Conv2dKernels conv2d_direct;
const Conv2dKernels conv2d_direct = {fprop, dgrad, wgrad};
}  // namespace FASTCONV_ISA

}  // namespace fastconv::cpu
