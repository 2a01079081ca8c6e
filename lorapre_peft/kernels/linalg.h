// This file holds the linear algebra of the factors: k×k Gram matrices and damped inverses in float64, and products of
// factors with k×k matrices. All matrices are row-major.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "blocks.h"

namespace {

// This is rules.MIN_FACTOR_NORM.
constexpr double MIN_FACTOR_NORM = 1e-12;
// If a float32 sum of CHUNK squares is above this, underflow has lost less than 1e-10 of it.
constexpr float LEAST_TRACE = 1e-25f;

// Returns Σ x² over the entries [begin, end), in float64.
inline double sum_of_squares(const void* x, Type type, int64_t begin, int64_t end) {
  constexpr int SUMS = 4;
  DoubleVec total[SUMS] = {};
  float part[CHUNK];
  for (int64_t i = begin; i < end; i += CHUNK) {
    const int count = int(std::min<int64_t>(CHUNK, end - i));
    const float* from = static_cast<const float*>(x) + i;
    if (type != FLOAT32 || count < CHUNK) {
      read(x, type, i, count, part);
      std::fill(part + count, part + CHUNK, 0.f);
      from = part;
    }
    for (int c = 0; c < CHUNK; c += SUMS * LANES / 2)
      UNROLLED for (int j = 0; j < SUMS; ++j) {
        const DoubleVec value = widened(from + c + j * LANES / 2);
        total[j] += value * value;
      }
  }
  double sum = 0;
  for (int j = 0; j < SUMS; ++j) sum += sum_of(total[j]);
  return sum;
}

inline double trace(const double* gram, int k, int64_t stride) {
  double sum = 0;
  for (int j = 0; j < k; ++j) sum += gram[j * stride + j];
  return sum;
}

// Writes L⁻¹ [k, k] into ``L``, with L the lower Cholesky factor of gram + ridge·I. If there is none, L is that of the
// diagonal alone. Rows of gram have ``stride`` numbers, and only its lower triangle is read.
void inverse_root(const double* gram, int k, int64_t stride, double ridge, double* L) {
  // Float64 round-off in a Gram matrix is relative to its trace. A smaller ridge would not keep the matrix positive.
  ridge = std::max(ridge, 1e-15 * trace(gram, k, stride) + std::numeric_limits<double>::min());
  std::fill_n(L, k * k, 0.0);
  bool positive = true;
  for (int i = 0; i < k && positive; ++i)
    for (int j = 0; j <= i; ++j) {
      double sum = gram[i * stride + j] + (i == j ? ridge : 0);
      for (int l = 0; l < j; ++l) sum -= L[i * k + l] * L[j * k + l];
      if (i == j) positive = sum > 0;
      L[i * k + j] = i == j ? std::sqrt(sum) : sum / L[j * k + j];
    }
  if (!positive) {
    std::fill_n(L, k * k, 0.0);
    for (int j = 0; j < k; ++j) L[j * k + j] = 1 / std::sqrt(gram[j * stride + j] + ridge);
    return;
  }
  for (int j = 0; j < k; ++j) {
    L[j * k + j] = 1 / L[j * k + j];
    for (int i = j + 1; i < k; ++i) {
      double sum = 0;
      for (int l = j; l < i; ++l) sum -= L[i * k + l] * L[l * k + j];
      L[i * k + j] = sum / L[i * k + i];
    }
  }
}

// Writes the inverse (gram + ridge·I)⁻¹ = L⁻ᵀ L⁻¹, [k, k]. work: a buffer, which is resized.
void damped_inverse(const double* gram, int k, int64_t stride, double ridge, double* inverse,
                    std::vector<double>& work) {
  work.resize(size_t(k) * k);
  double* L = work.data();
  inverse_root(gram, k, stride, ridge, L);
  std::fill_n(inverse, k * k, 0.0);
  for (int l = 0; l < k; ++l)  // Each row of L⁻¹ adds its outer product with itself.
    for (int i = 0; i <= l; ++i) {
      const double weight = L[l * k + i];
      for (int j = 0; j <= l; ++j) inverse[i * k + j] += weight * L[l * k + j];
    }
}

// Writes gram = A Aᵀ, [k, k] float64. A: [k, q]. part: a buffer, which is resized.
void gram_of(const float* A, int64_t k, int64_t q, double* gram, std::vector<double>& part) {
  std::fill_n(gram, k * k, 0.0);
  switch (k) {
    case 1: add_small_gram<1>(A, q, gram); break;
    case 2: add_small_gram<2>(A, q, gram); break;
    case 4: add_small_gram<4>(A, q, gram); break;
    default:
      const int64_t stride = std::min<int64_t>(CHUNK, padded(q));
      part.resize(k * stride);
      for (int64_t c0 = 0; c0 < q; c0 += stride) {
        read_rows(A, k, q, c0, stride, part.data());
        add_gram(part.data(), k, stride, gram);
      }
  }
  mirror(gram, k);
}

// Replaces A by W [A; P], with products in float64. `newton` needs these: its damping is absolute, so that its inverse
// may have entries that would turn the round-off of float32 products into momentum. The arguments are those of
// `columns_of`. made: a buffer, which is resized.
inline void wide_columns(const double* W, float* A, const float* P, int64_t p_stride, int64_t k, int64_t q,
                         std::vector<double>& made) {
  for (int64_t c0 = 0; c0 < q; c0 += CHUNK) {
    const int64_t here = std::min<int64_t>(CHUNK, q - c0);
    made.assign(k * CHUNK, 0.0);
    for (int64_t r = 0; r < k; ++r)
      for (int64_t j = 0; j < k; ++j) {
        const double of_A = W[r * 2 * k + j], of_P = W[r * 2 * k + k + j];
        const float *a = A + j * q + c0, *p = P + j * p_stride + c0;
        double* out = made.data() + r * CHUNK;
        for (int64_t c = 0; c < here; ++c) out[c] += of_A * a[c] + of_P * p[c];
      }
    for (int64_t r = 0; r < k; ++r) std::copy_n(made.data() + r * CHUNK, here, A + r * q + c0);
  }
}

// Writes A' = W [A; P] to out, and gram = A' A'ᵀ. W: [k, 2k]. A and out: [k, q], which may be the same. P: [k, q] in
// rows of ``p_stride`` numbers. W and all products are float32, since P is no more exact. A' A'ᵀ is summed in float32
// over up to CHUNK columns and in float64 beyond. part: a buffer, which is resized.
void columns_of(const double* W, const float* A, const float* P, int64_t p_stride, int64_t k, int64_t q, float* out,
                double* gram, std::vector<float>& part) {
  const int64_t rows = (k + ROWS - 1) / ROWS * ROWS, stride = std::min<int64_t>(CHUNK, padded(q)) + LANES;
  part.assign(rows * (3 * stride + 3 * k), 0.f);
  float *of_A = part.data(), *of_P = of_A + rows * k, *products = of_P + rows * k, *tail = products + rows * k,
        *made = tail + 2 * rows * stride;
  // Where B' is zero, entries of W may exceed float32's range. They multiply zeros.
  constexpr double most = std::numeric_limits<float>::max();
  for (int64_t r = 0; r < k; ++r)
    for (int64_t j = 0; j < k; ++j) {
      of_A[r * k + j] = float(std::clamp(W[r * 2 * k + j], -most, most));
      of_P[r * k + j] = float(std::clamp(W[r * 2 * k + k + j], -most, most));
    }
  std::fill_n(gram, k * k, 0.0);
  for (int64_t c0 = 0; c0 < q; c0 += CHUNK) {
    const int here = int(std::min<int64_t>(CHUNK, q - c0)), columns = int(padded(here));
    const float *a = A + c0, *p = P + c0;
    int64_t a_stride = q, of_stride = p_stride;
    if (here < columns) {
      for (int64_t j = 0; j < k; ++j) {
        std::copy_n(a + j * q, here, tail + j * stride);
        std::copy_n(p + j * p_stride, here, tail + (rows + j) * stride);
      }
      a = tail, p = tail + rows * stride, a_stride = of_stride = stride;
    }
    for (int64_t r0 = 0; r0 < k; r0 += ROWS) {
      outer(of_A + r0 * k, int(k), a, a_stride, columns, made + r0 * stride, stride);
      outer<true>(of_P + r0 * k, int(k), p, of_stride, columns, made + r0 * stride, stride);
    }
    for (int64_t j = 0; j < k; ++j) std::copy_n(made + j * stride, here, out + j * q + c0);
    std::fill_n(products, rows * k, 0.f);
    for (int64_t r0 = 0; r0 < k; r0 += ROWS)
      BY_RANKS(std::min<int64_t>(k, r0 + ROWS),  // The lower triangle is enough.
               (dot_tile<ROWS, J, false>(made + r0 * stride, stride, made + j0 * stride, stride, columns,
                                         products + r0 * k + j0, int(k))))
    float trace = 0;
    for (int64_t j = 0; j < k; ++j) trace += products[j * k + j];
    if (trace > LEAST_TRACE && trace < 1 / LEAST_TRACE) {
      for (int64_t i = 0; i < k * k; ++i) gram[i] += products[i];
    } else {  // Squares are near the ends of float32's range, or all of them are zero.
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
          for (int c = 0; c < here; ++c) gram[i * k + j] += double(made[i * stride + c]) * made[j * stride + c];
    }
  }
  mirror(gram, k);
}

// Replaces B by B Lᵀ. B: [p, K]. L: [K, K], lower triangular.
template <int K>
void turn_rows(float* B, int64_t p, const float* L) {
  alignas(64) float rows[K][CHUNK], turned[K][CHUNK];
  for (int64_t r0 = 0; r0 < p; r0 += CHUNK, B += K * CHUNK) {
    const int here = int(std::min<int64_t>(CHUNK, p - r0));
    split_columns<K>(B, here, *rows, CHUNK);
    UNROLLED for (int j = 0; j < K; ++j)
      for (int r = 0; r < here; r += LANES) {
        Vec sum = {};
        UNROLLED for (int l = 0; l <= j; ++l) sum += L[j * K + l] * load(rows[l] + r);
        store(turned[j] + r, sum);
      }
    join_columns<K>(*turned, CHUNK, here, B);
  }
}

// Does the same for any k. Loops over the ranks are unrolled for k = 1, 2 and 4.
void turn(float* B, int64_t p, int k, const float* L) {
  switch (k) {
    case 1: return turn_rows<1>(B, p, L);
    case 2: return turn_rows<2>(B, p, L);
    case 4: return turn_rows<4>(B, p, L);
  }
  const int64_t stride = padded(k);
  std::vector<float> transposed(k * stride), rows(ROWS * k), turned(ROWS * stride);
  for (int j = 0; j < k; ++j)
    for (int l = 0; l <= j; ++l) transposed[l * stride + j] = L[j * k + l];
  for (int64_t r = 0; r < p; r += ROWS) {
    const int64_t here = std::min<int64_t>(ROWS, p - r);
    std::copy_n(B + r * k, here * k, rows.data());
    outer(rows.data(), k, transposed.data(), stride, int(stride), turned.data(), stride);
    for (int64_t i = 0; i < here; ++i) std::copy_n(turned.data() + i * stride, k, B + (r + i) * k);
  }
}

}  // namespace
