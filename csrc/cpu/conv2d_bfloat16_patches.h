// Patches of bfloat16 as rows of (r, s, c), NHWC.
#pragma once

#include "bfloat16.h"

namespace fastconv::cpu {
namespace {

// Some neighbouring channels of a source [n][row][col][pitch], from `first` on.
struct Bfloat16Patches {
  Axis rows, cols;
  int64_t N, pitch;
  const bfloat16_t* source;

  int64_t pixels() const { return N * rows.outputs * cols.outputs; }
  int64_t taps() const { return rows.taps * cols.taps; }
};

// Zeros, and where [inside, outside) of them lies in the source, that. May write a register past the end.
FASTCONV_INLINE void copy_clipped(const bfloat16_t* from, int64_t length, int64_t inside, int64_t outside,
                                  bfloat16_t* out) {
  for (int64_t i = 0; i < length; i += 32) {
    const __mmask32 mask = first_lanes(outside - i) & ~first_lanes(inside - i);
    store_pairs(out + i, load_pairs(from + i, mask));
  }
}

// out[pixel − pixel0][0 … length) = elements from `begin` on of what the outputs read at tap (r, s): the `channels`
// from `first` on of `width` neighbouring pixels. May write a register past each row.
inline void pack_tap(const Bfloat16Patches& p, int64_t first, int64_t channels, int64_t r, int64_t s, int64_t width,
                     int64_t begin, int64_t length, int64_t pixel0, int64_t count, bfloat16_t* out, int64_t out_row) {
  const Axis &rows = p.rows, &cols = p.cols;
  const int64_t col0 = cols.first + s * cols.inc;  // of the output in column 0
  // Outputs from `whole0` to `whole1` read columns of the source only.
  const int64_t whole0 = col0 >= 0 ? 0 : ceil_div(-col0, cols.step);
  const int64_t whole1 = cols.source - width < col0 ? 0 : (cols.source - width - col0) / cols.step + 1;
  for (int64_t pixel = pixel0; pixel < pixel0 + count;) {
    const int64_t j0 = pixel % cols.outputs, i = pixel / cols.outputs % rows.outputs;
    const int64_t n = pixel / cols.outputs / rows.outputs, j1 = min_of(cols.outputs, j0 + pixel0 + count - pixel);
    const int64_t row = i * rows.step + rows.first + r * rows.inc;
    const bool outside = row < 0 || row >= rows.source;
    const bfloat16_t* from = p.source + ((n * rows.source + row) * cols.source + col0) * p.pitch + first + begin;
    const auto clipped = [&](int64_t j, int64_t end) {
      for (; j < end; ++j, out += out_row) {
        const int64_t col = col0 + j * cols.step;
        copy_clipped(from + j * cols.step * p.pitch, length, -col * channels - begin,
                     outside ? 0 : (cols.source - col) * channels - begin, out);
      }
    };
    const int64_t lo = outside ? j1 : min_of(j1, max_of(j0, whole0));
    const int64_t hi = outside ? j1 : min_of(j1, max_of(lo, whole1));
    clipped(j0, lo);
    const __mmask32 last = first_lanes((length - 1) % 32 + 1);
    const int64_t whole = (length - 1) / 32 * 32, step = cols.step * p.pitch;
    for (int64_t j = lo; j < hi; ++j, out += out_row) {
      const bfloat16_t* pixel_from = from + j * step;
      for (int64_t e = 0; e < whole; e += 32) store_pairs(out + e, _mm512_loadu_si512(pixel_from + e));
      store_pairs(out + whole, load_pairs(pixel_from + whole, last));
    }
    clipped(hi, j1);
    pixel += j1 - j0;
  }
}

// sources[pixel − pixel0] = what the output reads at a tap, from channel `first` on, or null outside of the source.
inline void tap_sources(const Bfloat16Patches& p, int64_t first, int64_t tap, int64_t pixel0, int64_t count,
                        const bfloat16_t** sources) {
  const Axis &rows = p.rows, &cols = p.cols;
  const int64_t col0 = cols.first + tap % cols.taps * cols.inc, step = cols.step * p.pitch;
  const int64_t inside0 = col0 >= 0 ? 0 : ceil_div(-col0, cols.step);
  const int64_t inside1 = cols.source <= col0 ? 0 : (cols.source - 1 - col0) / cols.step + 1;
  for (int64_t pixel = pixel0; pixel < pixel0 + count;) {
    const int64_t j0 = pixel % cols.outputs, i = pixel / cols.outputs % rows.outputs;
    const int64_t n = pixel / cols.outputs / rows.outputs, j1 = min_of(cols.outputs, j0 + pixel0 + count - pixel);
    const int64_t row = i * rows.step + rows.first + tap / cols.taps * rows.inc;
    const int64_t lo = row < 0 || row >= rows.source ? j1 : min_of(j1, max_of(j0, inside0));
    const int64_t hi = min_of(j1, max_of(lo, inside1));
    const bfloat16_t* from = p.source + ((n * rows.source + row) * cols.source + col0) * p.pitch + first;
    for (int64_t j = j0; j < lo; ++j) *sources++ = nullptr;
    for (int64_t j = lo; j < hi; ++j) *sources++ = from + j * step;
    for (int64_t j = hi; j < j1; ++j) *sources++ = nullptr;
    pixel += j1 - j0;
  }
}

// out[pixel − pixel0][t − t0] = element t = (tap, channel) of the pixel's patch, and a zero where t1 − t0 is odd.
// taps × channels are those of `channels` from `first` on, and of filter taps from tap0 on.
inline void pack_patch_rows(const Bfloat16Patches& p, int64_t first, int64_t channels, int64_t tap0, int64_t pixel0,
                            int64_t count, int64_t t0, int64_t t1, bfloat16_t* out, int64_t out_row) {
  // Whole pixels that are neighbours in a row of the filter are one piece.
  const bool joined = channels == p.pitch && p.cols.inc == 1 && tap0 % p.cols.taps == 0;
  const int64_t width = joined ? p.cols.taps : 1, unit = width * channels;
  for (int64_t t = t0; t < t1;) {
    const int64_t tap = tap0 + t / unit * width, begin = t % unit, end = min_of(unit, begin + t1 - t);
    pack_tap(p, first, channels, tap / p.cols.taps, tap % p.cols.taps, width, begin, end - begin, pixel0, count,
             out + t - t0, out_row);
    t += end - begin;
  }
  if ((t1 - t0) % 2)
    for (int64_t i = 0; i < count; ++i) out[i * out_row + t1 - t0] = {0};
}

}  // namespace
}  // namespace fastconv::cpu
