// The plan of a convolution on tensor cores: which tile, how many splits, which copies, by a model of the time.
#include "conv2d_mma.h"

#include <cstdio>
#include <limits>

#include "h200.h"

namespace fastconv::cuda {
namespace {

using namespace h200;
constexpr int step_bytes = 64;
constexpr int64_t most_sums_bytes = int64_t{64} << 20;  // of the partial sums of a split contraction

// mma.sync reaches 60 to 70 % of the rate of the instructions that Hopper adds. A smaller tile reuses a fragment less
// often; what that costs is an estimate until it is measured.
constexpr MmaTile large = {128, 128, 0.65, 2}, small = {64, 64, 0.45, 4};
// For few filters or, of dgrad, channels; of wgrad the results are the other way round.
constexpr MmaTile half[] = {{128, 64, 0.55, 3}, {64, 128, 0.55, 3}}, narrow[] = {{128, 16, 0.2, 4}, {16, 128, 0.2, 4}};

// The tiles that conv2d_mma.cuh is compiled for; nullptr ends them.
struct Tiles {
  const MmaTile* at[5];
};
Tiles tiles_of(const Conv2dProblem& p, Direction direction) {
  const bool wgrad = direction == Direction::wgrad;
  if (p.dtype == DType::float64) return {{&small}};
  if (p.dtype == DType::float32 && !p.allow_tf32) return {{&large, &small}};
  return {{&large, &half[wgrad], &small, &narrow[wgrad]}};
}

// Multiply-adds of an SM in a µs: half as many of tf32, a third of that where float32 is three products; float64's are
// the 67 TFLOP/s of NVIDIA's data sheet.
double rate(const Conv2dProblem& p) {
  const double bf16 = bf16_tflops / 2 * 1e6 / sms;
  if (p.dtype == DType::float64) return 67.0 / 2 * 1e6 / sms;
  if (p.dtype == DType::float32) return p.allow_tf32 ? bf16 / 2 : bf16 / 6;
  return bf16;
}

// Bytes that are loaded at once from rows of so many elements.
int64_t piece_bytes(int64_t elements, int64_t bytes) {
  for (int64_t piece : {16, 8, 4})
    if (piece >= bytes && elements * bytes % piece == 0) return piece;
  return bytes;
}

// How many elements a row had better have, if each is loaded `reads` times: a piece takes as long as 16 bytes, one of
// 2 bytes, which is waited for, as four; and a copy that is not made anyway costs what it reads and writes.
int64_t padded(int64_t elements, int64_t bytes, double reads, bool copied) {
  int64_t best = elements;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t alignment : {bytes, int64_t{4}, int64_t{8}, int64_t{16}}) {
    const int64_t row = round_up(elements * bytes, std::max(alignment, bytes)) / bytes, piece = piece_bytes(row, bytes);
    const double loads = double(row * bytes / piece * (piece < 4 ? 4 : 1)) * 16;
    const double copy = copied ? double(row * bytes) : row == elements ? 0 : double((elements + row) * bytes);
    if (reads * loads + copy < least) best = row, least = reads * loads + copy;
  }
  return best;
}

std::string time_text(double us) {
  char text[32];
  std::snprintf(text, sizeof text, us < 100 ? "%.1f µs" : "%.0f µs", us);
  return text;
}
std::string tile_text(const MmaTile& tile, int split) {
  return "tiles of " + std::to_string(tile.m) + " x " + std::to_string(tile.n) + ", split " + std::to_string(split);
}

}  // namespace

