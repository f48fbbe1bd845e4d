// How a problem will be computed: which kernel, in which tiles, with how much workspace.
// Pure functions of the problem and the target: the same arguments give the same plan on every machine, at any time,
// and nothing is measured, cached or read from the environment. What fastconv.plan() prints is what is launched.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace fastconv {

enum class Direction : uint8_t { fprop, dgrad, wgrad };

// The rungs of the ladder, from the first slide to the fast ones.
enum class Algo : uint8_t {
  direct_naive,
  direct,
  im2col,
  implicit_gemm_tile,
  implicit_gemm_registers,
  implicit_gemm_vectors,
  implicit_gemm,
  depthwise,
  mma,
  winograd,
  grouped
};
constexpr int num_algos = 11;

// Where it will run. A CPU plan does not depend on the number of threads, nor on the instruction set.
struct Target {
  bool cuda = false;
  int sm = 0;       // compute capability × 10: 75, 80, 90, 100
  int num_sms = 0;  // streaming multiprocessors
};

// Why an algorithm was taken or passed over; collected only when someone asks.
struct Reason {
  Algo algo;
  bool taken;
  std::string text;
};
using Reasons = std::vector<Reason>;

struct Conv2dPlan {
  Direction direction = Direction::fprop;
  Algo algo = Algo::direct;
  const char* kernel = "";                 // name of the kernel function that is launched
  int tile_m = 0, tile_n = 0, tile_k = 0;  // of the GEMM, or of the output for direct kernels; 0 where it has none
  int split = 1;                           // pieces of the contraction, each summed apart, then added in order
  int64_t workspace_bytes = 0;             // one buffer for the whole call
  int64_t scratch_bytes = 0;               // CPU: one more buffer for each thread
  double predicted_us = 0;                 // of the whole call, on an H200; 0 where there is no model of its time
};

struct MaxPool2dPlan {
  const char* kernel = "";
};

struct AvgPool2dPlan {
  const char* kernel = "";
  int threads = 1;  // CUDA: that share the window of an output
};

struct BatchNormPlan {
  const char* kernel = "";
  int split = 1;  // pieces of a channel's values, whose statistics are merged in order
  int64_t workspace_bytes = 0;
};

// Throws std::invalid_argument (a ValueError in Python) if `algo` cannot do the problem, saying why.
Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Direction direction, const Target& target,
                       std::optional<Algo> algo = std::nullopt, Reasons* reasons = nullptr);
MaxPool2dPlan plan_max_pool2d(const MaxPool2dProblem& problem, const Target& target);
AvgPool2dPlan plan_avg_pool2d(const AvgPool2dProblem& problem, const Target& target);
BatchNormPlan plan_batch_norm(const BatchNormProblem& problem, const Target& target);

// The two halves of plan_conv2d.
Conv2dPlan plan_conv2d_cpu(const Conv2dProblem&, Direction, std::optional<Algo>, Reasons*);
Conv2dPlan plan_conv2d_cuda(const Conv2dProblem&, Direction, const Target&, std::optional<Algo>, Reasons*);

// The CUDA half of plan_batch_norm.
BatchNormPlan plan_batch_norm_cuda(const BatchNormProblem& problem, const Target& target);

std::vector<Algo> algorithms(bool cuda);
Algo parse_algo(const std::string& name, bool cuda);  // throws std::invalid_argument with the list of known ones
Direction parse_direction(const std::string& name);
Target parse_arch(const std::string& arch);  // "cpu", "sm_90", "sm_90a"
const char* name(Algo algo);
const char* name(Direction direction);

}  // namespace fastconv
