// The matrices of F(4×4, 3×3), Winograd's minimal filtering: in one dimension, four outputs of three taps by six
// products instead of twelve,
//
//   y = Aᵀ [(G g) ⊙ (Bᵀ d)]        y[p] = Σ_q g[q] · d[p + q]      p = 0 … 3, q = 0 … 2, d has 6 elements
//
// and in two dimensions each matrix is applied to columns, then to rows. They are Toom and Cook's, transposed
// (Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, 2016): G evaluates the polynomial Σ g[q] z^q at five points α and at ∞, Aᵀ holds the powers of the points,
// and Bᵀ has the coefficients of M(z) / (z − α), where M(z) = Π (z − α), and those of M itself for ∞. G is divided by
// the products of differences M'(α).
//
// Their error grows with the sizes of these numbers, and so with the points (Barabasz and others, Error Analysis and
// Improving the Accuracy of Winograd Convolution, 2020). 0, ±3/4, ±3/2 lose less than a bit against the sum itself; the
// usual 0, ±1, ±2 lose almost three. All of A and B is exact in binary.
//
// F(3×3, 4×4), for the gradient of the filters, has the same points and hence the same B.
#pragma once

#include "isa.h"

namespace fastconv::cpu {
namespace {

constexpr double a1 = 0.75, a2 = a1 * a1, a3 = a2 * a1;
constexpr double b1 = 1.5, b2 = b1 * b1, b3 = b2 * b1;
// M(z) = z (z² − a²) (z² − b²), and 1/M' at 0, ±a, ±b
constexpr double at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

// Bᵀ: 6 elements of x at the points 0, a, −a, b, −b, ∞
struct InputMatrix {
  static constexpr int in = 6, out = 6;
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* d, V* out) {
    const V even_a = d[4] - E(b2) * d[2], odd_a = d[3] - E(b2) * d[1];
    const V even_b = d[4] - E(a2) * d[2], odd_b = d[3] - E(a2) * d[1];
    out[0] = E(a2 * b2) * d[0] + (d[4] - E(a2 + b2) * d[2]);
    out[1] = even_a + E(a1) * odd_a;
    out[2] = even_a - E(a1) * odd_a;
    out[3] = even_b + E(b1) * odd_b;
    out[4] = even_b - E(b1) * odd_b;
    out[5] = E(a2 * b2) * d[1] + (d[5] - E(a2 + b2) * d[3]);
  }
};

// Aᵀ: four outputs
struct OutputMatrix {
  static constexpr int in = 6, out = 4;
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* m, V* out) {
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    out[0] = m[0] + sum_a + sum_b;
    out[1] = E(a1) * difference_a + E(b1) * difference_b;
    out[2] = E(a2) * sum_a + E(b2) * sum_b;
    out[3] = m[5] + E(a3) * difference_a + E(b3) * difference_b;
  }
};

// G: a filter's three taps at the points
struct FilterMatrix {
  static constexpr int in = 3, out = 6;
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* g, V* out) {
    const V even_a = E(at_a) * (g[0] + E(a2) * g[2]), odd_a = E(at_a * a1) * g[1];
    const V even_b = E(at_b) * (g[0] + E(b2) * g[2]), odd_b = E(at_b * b1) * g[1];
    out[0] = E(at_0) * g[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = g[2];
  }
};

// F(3×3, 4×4): G for four elements of dy,
struct GradientMatrix {
  static constexpr int in = 4, out = 6;
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* g, V* out) {
    const V even_a = E(at_a) * (g[0] + E(a2) * g[2]), odd_a = E(at_a * a1) * (g[1] + E(a2) * g[3]);
    const V even_b = E(at_b) * (g[0] + E(b2) * g[2]), odd_b = E(at_b * b1) * (g[1] + E(b2) * g[3]);
    out[0] = E(at_0) * g[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = g[3];
  }
};

// and Aᵀ for three outputs, the taps of dw.
struct TapsMatrix {
  static constexpr int in = 6, out = 3;
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* m, V* out) {
    out[0] = m[0] + (m[1] + m[2]) + (m[3] + m[4]);
    out[1] = E(a1) * (m[1] - m[2]) + E(b1) * (m[3] - m[4]);
    out[2] = m[5] + E(a2) * (m[1] + m[2]) + E(b2) * (m[3] + m[4]);
  }
};

// put(i, j, Σ M[i][k] · get(k, l) · M[j][l]), lane by lane
template <typename E, typename Matrix, typename Get, typename Put>
FASTCONV_INLINE void transform(const Get& get, const Put& put) {
  vec_t<E> columns[Matrix::out][Matrix::in];
#pragma GCC unroll 6
  for (int l = 0; l < Matrix::in; ++l) {
    vec_t<E> from[Matrix::in], to[Matrix::out];
#pragma GCC unroll 6
    for (int k = 0; k < Matrix::in; ++k) from[k] = get(k, l);
    Matrix::template apply<E>(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < Matrix::out; ++i) columns[i][l] = to[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < Matrix::out; ++i) {
    vec_t<E> to[Matrix::out];
    Matrix::template apply<E>(columns[i], to);
#pragma GCC unroll 6
    for (int j = 0; j < Matrix::out; ++j) put(i, j, to[j]);
  }
}

}  // namespace
}  // namespace fastconv::cpu
