// Atomics, on integers alone: the order of a floating-point sum would depend on the schedule. They order nothing else
// (CUDA C++ Programming Guide, Atomic Functions: relaxed).
#pragma once

#include <concepts>
#include <type_traits>

template <std::integral T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <std::integral T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <std::integral T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;  // what it was
}
template <std::integral T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < v && atomicCAS(p, before, v) != before) before = __atomic_load_n(p, __ATOMIC_RELAXED);
  return before;
}
template <std::integral T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < before && atomicCAS(p, before, v) != before) before = __atomic_load_n(p, __ATOMIC_RELAXED);
  return before;
}
