// The runtime: one device, an sm_80 with few multiprocessors, so that small problems are split as large ones are.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#include "../../csrc/cuda/launchers.h"
#include "instantiations.h"
#include "machine.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  *value = which == cudaDevAttrMultiProcessorCount ? 4 : which == cudaDevAttrComputeCapabilityMajor ? 8 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// What launch.cuh builds on.

namespace fastconv::cuda {

template <typename... P, typename... A>
const char* launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
                          A&&... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters are at most 4 KiB");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto body = [](void* context) {
    const Call& c = *static_cast<Call*>(context);
    std::apply(c.kernel, c.args);
  };
  emulation::count_launch(reinterpret_cast<const void*>(kernel), block.x * block.y * block.z, shared_bytes);
  return emulation::run_grid(name, grid, block, shared_bytes, body, &call);
}

inline void* dynamic_shared_memory() { return emulation::shared_memory(); }

inline void check_aligned(const void* p, size_t bytes, const emulation::Where& where = emulation::Where::current()) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) emulation::fail(where, "%p is not a multiple of %zu", p, bytes);
}

}  // namespace fastconv::cuda
