// Kernels around the wrappers of ptx.cuh with one fault each, and their right counterparts: what the models must
// report, what must show as a wrong result, and what must do neither.
#include <cstring>

#include "../../csrc/cuda/launch.cuh"

namespace fastconv::cuda {
namespace {

// Rows of 8 float16 elements for ldmatrix, and the destinations of copies.
struct Shared {
  alignas(16) uint32_t rows[32][4];
  alignas(16) float part[3][64];
};

// cp.async: out[i] = in[i], by way of shared memory and another thread.

__device__ void copy_out(const float* part, float* out) {
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x ^ 1];
}
__global__ void copies(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  ptx::cp_async_4(&part[threadIdx.x ^ 1], in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  copy_out(part, out);
}
__global__ void missing_wait(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  ptx::cp_async_4(&part[threadIdx.x ^ 1], in + threadIdx.x);
  ptx::cp_async_commit();
  copy_out(part, out);
  ptx::cp_async_wait<0>();
}
__global__ void missing_commit(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  ptx::cp_async_4(&part[threadIdx.x ^ 1], in + threadIdx.x);
  ptx::cp_async_wait<0>();
  copy_out(part, out);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
__global__ void missing_barrier_after_wait(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  ptx::cp_async_4(&part[threadIdx.x ^ 1], in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = part[threadIdx.x];
}
__global__ void never_waited_for(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  ptx::cp_async_4(&part[threadIdx.x], in + threadIdx.x);
  ptx::cp_async_commit();
  out[threadIdx.x] = in[threadIdx.x];
}

// A ring of three stages, two of them under way while the third is used: `later` groups may be incomplete.
template <int later>
__device__ void ring_kernel(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part;
  const int i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_4(&part[stage][i], in + 64 * stage + i);
    ptx::cp_async_commit();
  }
  float sum = 0;
  for (int step = 0; step < 4; ++step) {
    ptx::cp_async_wait<later>();
    __syncthreads();
    sum += part[step % 3][i ^ 33];
    if (step + 2 < 4) ptx::cp_async_4(&part[(step + 2) % 3][i], in + 64 * (step + 2) + i);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<0>();
  out[i ^ 33] = sum;
}
__global__ void ring(const float* in, float* out) { ring_kernel<1>(in, out); }
__global__ void ring_waits_for_one_too_few(const float* in, float* out) { ring_kernel<2>(in, out); }

__global__ void misaligned_source(const float* in, float*) { ptx::cp_async_8(shared_memory<Shared>().part, in + 1); }
__global__ void misaligned_destination(const float* in, float*) {
  ptx::cp_async_16(&shared_memory<Shared>().part[0][2], in);
}
__global__ void too_many_bytes(const float* in, float*) { ptx::cp_async_8(shared_memory<Shared>().part, in, 16); }
__global__ void copy_to_global(const float* in, float* out) { ptx::cp_async_4(out, in); }
__global__ void copy_past_the_end(const float* in, float*) {
  ptx::cp_async_16(shared_memory<Shared>().part[3 + threadIdx.x / 63], in);
}
__global__ void copy_from_shared(const float*, float*) {
  Shared& shared = shared_memory<Shared>();
  ptx::cp_async_4(shared.part[0], shared.part[1]);
}

// D = A·B of 16 × 16 by 16 × 8 float16 elements: A and then B^T lie in `in`, row by row. A warp, whose lane i gives
// ldmatrix the row that holds the i-th eight elements.

struct Fragments {
  uint32_t a[4], b[2];
};
__device__ void stage(const float* in) {
  Shared& shared = shared_memory<Shared>();
  for (int i = threadIdx.x; i < 32 * 4; i += 64) memcpy(&shared.rows[i / 4][i % 4], in + i, 4);
  __syncthreads();
}
__device__ Fragments load_fragments(const float* in, int wrong_row) {
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % 32;
  Fragments f;
  stage(in);
  ptx::ldmatrix_x4(f.a, shared.rows[lane % 16 * 2 + lane / 16 + wrong_row]);
  __syncthreads();
  stage(in + 128);  // B^T: 16 half rows
  ptx::ldmatrix_x2(f.b, shared.rows[lane % 8 * 2 + lane / 8 % 2]);
  return f;
}
__device__ void store_product(const float (&d)[4], float* out) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x >= 32) return;
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
__global__ void product(const float* in, float* out) {
  const Fragments f = load_fragments(in, 0);
  float d[4] = {};
  ptx::mma_m16n8k16_f16(d, f.a, f.b);
  store_product(d, out);
}
__global__ void wrong_row(const float* in, float* out) {
  const Fragments f = load_fragments(in, threadIdx.x == 9);  // its neighbour's
  float d[4] = {};
  ptx::mma_m16n8k16_f16(d, f.a, f.b);
  store_product(d, out);
}
__global__ void swapped_registers(const float* in, float* out) {
  const Fragments f = load_fragments(in, 0);
  float d[4] = {};
  ptx::mma_m16n8k16_f16(d, {f.a[0], f.a[2], f.a[1], f.a[3]}, f.b);
  store_product(d, out);
}
__global__ void swapped_columns(const float* in, float* out) {
  Fragments f = load_fragments(in, 0);
  for (uint32_t& pair : f.b) pair = pair << 16 | pair >> 16;
  float d[4] = {};
  ptx::mma_m16n8k16_f16(d, f.a, f.b);
  store_product(d, out);
}
__global__ void misaligned_row(const float* in, float*) {
  stage(in);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, &shared_memory<Shared>().rows[threadIdx.x % 32][threadIdx.x == 9]);
}
__global__ void row_outside(const float* in, float*) {
  stage(in);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, threadIdx.x == 9 ? static_cast<const void*>(in) : shared_memory<Shared>().rows);
}
__global__ void unused_address(const float* in, float* out) {  // right: the lanes from 8 on give no row
  stage(in);
  uint32_t r[1];
  ptx::ldmatrix_x1(r, threadIdx.x % 32 < 8 ? shared_memory<Shared>().rows[threadIdx.x % 32] : nullptr);
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void divergent_mma(const float*, float* out) {
  float d[4] = {};
  if (threadIdx.x != 9) ptx::mma_m16n8k16_f16(d, {}, {});
  out[threadIdx.x] = d[0];
}
__global__ void mma_at_two_places(const float*, float* out) {
  float d[4] = {};
  if (threadIdx.x % 2)
    ptx::mma_m16n8k16_f16(d, {}, {});
  else
    ptx::mma_m16n8k16_f16(d, {}, {});
  out[threadIdx.x] = d[0];
}

// tf32 operands

__device__ void multiply_tf32(uint32_t word, float* out) {
  float d[4] = {};
  ptx::mma_m16n8k8_tf32(d, {word, word, word, word}, {word, word});
  out[threadIdx.x] = d[0];
}
__global__ void rounded(const float*, float* out) { multiply_tf32(ptx::cvt_rna_tf32(1 / 3.f), out); }
__global__ void not_rounded(const float*, float* out) {
  const float third = 1 / 3.f;
  uint32_t word;
  memcpy(&word, &third, sizeof word);
  multiply_tf32(threadIdx.x == 9 ? word : 0, out);
}

// Named barriers

__global__ void producer_and_consumer(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  if (threadIdx.x < 32) {
    part[threadIdx.x] = in[threadIdx.x], part[threadIdx.x + 32] = in[threadIdx.x + 32];
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(1, 64);
    out[threadIdx.x] = part[threadIdx.x], out[threadIdx.x - 32] = part[threadIdx.x - 32];
  }
}
__global__ void nobody_arrives(const float*, float*) {
  if (threadIdx.x >= 32) ptx::bar_sync(1, 64);
}
__global__ void half_a_warp(const float*, float*) {
  if (threadIdx.x >= 16) ptx::bar_sync(1, 64);
}
__global__ void counts_differ(const float*, float*) { ptx::bar_sync(3, threadIdx.x < 32 ? 64 : 32); }
__global__ void odd_count(const float*, float*) { ptx::bar_sync(1, 48); }
__global__ void sixteenth_barrier(const float*, float*) { ptx::bar_sync(16, 64); }
__global__ void zero_is_syncthreads(const float* in, float* out) {
  auto& part = shared_memory<Shared>().part[0];
  part[threadIdx.x] = in[threadIdx.x];
  ptx::bar_sync(0, 64);
  out[threadIdx.x ^ 33] = part[threadIdx.x ^ 33];
}

struct Case {
  const char* name;
  void (*kernel)(const float*, float*);
};
#define FASTCONV_CASE(kernel) {#kernel, kernel}
constexpr Case cases[] = {FASTCONV_CASE(copies),
                          FASTCONV_CASE(missing_wait),
                          FASTCONV_CASE(missing_commit),
                          FASTCONV_CASE(missing_barrier_after_wait),
                          FASTCONV_CASE(never_waited_for),
                          FASTCONV_CASE(ring),
                          FASTCONV_CASE(ring_waits_for_one_too_few),
                          FASTCONV_CASE(misaligned_source),
                          FASTCONV_CASE(misaligned_destination),
                          FASTCONV_CASE(too_many_bytes),
                          FASTCONV_CASE(copy_to_global),
                          FASTCONV_CASE(copy_past_the_end),
                          FASTCONV_CASE(copy_from_shared),
                          FASTCONV_CASE(product),
                          FASTCONV_CASE(wrong_row),
                          FASTCONV_CASE(swapped_registers),
                          FASTCONV_CASE(swapped_columns),
                          FASTCONV_CASE(misaligned_row),
                          FASTCONV_CASE(row_outside),
                          FASTCONV_CASE(unused_address),
                          FASTCONV_CASE(divergent_mma),
                          FASTCONV_CASE(mma_at_two_places),
                          FASTCONV_CASE(rounded),
                          FASTCONV_CASE(not_rounded),
                          FASTCONV_CASE(producer_and_consumer),
                          FASTCONV_CASE(nobody_arrives),
                          FASTCONV_CASE(half_a_warp),
                          FASTCONV_CASE(counts_differ),
                          FASTCONV_CASE(odd_count),
                          FASTCONV_CASE(sixteenth_barrier),
                          FASTCONV_CASE(zero_is_syncthreads)};

}  // namespace
}  // namespace fastconv::cuda

// Runs one of the kernels above in a block of 64 threads. Returns what the launch reports, or null.
extern "C" __attribute__((visibility("default"))) const char* fastconv_emulation_run_ptx_case(const char* name,
                                                                                              const float* in,
                                                                                              float* out) {
  using namespace fastconv::cuda;
  for (const Case& c : cases)
    if (!strcmp(c.name, name))
      return launch(c.name, c.kernel, dim3(1), dim3(64), sizeof(Shared), nullptr, in, out).error;
  return "no such case";
}
