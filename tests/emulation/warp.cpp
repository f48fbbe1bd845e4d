// What the last lane to come computes for all of them.
#include "warp.h"

#include <algorithm>

#include "state.h"

namespace emulation {
namespace {

template <typename T>
T reduce(Reduction reduction, T a, T b) {
  switch (reduction) {
    case Reduction::add: return T(unsigned(a) + unsigned(b));  // wraps, as in hardware
    case Reduction::min: return std::min(a, b);
    case Reduction::max: return std::max(a, b);
    case Reduction::bit_and: return a & b;
    case Reduction::bit_or: return a | b;
    case Reduction::bit_xor: return a ^ b;
  }
  return a;
}

// PTX ISA, shfl.sync: segments of `width` lanes; a source outside the segment is the lane itself.
int source_lane(Shuffle mode, int self, int b, int width) {
  const int first = self & ~(width - 1), last = first + width - 1;
  b &= 31;
  int j = self;
  switch (mode) {
    case Shuffle::idx: j = first + (b & (width - 1)); break;
    case Shuffle::up: j = self - b; break;
    case Shuffle::down: j = self + b; break;
    case Shuffle::bfly: j = self ^ b; break;
  }
  if (j < first && mode == Shuffle::up) j = self;
  return j > last ? self : j;
}

}  // namespace

uint32_t warp_ballot(const char* what, const Where& where, uint32_t mask, bool predicate) {
  struct Operand {
    bool predicate;
    uint32_t ballot;
  } self{predicate, 0};
  warp_collective(what, where, mask, &self, [](const Lanes& lanes) {
    uint32_t ballot = 0;
    lanes.each([&](int i) { ballot |= uint32_t(lanes.operand<Operand>(i).predicate) << i; });
    lanes.each([&](int i) { lanes.operand<Operand>(i).ballot = ballot; });
  });
  return self.ballot;
}

uint32_t warp_match(const char* what, const Where& where, uint32_t mask, uint64_t value) {
  struct Operand {
    uint64_t value;
    uint32_t equal;
  } self{value, 0};
  warp_collective(what, where, mask, &self, [](const Lanes& lanes) {
    lanes.each([&](int i) {
      auto& a = lanes.operand<Operand>(i);
      lanes.each([&](int j) { a.equal |= uint32_t(a.value == lanes.operand<Operand>(j).value) << j; });
    });
  });
  return self.equal;
}

template <typename T>
T warp_reduce(const char* what, const Where& where, uint32_t mask, Reduction reduction, T value) {
  struct Operand {
    Reduction reduction;
    T value;
  } self{reduction, value};
  warp_collective(what, where, mask, &self, [](const Lanes& lanes) {
    const int first = __builtin_ctz(lanes.mask);
    auto sum = lanes.operand<Operand>(first);
    lanes.each([&](int i) {
      if (i > first) sum.value = reduce(sum.reduction, sum.value, lanes.operand<Operand>(i).value);
    });
    lanes.each([&](int i) { lanes.operand<Operand>(i) = sum; });
  });
  return self.value;
}
template int warp_reduce(const char*, const Where&, uint32_t, Reduction, int);
template unsigned warp_reduce(const char*, const Where&, uint32_t, Reduction, unsigned);

uint64_t warp_shuffle(const char* what, const Where& where, uint32_t mask, Shuffle mode, uint64_t value, int b,
                      int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail(where, "%s with a width of %d", what, width);
  struct Operand {
    int source;
    uint64_t value, result;
  } self{source_lane(mode, lane(), b, width), value, 0};
  warp_collective(what, where, mask, &self, [](const Lanes& lanes) {
    lanes.each([&](int i) {
      auto& operand = lanes.operand<Operand>(i);
      if (!lanes.take_part(operand.source))
        fail(lanes.where, "%s: lane %d reads lane %d, which does not take part", lanes.what, i, operand.source);
      operand.result = lanes.operand<Operand>(operand.source).value;
    });
  });
  return self.result;
}

}  // namespace emulation
