// Max pooling: y[n,c,p,q] = max over r, s of
//   x[n, c, p·stride_h − pad_h + r·dilation_h, q·stride_w − pad_w + s·dilation_w],
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
#include "max_pool2d_backward.h"
#include "max_pool2d_backward_stride_2.h"
#include "max_pool2d_forward.h"
#include "max_pool2d_forward_stride_2.h"

namespace fastconv::cpu {
namespace {

// The same problem without values that have no effect: huge strides or dilations, the layout of one channel.
MaxPool2dProblem normalized(MaxPool2dProblem p) {
  p.stride_h = min_of(p.stride_h, p.H + 2 * p.pad_h + 1);
  p.stride_w = min_of(p.stride_w, p.W + 2 * p.pad_w + 1);
  if (p.R == 1) p.dilation_h = 1;
  if (p.S == 1) p.dilation_w = 1;
  if (p.C == 1) p.layout = Layout::NCHW;
  return p;
}

template <typename T, typename Offset>
void forward_as(const MaxPool2dProblem& p, const T* x, T* y, Offset* offsets, const Parallel& parallel) {
  const bool plain = p.R == p.S && p.dilation_h == 1 && p.dilation_w == 1;
  if (p.layout == Layout::NHWC) {
    if constexpr (sizeof(Offset) == 1) {
      if (plain && p.R == 2) return forward_nhwc<2>(p, x, y, offsets, parallel);
      if (plain && p.R == 3) return forward_nhwc<3>(p, x, y, offsets, parallel);
    }
    return forward_nhwc<0>(p, x, y, offsets, parallel);
  }
  if constexpr (sizeof(Offset) == 1) {
    if (has_forward_stride_2(p)) {
      if (p.R == 2) return forward_nchw_stride_2<2>(p, x, y, offsets, parallel);
      return forward_nchw_stride_2<3>(p, x, y, offsets, parallel);
    }
    if (p.stride_w == 2) {
      if (plain && p.R == 2) return forward_nchw<2, 2>(p, x, y, offsets, parallel);
      if (plain && p.R == 3) return forward_nchw<2, 3>(p, x, y, offsets, parallel);
      return forward_nchw<2, 0>(p, x, y, offsets, parallel);
    }
    if (p.stride_w == 1 && plain && p.R == 3) return forward_nchw<1, 3>(p, x, y, offsets, parallel);
    if (p.stride_w == 1) return forward_nchw<1, 0>(p, x, y, offsets, parallel);
  }
  forward_nchw<0, 0>(p, x, y, offsets, parallel);  // windows of more than 256 taps are rarely many
}

template <typename T, typename Offset>
void backward_as(const MaxPool2dProblem& p, const T* dy, const Offset* offsets, T* dx, const Parallel& parallel) {
  const bool nhwc = p.layout == Layout::NHWC;
  if constexpr (sizeof(Offset) == 1) {
    if (is_stride_2(p)) {
      if (nhwc && p.R == 2) return backward_nhwc_stride_2<2>(p, dy, offsets, dx, parallel);
      if (nhwc) return backward_nhwc_stride_2<3>(p, dy, offsets, dx, parallel);
      if (p.R == 2 && p.pad_w == 0) return backward_nchw_stride_2<2, false>(p, dy, offsets, dx, parallel);
      if (p.R == 2) return backward_nchw_stride_2<2, true>(p, dy, offsets, dx, parallel);
      if (p.pad_w == 0) return backward_nchw_stride_2<3, false>(p, dy, offsets, dx, parallel);
      return backward_nchw_stride_2<3, true>(p, dy, offsets, dx, parallel);
    }
  }
  if (nhwc) return backward_nhwc(p, dy, offsets, dx, parallel);
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
    int64_t i = task * task_elements, c = i % inner;
    Walk walk(i / inner, p.P, p.Q);
    for (const int64_t end = min_of(i + task_elements, total); i < end; ++i) {
      const int64_t offset = offsets[i], r = offset / p.S, s = offset % p.S;
      const int64_t h = walk.row * p.stride_h - p.pad_h + min_of(r, p.R) * p.dilation_h;
      const int64_t w = walk.column * p.stride_w - p.pad_w + s * p.dilation_w;
      const bool inside = r < p.R && h >= 0 && h < p.H && w >= 0 && w < p.W;
      visit(i, inside ? h * p.W + w : -1, walk.plane * p.H * p.W * inner + c);
      if (++c < inner) continue;
      c = 0;
      walk.next();
    }
  });
}

// Calls f(Offset{}) with the offsets' type.
template <typename F>
FASTCONV_INLINE void dispatch_offsets(const MaxPool2dProblem& p, F&& f) {
  switch (p.offset_bytes) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    default: return f(uint32_t{});
  }
}

void forward(const MaxPool2dProblem& problem, const MaxPool2dPlan&, const void* x, void* y, void* offsets,
             const Parallel& parallel) {
  if (problem.y_elements() == 0) return;
  const MaxPool2dProblem p = normalized(problem);
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x_t = static_cast<const T*>(x);
    T* y_t = static_cast<T*>(y);
    if (!offsets) return forward_as(p, x_t, y_t, static_cast<NoOffset*>(nullptr), parallel);
    dispatch_offsets(p, [&](auto o) { forward_as(p, x_t, y_t, static_cast<decltype(o)*>(offsets), parallel); });
  });
}

void backward(const MaxPool2dProblem& problem, const MaxPool2dPlan&, const void* dy, const void* offsets, void* dx,
              const Parallel& parallel) {
  if (problem.x_elements() == 0) return;
  const MaxPool2dProblem p = normalized(problem);
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_offsets(p, [&](auto o) {
      backward_as(p, static_cast<const T*>(dy), static_cast<const decltype(o)*>(offsets), static_cast<T*>(dx),
                  parallel);
    });
  });
}

void indices(const MaxPool2dProblem& problem, const void* offsets, int64_t* indices, const Parallel& parallel) {
  const MaxPool2dProblem p = normalized(problem);
  dispatch_offsets(p, [&](auto o) {
    for_each_index(p, static_cast<const decltype(o)*>(offsets), parallel,
                   [&](int64_t i, int64_t index, int64_t) { indices[i] = max_of<int64_t>(index, 0); });
  });
}

void gather(const MaxPool2dProblem& problem, const void* x, const void* offsets, void* y, const Parallel& parallel) {
  const MaxPool2dProblem p = normalized(problem);
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
