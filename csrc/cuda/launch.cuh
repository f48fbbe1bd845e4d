// What every kernel file starts from: the CUDA headers or the host emulation of them, kernel launches, shared memory.
// The one #ifdef between the two is here. Kernel files write no <<<>>>, no bare __shared__ and no asm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "launchers.h"

#ifdef FASTCONV_EMULATION
#include "emulation.h"
#include "ptx.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ptx.cuh"

namespace fastconv::cuda {

// Returns null, or the driver's words.
template <typename... P, typename... A>
const char* launch_kernel(const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
                          A&&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // what is reported here must not be reported again by someone else's next call
  return cudaGetErrorString(error);
}

__device__ __forceinline__ void* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char fastconv_shared_memory[];
  return fastconv_shared_memory;
}

// The emulation reports an address that a vector access would fault at; the device does so itself.
__device__ __forceinline__ void check_aligned(const void*, size_t) {}

}  // namespace fastconv::cuda
#endif

namespace fastconv::cuda {

// Queues kernel(args...) on the stream. `name` is for reports. A grid has at least one block: the caller returns early
// where there is nothing to compute. grid.y and grid.z end at 65535, grid.x at 2^31 − 1.
template <typename... P, typename... A>
Status launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
              A&&... args) {
  const char* error = launch_kernel(name, kernel, grid, block, shared_bytes, stream, std::forward<A>(args)...);
  return error ? Status{name, error} : Status{};
}

// The shared memory of a block, launched with sizeof(Shared) bytes.
template <typename Shared>
__device__ __forceinline__ Shared& shared_memory() {
  static_assert(alignof(Shared) <= 128, "shared memory starts at a multiple of 128 bytes");
  return *static_cast<Shared*>(dynamic_shared_memory());
}

}  // namespace fastconv::cuda
