// Where the im2col convolutions put the gradient of the weights, and how its pieces are added.
#pragma once

#include "isa.h"

namespace fastconv::cpu {
namespace {

// A task's sums go to dw and db, or to its piece's partial ones if the contraction is split.
template <typename T>
struct WgradOut {
  T *dw, *db;
  acc_t<T>* partial;  // [piece][w_elements + K], or null

  // index: into dw, or behind it into db
  FASTCONV_INLINE void put(const Conv2dProblem& pr, int64_t piece, int64_t index, acc_t<T> value) const {
    if (partial) partial[piece * (pr.w_elements() + pr.K) + index] = value;
    else if (index < pr.w_elements()) dw[index] = from_acc<T>(value);
    else if (db) db[index - pr.w_elements()] = from_acc<T>(value);
  }
};

// dw and db from the pieces, added in order.
template <typename T>
void add_pieces(const Conv2dProblem& pr, const Conv2dPlan& plan, const WgradOut<T>& out, const Parallel& parallel) {
  constexpr int64_t chunk = 4096;
  const int64_t total = pr.w_elements() + pr.K;
  const WgradOut<T> whole{out.dw, out.db, nullptr};
  for_each_task(parallel, ceil_div(total, chunk), [&](int, int64_t task) {
    for (int64_t i = task * chunk; i < min_of(total, (task + 1) * chunk); ++i) {
      acc_t<T> sum = 0;
      for (int64_t piece = 0; piece < plan.split; ++piece) sum += out.partial[piece * total + i];
      whole.put(pr, 0, i, sum);
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
