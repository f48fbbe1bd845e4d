// Products of bfloat16 matrices by VDPBF16PS, which adds two products to each float: operands are pairs of neighbours
// along the contraction.
//
//   C[i][col] (+)= Σ_t A[i][2t]·B[2t][col] + A[i][2t+1]·B[2t+1][col]
//
// A pair of A is 32 bits anywhere in memory, broadcast to all columns. B is packed into panels of two registers,
// b[panel][t][pair_cols][2]. Where the contraction is odd, both operands end with a zero: 0·0 is 0, 0·NaN is not.
//
// The instruction takes subnormal numbers for zero, and rounds sums to nearest even without regard to the rounding
// mode. The products are exact.
#pragma once

#include <type_traits>

#include "conv2d_bfloat16_blocks.h"
#include "isa.h"
#include "transpose.h"

#if !defined(__AVX512BF16__)
#error "for files that are compiled with -mavx512bf16"
#endif

namespace fastconv::cpu {
namespace {

// The lanes of the first `count` elements of a register; all for 32 or more.
FASTCONV_INLINE __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : __mmask32((1u << (count > 0 ? count : 0)) - 1);
}
FASTCONV_INLINE __m512i load_pairs(const bfloat16_t* p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }
FASTCONV_INLINE void store_pairs(bfloat16_t* p, __m512i v) { _mm512_storeu_si512(p, v); }

// even[i], odd[i] side by side: those of columns 0 … 15 and of columns 16 … 31.
template <int Half>
FASTCONV_INLINE __m512i interleave(__m512i even_row, __m512i odd_row) {
  typedef uint16_t indices __attribute__((vector_size(64)));
  indices index;
  for (int i = 0; i < 16; ++i) {
    index[2 * i] = uint16_t(16 * Half + i);
    index[2 * i + 1] = uint16_t(32 + 16 * Half + i);
  }
  return _mm512_permutex2var_epi16(even_row, (__m512i)index, odd_row);
}

// v[j] of 16 pairs ← pair j of v[0 … 15]
FASTCONV_INLINE void transpose_pairs(__m512i (&v)[16]) {
  vec_t<float> f[16];
  for (int i = 0; i < 16; ++i) f[i] = (vec_t<float>)v[i];
  transpose_registers<float, 1>(f);
  for (int i = 0; i < 16; ++i) v[i] = (__m512i)f[i];
}

template <int Half>
FASTCONV_INLINE void transpose_half(const bfloat16_t* in, int64_t in_pitch, int64_t height, int64_t width,
                                    bfloat16_t* out, int64_t out_pitch) {
  const __mmask32 cols = first_lanes(width), rows = first_lanes(height);
  __m512i v[16];
  for (int i = 0; i < 16; ++i) {
    const __m512i even_row = 2 * i < height ? load_pairs(in + 2 * i * in_pitch, cols) : __m512i{};
    const __m512i odd_row = 2 * i + 1 < height ? load_pairs(in + (2 * i + 1) * in_pitch, cols) : __m512i{};
    v[i] = interleave<Half>(even_row, odd_row);
  }
  transpose_pairs(v);
  for (int i = 0; i < min_of<int64_t>(16, width - 16 * Half); ++i)
    if (height == 32)
      store_pairs(out + (16 * Half + i) * out_pitch, v[i]);
    else
      _mm512_mask_storeu_epi16(out + (16 * Half + i) * out_pitch, rows, v[i]);
}

// out[col][row] = in[row][col]
inline void transpose_bfloat16(const bfloat16_t* in, int64_t in_pitch, int64_t rows, int64_t cols, bfloat16_t* out,
                               int64_t out_pitch) {
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t col = 0; col < cols; col += 32) {
      const int64_t height = min_of<int64_t>(32, rows - row), width = min_of<int64_t>(32, cols - col);
      const bfloat16_t* from = in + row * in_pitch + col;
      bfloat16_t* to = out + col * out_pitch + row;
      for (int64_t next = row + 32; next < min_of(rows, row + 64); ++next)
        __builtin_prefetch(in + next * in_pitch + col);
      transpose_half<0>(from, in_pitch, height, width, to, out_pitch);
      if (width > 16) transpose_half<1>(from, in_pitch, height, width, to, out_pitch);
    }
}

// One pair of rows of a panel.
FASTCONV_INLINE void pack_row_pair(__m512i even_row, __m512i odd_row, bfloat16_t* out) {
  store_pairs(out, interleave<0>(even_row, odd_row));
  store_pairs(out + 32, interleave<1>(even_row, odd_row));
}

// A panel of the transpose of in[col][t], whose columns past `cols` are zero.
inline void pack_transposed_panel(const bfloat16_t* in, int64_t in_pitch, int64_t cols, int64_t depth,
                                  bfloat16_t* out) {
  for (int64_t t = 0; t < depth; t += 32, out += 16 * 2 * pair_cols)
    for (int half = 0; half < 2; ++half) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i)
        v[i] =
            16 * half + i < cols ? load_pairs(in + (16 * half + i) * in_pitch + t, first_lanes(depth - t)) : __m512i{};
      transpose_pairs(v);
      for (int i = 0; i < 16; ++i)
        if (t + 2 * i < depth) store_pairs(out + i * 2 * pair_cols + 32 * half, v[i]);
    }
}

