// A kernel for each wrapper of csrc/cuda/ptx.cuh: every thread loads its operands from its row of `in`, executes the
// wrapper and stores what it got to its row of `out`. What must come out is computed by tests/test_ptx.py. Built twice,
// by nvcc and for the emulation.
#include <cstring>

#include "../../csrc/cuda/launch.cuh"

namespace fastconv::cuda {
namespace {

constexpr int in_words = 16, out_words = 4;  // a row

template <int n>
__device__ void load(uint32_t (&r)[n], const uint32_t* in, int first) {
  for (int i = 0; i < n; ++i) r[i] = in[threadIdx.x * in_words + first + i];
}
template <int n>
__device__ void store(uint32_t* out, const uint32_t (&r)[n]) {
  for (int i = 0; i < n; ++i) out[threadIdx.x * out_words + i] = r[i];
}

constexpr int max_threads = 96;
struct Shared {
  alignas(16) uint32_t rows[max_threads][4];
};

// cp.async: words 0 … 3 the source, word 4 how many bytes of it. The destination is another thread's row in shared
// memory, filled with ones before.

template <int bytes>
__device__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory<Shared>();
  const uint32_t* source = in + threadIdx.x * in_words;
  uint32_t* destination = shared.rows[threadIdx.x ^ 5];
  for (int i = 0; i < 4; ++i) destination[i] = 1;
  if (bytes == 16) ptx::cp_async_16(destination, source, int(source[4]));
  if (bytes == 8) ptx::cp_async_8(destination, source, int(source[4]));
  if (bytes == 4) ptx::cp_async_4(destination, source, int(source[4]));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  store(out, shared.rows[threadIdx.x]);
}
__global__ void cp_async_16(const uint32_t* in, uint32_t* out) { cp_async_kernel<16>(in, out); }
__global__ void cp_async_8(const uint32_t* in, uint32_t* out) { cp_async_kernel<8>(in, out); }
__global__ void cp_async_4(const uint32_t* in, uint32_t* out) { cp_async_kernel<4>(in, out); }

// Four groups, one of them of no copies: what has come is stored while a later group may be under way.
__global__ void cp_async_wait(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory<Shared>();
  uint32_t* row = shared.rows[threadIdx.x];
  const uint32_t* source = in + threadIdx.x * in_words;
  uint32_t r[4];
  ptx::cp_async_4(row, source);
  ptx::cp_async_commit();
  ptx::cp_async_4(row + 1, source + 1);
  ptx::cp_async_4(row + 2, source + 2);
  ptx::cp_async_commit();
  ptx::cp_async_commit();
  ptx::cp_async_4(row + 3, source + 3);
  ptx::cp_async_commit();
  ptx::cp_async_wait<3>();
  r[0] = row[0];
  ptx::cp_async_wait<2>();
  r[1] = row[1];
  r[2] = row[2];
  ptx::cp_async_wait<0>();
  r[3] = row[3];
  store(out, r);
}

// ldmatrix, stmatrix: words 0 … 3 a row in shared memory, or what to store; word 4 the number of the row to give.

template <int n, typename F>
__device__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out, F ldmatrix) {
  Shared& shared = shared_memory<Shared>();
  load(shared.rows[threadIdx.x], in, 0);
  __syncthreads();
  uint32_t r[n];
  ldmatrix(r, shared.rows[in[threadIdx.x * in_words + 4]]);
  store(out, r);
}
__global__ void ldmatrix_x1(const uint32_t* in, uint32_t* out) {
  ldmatrix_kernel<1>(in, out, [](auto& r, const void* row) { ptx::ldmatrix_x1(r, row); });
}
__global__ void ldmatrix_x2(const uint32_t* in, uint32_t* out) {
  ldmatrix_kernel<2>(in, out, [](auto& r, const void* row) { ptx::ldmatrix_x2(r, row); });
}
__global__ void ldmatrix_x4(const uint32_t* in, uint32_t* out) {
  ldmatrix_kernel<4>(in, out, [](auto& r, const void* row) { ptx::ldmatrix_x4(r, row); });
}
__global__ void ldmatrix_x1_trans(const uint32_t* in, uint32_t* out) {
  ldmatrix_kernel<1>(in, out, [](auto& r, const void* row) { ptx::ldmatrix_x1_trans(r, row); });
}
__global__ void ldmatrix_x2_trans(const uint32_t* in, uint32_t* out) {
  ldmatrix_kernel<2>(in, out, [](auto& r, const void* row) { ptx::ldmatrix_x2_trans(r, row); });
}
__global__ void ldmatrix_x4_trans(const uint32_t* in, uint32_t* out) {
  ldmatrix_kernel<4>(in, out, [](auto& r, const void* row) { ptx::ldmatrix_x4_trans(r, row); });
}

template <typename F>
__device__ void stmatrix_kernel(const uint32_t* in, uint32_t* out, F stmatrix) {
  Shared& shared = shared_memory<Shared>();
  uint32_t r[4];
  load(r, in, 0);
  stmatrix(shared.rows[in[threadIdx.x * in_words + 4]], r);
  __syncthreads();
  store(out, shared.rows[threadIdx.x]);
}
__global__ void stmatrix_x4(const uint32_t* in, uint32_t* out) {
  stmatrix_kernel(in, out, [](void* row, const auto& r) { ptx::stmatrix_x4(row, r); });
}
__global__ void stmatrix_x4_trans(const uint32_t* in, uint32_t* out) {
  stmatrix_kernel(in, out, [](void* row, const auto& r) { ptx::stmatrix_x4_trans(row, r); });
}

