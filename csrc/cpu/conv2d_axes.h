// Where a convolution reads and writes along one axis, and how a block of it is laid out when it is staged.
// Plain arithmetic on sizes, shared by the plan (how much scratch) and by the kernels (where in it).
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fastconv::cpu {
namespace {

// Output i, which lies at position out_first + i·out_step, sums over tap = 0 … taps−1
//   filter[filter_first + tap·filter_step] · source[i·step + first + tap·inc]      0 outside 0 … source−1
struct Axis {
  int64_t source, outputs, taps;
  int64_t step, first, inc;
  int64_t filter_first, filter_step;
  int64_t out_first, out_step;
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// y[p] = Σ_r w[r] · x[p·stride + r·dilation − pad]
inline Axis fprop_axis(int64_t source, int64_t outputs, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  if (taps == 1) dilation = 1;  // without effect then, and so large perhaps that products would overflow
  return {source, outputs, taps, stride, -pad, dilation, 0, 1, 0, 1};
}

// dx[h] = Σ w[r] · dy[p] over p·stride + r·dilation − pad = h. The h of one phase, h = phase + i·stride, share their
// taps: every r with r·dilation ≡ phase + pad (mod stride). Those are `period` apart, and each reads p = i + constant.
inline Axis dgrad_axis(int64_t source, int64_t outputs, int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                       int64_t phase) {
  if (taps == 1) dilation = 1;
  const int64_t period = stride / greatest_common_divisor(stride, dilation);
  int64_t r = 0;
  while (r < period && r < taps && (phase + pad - r * dilation) % stride != 0) ++r;
  const bool any = r < period && r < taps;
  return {source,
          phase < outputs ? (outputs - 1 - phase) / stride + 1 : 0,
          any ? (taps - 1 - r) / period + 1 : 0,
          1,
          any ? (phase + pad - r * dilation) / stride : 0,
          -dilation * period / stride,
          r,
          period,
          phase,
          stride};
}

inline Axis fprop_rows(const Conv2dProblem& p) { return fprop_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h); }
inline Axis fprop_cols(const Conv2dProblem& p) { return fprop_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w); }
inline Axis dgrad_rows(const Conv2dProblem& p, int64_t phase) {
  return dgrad_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h, phase);
}
inline Axis dgrad_cols(const Conv2dProblem& p, int64_t phase) {
  return dgrad_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w, phase);
}

// A staged block holds what `outputs` neighbouring outputs read, as strips in which a step is one element: output i and
// tap find their value at element i + shift(tap) of strip(tap). Taps that are congruent modulo the step share a strip;
// where dilation leaves more gaps between taps than there are outputs, each tap has its own.
struct Strips {
  int64_t count, length;
  int64_t jump;  // elements between two taps of one strip
  int64_t last;  // most jumps in a strip

  int64_t elements() const { return count * length; }
  int64_t shift(int64_t tap) const { return jump >= 0 ? tap / count * jump : (tap / count - last) * jump; }
  int64_t offset(int64_t tap) const { return tap % count * length + shift(tap); }  // of output 0, in the staged block
  // Source index of element 0 of a strip, for a block whose first output is i0.
  int64_t origin(const Axis& axis, int64_t strip, int64_t i0) const {
    return i0 * axis.step + axis.first + strip * axis.inc + (jump < 0 ? last * jump * axis.step : 0);
  }
};

inline Strips make_strips(const Axis& axis, int64_t outputs) {
  if (axis.taps == 0) return {0, 0, 0, 0};
  const int64_t period = axis.step / greatest_common_divisor(axis.step, axis.inc < 0 ? -axis.inc : axis.inc);
  const int64_t count = period < axis.taps ? period : axis.taps;
  const int64_t last = (axis.taps - 1) / count;
  const int64_t jump = last == 0 ? 0 : count * axis.inc / axis.step;
  const int64_t length = outputs + last * (jump < 0 ? -jump : jump);
  if (count * length > axis.taps * outputs) return {axis.taps, outputs, 0, 0};
  return {count, length, jump, last};
}

}  // namespace
}  // namespace fastconv::cpu