// Where finished rows of C go, with a bias and a ReLU: rows of bfloat16.
struct FinishedRows {
  bfloat16_t* data;
  int64_t row, cols;
  const bfloat16_t *bias, *row_bias;  // of columns, and of rows; or null
  bool relu;

  FinishedRows from(int64_t i, int64_t col) const {
    return {
        data + i * row + col, row, cols - col, bias ? bias + col : nullptr, row_bias ? row_bias + i : nullptr, relu};
  }
};

// A tile of C is pair_rows × pair_cols: 24 registers of sums, for 2 loads and 12 broadcasts.
// C += A·B, or if they are finished, out = C + A·B. first: there is no C yet. The loops over rows are unrolled early,
// so that rows and sums never are arrays in memory. Registers: two, or one where a panel ends with 16 idle columns.
template <int Rows, int Registers>
void multiply_pairs_tile(int64_t pairs, const bfloat16_t* a, int64_t a_row, int64_t a_pair, const bfloat16_t* b,
                         float* c, int64_t c_row, bool first, const FinishedRows* out) {
  const bfloat16_t* rows[(Rows + 2) / 3];
  __m512 sums[Rows][2];  // with one register, the right ones are zero
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    if (i % 3 == 0) rows[i / 3] = a + i * a_row;
    sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  }
  for (int64_t t = 0, at = 0; t < pairs; ++t, at += a_pair, b += 2 * pair_cols) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      int bits;
      memcpy(&bits, rows[i / 3] + at + i % 3 * a_row, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(bits);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], value, left);
      if (Registers > 1) sums[i][1] = _mm512_dpbf16_ps(sums[i][1], value, right);
    }
  }
  if (!first) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      sums[i][0] += _mm512_loadu_ps(c + i * c_row);
      if (Registers > 1) sums[i][1] += _mm512_loadu_ps(c + i * c_row + 16);
    }
  }
  if (!out) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      _mm512_storeu_ps(c + i * c_row, sums[i][0]);
      if (Registers > 1) _mm512_storeu_ps(c + i * c_row + 16, sums[i][1]);
    }
    return;
  }
  const __mmask32 cols = first_lanes(out->cols);
  vec_t<float> left{}, right{};
  if (out->bias) {
    left = load_first(out->bias, min_of<int64_t>(16, out->cols));
    right = load_first(out->bias + 16, min_of<int64_t>(16, max_of<int64_t>(0, out->cols - 16)));
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    if (out->bias) {
      sums[i][0] += (__m512)left;
      sums[i][1] += (__m512)right;
    }
    if (out->row_bias) {
      const __m512 value = _mm512_set1_ps(to_acc(out->row_bias[i]));
      sums[i][0] += value;
      sums[i][1] += value;
    }
    if (out->relu) {
      sums[i][0] = (__m512)relu((vec_t<float>)sums[i][0]);
      sums[i][1] = (__m512)relu((vec_t<float>)sums[i][1]);
    }
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(sums[i][1], sums[i][0]);
    if (out->cols >= pair_cols)  // a store under a mask takes longer
      store_pairs(out->data + i * out->row, rounded);
    else
      _mm512_mask_storeu_epi16(out->data + i * out->row, cols, rounded);
  }
}

template <int Rows, int Registers>
void multiply_pairs_rows(int64_t rows, int64_t pairs, const bfloat16_t* a, int64_t a_row, int64_t a_pair,
                         const bfloat16_t* b, float* c, int64_t c_row, bool first, const FinishedRows* out) {
  if constexpr (Rows > 1)
    if (rows < Rows)
      return multiply_pairs_rows<Rows - 1, Registers>(rows, pairs, a, a_row, a_pair, b, c, c_row, first, out);
  multiply_pairs_tile<Rows, Registers>(pairs, a, a_row, a_pair, b, c, c_row, first, out);
}

// Rows outside, panels inside: the rows of A stay in L1 while panels stream from L2. begin(i, end) is called before the
// panels of rows i … end−1. out: null, or where C goes, which then is finished.
template <typename Begin>
FASTCONV_INLINE void multiply_pairs(int64_t rows, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t a_row,
                                    int64_t a_pair, const bfloat16_t* b, int64_t b_panel, float* c, int64_t c_row,
                                    bool first, const FinishedRows* out, const Begin& begin) {
  const int64_t tiles = ceil_div(rows, pair_rows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = tile * rows / tiles, end = (tile + 1) * rows / tiles;
    begin(i, end);
    for (int64_t col = 0; col < cols; col += pair_cols) {
      const FinishedRows here = out ? out->from(i, col) : FinishedRows{};
      const auto multiply = cols - col <= 16 ? multiply_pairs_rows<pair_rows, 1> : multiply_pairs_rows<pair_rows, 2>;
      multiply(end - i, pairs, a + i * a_row, a_row, a_pair, b + col / pair_cols * b_panel, c + i * c_row + col, c_row,
               first, out ? &here : nullptr);
    }
  }
}

}  // namespace
}  // namespace fastconv::cpu
