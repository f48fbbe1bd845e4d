// Patches of bfloat16 read from planes, NCHW: row t = (channel, tap) of the matrix of patches holds what neighbouring
// outputs read at that tap, a piece of a row of the plane.
#pragma once

#include "bfloat16.h"

namespace fastconv::cpu {
namespace {

// Some neighbouring channels of a source [n][pitch][row][col].
struct Bfloat16Planes {
  Axis rows, cols;
  int64_t pitch;
  const bfloat16_t* source;  // the first channel of the first image

  int64_t plane() const { return rows.source * cols.source; }
  // Whether outputs that are neighbours across the end of a row read neighbours too, or what lies outside.
  bool joined() const { return rows.step == 1 && cols.step == 1 && cols.outputs == cols.source; }
};

// Outputs (i, j), (i, j + 1) … of image n, the first of which is number `at` of its block: of a row or, where they are
// joined, of several. What they read at a tap lies in two registers.
struct Segment {
  int64_t n, i, j, at, length;
};
// width: no segment crosses a multiple of so many outputs of the block.
template <typename Visit>
FASTCONV_INLINE void for_segments(const Bfloat16Planes& p, int64_t pixel0, int64_t count, int64_t width,
                                  const Visit& visit) {
  const int64_t outputs = p.cols.outputs, image = p.rows.outputs * outputs, line = p.joined() ? image : outputs;
  const int64_t most = min_of<int64_t>(32, 63 / p.cols.step + 1);
  for (int64_t at = 0, length; at < count; at += length) {
    const int64_t pixel = pixel0 + at;
    length = min_of(min_of(most, width - at % width), min_of(line - pixel % line, count - at));
    visit(Segment{pixel / image, pixel % image / outputs, pixel % outputs, at, length});
  }
}

// What a segment reads at each tap: lanes of the 64 elements from `offset` on of a plane, the others being zeros.
inline void segment_reads(const Bfloat16Planes& p, const Segment& segment, TapRead* reads) {
  const Axis &rows = p.rows, &cols = p.cols;
  for (int64_t s = 0; s < cols.taps; ++s) {  // as if all rows were there
    const int64_t col0 = cols.first + s * cols.inc;
    TapRead read{};
    for (int64_t lane = 0, j = segment.j, length; lane < segment.length; lane += length, j = 0) {
      length = min_of(segment.length - lane, cols.outputs - j);
      const int64_t col = col0 + j * cols.step;
      const int64_t begin = col < 0 ? ceil_div(-col, cols.step) : 0;
      int64_t end = length;
      if (col + (end - 1) * cols.step >= cols.source)
        end = col < cols.source ? (cols.source - 1 - col) / cols.step + 1 : 0;
      if (begin >= end) continue;
      const int64_t from = begin * cols.step, to = (end - 1) * cols.step + 1;
      read.lanes |= (first_lanes(end) & ~first_lanes(begin)) << lane;
      read.low = first_lanes(to) & ~first_lanes(from);
      read.high = first_lanes(to - 32) & ~first_lanes(from - 32);
    }
    if (cols.step == 1) read.low = read.lanes;
    reads[s] = read;
  }
  const auto lane_of = [&](int64_t row) { return row <= 0 ? 0 : row * cols.outputs - segment.j; };
  for (int64_t r = rows.taps - 1; r >= 0; --r) {
    const int64_t row = segment.i * rows.step + rows.first + r * rows.inc;
    const uint32_t inside =
        row >= rows.source ? 0 : first_lanes(lane_of(rows.source - row)) & ~first_lanes(lane_of(-row));
    for (int64_t s = 0; s < cols.taps; ++s) {
      TapRead read = reads[s];
      read.offset = row * cols.source + segment.j * cols.step + cols.first + s * cols.inc;
      read.lanes &= inside;
      if (cols.step == 1) read.low = read.lanes;
      reads[r * cols.taps + s] = read.lanes ? read : TapRead{};
    }
  }
}

FASTCONV_INLINE __m512i multiples_of(int64_t step) {
  typedef uint16_t indices __attribute__((vector_size(64)));
  indices index;
  for (int i = 0; i < 32; ++i) index[i] = uint16_t(i * step);
  return (__m512i)index;
}
// index: multiples of the step, where it is not 1.
template <bool Strided>
FASTCONV_INLINE __m512i load_tap(const bfloat16_t* plane, const TapRead& read, __m512i index) {
  const __m512i low = load_pairs(plane + read.offset, read.low);
  if (!Strided) return low;
  return _mm512_maskz_permutex2var_epi16(read.lanes, low, index, load_pairs(plane + read.offset + 32, read.high));
}

// Pairs of rows, t = 2·pair and 2·pair + 1, in panels of pixels: out[panel][pair − pair0][pair_cols][2]. A zero
// completes the last pair. reads: one for each tap
template <bool Strided>
void pack_pixel_panels(const Bfloat16Planes& p, int64_t channels, int64_t pixel0, int64_t count, int64_t pair0,
                       int64_t pair1, TapRead* reads, bfloat16_t* out) {
  const int64_t taps = p.rows.taps * p.cols.taps, plane = p.plane(), panel = (pair1 - pair0) * 2 * pair_cols;
  const __m512i index = multiples_of(p.cols.step);
  if (pair0 == pair1) return;
  for_segments(p, pixel0, count, pair_cols, [&](const Segment& segment) {
    segment_reads(p, segment, reads);
    const bfloat16_t* from = p.source + (segment.n * p.pitch + 2 * pair0 / taps) * plane;
    const bfloat16_t* const end = p.source + (segment.n * p.pitch + channels) * plane;
    bfloat16_t* to = out + segment.at / pair_cols * panel + segment.at % pair_cols * 2;
    const __mmask16 left = __mmask16(first_lanes(segment.length)), right = __mmask16(first_lanes(segment.length - 16));
    int64_t tap = 2 * pair0 % taps;
    const auto next = [&] {
      if (from == end) return __m512i{};
      const __m512i row = load_tap<Strided>(from, reads[tap], index);
      if (++tap == taps) tap = 0, from += plane;
      return row;
    };
    for (int64_t pair = pair0; pair < pair1; ++pair, to += 2 * pair_cols) {
      const __m512i even_row = next(), odd_row = next();
      _mm512_mask_storeu_epi32(to, left, interleave<0>(even_row, odd_row));
      if (right) _mm512_mask_storeu_epi32(to + 32, right, interleave<1>(even_row, odd_row));
    }
  });
}

// out[channel · taps + tap − tap0][pixel − pixel0], for taps from tap0 on. May write a register past each row.
template <bool Strided>
void pack_pixel_rows(const Bfloat16Planes& p, int64_t channels, int64_t tap0, int64_t taps, int64_t pixel0,
                     int64_t count, TapRead* reads, bfloat16_t* out, int64_t out_row) {
  const int64_t plane = p.plane();
  const __m512i index = multiples_of(p.cols.step);
  for_segments(p, pixel0, count, count, [&](const Segment& segment) {
    segment_reads(p, segment, reads);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const bfloat16_t* from = p.source + segment.n * p.pitch * plane;
      bfloat16_t* to = out + tap * out_row + segment.at;
      for (int64_t c = 0; c < channels; ++c, from += plane, to += taps * out_row)
        store_pairs(to, load_tap<Strided>(from, reads[tap0 + tap], index));
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
