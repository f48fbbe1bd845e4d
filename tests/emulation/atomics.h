// Atomics, on integers alone: the order of a floating-point sum would depend on the schedule. One fiber runs at a time.
#pragma once

#include <concepts>
#include <type_traits>
#include <utility>

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
