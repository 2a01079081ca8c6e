// The k×k part of a step in float64: Gram matrices, damped inverses and what the rules make of them. Small matrices are row-major.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "blocks.h"

namespace {

// As in rules.py.
constexpr double DAMPING = 1e-6, MIN_FACTOR_NORM = 1e-12;

// Memory that will be read soon: its share of it is asked for whenever a share of other work is done.
struct Ahead {
  const void* at;
  int64_t bytes;

  void fetch(int64_t part, int64_t parts) const {
    const char* first = static_cast<const char*>(at);
    for (int64_t i = bytes * part / parts / 64 * 64; i < bytes * (part + 1) / parts; i += 64) __builtin_prefetch(first + i, 1, 2);
  }
};

// Σ x² of the entries from ``begin`` to ``end``; x is one stream from memory, and ``ahead`` keeps some more of them busy.
inline double sum_of_squares(const void* x, Type type, int64_t begin, int64_t end, const std::vector<Ahead>& ahead = {}) {
  constexpr int SUMS = 4;
  DoubleVec total[SUMS] = {};
  float part[CHUNK];
  for (int64_t i = begin; i < end; i += CHUNK) {
    const int count = int(std::min<int64_t>(CHUNK, end - i));
    for (const Ahead& other : ahead) other.fetch((i - begin) / CHUNK, (end - begin + CHUNK - 1) / CHUNK);
    const float* from = static_cast<const float*>(x) + i;
    if (type != FLOAT32 || count < CHUNK) {
      read(x, type, i, count, part);
      std::fill(part + count, part + CHUNK, 0.f);
      from = part;
    }
    for (int c = 0; c < CHUNK; c += SUMS * LANES / 2)
      UNROLLED for (int j = 0; j < SUMS; ++j) {
        const DoubleVec value = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(from + c + j * LANES / 2), DoubleVec);
        total[j] += value * value;
      }
  }
  double sum = 0;
  for (int j = 0; j < SUMS; ++j)
    for (int lane = 0; lane < LANES / 2; ++lane) sum += total[j][lane];
  return sum;
}

inline double trace(const double* gram, int k, int64_t stride) {
  double sum = 0;
  for (int j = 0; j < k; ++j) sum += gram[j * stride + j];
  return sum;
}

// L⁻¹ of the Cholesky factor of gram + ridge·I, a symmetric matrix of rows of ``stride`` numbers; where there is none, of the diagonal alone.
void inverse_root(const double* gram, int k, int64_t stride, double ridge, double* L) {
  // float64 round-off in a Gram matrix is relative to its trace: a smaller ridge would not keep it positive.
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

// (gram + ridge·I)⁻¹ = L⁻ᵀ L⁻¹.
void damped_inverse(const double* gram, int k, int64_t stride, double ridge, double* inverse, std::vector<double>& work) {
  work.resize(size_t(k) * k);
  double* L = work.data();
  inverse_root(gram, k, stride, ridge, L);
  std::fill_n(inverse, k * k, 0.0);
  for (int l = 0; l < k; ++l)  // row by row of L⁻¹
    for (int i = 0; i <= l; ++i) {
      const double weight = L[l * k + i];
      for (int j = 0; j <= l; ++j) inverse[i * k + j] += weight * L[l * k + j];
    }
}

// A Aᵀ of A [k, q], float64 [k, k]; part: room for k rows of CHUNK numbers.
void gram_of(const float* A, int64_t k, int64_t q, double* gram, std::vector<double>& part) {
  const int64_t stride = std::min<int64_t>(CHUNK, padded(q));
  part.resize(k * stride);
  std::fill_n(gram, k * k, 0.0);
  for (int64_t c0 = 0; c0 < q; c0 += stride) {
    read_rows(A, k, q, c0, stride, part.data());
    add_gram(part.data(), k, stride, gram);
  }
  mirror(gram, k);
}

// A' = W [A; P] in float64, written as float32, and A' A'ᵀ; W [k, 2k], A [k, q], and P [k, q] in rows of ``p_stride`` numbers.
void columns_of(const double* W, const float* A, const float* P, int64_t p_stride, int64_t k, int64_t q, float* out,
                double* gram, std::vector<double>& part) {
  const int64_t stride = std::min<int64_t>(CHUNK, padded(q));
  part.resize(3 * k * stride);
  double *both = part.data(), *made = both + 2 * k * stride;
  std::fill_n(gram, k * k, 0.0);
  for (int64_t c0 = 0; c0 < q; c0 += stride) {
    const int64_t here = std::min(stride, q - c0);
    read_rows(A, k, q, c0, stride, both);
    for (int64_t j = 0; j < k; ++j) {
      std::copy_n(P + j * p_stride + c0, here, both + (k + j) * stride);
      std::fill_n(both + (k + j) * stride + here, stride - here, 0.0);
    }
    std::fill_n(made, k * stride, 0.0);
    BY_RANKS(k, combine_block<J>(W + j0 * 2 * k, 1, 2 * k, both, stride, int(2 * k), made + j0 * stride))
    for (int64_t j = 0; j < k; ++j) std::copy_n(made + j * stride, here, out + j * q + c0);
    add_gram(made, k, stride, gram);
  }
  mirror(gram, k);
}

}  // namespace
