// A block's matrix product on tensor cores: operands staged in shared memory by cp.async, fragments of them loaded by
// ldmatrix or word by word, multiplied by mma.sync and added up in float32, of float64 in float64.
//
// A step of the contraction is 64 bytes of it: 32 elements of 16 bits, 16 floats or 8 doubles. An operand's tile of a
// step lies in shared memory as it lies in memory, in chunks of 16 bytes, either shared[index][k], if the contraction
// is contiguous (along_k), or shared[k][index]. The chunks of a row are permuted, so that the eight rows of one
// ldmatrix, or what one load of words or doubles reads at once, are in different banks.
#pragma once

#include <type_traits>

#include "conv2d_mma_arguments.cuh"

namespace fastconv::cuda {

// The elements of what is multiplied, `Math` below.
template <typename Math>
using element_t = std::conditional_t<std::is_same_v<Math, Tf32>, float, Math>;

constexpr int mma_step_bytes = 64, mma_stages = 4;
template <typename T>
constexpr int mma_depth = mma_step_bytes / int(sizeof(T));  // of a step, in elements

// A block's warps, each of which has rows × columns fragments of 16 × 8 results.
template <int tile_m, int tile_n>
struct MmaWarps {
  static constexpr int threads = tile_m * tile_n >= 128 * 128 ? 256 : 128;
  static constexpr int along_n = tile_n > 32 ? tile_n / 32 : 1, along_m = threads / 32 / along_n;
  static constexpr int rows = tile_m / along_m / 16, columns = tile_n / along_n / 8;
};

template <int tile_m, int tile_n>
struct alignas(128) MmaShared {
  char a[mma_stages][tile_m * mma_step_bytes];
  char b[mma_stages][tile_n * mma_step_bytes];
};

template <typename T, int tile, bool along_k>
struct OperandTile {
  static constexpr int row_bytes = along_k ? mma_step_bytes : tile * int(sizeof(T));
  static constexpr int row_chunks = row_bytes / 16, chunk_elements = 16 / int(sizeof(T));

  // Where a chunk of a row lies: bank group (row·row_chunks + chunk) % 8, permuted by the row.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    constexpr bool short_rows = row_chunks < 8, words = sizeof(T) > 2;  // words: one load reads two chunks of four rows
    int permutation = words ? row % 4 * 2 : row % 8;
    if (along_k)
      permutation = sizeof(T) == 8 ? row / 2 % 2 * 2 : row / 2 % 4;
    else if (short_rows)
      permutation = words ? row / 2 % 2 * 2 : row / 4 % 2;
    return row * row_bytes + (chunk ^ permutation) * 16;
  }

  // Asks for the tile's elements (index0 …, k0 …): at(index, k) is a pointer to one of them, null where it is zero.
  // If the first element of a piece of `piece` bytes is inside, so is all of it, at an address that is a multiple of
  // piece; `readable` is such an address. Pieces are asked for asynchronously, but those of 2 bytes are copied here.
  template <int threads, typename At>
  __device__ __forceinline__ static void load(char* shared, int index0, int index_end, int k0, int k_end, int piece,
                                              const void* readable, At&& at) {
    constexpr int chunks = tile * mma_step_bytes / 16;
#pragma unroll 1  // what is remembered of several rows would take registers that the sums need
    for (int number = threadIdx.x; number < chunks; number += threads) {
      const int row = number / row_chunks, column = number % row_chunks;
      const int index = index0 + (along_k ? row : column * chunk_elements);
      const int k = k0 + (along_k ? column * chunk_elements : row);
      char* to = shared + offset(row, column);
      if (piece == 16) {
        const T* from = index < index_end && k < k_end ? at(index, k) : nullptr;
        ptx::cp_async_16(to, from ? from : readable, from ? 16 : 0);
        continue;
      }
#pragma unroll 1
      for (int byte = 0; byte < 16; byte += piece) {
        const int element = byte / int(sizeof(T));
        const int index_e = index + (along_k ? 0 : element), k_e = k + (along_k ? element : 0);
        const T* from = index_e < index_end && k_e < k_end ? at(index_e, k_e) : nullptr;
        if (piece == 8)
          ptx::cp_async_8(to + byte, from ? from : readable, from ? 8 : 0);
        else if (piece == 4)
          ptx::cp_async_4(to + byte, from ? from : readable, from ? 4 : 0);
        else
          *reinterpret_cast<T*>(to + byte) = from ? *from : from_acc<T>(0);
      }
    }
  }

