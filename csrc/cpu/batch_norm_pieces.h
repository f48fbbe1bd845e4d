// BatchNorm: what a task takes of x.
#pragma once

#include <type_traits>

#include "batch_norm_nchw.h"
#include "batch_norm_nhwc.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t max_group = 64;           // NCHW: channels of a task
constexpr int64_t short_plane = 1024;       // NCHW: a plane of fewer values is asked of memory with its neighbours
constexpr int64_t finish_channels = 64;     // of a task that merges pieces
constexpr int64_t eval_elements = 1 << 18;  // of a task in evaluation, where each task derives its coefficients

bool is_nhwc(const BatchNormProblem& p) { return p.L == 1 || (p.layout == Layout::NHWC && p.C > 1); }

// Whether the last of a call's tensors is written past the caches: if they do not fit into them together, and rows are
// whole lines.
bool goes_past_caches(const BatchNormProblem& p, int tensors) {
  const int64_t bytes = element_bytes(p.dtype), row = is_nhwc(p) ? p.C : p.L;
  return row * bytes % 64 == 0 && tensors * p.x_elements() * bytes > cache_bytes;
}

// Piece s of `count` things: [begin, end).
struct Piece {
  int64_t begin, end;
};
FASTCONV_INLINE Piece piece_of(int64_t count, int64_t split, int64_t s) {
  return {count / split * s + min_of(s, count % split), count / split * (s + 1) + min_of(s + 1, count % split)};
}

// The workspace of a split: two sums of every piece, then three coefficients a channel.
template <typename S>
struct Workspace {
  double* sums;
  int64_t C;
  S* coefficients;
  Workspace(void* memory, const BatchNormProblem& p, const BatchNormPlan& plan)
      : sums(static_cast<double*>(memory)), C(p.C), coefficients(reinterpret_cast<S*>(sums + 2 * plan.split * p.C)) {}
  double* first(int64_t s) const { return sums + 2 * s * C; }
  double* second(int64_t s) const { return sums + (2 * s + 1) * C; }
  S* coefficient(int i) const { return coefficients + i * C; }
};

// Channels of a task in NCHW. Small planes are applied together with their neighbours in memory.
int64_t group_channels(const BatchNormProblem& p) {
  return max_of<int64_t>(min_of(min_of<int64_t>(max_group, 2048 / p.L), p.C / 32), 1);
}

// The pieces that a split cuts each channel into: of the rows in NHWC, where a task has many channels, and of the
// chunks in NCHW, where it has one.
struct Pieces {
  bool nhwc;
  int64_t C, rows, split;
  Chunks chunks;
  Pieces(const BatchNormProblem& p, const BatchNormPlan& plan)
      : nhwc(is_nhwc(p)), C(p.C), rows(p.count()), split(plan.split), chunks(chunks_of(p)) {}
  Piece operator[](int64_t s) const { return piece_of(nhwc ? rows : chunks.count, split, s); }
  int64_t count(int64_t s) const {
    const Piece piece = (*this)[s];
    if (nhwc) return piece.end - piece.begin;
    int64_t count = 0;
    for (int64_t i = piece.begin; i < piece.end; ++i) count += chunks[i].count();
    return count;
  }
};

// Runs rows(s, begin, end, first, n) for n channels in NHWC, chunks(s, begin, end, c) for one in NCHW, for every piece,
// in the order of for_each_task<backwards>.
template <bool backwards, typename Rows, typename OneChannel>
void for_each_piece(const Pieces& pieces, const Parallel& parallel, const Rows& rows, const OneChannel& chunks) {
  const int64_t width = pieces.nhwc ? wide_channels : 1, ranges = ceil_div(pieces.C, width);
  const int64_t tasks = pieces.split * ranges;
  for_each_task<backwards>(parallel, tasks, [&](int, int64_t task) {
    const int64_t s = task / ranges, first = task % ranges * width;
    const Piece piece = pieces[s];
    if (pieces.nhwc)
      rows(s, piece.begin, piece.end, first, min_of(width, pieces.C - first));
    else
      chunks(s, piece.begin, piece.end, first);
  });
}

// In NCHW calls f(c, begin, chunk), the chunk in the plane that begins there: a whole plane, or a part of a long one.
template <typename F>
void for_each_unit(const BatchNormProblem& p, const Parallel& parallel, const F& f) {
  const int64_t a_plane = ceil_div(p.L, chunk_elements), units = p.N * p.C * a_plane;
  const int64_t units_per_task = ceil_div(eval_elements, min_of(p.L, chunk_elements));
  for_each_task(parallel, ceil_div(units, units_per_task), [&](int, int64_t task) {
    for (int64_t i = task * units_per_task; i < min_of((task + 1) * units_per_task, units); ++i) {
      const int64_t plane = i / a_plane, begin = i % a_plane * chunk_elements;
      f(plane % p.C, plane * p.L, Chunk{0, 1, begin, min_of(begin + chunk_elements, p.L)});
    }
  });
}

// In NHWC calls f(first, n, row, rows) for some rows of n channels.
template <typename F>
void for_each_rows(const BatchNormProblem& p, const Parallel& parallel, const F& f) {
  const int64_t C = p.C, blocks = ceil_div(C, wide_channels);
  const int64_t rows_per_task = ceil_div(eval_elements, min_of(C, wide_channels));
  for_each_task(parallel, ceil_div(p.count(), rows_per_task) * blocks, [&](int, int64_t task) {
    const int64_t first = task % blocks * wide_channels, n = min_of(wide_channels, C - first);
    const int64_t row = task / blocks * rows_per_task, rows = min_of(rows_per_task, p.count() - row);
    f(first, n, row, rows);
  });
}

template <typename T>
const acc_t<T>* in(const void* values) {
  return static_cast<const acc_t<T>*>(values);
}
template <typename T>
acc_t<T>* out(void* values) {
  return static_cast<acc_t<T>*>(values);
}

// What follows x̂·weight + bias, where `other` is the residual in forward, y in backward, or null.
Act act_of(const BatchNormProblem& p, const void* other) {
  return !p.relu ? Act::none : other ? Act::add_relu : Act::relu;
}
// Calls f with that as a constant.
template <typename F>
FASTCONV_INLINE void dispatch_act(Act act, const F& f) {
  switch (act) {
    case Act::none: return f(std::integral_constant<Act, Act::none>());
    case Act::relu: return f(std::integral_constant<Act, Act::relu>());
    case Act::add_relu: return f(std::integral_constant<Act, Act::add_relu>());
  }
}

}  // namespace
}  // namespace fastconv::cpu
