// A block's matrix product on tensor cores: operands staged in shared memory by cp.async, fragments of them loaded by
// ldmatrix, multiplied by mma.sync and added up in float32. For float16, bfloat16 and float, which is rounded to tf32.
//
// A step of the contraction is 64 bytes of it: 32 elements of 16 bits, or 16 floats. An operand's tile of a step lies
// in shared memory as it lies in memory, in chunks of 16 bytes, either shared[index][k], if the contraction is
// contiguous (along_k), or shared[k][index]. The chunks of a row are permuted, so that the eight rows of one ldmatrix,
// or the 32 words of one load, are in different banks.
#pragma once

#include <type_traits>

#include "types.cuh"

namespace fastconv::cuda {

constexpr int mma_step_bytes = 64, mma_stages = 4;
template <typename T>
constexpr int mma_depth = mma_step_bytes / int(sizeof(T));  // of a step, in elements
template <typename T>
constexpr int mma_chunk = 16 / int(sizeof(T));

// Warps of a block: two along m, each tile / 2 rows, by tile / 32 along n, each 32 columns.
template <int tile>
constexpr int mma_threads = 2 * tile;

template <int tile>
struct alignas(128) MmaShared {
  char a[mma_stages][tile * mma_step_bytes];
  char b[mma_stages][tile * mma_step_bytes];
};

template <typename T, int tile, bool along_k>
struct OperandTile {
  static constexpr int row_bytes = along_k ? mma_step_bytes : tile * int(sizeof(T));
  static constexpr int row_chunks = row_bytes / 16;

  // Where a chunk of a row lies: bank group 4·(row % 2) + chunk of along_k, chunk otherwise, permuted by the row.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    const int permuted = chunk ^ (along_k ? row / 2 % 4 : sizeof(T) == 2 ? row % 8 : row % 4 * 2);
    return row * row_bytes + permuted * 16;
  }

  // Asks for the tile's elements (index0 …, k0 …): at(index, k) is a pointer to one of them, null where it is zero.
  // vectors: if the first element of a chunk is inside, so is all of it, at an address that is a multiple of 16, and
  // `readable` is such an address. Otherwise elements are loaded one by one, here and now.
  template <typename At>
  __device__ __forceinline__ static void load(char* shared, int index0, int index_end, int k0, int k_end, bool vectors,
                                              const void* readable, At&& at) {
    constexpr int threads = mma_threads<tile>, chunk = mma_chunk<T>;
#pragma unroll 1  // what is remembered of both rows would take registers that the sums need
    for (int i = 0; i < tile * mma_step_bytes / 16 / threads; ++i) {
      const int number = int(threadIdx.x) + i * threads;
      const int row = number / row_chunks, column = number % row_chunks;
      const int index = index0 + (along_k ? row : column * chunk), k = k0 + (along_k ? column * chunk : row);
      char* to = shared + offset(row, column);
      if (vectors) {
        const T* from = index < index_end && k < k_end ? at(index, k) : nullptr;
        ptx::cp_async_16(to, from ? from : readable, from ? 16 : 0);
        continue;
      }
      Vec<T, chunk> values;
#pragma unroll
      for (int j = 0; j < chunk; ++j) {
        const int index_j = index + (along_k ? 0 : j), k_j = k + (along_k ? j : 0);
        const T* from = index_j < index_end && k_j < k_end ? at(index_j, k_j) : nullptr;
        values.at[j] = from ? *from : from_acc<T>(0);
      }
      store_vec(reinterpret_cast<T*>(to), values);
    }
  }

  // The word of element (k, index) of a tile of floats that is not along_k.
  __device__ __forceinline__ static uint32_t word(const char* shared, int k, int index) {
    uint32_t bits;
    memcpy(&bits, shared + offset(k, index / 4) + index % 4 * 4, sizeof bits);
    return bits;
  }
};

// float's fragments are rounded to tf32 when they are loaded; the others are as they should be.
template <typename T, int n>
__device__ __forceinline__ void round_fragment(uint32_t (&fragment)[n]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      float value;
      memcpy(&value, &fragment[i], sizeof value);
      fragment[i] = ptx::cvt_rna_tf32(value);
    }
  }
}

// A's fragment of 16 rows from m0 on, of one half of the step (32 bytes of the contraction); see ptx.cuh for its
// layout.
template <typename T, int tile, bool along_k>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const char* shared, int m0, int half) {
  using Tile = OperandTile<T, tile, along_k>;
  const int lane = threadIdx.x % 32;
  if constexpr (along_k) {
    ptx::ldmatrix_x4(a, shared + Tile::offset(m0 + lane % 16, 2 * half + lane / 16));
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(a, shared + Tile::offset(16 * half + lane % 8 + lane / 16 * 8, m0 / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Tile::word(shared, 8 * half + lane % 4 + i / 2 * 4, m0 + lane / 4 + i % 2 * 8);
  }
  round_fragment<T>(a);
}

// B's fragments of 16 columns from n0 on: b[0], b[1] of the first eight, b[2], b[3] of the others.
template <typename T, int tile, bool along_k>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const char* shared, int n0, int half) {
  using Tile = OperandTile<T, tile, along_k>;
  const int lane = threadIdx.x % 32;
  if constexpr (along_k) {
    ptx::ldmatrix_x4(b, shared + Tile::offset(n0 + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(b, shared + Tile::offset(16 * half + lane % 16, n0 / 8 + lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = Tile::word(shared, 8 * half + lane % 4 + i % 2 * 4, n0 + lane / 4 + i / 2 * 8);
  }
  round_fragment<T>(b);
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_m16n8k16_f16(d, a, b);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    ptx::mma_m16n8k16_bf16(d, a, b);
  else
    ptx::mma_m16n8k8_tf32(d, a, b);
}

// A fragment of B whose elements are all one: its product with A is the sum of A's rows.
template <typename T>
__device__ __forceinline__ void set_ones(uint32_t (&b)[2]) {
  constexpr uint32_t one = std::is_same_v<T, __half>          ? 0x3c003c00u
                           : std::is_same_v<T, __nv_bfloat16> ? 0x3f803f80u
                                                              : 0x3f800000u;
  b[0] = b[1] = one;
}

}  // namespace fastconv::cuda