  // Element (k, index).
  __device__ __forceinline__ static T element(const char* shared, int k, int index) {
    const int row = along_k ? index : k, column = along_k ? k : index;
    return *reinterpret_cast<const T*>(shared + offset(row, column / chunk_elements) +
                                       column % chunk_elements * int(sizeof(T)));
  }
};

// What a lane holds of 16 rows of A, or of 8 columns of B, times 32 bytes of the contraction: half a step. The layouts
// of the words are in ptx.cuh; those of float are kept as big + rest, of double there are two fragments of 8 rows.
template <typename Math>
struct FragmentA {
  uint32_t word[4];
};
template <typename Math>
struct FragmentB {
  uint32_t word[2];
};
template <>
struct FragmentA<float> {
  uint32_t big[4], rest[4];
};
template <>
struct FragmentB<float> {
  uint32_t big[2], rest[2];
};
template <>
struct FragmentA<double> {
  double rows[2];
};
template <>
struct FragmentB<double> {
  double column;
};

__device__ __forceinline__ float as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <typename Math, int words>
__device__ __forceinline__ void set_words(uint32_t (&to)[words], const uint32_t* from) {
#pragma unroll
  for (int i = 0; i < words; ++i) to[i] = std::is_same_v<Math, Tf32> ? ptx::cvt_rna_tf32(as_float(from[i])) : from[i];
}
template <int words>
__device__ __forceinline__ void split(uint32_t (&big)[words], uint32_t (&rest)[words], const uint32_t* from) {
#pragma unroll
  for (int i = 0; i < words; ++i) {
    big[i] = ptx::cvt_rna_tf32(as_float(from[i]));
    rest[i] = ptx::cvt_rna_tf32(as_float(from[i]) - as_float(big[i]));
  }
}

// A's fragment of the 16 rows from m0 on.
template <typename Math, int tile, bool along_k>
__device__ __forceinline__ void load_a(FragmentA<Math>& a, const char* shared, int m0, int half) {
  using T = element_t<Math>;
  using Tile = OperandTile<T, tile, along_k>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) a.rows[i] = Tile::element(shared, 4 * half + lane % 4, m0 + lane / 4 + 8 * i);
  } else {
    uint32_t word[4];
    if constexpr (along_k) {
      ptx::ldmatrix_x4(word, shared + Tile::offset(m0 + lane % 16, 2 * half + lane / 16));
    } else if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(word, shared + Tile::offset(16 * half + lane % 8 + lane / 16 * 8, m0 / 8 + lane / 8 % 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = Tile::element(shared, 8 * half + lane % 4 + i / 2 * 4, m0 + lane / 4 + i % 2 * 8);
        memcpy(&word[i], &v, sizeof v);
      }
    }
    if constexpr (std::is_same_v<Math, float>)
      split(a.big, a.rest, word);
    else
      set_words<Math>(a.word, word);
  }
}

