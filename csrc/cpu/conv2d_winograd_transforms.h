// The matrices of Winograd's minimal filtering F(m×m, r×r) with tiles of m + r − 1 = 6: F(4×4, 3×3) and F(2×2, 5×5). In
// one dimension m outputs of r taps take six products instead of m·r,
//
//   y = Aᵀ [(G g) ⊙ (Bᵀ d)]        y[p] = Σ_q g[q] · d[p + q]      p < m, q < r, d has 6 elements
//
// and in two dimensions each matrix is applied to columns, then to rows. They are Toom and Cook's, transposed
// (Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, 2016): G evaluates the polynomial Σ g[q] z^q at five points α and at ∞, Aᵀ holds the powers of the points,
// and Bᵀ has the coefficients of M(z) / (z − α), where M(z) = Π (z − α), and those of M itself for ∞. G is divided by
// the products of differences M'(α). B depends on the points alone.
//
// Their error grows with the sizes of these numbers, and so with the points (Barabasz and others, Error Analysis and
// Improving the Accuracy of Winograd Convolution, 2020). 0, ±11/16, ±23/16 lose little against the sum itself; the
// usual 0, ±1, ±2 lose two bits more. All of A and B is exact in binary.
//
// The gradient of the filters is F(3×3, 4×4), where dy takes the filters' part.
//
// A tile with fewer outputs takes the first of these points and ∞. Its filters are those of all points, whose 1/M' is
// not its own: Bᵀ makes up for that, row by row, by the product of α − β over the points β that it leaves out.
#pragma once

#include "isa.h"

namespace fastconv::cpu {
namespace {

constexpr double a1 = 11 / 16., a2 = a1 * a1, a3 = a2 * a1;
constexpr double b1 = 23 / 16., b2 = b1 * b1, b3 = b2 * b1;
// M(z) = z (z² − a²) (z² − b²), and 1/M' at 0, ±a, ±b
constexpr double at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

// One of the matrices for a tile of fewer points: the rows are those of its points in B and G, of its outputs in A.
template <typename E>
struct PartialMatrix {
  int in, out;
  E at[6][6];
};
constexpr double point_values[] = {0, a1, -a1, b1, -b1}, point_scales[] = {at_0, at_a, at_a, at_b, at_b};

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

  template <typename E>
  static PartialMatrix<E> partial(int points) {
    PartialMatrix<E> m{points, points, {}};
    for (int i = 0; i < points; ++i) {
      double row[6] = {1};  // coefficients, the lowest first
      for (int j = 0; j < 5; ++j) {
        const double z = point_values[j];
        if (j >= points - 1) {
          for (double& c : row) c *= i < points - 1 ? point_values[i] - z : 1;
        } else if (j != i) {
          for (int k = 5; k > 0; --k) row[k] = row[k - 1] - z * row[k];
          row[0] *= -z;
        }
      }
      for (int k = 0; k < points; ++k) m.at[i][k] = E(row[k]);
    }
    return m;
  }
};

// Aᵀ: 2, 3 or 4 outputs
template <int Outputs>
struct OutputMatrix {
  static constexpr int in = 6, out = Outputs;
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* m, V* out) {
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    constexpr double a[] = {1, a1, a2, a3}, b[] = {1, b1, b2, b3};
    out[0] = m[0] + sum_a + sum_b;
#pragma GCC unroll 6
    for (int i = 1; i < Outputs; ++i) {
      const V& of_a = i % 2 ? difference_a : sum_a;
      const V& of_b = i % 2 ? difference_b : sum_b;
      out[i] = i == Outputs - 1 ? m[5] + E(a[i]) * of_a + E(b[i]) * of_b : E(a[i]) * of_a + E(b[i]) * of_b;
    }
  }

  template <typename E>
  static PartialMatrix<E> partial(int points) {
    PartialMatrix<E> m{points, points - (6 - Outputs), {}};
    for (int j = 0; j < points - 1; ++j) {
      double power = 1;
      for (int i = 0; i < m.out; ++i, power *= point_values[j]) m.at[i][j] = E(power);
    }
    m.at[m.out - 1][points - 1] = 1;
    return m;
  }
};

// G: 3, 4 or 5 taps at the points
template <int Taps>
struct FilterMatrix {
  static constexpr int in = Taps, out = 6;
  // Σ g[q] z^q over the even q, and over the odd ones
  template <typename E, typename V>
  static FASTCONV_INLINE V even(const V* g, double z2) {
    if constexpr (Taps > 4) return g[0] + E(z2) * g[2] + E(z2 * z2) * g[4];
    return g[0] + E(z2) * g[2];
  }
  template <typename E, typename V>
  static FASTCONV_INLINE V odd(const V* g, double z2) {
    if constexpr (Taps > 3) return g[1] + E(z2) * g[3];
    return g[1];
  }
  template <typename E, typename V>
  static FASTCONV_INLINE void apply(const V* g, V* out) {
    const V even_a = E(at_a) * even<E>(g, a2), odd_a = E(at_a * a1) * odd<E>(g, a2);
    const V even_b = E(at_b) * even<E>(g, b2), odd_b = E(at_b * b1) * odd<E>(g, b2);
    out[0] = E(at_0) * g[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = g[Taps - 1];
  }

  template <typename E>
  static PartialMatrix<E> partial(int points) {
    PartialMatrix<E> m{points - (6 - Taps), points, {}};
    for (int i = 0; i < points - 1; ++i) {
      double power = point_scales[i];
      for (int k = 0; k < m.in; ++k, power *= point_values[i]) m.at[i][k] = E(power);
    }
    m.at[points - 1][m.in - 1] = 1;
    return m;
  }
};

// A matrix for all points, and for those of an image's last row and column of tiles.
template <typename E>
struct PartialMatrices {
  PartialMatrix<E> whole, row, col;
};
template <typename E, typename Matrix>
PartialMatrices<E> partial_matrices(int64_t row_points, int64_t col_points) {
  return {Matrix::template partial<E>(6), Matrix::template partial<E>(int(row_points)),
          Matrix::template partial<E>(int(col_points))};
}

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

// The same by two partial matrices: put(i, j, Σ rows[i][k] · get(k, l) · cols[j][l]).
template <typename E, typename Get, typename Put>
void transform_partial(const PartialMatrix<E>& rows, const PartialMatrix<E>& cols, const Get& get, const Put& put) {
  vec_t<E> columns[6][6];
  for (int l = 0; l < cols.in; ++l)
    for (int i = 0; i < rows.out; ++i) {
      vec_t<E> sum{};
      for (int k = 0; k < rows.in; ++k) sum += rows.at[i][k] * get(k, l);
      columns[i][l] = sum;
    }
  for (int i = 0; i < rows.out; ++i)
    for (int j = 0; j < cols.out; ++j) {
      vec_t<E> sum{};
      for (int l = 0; l < cols.in; ++l) sum += cols.at[j][l] * columns[i][l];
      put(i, j, sum);
    }
}

}  // namespace
}  // namespace fastconv::cpu
