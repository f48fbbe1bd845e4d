// CUDA on the host: what the kernels of csrc/cuda use of the language and its headers, as plain C++20.
//
// A CUDA thread is a fiber. The fibers of a block run on one OS thread, one at a time, each until it waits at a barrier
// or returns; blocks run one after another. Barriers, shuffles and votes honour their masks and are told apart by their
// place in the source, so that threads which wait for each other at different places are found and named. What the
// hardware leaves undefined (a shuffle from a lane that does not take part, a misaligned vector, a write past the
// shared memory) is an error: it ends the launch, whose status then says which kernel, block and thread did what.
// What is modelled, and what is not, is listed in README.md beside this file.
#pragma once

#include <math.h>  // the overloads outside of std, as in CUDA

#include <climits>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

// Built-in types and variables

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Those of the fiber that runs: launches take turns, so there is never more than one.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The machine behind the functions below.

namespace emulation {

using Where = std::source_location;

// Runs body(context) as every thread of the grid. Returns null, or what went wrong.
const char* run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                     void* context);
void* shared_memory();
// Ends the launch with an error that names the kernel, the block, the thread and the place.
[[noreturn]] void fail(const Where& where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Each waits until all threads of the block, or all lanes in the mask, wait at the same place.
int block_barrier(const char* what, const Where& where, bool predicate);  // returns how many predicates are true
uint32_t warp_vote(const char* what, const Where& where, uint32_t mask, bool predicate);  // returns the ballot
uint64_t warp_shuffle(const char* what, const Where& where, uint32_t mask, int source_lane, uint64_t value);
int lane();

}  // namespace emulation

extern "C" {
// The order in which a block's threads, and a grid's blocks, take their turns: 0 forward, 1 reverse, 2 shuffled by
// `seed`. Right kernels give the same bits in any.
__attribute__((visibility("default"))) void fastconv_emulation_set_order(int order, unsigned seed);
// For tests: how often fibers were switched since the library was loaded.
__attribute__((visibility("default"))) uint64_t fastconv_emulation_switches();
}

// Block barriers (CUDA C++ Programming Guide, Synchronization Functions). The hardware lets a barrier pass without the
// threads that have exited; here every thread must come.

inline void __syncthreads(const emulation::Where& where = emulation::Where::current()) {
  emulation::block_barrier("__syncthreads", where, false);
}
inline int __syncthreads_or(int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::block_barrier("__syncthreads_or", where, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::block_barrier("__syncthreads_and", where, predicate == 0) == 0;
}
inline int __syncthreads_count(int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::block_barrier("__syncthreads_count", where, predicate != 0);
}

// Warp barriers, votes and shuffles. Lanes beyond the end of the block may be in the mask, lanes that have exited not.

inline void __syncwarp(uint32_t mask = ~0u, const emulation::Where& where = emulation::Where::current()) {
  emulation::warp_vote("__syncwarp", where, mask, false);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_vote("__ballot_sync", where, mask, predicate != 0);
}
inline int __any_sync(uint32_t mask, int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_vote("__any_sync", where, mask, predicate != 0) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_vote("__all_sync", where, mask, predicate == 0) == 0;
}

namespace emulation {

enum class Shuffle { idx, up, down, bfly };

// The source lane j of PTX ISA 9.7.9.6, shfl.sync: segments of `width` lanes; a source outside the segment is the lane
// itself.
template <typename T>
T shuffle(Shuffle mode, const char* what, const Where& where, uint32_t mask, T value, int b, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  if (width < 1 || width > 32 || (width & (width - 1))) fail(where, "%s with a width of %d", what, width);
  const int self = lane(), first = self & ~(width - 1), last = first + width - 1;
  b &= 31;
  int j = self;
  switch (mode) {
    case Shuffle::idx: j = first + (b & (width - 1)); break;
    case Shuffle::up: j = self - b; break;
    case Shuffle::down: j = self + b; break;
    case Shuffle::bfly: j = self ^ b; break;
  }
  if (j < first && mode == Shuffle::up) j = self;
  if (j > last) j = self;
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = warp_shuffle(what, where, mask, j, bits);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32,
              const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle(emulation::Shuffle::idx, "__shfl_sync", where, mask, value, lane, width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle(emulation::Shuffle::up, "__shfl_up_sync", where, mask, value, int(delta), width);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle(emulation::Shuffle::down, "__shfl_down_sync", where, mask, value, int(delta), width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32,
                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle(emulation::Shuffle::bfly, "__shfl_xor_sync", where, mask, value, lane_mask, width);
}

// Atomics, on integers alone: the order of a floating-point sum would depend on the schedule. One fiber runs at a time.

template <std::integral T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return std::exchange(*p, T(*p + v));
}
template <std::integral T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return std::exchange(*p, *p < v ? v : *p);
}
template <std::integral T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return std::exchange(*p, v < *p ? v : *p);
}
template <std::integral T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return std::exchange(*p, v);
}
template <std::integral T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return std::exchange(*p, *p == expected ? v : *p);
}
inline void __threadfence() {}

// Arithmetic

template <typename T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline float rsqrtf(float v) { return float(1 / std::sqrt(double(v))); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t(__uint128_t(a) * b >> 64); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}

// 16-bit floats: storage alone. Kernels compute in float, so there is no arithmetic to model.

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The runtime: one device, an sm_80 with few multiprocessors, so that small problems are split as large ones are.

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
  return emulation::run_grid(name, grid, block, shared_bytes, body, &call);
}

inline void* dynamic_shared_memory() { return emulation::shared_memory(); }

inline void check_aligned(const void* p, size_t bytes, const emulation::Where& where = emulation::Where::current()) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) emulation::fail(where, "%p is not a multiple of %zu", p, bytes);
}

}  // namespace fastconv::cuda
