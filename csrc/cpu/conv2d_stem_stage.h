// What the stem's kernels share.
//
// Rows of pixels of x with their padding, the channels of a pixel side by side in both memory orders. The taps (s, c)
// of a row of a window are then neighbours, and windows are read in place.
#pragma once

#include "conv2d_stage.h"
#include "conv2d_stem_blocks.h"

namespace fastconv::cpu {
namespace {

// For loops over registers: unrolled before the compiler decides what lives there, otherwise all the sums take a way by
// the stack.
#define FASTCONV_UNROLL _Pragma("GCC unroll 16")

// out[row][(col, channel)] for the given rows and columns of image n, whose positions may lie outside of it.
template <typename T>
void stage_rows(const Conv2dProblem& p, const T* x, int64_t n, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                acc_t<T>* out) {
  const int64_t C = p.C, begin = min_of(cols, max_of<int64_t>(0, -col0));
  const int64_t end = max_of(begin, min_of(cols, p.W - col0));
  for (int64_t row = row0; row < row0 + rows; ++row, out += cols * C) {
    if (row < 0 || row >= p.H) {
      fill_zero<T>(out, cols * C);
      continue;
    }
    fill_zero<T>(out, begin * C);
    if (p.layout == Layout::NHWC || C == 1) {
      copy_strided(x + ((n * p.H + row) * p.W + col0 + begin) * C, 1, out + begin * C, (end - begin) * C);
    } else {
      for (int64_t c = 0; c < C; ++c) {
        const T* from = x + ((n * C + c) * p.H + row) * p.W + col0;
        for (int64_t col = begin; col < end; ++col) out[col * C + c] = to_acc(from[col]);
      }
    }
    fill_zero<T>(out + end * C, (cols - end) * C);
  }
}

// The lines of dy that the next block reads: fetched one by one, while this block is multiplied.
struct StemAhead {
  const char* at;
  int64_t rows, row_bytes, pitch, done;

  FASTCONV_INLINE void fetch_line() {
    if (rows == 0) return;
    __builtin_prefetch(at + done);
    done += 64;
    if (done >= row_bytes) at += pitch, --rows, done = 0;
  }
};
template <typename T>
StemAhead stem_ahead(const Conv2dProblem& p, const T* dy, int64_t n, int64_t pixel, int64_t pixels) {
  const int64_t plane = p.P * p.Q, size = sizeof(T);
  if (p.layout == Layout::NHWC) return {(const char*)(dy + (n * plane + pixel) * p.K), 1, pixels * p.K * size, 0, 0};
  return {(const char*)(dy + n * p.K * plane + pixel), p.K, pixels * size, plane * size, 0};
}

}  // namespace
}  // namespace fastconv::cpu