// mma: words 0 … 3 of A, 4 and 5 of B, 6 … 9 of C.

template <int a_words, int b_words, typename F>
__device__ void mma_kernel(const uint32_t* in, uint32_t* out, F mma) {
  uint32_t a[a_words], b[b_words], c[4];
  load(a, in, 0);
  load(b, in, 4);
  load(c, in, 6);
  float d[4];
  memcpy(d, c, sizeof d);
  mma(d, a, b);
  memcpy(c, d, sizeof c);
  store(out, c);
}
__global__ void mma_m16n8k16_f16(const uint32_t* in, uint32_t* out) {
  mma_kernel<4, 2>(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_m16n8k16_f16(d, a, b); });
}
__global__ void mma_m16n8k16_bf16(const uint32_t* in, uint32_t* out) {
  mma_kernel<4, 2>(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_m16n8k16_bf16(d, a, b); });
}
__global__ void mma_m16n8k8_f16(const uint32_t* in, uint32_t* out) {
  mma_kernel<2, 1>(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_m16n8k8_f16(d, a, b); });
}
__global__ void mma_m16n8k8_bf16(const uint32_t* in, uint32_t* out) {
  mma_kernel<2, 1>(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_m16n8k8_bf16(d, a, b); });
}
__global__ void mma_m16n8k8_tf32(const uint32_t* in, uint32_t* out) {
  mma_kernel<4, 2>(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_m16n8k8_tf32(d, a, b); });
}
__global__ void mma_m8n8k4_f64(const uint32_t* in, uint32_t* out) {
  uint32_t a_words[2], b_words[2], c_words[4];
  load(a_words, in, 0);
  load(b_words, in, 4);
  load(c_words, in, 6);
  double a, b, d[2];
  memcpy(&a, a_words, sizeof a);
  memcpy(&b, b_words, sizeof b);
  memcpy(d, c_words, sizeof d);
  ptx::mma_m8n8k4_f64(d, a, b);
  memcpy(c_words, d, sizeof c_words);
  store(out, c_words);
}

// cvt: words 0 … 3.
__global__ void cvt_rna_tf32(const uint32_t* in, uint32_t* out) {
  uint32_t r[4];
  load(r, in, 0);
  for (int i = 0; i < 4; ++i) {
    float v;
    memcpy(&v, &r[i], sizeof v);
    r[i] = ptx::cvt_rna_tf32(v);
  }
  store(out, r);
}

// bar: words 0 … 3 go from warp 0 to warp 1 by one barrier, from there to warp 2 by another, and by a third, of all
// three warps, back to warp 0. Each reads from another lane, and what it reads is what it stores.
__global__ void barriers(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory<Shared>();
  const int warp = threadIdx.x / 32, before = (warp + 2) % 3 * 32 + (threadIdx.x % 32 ^ 3);
  if (warp == 0) {
    load(shared.rows[threadIdx.x], in, 0);
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(warp, 64);
    for (int i = 0; i < 4; ++i) shared.rows[threadIdx.x][i] = shared.rows[before][i];
    if (warp == 1) ptx::bar_arrive(2, 64);
  }
  ptx::bar_sync(15, 96);
  store(out, shared.rows[before]);
}

struct Kernel {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*);
};
#define FASTCONV_KERNEL(kernel) {#kernel, kernel}
constexpr Kernel kernels[] = {
    FASTCONV_KERNEL(cp_async_16),       FASTCONV_KERNEL(cp_async_8),        FASTCONV_KERNEL(cp_async_4),
    FASTCONV_KERNEL(cp_async_wait),     FASTCONV_KERNEL(ldmatrix_x1),       FASTCONV_KERNEL(ldmatrix_x2),
    FASTCONV_KERNEL(ldmatrix_x4),       FASTCONV_KERNEL(ldmatrix_x1_trans), FASTCONV_KERNEL(ldmatrix_x2_trans),
    FASTCONV_KERNEL(ldmatrix_x4_trans), FASTCONV_KERNEL(stmatrix_x4),       FASTCONV_KERNEL(stmatrix_x4_trans),
    FASTCONV_KERNEL(mma_m16n8k16_f16),  FASTCONV_KERNEL(mma_m16n8k16_bf16), FASTCONV_KERNEL(mma_m16n8k8_f16),
    FASTCONV_KERNEL(mma_m16n8k8_bf16),  FASTCONV_KERNEL(mma_m16n8k8_tf32),  FASTCONV_KERNEL(mma_m8n8k4_f64),
    FASTCONV_KERNEL(cvt_rna_tf32),      FASTCONV_KERNEL(barriers)};

}  // namespace
}  // namespace fastconv::cuda

// Runs one of the kernels above in a block of so many threads. Returns what the launch reports, or null.
extern "C" __attribute__((visibility("default"))) const char* fastconv_golden_run(const char* name, int threads,
                                                                                  const uint32_t* in, uint32_t* out,
                                                                                  void* stream) {
  using namespace fastconv::cuda;
  for (const Kernel& k : kernels)
    if (!strcmp(k.name, name))
      return launch(k.name, k.kernel, dim3(1), dim3(threads), sizeof(Shared), stream, in, out).error;
  return "no such kernel";
}
