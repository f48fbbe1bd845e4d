// Models of the wrappers of csrc/cuda/ptx.cuh, with the same signatures: see there for the sections of the PTX ISA,
// whose text they are transcribed from. What it calls undefined is an error.
#pragma once

#include "machine.h"

namespace fastconv::cuda::ptx {

using emulation::Where;

// A copy is held back until the wait that completes its group. Until then its destination is NaN. A thread may not exit
// before it has waited for all of its copies.
void cp_async_16(void* shared, const void* global, int src_bytes = 16, const Where& where = Where::current());
void cp_async_8(void* shared, const void* global, int src_bytes = 8, const Where& where = Where::current());
void cp_async_4(void* shared, const void* global, int src_bytes = 4, const Where& where = Where::current());
void cp_async_commit();
void cp_async_wait_group(int n);
template <int n>
void cp_async_wait() {
  cp_async_wait_group(n);
}

void ldmatrix_x1(uint32_t (&r)[1], const void* row, const Where& where = Where::current());
void ldmatrix_x2(uint32_t (&r)[2], const void* row, const Where& where = Where::current());
void ldmatrix_x4(uint32_t (&r)[4], const void* row, const Where& where = Where::current());
void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, const Where& where = Where::current());
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, const Where& where = Where::current());
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const Where& where = Where::current());
void stmatrix_x4(void* row, const uint32_t (&r)[4], const Where& where = Where::current());
void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], const Where& where = Where::current());

// Products are exact; they are added to d one by one, by rising k, each sum rounded to float. Hardware has other orders
// and roundings: what agrees bitwise here need not there, unless all sums are exact.
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const Where& where = Where::current());
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const Where& where = Where::current());
void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                     const Where& where = Where::current());
void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                      const Where& where = Where::current());
// An operand whose low 13 bits are not zero is an error: rounding belongs to cvt_rna_tf32.
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const Where& where = Where::current());
void mma_m8n8k4_f64(double (&d)[2], double a, double b, const Where& where = Where::current());

uint32_t cvt_rna_tf32(float v);

void bar_sync(int id, int threads, const Where& where = Where::current());
void bar_arrive(int id, int threads, const Where& where = Where::current());

}  // namespace fastconv::cuda::ptx
