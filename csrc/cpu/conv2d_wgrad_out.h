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

// dw and db from the pieces, added in order.
template <typename T>
void add_pieces(const WgradOut<T>& out, int64_t pieces, const Parallel& parallel) {
  constexpr int64_t chunk = 4096;
  const int64_t total = out.w_elements + out.K;
  for_each_task(parallel, ceil_div(total, chunk), [&](int, int64_t task) {
    for (int64_t i = task * chunk; i < min_of(total, (task + 1) * chunk); ++i) {
      acc_t<T> sum = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) sum += out.partial[piece * total + i];
      if (i < out.w_elements)
        out.dw[i] = from_acc<T>(sum);
      else if (out.db)
        out.db[i - out.w_elements] = from_acc<T>(sum);
    }
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
