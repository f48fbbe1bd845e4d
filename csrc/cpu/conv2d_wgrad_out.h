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
  int64_t w_elements, K;

  // Calls write(dw, db or null) with the pointers that the piece's sums belong to.
  template <typename Write>
  FASTCONV_INLINE void with_piece(int64_t piece, const Write& write) const {
    acc_t<T>* sums = partial + piece * (w_elements + K);
    if (partial)
      write(sums, sums + w_elements);
    else
      write(dw, db);
  }
};

// to[i] = Σ over pieces, in order, of their partial sums from `first` on
template <typename T>
void add_partial_sums(const WgradOut<T>& out, int64_t pieces, int64_t first, int64_t count, T* to) {
  const int64_t total = out.w_elements + out.K;
  const auto* from = out.partial + first;
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) {
    vec_t<T> sum = load(from + i);
    for (int64_t piece = 1; piece < pieces; ++piece) sum += load(from + piece * total + i);
    store(to + i, sum);
  }
  for (; i < count; ++i) {
    acc_t<T> sum = from[i];
    for (int64_t piece = 1; piece < pieces; ++piece) sum += from[piece * total + i];
    to[i] = from_acc<T>(sum);
  }
}

// dw and db from the pieces, added in order.
template <typename T>
void add_pieces(const WgradOut<T>& out, int64_t pieces, const Parallel& parallel) {
  constexpr int64_t chunk = 4096;
  const int64_t dw_chunks = ceil_div(out.w_elements, chunk);
  for_each_task(parallel, dw_chunks + (out.db ? ceil_div(out.K, chunk) : 0), [&](int, int64_t task) {
    const bool is_dw = task < dw_chunks;
    const int64_t i0 = (is_dw ? task : task - dw_chunks) * chunk;
    const int64_t count = min_of(chunk, (is_dw ? out.w_elements : out.K) - i0);
    add_partial_sums(out, pieces, (is_dw ? 0 : out.w_elements) + i0, count, (is_dw ? out.dw : out.db) + i0);
  });
}

// out[i] = values[i]
template <typename E, typename Out>
FASTCONV_INLINE void convert_row(const E* values, int64_t count, Out* out) {
  int64_t i = 0;
  for (; i + lanes<E> <= count; i += lanes<E>) store(out + i, load(values + i));
  if (i < count) store_first(out + i, load_first(values + i, count - i), count - i);
}

}  // namespace
}  // namespace fastconv::cpu
