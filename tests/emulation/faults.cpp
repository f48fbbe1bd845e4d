// Kernels with one fault each, and some without: what the emulation must report, and what it must not.
#include <cstring>

#include "../../csrc/cuda/types.cuh"

namespace fastconv::cuda {
namespace {

struct Shared {
  float part[64];
};

__global__ void exit_before_barrier(float*) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers(float*) {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void exited_lane(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, float(threadIdx.x), 1);
}
__global__ void lane_outside_mask(float* out) { out[threadIdx.x] = float(__any_sync(0xffffu, 1)); }
__global__ void source_outside_mask(float* out) {
  const uint32_t mask = threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u;
  out[threadIdx.x] = __shfl_xor_sync(mask, float(threadIdx.x), 1);
}
__global__ void shared_overrun(float*) { shared_memory<Shared>().part[threadIdx.x + 1] = 1; }
__global__ void misaligned_vector(float* out) { store_vec(out + 1, Vec<float, 4>{}); }
__global__ void missing_barrier(float* out) {  // right in no order of the threads, since shared memory starts as NaN
  Shared& shared = shared_memory<Shared>();
  shared.part[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared.part[threadIdx.x ^ 1];
}

// Without fault: two halves of a warp that shuffle at different places, and sums by shuffles and shared memory.
__global__ void halves(float* out) {
  float v = float(threadIdx.x % 32);
  if (threadIdx.x % 32 < 16)
    v = __shfl_down_sync(0x0000ffffu, v, 1, 16);
  else
    v = __shfl_up_sync(0xffff0000u, v, 3, 16);
  out[threadIdx.x] = v;
}
__global__ void sum(float* out) {
  Shared& shared = shared_memory<Shared>();
  float v = float(threadIdx.x);
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(~0u, v, lane);
  if (threadIdx.x % 32 == 0) shared.part[threadIdx.x / 32] = v;
  const int odd = __syncthreads_count(threadIdx.x % 2);
  const uint32_t small = __ballot_sync(~0u, threadIdx.x % 32 < 5);
  out[threadIdx.x] = shared.part[0] + shared.part[1] + 1e4f * float(odd) + 1e6f * float(__popc(small));
}

struct Case {
  const char* name;
  void (*kernel)(float*);
};
#define FASTCONV_CASE(kernel) {#kernel, kernel}
constexpr Case cases[] = {FASTCONV_CASE(exit_before_barrier),
                          FASTCONV_CASE(two_barriers),
                          FASTCONV_CASE(exited_lane),
                          FASTCONV_CASE(lane_outside_mask),
                          FASTCONV_CASE(source_outside_mask),
                          FASTCONV_CASE(shared_overrun),
                          FASTCONV_CASE(misaligned_vector),
                          FASTCONV_CASE(missing_barrier),
                          FASTCONV_CASE(halves),
                          FASTCONV_CASE(sum)};

}  // namespace
}  // namespace fastconv::cuda

// Runs one of the kernels above in a block of 64 threads that write to `out`. Returns what the launch reports, or null.
extern "C" __attribute__((visibility("default"))) const char* fastconv_emulation_run_case(const char* name,
                                                                                          float* out) {
  using namespace fastconv::cuda;
  for (const Case& c : cases)
    if (!strcmp(c.name, name)) return launch(c.name, c.kernel, dim3(1), dim3(64), sizeof(Shared), nullptr, out).error;
  return "no such case";
}
