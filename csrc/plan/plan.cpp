// What the plans share: names, parsing, and the choice between the CPU's and CUDA's half.
#include "../plan.h"

#include <stdexcept>

namespace fastconv {

Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Direction direction, const Target& target,
                       std::optional<Algo> algo, Reasons* reasons) {
  return target.cuda ? plan_conv2d_cuda(problem, direction, target, algo, reasons)
                     : plan_conv2d_cpu(problem, direction, algo, reasons);
}

std::vector<Algo> algorithms(bool cuda) {
  if (cuda)
    return {Algo::direct_naive,
            Algo::direct,
            Algo::im2col,
            Algo::implicit_gemm_tile,
            Algo::implicit_gemm_registers,
            Algo::implicit_gemm_vectors,
            Algo::implicit_gemm,
            Algo::depthwise,
            Algo::mma};
  return {Algo::direct, Algo::im2col, Algo::depthwise, Algo::grouped, Algo::winograd};
}

const char* name(Algo algo) {
  switch (algo) {
    case Algo::direct_naive: return "direct_naive";
    case Algo::direct: return "direct";
    case Algo::im2col: return "im2col";
    case Algo::implicit_gemm_tile: return "implicit_gemm_tile";
    case Algo::implicit_gemm_registers: return "implicit_gemm_registers";
    case Algo::implicit_gemm_vectors: return "implicit_gemm_vectors";
    case Algo::implicit_gemm: return "implicit_gemm";
    case Algo::depthwise: return "depthwise";
    case Algo::mma: return "mma";
    case Algo::winograd: return "winograd";
    case Algo::grouped: return "grouped";
  }
  return "";
}

const char* name(Direction direction) {
  switch (direction) {
    case Direction::fprop: return "fprop";
    case Direction::dgrad: return "dgrad";
    case Direction::wgrad: return "wgrad";
  }
  return "";
}

Algo parse_algo(const std::string& text, bool cuda) {
  std::string known;
  for (Algo algo : algorithms(cuda)) {
    if (text == name(algo)) return algo;
    known += (known.empty() ? "" : ", ") + std::string(name(algo));
  }
  throw std::invalid_argument("unknown algo '" + text + "' for " + (cuda ? "CUDA" : "the CPU") + ": expected one of " +
                              known);
}

Direction parse_direction(const std::string& text) {
  for (Direction direction : {Direction::fprop, Direction::dgrad, Direction::wgrad})
    if (text == name(direction)) return direction;
  throw std::invalid_argument("unknown direction '" + text + "': expected fprop, dgrad or wgrad");
}

Target parse_arch(const std::string& arch) {
  if (arch == "cpu") return {};
  // A representative device of each architecture: T4, A100, A10, RTX 4090, H100, B200, RTX 5090.
  struct Known {
    const char* name;
    int sm, num_sms;
  };
  constexpr Known known[] = {{"sm_75", 75, 40},  {"sm_80", 80, 108},   {"sm_86", 86, 72},   {"sm_89", 89, 128},
                             {"sm_90", 90, 132}, {"sm_100", 100, 148}, {"sm_120", 120, 170}};
  const std::string plain = !arch.empty() && arch.back() == 'a' ? arch.substr(0, arch.size() - 1) : arch;
  for (const Known& k : known)
    if (plain == k.name) return {true, k.sm, k.num_sms};
  throw std::invalid_argument("unknown arch '" + arch +
                              "': expected cpu, sm_75, sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120");
}

}  // namespace fastconv
