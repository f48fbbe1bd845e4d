// Images and filters in either memory order, by strides in elements.
#pragma once

#include "../plan.h"
#include "isa.h"

namespace fastconv::cpu {
namespace {

template <typename T>
struct Images {
  T* data;
  int64_t n, channel, row, col;

  T* at(int64_t image, int64_t ch, int64_t i, int64_t j) const {
    return data + image * n + ch * channel + i * row + j * col;
  }
};
template <typename T>
Images<T> images(T* data, Layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == Layout::NCHW) return {data, channels * height * width, height * width, width, 1};
  return {data, height * width * channels, 1, width * channels, channels};
}

// Element (group, produced channel m, contracted channel, r, s).
template <typename T>
struct Filters {
  const T* data;
  int64_t group, m, channel, r, s;
};
template <typename T>
Filters<T> filters(const T* w, const Conv2dProblem& p, Direction direction) {
  const int64_t cg = p.channels_per_group(), taps = p.R * p.S;
  const bool nchw = p.layout == Layout::NCHW;
  const int64_t k = cg * taps, c = nchw ? taps : 1, r = nchw ? p.S : p.S * cg, s = nchw ? 1 : cg;
  if (direction == Direction::fprop) return {w, p.filters_per_group() * k, k, c, r, s};
  return {w, p.filters_per_group() * k, c, k, r, s};
}

}  // namespace
}  // namespace fastconv::cpu
