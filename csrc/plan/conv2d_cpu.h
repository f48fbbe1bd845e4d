// The parts of the plan of a convolution on a CPU, a file each: how every algorithm is blocked, and when it is taken.
//
// Blocks are sized for a core with 32 KiB of L1 and 512 KiB of L2, and shrunk where the problem would otherwise give
// fewer than `enough_tasks` tasks. Nothing depends on the number of threads, so neither do the bits of the result.
#pragma once

#include <string>

#include "../cpu/conv2d_blocks.h"
#include "../plan.h"

namespace fastconv::cpu {

constexpr int64_t enough_tasks = 16;

inline int64_t sum_bytes(const Conv2dProblem& p) { return p.dtype == DType::float64 ? 8 : 4; }
inline int64_t aligned(int64_t bytes) { return pieces_of(bytes, 64) * 64; }
inline const char* pick(Direction d, const char* fprop, const char* dgrad, const char* wgrad) {
  return d == Direction::fprop ? fprop : d == Direction::dgrad ? dgrad : wgrad;
}

// The kernel, the blocks, scratch and workspace of an algorithm that can do the problem.
void plan_depthwise(const Conv2dProblem& p, Conv2dPlan& plan);
void plan_grouped(const Conv2dProblem& p, Conv2dPlan& plan);
void plan_im2col(const Conv2dProblem& p, Conv2dPlan& plan);
void plan_winograd(const Conv2dProblem& p, Conv2dPlan& plan);

// Empty if Winograd's method can do the problem.
std::string winograd_rejection(const Conv2dProblem& p);
// Whether it is taken unasked, and why.
bool winograd_wins(const Conv2dProblem& p, Direction direction);
void explain_winograd(const Conv2dProblem& p, Direction direction, bool taken, Reasons* reasons);

}  // namespace fastconv::cpu
