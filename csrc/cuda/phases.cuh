// The phases of a strided dgrad: rows h of dx with the same h mod stride meet the same taps, every `tap_step`-th, so
// that each phase is a dense convolution of dy by some of the taps, and nothing is multiplied by zeros.
#pragma once

#include "types.cuh"

namespace fastconv::cuda {

// Which outputs of dx make up a phase, and which taps they meet: r = tap_first + i·tap_step reads dy's row
// first + h / stride − i·dilation / gcd(stride, dilation).
struct PhaseAxis {
  int outputs, first, taps, tap_first;
};
__host__ __device__ inline PhaseAxis phase_axis(int phase, int size, int stride, int pad, int dilation, int taps,
                                                int tap_step) {
  const int outputs = (size - phase + stride - 1) / stride;
  // redundant: if none of the first tap_step taps meets the phase, none does
  for (int tap = 0; tap < taps && tap < tap_step; ++tap) {
    const int distance = phase + pad - tap * dilation;
    if (distance % stride == 0) return {outputs, distance / stride, (taps - 1 - tap) / tap_step + 1, tap};
  }
  return {outputs, 0, 0, 0};
}

}  // namespace fastconv::cuda