// B's fragments of the 16 columns from n0 on.
template <typename Math, int tile, bool along_k>
__device__ __forceinline__ void load_b(FragmentB<Math>* b, const char* shared, int n0, int half) {
  using T = element_t<Math>;
  using Tile = OperandTile<T, tile, along_k>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int j = 0; j < 2; ++j) b[j].column = Tile::element(shared, 4 * half + lane % 4, n0 + lane / 4 + 8 * j);
  } else {
    uint32_t word[4];
    if constexpr (along_k) {
      ptx::ldmatrix_x4(word, shared + Tile::offset(n0 + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
    } else if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(word, shared + Tile::offset(16 * half + lane % 16, n0 / 8 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = Tile::element(shared, 8 * half + lane % 4 + i % 2 * 4, n0 + lane / 4 + i / 2 * 8);
        memcpy(&word[i], &v, sizeof v);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if constexpr (std::is_same_v<Math, float>)
        split(b[j].big, b[j].rest, word + 2 * j);
      else
        set_words<Math>(b[j].word, word + 2 * j);
  }
}

// A fragment of B whose elements are all one: its product with A is the sum of A's rows.
template <typename Math>
__device__ __forceinline__ void set_ones(FragmentB<Math>& b) {
  if constexpr (std::is_same_v<Math, double>) {
    b.column = 1;
  } else if constexpr (std::is_same_v<Math, float>) {
    b.big[0] = b.big[1] = 0x3f800000u;
    b.rest[0] = b.rest[1] = 0;
  } else {
    b.word[0] = b.word[1] = std::is_same_v<Math, __half>          ? 0x3c003c00u
                            : std::is_same_v<Math, __nv_bfloat16> ? 0x3f803f80u
                                                                  : 0x3f800000u;
  }
}

// sums[j] += a·b[j]: the results (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1) of a lane with g = lane / 4 and
// t = lane % 4.
//
// float is multiplied as three products of tf32 (Ootomo and Yokota, Recovering single precision accuracy from Tensor
// Cores while surpassing the FP32 theoretical peak performance, 2022). An operand is big + rest, both rounded to the 11
// bits of tf32, which leaves out at most the last bit of its 24: 2u of it, with u = 2^-24. The product of the rests,
// at most 4u of that of the operands, is left out too, so that a product is exact to 8u. Tensor cores do not add in
// IEEE order: they may align all terms of one mma to the largest and truncate, an error in one direction that would
// grow with the contraction. So only the 24 products of eight k are added there, from zero, the small ones first, and
// what they come to is added in float32, rounded to nearest. By Higham's bound that is K/8 + 8 roundings and those
// inside of a tensor core, instead of K. The emulated tensor core rounds every sum to nearest, so what it shows is the
// error of the splitting alone. An infinite operand gives a NaN where fused multiply-adds may give an infinity.
template <typename Math, int columns>
__device__ __forceinline__ void multiply_add(acc_t<element_t<Math>> (&sums)[columns][4], const FragmentA<Math>& a,
                                             const FragmentB<Math> (&b)[columns]) {
  if constexpr (std::is_same_v<Math, float>) {
    float step[columns][4] = {};
#pragma unroll
    for (int j = 0; j < columns; ++j) ptx::mma_m16n8k8_tf32(step[j], a.rest, b[j].big);
#pragma unroll
    for (int j = 0; j < columns; ++j) ptx::mma_m16n8k8_tf32(step[j], a.big, b[j].rest);
#pragma unroll
    for (int j = 0; j < columns; ++j) ptx::mma_m16n8k8_tf32(step[j], a.big, b[j].big);
#pragma unroll
    for (int j = 0; j < columns; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] += step[j][i];
  }
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    if constexpr (std::is_same_v<Math, __half>) ptx::mma_m16n8k16_f16(sums[j], a.word, b[j].word);
    if constexpr (std::is_same_v<Math, __nv_bfloat16>) ptx::mma_m16n8k16_bf16(sums[j], a.word, b[j].word);
    if constexpr (std::is_same_v<Math, Tf32>) ptx::mma_m16n8k8_tf32(sums[j], a.word, b[j].word);
    if constexpr (std::is_same_v<Math, double>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        double d[2] = {sums[j][2 * i], sums[j][2 * i + 1]};
        ptx::mma_m8n8k4_f64(d, a.rows[i], b[j].column);
        sums[j][2 * i] = d[0], sums[j][2 * i + 1] = d[1];
      }
    }
  }
}

}  // namespace fastconv::cuda