MmaOperands mma_operands(const Conv2dProblem& p, Direction direction) {
  const bool fprop = direction == Direction::fprop, dgrad = direction == Direction::dgrad;
  const int64_t channels = p.channels_per_group(), filters = p.filters_per_group(), bytes = element_bytes(p.dtype);
  const auto moved = [&](int64_t rows, int64_t plane) { return p.layout == Layout::NCHW && rows > 1 && plane > 1; };
  MmaOperands o = {channels, channels, filters, filters, false, false, false};
  o.copies_x = moved(p.C, p.H * p.W), o.copies_w = moved(channels, p.R * p.S), o.copies_y = moved(p.K, p.P * p.Q);
  if (p.x_elements() == 0 || p.w_elements() == 0 || p.y_elements() == 0) return o;

  // The products that an element takes part in, by the results of a tile.
  const double taps = double(p.R * p.S), windows = taps * double(p.P * p.Q) / double(p.H * p.W);
  if (dgrad) {
    const double tiles = double(pieces(channels, large.n));
    o.y_filters = o.w_filters =
        padded(filters, bytes, taps / double(p.stride_h * p.stride_w) * double(p.H * p.W) / double(p.P * p.Q) * tiles,
               o.copies_y);
    o.w_channels = padded(channels, bytes, double(pieces(p.N * p.H * p.W, large.m)), o.copies_w);
  } else {
    o.x_channels = o.w_channels = padded(channels, bytes, windows * double(pieces(filters, large.n)), o.copies_x);
    if (!fprop) o.y_filters = padded(filters, bytes, double(pieces(o.w_channels * p.R * p.S, large.n)), o.copies_y);
  }
  o.copies_x = o.copies_x || o.x_channels != channels;
  o.copies_w = o.copies_w || o.w_channels != channels || o.w_filters != filters;
  o.copies_y = o.copies_y || o.y_filters != filters;
  return o;
}

MmaProduct mma_product(const Conv2dProblem& p, Direction direction) {
  const MmaOperands o = mma_operands(p, direction);
  const int64_t rows = std::clamp<int64_t>(p.H, 1, p.stride_h), columns = std::clamp<int64_t>(p.W, 1, p.stride_w);
  switch (direction) {
    case Direction::fprop: return {p.N * p.P * p.Q, p.filters_per_group(), o.x_channels * p.R * p.S, p.groups, 1};
    case Direction::dgrad:
      return {p.N * pieces(p.H, rows) * pieces(p.W, columns), p.channels_per_group(),
              o.y_filters * pieces(p.R, p.stride_h / std::gcd(p.stride_h, p.dilation_h)) *
                  pieces(p.S, p.stride_w / std::gcd(p.stride_w, p.dilation_w)),
              p.groups, rows * columns};
    default: return {p.filters_per_group(), o.x_channels * p.R * p.S, p.N * p.P * p.Q, p.groups, 1};
  }
}

MmaWorkspace mma_workspace(const Conv2dProblem& p, Direction direction, int split) {
  const MmaProduct g = mma_product(p, direction);
  const MmaOperands o = mma_operands(p, direction);
  const bool partial = split > 1;
  const int64_t bytes = element_bytes(p.dtype), sum_bytes = accumulator_bytes(p.dtype);
  const auto copy = [&](bool copies, int64_t elements) { return copies ? round_up(elements * bytes, 256) : 0; };
  MmaWorkspace at = {};
  at.row_sums = partial ? round_up(sum_bytes * split * g.groups * g.m * round_up(g.n, 4), 256) : 0;
  at.x = at.row_sums + (partial && direction == Direction::wgrad ? round_up(sum_bytes * split * p.K, 256) : 0);
  at.w = at.x + copy(o.copies_x, p.N * p.H * p.W * p.groups * o.x_channels);
  at.y = at.w + copy(o.copies_w, p.groups * o.w_filters * p.R * p.S * o.w_channels);
  at.end = at.y + copy(o.copies_y, p.N * p.P * p.Q * p.groups * o.y_filters);
  return at;
}

