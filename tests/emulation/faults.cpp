// Kernels with one fault each, and some without: what the emulation must report, and what it must not.
#include <climits>
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
__global__ void read_past_the_end(float* out) { out[threadIdx.x] = out[threadIdx.x + 1]; }
__global__ void signed_overflow(float* out) { out[threadIdx.x] = float(INT_MAX - 40 + int(threadIdx.x)); }
__global__ void misaligned_vector(float* out) { store_vec(out + 1, Vec<float, 4>{}); }
__global__ void misaligned_load(float* out) { out[threadIdx.x] = load_vec<2>(out + 1).at[0]; }
__global__ void endless_spin(float* out) {
  while (__ldg(out) != 1) __nanosleep(20);
}
__global__ void unwritten_output(float* out) { out[threadIdx.x] += 1; }
__global__ void too_much_shared_memory(float*) {}
__global__ void missing_barrier(float* out) {  // right in no order of the threads, since shared memory starts as NaN
  Shared& shared = shared_memory<Shared>();
  shared.part[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared.part[threadIdx.x ^ 1];
}

// Races: those that ThreadSanitizer must see although the result is right, in some order of the threads or in any.
__global__ void race_in_order(float* out) {  // right if threads run forward
  Shared& shared = shared_memory<Shared>();
  shared.part[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared.part[threadIdx.x / 2];
}
__global__ void race_in_warp(float* out) {  // the same within a warp, behind a shuffle among half of its lanes
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % 32;
  shared.part[threadIdx.x] = float(threadIdx.x);
  if (lane < 16) __shfl_xor_sync(0xffff, lane, 1);
  out[threadIdx.x] = shared.part[threadIdx.x - lane / 2];
}
__global__ void race_between_masks(float* out) {  // each half of a warp is in order, but not with the other
  Shared& shared = shared_memory<Shared>();
  const bool upper = threadIdx.x % 32 >= 16;
  shared.part[threadIdx.x] = float(threadIdx.x);
  for (int i = 0; i < 2 + upper; ++i) __syncwarp(upper ? 0xffff0000u : 0xffffu);
  if (upper) out[threadIdx.x] = shared.part[threadIdx.x ^ 16];
}
__global__ void race_between_meetings(float* out) {  // the warp meets before and after, but not between
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if (lane == 0) shared.part[threadIdx.x] = 1;
  out[threadIdx.x] = shared.part[threadIdx.x - lane];
  __syncwarp();
}
__global__ void race_after_reading(float* out) {  // what the first read, the second overwrites
  Shared& shared = shared_memory<Shared>();
  shared.part[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared.part[threadIdx.x ^ 1];
  shared.part[threadIdx.x] = 1;
}
__global__ void race_between_blocks(float* out) { out[threadIdx.x] = float(threadIdx.x); }
__global__ void race_with_atomics(float* out) {  // the sum is made of atomics, but one thread reads it as plain memory
  int* count = reinterpret_cast<int*>(shared_memory<Shared>().part);
  if (threadIdx.x == 0) atomicExch(count, 0);
  __syncthreads();
  atomicAdd(count, 1);
  if (threadIdx.x == 63) out[0] = float(*count);
}

// Their right counterparts, of which nobody may say anything.
__global__ void ordered_by_barrier(float* out) {
  Shared& shared = shared_memory<Shared>();
  for (int turn = 0; turn < 3; ++turn) {
    shared.part[threadIdx.x] = float(threadIdx.x);
    __syncthreads();
    out[64 * blockIdx.x + threadIdx.x] = shared.part[63 - threadIdx.x];
    __syncthreads();
  }
}
__global__ void ordered_by_warp(float* out) {
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % 32;
  for (int turn = 0; turn < 3; ++turn) {
    shared.part[threadIdx.x] = float(threadIdx.x);
    if (turn == 0)
      __syncwarp();
    else if (turn == 1)
      __shfl_xor_sync(~0u, lane, 1);
    else
      __any_sync(~0u, lane);
    out[64 * blockIdx.x + threadIdx.x] = shared.part[threadIdx.x ^ 31];
    __syncwarp();
  }
}
// The last block to count itself adds up what all of them have written (CUDA C++ Programming Guide, Memory Fence
// Functions).
__global__ void ordered_by_fences(float* out) {
  int* state = reinterpret_cast<int*>(shared_memory<Shared>().part);
  if (threadIdx.x == 0) {
    out[8 + blockIdx.x] = 2;
    __threadfence();
    state[0] = atomicAdd(reinterpret_cast<int*>(out + 1), 1);
    __threadfence();
    if (state[0] == int(gridDim.x) - 1) {
      float sum = 0;
      for (unsigned block = 0; block < gridDim.x; ++block) sum += out[8 + block];
      out[0] = sum;
    }
  }
}
__global__ void spin(float* out) {  // the first thread waits for the last one
  int* flag = reinterpret_cast<int*>(shared_memory<Shared>().part);
  if (threadIdx.x == 0) atomicExch(flag, 0);
  __syncthreads();
  if (threadIdx.x == 63) {
    out[0] = 5;
    __threadfence_block();
    atomicExch(flag, 1);
  } else if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(20);
    __threadfence_block();
    out[1] = out[0];
  }
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

// Without fault: what a warp reduces and matches.
__global__ void reduce(float* out) {
  const unsigned lane = threadIdx.x % 32;
  const int sign = lane % 2 ? -1 : 1;
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int same;
  const float results[] = {
      float(__reduce_add_sync(~0u, lane)),
      float(__reduce_add_sync(half, sign * int(lane))),
      float(__reduce_min_sync(~0u, sign * int(lane))),
      float(__reduce_max_sync(half, lane)),
      float(__reduce_and_sync(half, lane | 32)),
      float(__reduce_or_sync(~0u, 1u << (lane % 4))),
      float(__reduce_xor_sync(half, lane)),
      float(__popc(__match_any_sync(~0u, lane / 5))),
      float(__match_all_sync(half, lane / 16, &same) == half) + 10 * float(same),
      float(__match_all_sync(~0u, lane / 31, &same)) + 10 * float(same),
  };
  for (int i = 0; i < 10; ++i)
    if (threadIdx.x == 35) out[i] = results[i];
}

__global__ void pairs(float* out) {
  const float2 h = __half22float2(__float22half2_rn({1 + 1.f / 2048, 70000}));
  const float2 b = __bfloat1622float2(__float22bfloat162_rn({1 + 3.f / 256, -1 - 1.f / 256}));
  if (threadIdx.x == 0) out[0] = h.x, out[1] = h.y, out[2] = b.x, out[3] = b.y;
}

struct Case {
  const char* name;
  void (*kernel)(float*);
  unsigned blocks = 1;
  size_t shared_bytes = sizeof(Shared);
};
#define FASTCONV_CASE(kernel) {#kernel, kernel}
constexpr Case cases[] = {FASTCONV_CASE(exit_before_barrier),
                          FASTCONV_CASE(two_barriers),
                          FASTCONV_CASE(exited_lane),
                          FASTCONV_CASE(lane_outside_mask),
                          FASTCONV_CASE(source_outside_mask),
                          FASTCONV_CASE(shared_overrun),
                          FASTCONV_CASE(read_past_the_end),
                          FASTCONV_CASE(signed_overflow),
                          FASTCONV_CASE(misaligned_vector),
                          FASTCONV_CASE(misaligned_load),
                          FASTCONV_CASE(endless_spin),
                          FASTCONV_CASE(unwritten_output),
                          {"too_much_shared_memory", too_much_shared_memory, 1, 163 * 1024 + 1},
                          FASTCONV_CASE(missing_barrier),
                          FASTCONV_CASE(race_in_order),
                          FASTCONV_CASE(race_in_warp),
                          FASTCONV_CASE(race_between_masks),
                          FASTCONV_CASE(race_between_meetings),
                          FASTCONV_CASE(race_after_reading),
                          {"race_between_blocks", race_between_blocks, 2},
                          FASTCONV_CASE(race_with_atomics),
                          {"ordered_by_barrier", ordered_by_barrier, 6},
                          {"ordered_by_warp", ordered_by_warp, 6},
                          {"ordered_by_fences", ordered_by_fences, 6},
                          FASTCONV_CASE(spin),
                          FASTCONV_CASE(halves),
                          FASTCONV_CASE(sum),
                          FASTCONV_CASE(reduce),
                          FASTCONV_CASE(pairs)};

}  // namespace
}  // namespace fastconv::cuda

// Runs one of the kernels above in blocks of 64 threads that write to `out`. Returns what the launch reports, or null.
extern "C" __attribute__((visibility("default"))) const char* fastconv_emulation_run_case(const char* name,
                                                                                          float* out) {
  using namespace fastconv::cuda;
  for (const Case& c : cases)
    if (!strcmp(c.name, name))
      return launch(c.name, c.kernel, dim3(c.blocks), dim3(64), c.shared_bytes, nullptr, out).error;
  return "no such case";
}
