// What the lanes of a warp do together: barriers, votes, reductions, matches and shuffles (CUDA C++ Programming Guide,
// Warp Vote, Warp Reduce, Warp Match and Warp Shuffle Functions). Lanes beyond the end of the block may be in the mask,
// lanes that have exited not.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

namespace emulation {

enum class Reduction { add, min, max, bit_and, bit_or, bit_xor };
enum class Shuffle { idx, up, down, bfly };

// The lanes whose predicate is true, or whose value equals this lane's.
uint32_t warp_ballot(const char* what, const Where& where, uint32_t mask, bool predicate);
uint32_t warp_match(const char* what, const Where& where, uint32_t mask, uint64_t value);
// Of int or unsigned.
template <typename T>
T warp_reduce(const char* what, const Where& where, uint32_t mask, Reduction reduction, T value);
// The value of the source lane that PTX ISA, shfl.sync defines.
uint64_t warp_shuffle(const char* what, const Where& where, uint32_t mask, Shuffle mode, uint64_t value, int b,
                      int width);

template <typename T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T shuffle(const char* what, const Where& where, uint32_t mask, Shuffle mode, T value, int b, int width) {
  const uint64_t bits = warp_shuffle(what, where, mask, mode, bits_of(value), b, width);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

inline void __syncwarp(uint32_t mask = ~0u, const emulation::Where& where = emulation::Where::current()) {
  emulation::warp_collective("__syncwarp", where, mask, nullptr, nullptr);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_ballot("__ballot_sync", where, mask, predicate != 0);
}
inline int __any_sync(uint32_t mask, int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_ballot("__any_sync", where, mask, predicate != 0) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_ballot("__all_sync", where, mask, predicate == 0) == 0;
}

inline unsigned __reduce_add_sync(uint32_t mask, unsigned value,
                                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_add_sync", where, mask, emulation::Reduction::add, value);
}
inline int __reduce_add_sync(uint32_t mask, int value, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_add_sync", where, mask, emulation::Reduction::add, value);
}
inline unsigned __reduce_min_sync(uint32_t mask, unsigned value,
                                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_min_sync", where, mask, emulation::Reduction::min, value);
}
inline int __reduce_min_sync(uint32_t mask, int value, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_min_sync", where, mask, emulation::Reduction::min, value);
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned value,
                                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_max_sync", where, mask, emulation::Reduction::max, value);
}
inline int __reduce_max_sync(uint32_t mask, int value, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_max_sync", where, mask, emulation::Reduction::max, value);
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value,
                                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_and_sync", where, mask, emulation::Reduction::bit_and, value);
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value,
                                 const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_or_sync", where, mask, emulation::Reduction::bit_or, value);
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value,
                                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_reduce("__reduce_xor_sync", where, mask, emulation::Reduction::bit_xor, value);
}

template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, const emulation::Where& where = emulation::Where::current()) {
  return emulation::warp_match("__match_any_sync", where, mask, emulation::bits_of(value));
}
// The mask if all of its lanes have the same value, otherwise 0.
template <typename T>
uint32_t __match_all_sync(uint32_t mask, T value, int* same,
                          const emulation::Where& where = emulation::Where::current()) {
  const uint32_t equal = emulation::warp_match("__match_all_sync", where, mask, emulation::bits_of(value));
  *same = equal == emulation::present_lanes(mask);
  return *same ? mask : 0;
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32,
              const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle("__shfl_sync", where, mask, emulation::Shuffle::idx, value, lane, width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle("__shfl_up_sync", where, mask, emulation::Shuffle::up, value, int(delta), width);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle("__shfl_down_sync", where, mask, emulation::Shuffle::down, value, int(delta), width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32,
                  const emulation::Where& where = emulation::Where::current()) {
  return emulation::shuffle("__shfl_xor_sync", where, mask, emulation::Shuffle::bfly, value, lane_mask, width);
}