double mma_time_us(const Conv2dProblem& p, Direction direction, const MmaTile& tile, int split, int num_sms) {
  const MmaProduct g = mma_product(p, direction);
  const MmaOperands o = mma_operands(p, direction);
  const int64_t bytes = element_bytes(p.dtype), depth = step_bytes / bytes;
  const int64_t blocks = pieces(g.m, tile.m) * pieces(g.n, tile.n) * g.groups * g.phases * split;
  const int64_t on_one_sm = pieces(blocks, std::max(num_sms, 1));
  const int64_t steps = pieces(pieces(g.k, split), depth) + 2;

  // The operand that is looked up in windows is loaded in pieces of its channels, the other one in whole chunks.
  const bool dgrad = direction == Direction::dgrad, wgrad = direction == Direction::wgrad;
  const int64_t piece = piece_bytes(dgrad ? o.y_filters : o.x_channels, bytes);
  const double windows = double(wgrad ? tile.n : tile.m) * 16.0 / double(piece) * (piece < 4 ? 4 : 1);
  const double loaded = (windows + double(wgrad ? tile.m : tile.n)) * step_bytes;
  const double multiply_us = double(tile.m * tile.n * depth) / (rate(p) * tile.reach);
  const double load_us = loaded * sms / l2_bytes_per_us;
  const double products_us =
      double(steps) * std::max(double(std::max(on_one_sm, tile.to_fill)) * multiply_us, double(on_one_sm) * load_us);

  const MmaWorkspace at = mma_workspace(p, direction, split);
  const int64_t copies = at.end - at.x, tensors = (p.x_elements() + p.w_elements() + p.y_elements()) * bytes;
  const double memory_us = double(tensors) / copy_bytes_per_us;
  const double passes_us = double(2 * (copies + at.x)) / copy_bytes_per_us;  // copies and sums, written and read
  const int launches = 1 + o.copies_x + o.copies_w + o.copies_y + (split > 1) + (split > 1 && wgrad);
  return std::max(products_us, memory_us) + passes_us + launches * launch_us;
}

void plan_mma(const Conv2dProblem& p, const Target& target, Conv2dPlan* plan, Reasons* reasons) {
  constexpr int splits[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128};
  const MmaProduct g = mma_product(p, plan->direction);
  const MmaOperands o = mma_operands(p, plan->direction);
  struct Candidate {
    const MmaTile* tile;
    int split;
    double us;
  };
  std::vector<Candidate> candidates;
  for (const MmaTile* tile : tiles_of(p, plan->direction).at) {
    if (!tile) break;
    Candidate best = {tile, 1, std::numeric_limits<double>::infinity()};
    for (int split : splits) {
      const int64_t sums = split * g.groups * g.m * round_up(g.n, 4) * accumulator_bytes(p.dtype);
      // The partial sums of several phases would lie in a strided order that ordered_sum.cuh does not know.
      if (split > 1 && (g.phases > 1 || pieces(g.k, split) < 256 || sums > most_sums_bytes)) break;
      const double us = mma_time_us(p, plan->direction, *tile, split, target.num_sms);
      if (us < 0.95 * best.us) best.split = split, best.us = us;  // a little more speed is not worth more splits
    }
    candidates.push_back(best);
  }
  Candidate best = candidates.front();
  for (const Candidate& candidate : candidates)
    if (candidate.us < best.us) best = candidate;

  plan->tile_m = best.tile->m, plan->tile_n = best.tile->n;
  plan->tile_k = int(step_bytes / element_bytes(p.dtype));
  plan->split = best.split;
  plan->workspace_bytes = mma_workspace(p, plan->direction, best.split).end;
  plan->kernel = "conv2d_mma_kernel";
  plan->predicted_us = best.us;
  if (!reasons) return;
  const auto say = [&](const std::string& text) { reasons->push_back({Algo::mma, false, text}); };
  for (const Candidate& other : candidates)
    if (other.tile != best.tile)
      say(tile_text(*other.tile, other.split) + ": the model's time is " + time_text(other.us) + ", that of " +
          tile_text(*best.tile, best.split) + " " + time_text(best.us));
  const auto padding = [&](const char* what, int64_t from, int64_t to) {
    if (from != to)
      say("loads of " + std::to_string(piece_bytes(from, element_bytes(p.dtype))) + " bytes: " + what + " " +
          std::to_string(from) + " a group, " + std::to_string(to) + " in a copy, take " +
          std::to_string(piece_bytes(to, element_bytes(p.dtype))));
  };
  padding("channels", p.channels_per_group(), std::max(o.x_channels, o.w_channels));
  padding("filters", p.filters_per_group(), o.y_filters);
}

}  // namespace fastconv::cuda
