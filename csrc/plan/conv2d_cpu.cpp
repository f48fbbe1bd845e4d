// How a convolution is done on a CPU: the algorithm. Its blocks are the business of the file of its name.
#include "conv2d_cpu.h"

#include <stdexcept>

#include "../cpu/conv2d_stem_blocks.h"

namespace fastconv {
namespace {

using namespace cpu;

// Empty if the algorithm can do the problem.
std::string rejection(const Conv2dProblem& p, Algo algo) {
  if (algo == Algo::winograd) return winograd_rejection(p);
  if (algo == Algo::grouped && p.groups == 1) return "grouped needs more than one group";
  if (algo != Algo::depthwise) return "";
  if (p.groups != p.C)
    return "depthwise needs groups = C, here groups = " + std::to_string(p.groups) + " and C = " + std::to_string(p.C);
  if (p.K != p.C)
    return "depthwise needs one filter a channel, here K = " + std::to_string(p.K) + " and C = " + std::to_string(p.C);
  return "";
}

void plan_direct(const Conv2dProblem& p, Conv2dPlan& plan) {
  plan.kernel = pick(plan.direction, "conv2d_direct_fprop", "conv2d_direct_dgrad", "conv2d_direct_wgrad");
  // One row of sums; NHWC and wgrad keep theirs in registers.
  if (p.layout == Layout::NCHW && plan.direction != Direction::wgrad)
    plan.scratch_bytes = aligned((plan.direction == Direction::fprop ? p.Q : p.W) * sum_bytes(p));
}

// Groups that a matrix product would leave registers idle for.
constexpr int64_t few_channels = 32;
bool few_a_group(const Conv2dProblem& p) {
  return p.groups > 1 && p.channels_per_group() <= few_channels && p.filters_per_group() <= few_channels;
}

std::string why_not_grouped(const Conv2dProblem& p) {
  if (p.groups == 1) return rejection(p, Algo::grouped);
  return "for groups of at most " + std::to_string(few_channels) +
         " channels and filters; with more, a product is faster";
}

// What is taken unasked. Reasons are put into words only if someone wants them.
Algo choose(const Conv2dProblem& p, Direction direction, Reasons* reasons) {
  const bool depthwise = p.groups == p.C && p.K == p.C, grouped = !depthwise && few_a_group(p);
  const bool winograd = !depthwise && !grouped && winograd_wins(p, direction);
  const Algo taken = depthwise ? Algo::depthwise : grouped ? Algo::grouped : winograd ? Algo::winograd : Algo::im2col;
  if (!reasons) return taken;
  if (depthwise) {
    reasons->push_back(
        {Algo::depthwise, true, "groups = C = K: no reuse across channels, so memory traffic is all there is"});
    reasons->push_back({Algo::grouped, false, "depthwise is the same without a sum over channels"});
    reasons->push_back({Algo::winograd, false, "with one filter a group nothing would pay for its transforms"});
    reasons->push_back({Algo::im2col, false, "a product with one filter a group would leave most of each vector idle"});
  } else if (grouped) {
    reasons->push_back(
        {Algo::grouped, true, "few channels a group: sums over taps and channels, vectors along the channels"});
    reasons->push_back({Algo::winograd, false, "with so few filters a group nothing would pay for its transforms"});
    reasons->push_back({Algo::im2col, false, "products with so few rows or columns would leave registers idle"});
    reasons->push_back({Algo::depthwise, false, rejection(p, Algo::depthwise)});
  } else {
    const bool pixels = along_pixels(p, direction) && !exchanges_operands(p, direction);
    const std::string along = pixels ? "pixels" : "channels";
    const char* stem = direction == Direction::dgrad
                           ? "few channels: every pixel of dy times every tap, added up in the rows of dx"
                           : "few channels: windows are read in place, vectors along the filters";
    explain_winograd(p, direction, winograd, reasons);
    reasons->push_back({Algo::im2col, !winograd,
                        winograd ? "multiplies each output's patch"
                        : is_stem(p, direction)
                            ? stem
                            : "patches times filters, blocked for the caches, vectors along the " + along});
    reasons->push_back({Algo::grouped, false, why_not_grouped(p)});
    reasons->push_back({Algo::depthwise, false, rejection(p, Algo::depthwise)});
  }
  reasons->push_back({Algo::direct, false, "its loops reuse registers less"});
  return taken;
}

// What was asked for, or its nearest rung on a CPU.
Algo check_asked(const Conv2dProblem& p, Algo asked, Reasons* reasons) {
  const Algo taken = asked == Algo::direct_naive ? Algo::direct : asked;
  const std::string why_not = rejection(p, taken);
  if (!why_not.empty()) throw std::invalid_argument("algo='" + std::string(name(asked)) + "': " + why_not);
  if (reasons)
    reasons->push_back(
        {taken, true, taken == asked ? "asked for" : "asked for direct_naive; direct is its nearest rung on a CPU"});
  return taken;
}

}  // namespace

Conv2dPlan plan_conv2d_cpu(const Conv2dProblem& problem, Direction direction, std::optional<Algo> algo,
                           Reasons* reasons) {
  Conv2dPlan plan;
  plan.direction = direction;
  plan.algo = algo ? check_asked(problem, *algo, reasons) : choose(problem, direction, reasons);
  switch (plan.algo) {
    case Algo::im2col: plan_im2col(problem, plan); break;
    case Algo::depthwise: plan_depthwise(problem, plan); break;
    case Algo::grouped: plan_grouped(problem, plan); break;
    case Algo::winograd: plan_winograd(problem, plan); break;
    default: plan_direct(problem, plan); break;
  }
  return plan;
}

}  // namespace fastconv
