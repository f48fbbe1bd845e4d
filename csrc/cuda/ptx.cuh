// PTX instructions, one wrapper each: the only asm of the project. Kernels get them through launch.cuh, which the host
// emulation gives models of the same signatures instead (tests/emulation/ptx.h).
//
// Sections are those of the PTX ISA 9.0. Every wrapper compiles for every target; on one that lacks the instruction it
// traps, and the plan must not have chosen the kernel. Pointers are generic: `shared` must point into shared memory,
// `global` into global memory. Where it says "by a warp", all 32 lanes must call the wrapper together.
//
// To come, each group below those it resembles: mbarrier and bulk tensor copies (TMA) with cp.async, wgmma with mma.
#pragma once

#include <cstdint>

namespace fastconv::cuda::ptx {

#ifdef __CUDA_ARCH__
constexpr int arch = __CUDA_ARCH__ / 10;
#else
constexpr int arch = 0;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// 9.7.9.25.3.1, cp.async: copies 16, 8 or 4 bytes from global to shared memory, both aligned to as many. Of the source
// only src_bytes are read, and zeros take the place of the rest. Nothing may touch the destination before a
// cp_async_wait of this thread that its group completes by, nor other threads before a barrier after that. sm_80.

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int src_bytes = 16) {
  if constexpr (arch >= 80)  // .cg: by the L2 cache alone
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(src_bytes)
                 : "memory");
  else
    __trap();
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, int src_bytes = 8) {
  if constexpr (arch >= 80)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(src_bytes)
                 : "memory");
  else
    __trap();
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int src_bytes = 4) {
  if constexpr (arch >= 80)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(src_bytes)
                 : "memory");
  else
    __trap();
}

// 9.7.9.25.3.2, cp.async.commit_group: the copies since the last one are a group, of none if there were none.
__device__ __forceinline__ void cp_async_commit() {
  if constexpr (arch >= 80)
    asm volatile("cp.async.commit_group;" ::: "memory");
  else
    __trap();
}

// 9.7.9.25.3.3, cp.async.wait_group: waits until of this thread's groups at most the n latest are not complete.
template <int n>
__device__ __forceinline__ void cp_async_wait() {
  if constexpr (arch >= 80)
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
  else
    __trap();
}

// 9.7.14.5.15, ldmatrix: loads one, two or four 8 × 8 matrices of 16-bit elements, by a warp. Row i of matrix m is the
// 16 bytes at the address that lane 8m + i gives, a multiple of 16. Lane l, with g = l / 4 and t = l % 4, gets in r[m]
// the elements (g, 2t) and (g, 2t + 1), the first in the low half; transposed, (2t, g) and (2t + 1, g). From sm_80 on,
// the addresses of lanes beyond the last row are not read. sm_75.

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 9.7.14.5.16, stmatrix: stores four matrices from where ldmatrix_x4 puts them, by a warp. sm_90.

__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  if constexpr (arch >= 90)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  else
    __trap();
}
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  if constexpr (arch >= 90)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  else
    __trap();
}

// 9.7.14.5.14, mma: D += A·B with A of m × k, B of k × n and D of m × n elements, by a warp. Products are exact and
// added up in float32, in no order that is told and without IEEE rounding; float64 is IEEE. With g = lane / 4 and t =
// lane % 4, a lane holds the elements (row, column), 16-bit ones in pairs, the first in the low half:
//
//   m16n8k16, 16-bit (9.7.14.5.8):  a[0] (g, 2t) (g, 2t + 1)        b[0] (2t, g) (2t + 1, g)
//                                   a[1] (g + 8, …)                 b[1] (2t + 8, g) (2t + 9, g)
//                                   a[2] (g, 2t + 8) (g, 2t + 9)    d[0] d[1] (g, 2t) (g, 2t + 1)
//                                   a[3] (g + 8, …)                 d[2] d[3] (g + 8, …)
//   m16n8k8, 16-bit (9.7.14.5.7):   a[0], a[1], b[0] and d as above
//   m16n8k8, tf32 (9.7.14.5.7):     a[0] (g, t)                     b[0] (t, g)
//                                   a[1] (g + 8, t)                 b[1] (t + 4, g)
//                                   a[2] (g, t + 4)                 d as above
//                                   a[3] (g + 8, t + 4)
//   m8n8k4, float64 (9.7.14.5.2):   a (g, t)    b (t, g)            d[0] d[1] (g, 2t) (g, 2t + 1)

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (arch >= 80)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    __trap();
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (arch >= 80)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    __trap();
}
__device__ __forceinline__ void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile(  // sm_75 has this one
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
__device__ __forceinline__ void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  if constexpr (arch >= 80)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  else
    __trap();
}
// Operands are from cvt_rna_tf32: of others the hardware leaves out the low bits.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (arch >= 80)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    __trap();
}
__device__ __forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
  if constexpr (arch >= 80)
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d[0]), "+d"(d[1])
                 : "d"(a), "d"(b));
  else
    __trap();
}

// 9.7.9, cvt: to the nearest value with 10 bits of mantissa, ties away from zero; the low 13 bits are zero. sm_80.
__device__ __forceinline__ uint32_t cvt_rna_tf32(float v) {
  uint32_t r = 0;
  if constexpr (arch >= 80)
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  else
    __trap();
  return r;
}

// 9.7.13.1, bar: the barriers 1 to 15 of a block, for `threads` of its threads; each call is by a warp. A bar_sync
// waits until as many have come, by bar_sync or by bar_arrive, which does not wait. The barrier 0 is __syncthreads'.

__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fastconv::cuda::ptx
