// This file holds the products that a step is made of, for tiles of matrices in registers. Unless a comment says
// otherwise, a number of columns is a multiple of LANES, to which callers pad rows with zeros.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "numbers.h"

namespace {

typedef int32_t Bits __attribute__((vector_size(4 * LANES), may_alias));

inline Vec absolute(Vec x) { return (Vec)((Bits)x & 0x7FFFFFFF); }

template <bool ABSOLUTE>
inline Vec load_as(const float* x) {
  const Vec value = load(x);
  return ABSOLUTE ? absolute(value) : value;
}

// Returns Σ x² of DOT_ROWS rows. The squares of a column are added in float32, and all other sums are float64.
double square_tile(const float* x, int64_t stride, int columns) {
  DoubleVec total[2] = {};
  for (int c = 0; c < columns; c += LANES) {
    Vec square = {};
    UNROLLED for (int r = 0; r < DOT_ROWS; ++r) square += load(x + r * stride + c) * load(x + r * stride + c);
    float lanes[LANES];
    store(lanes, square);
    UNROLLED for (int half = 0; half < 2; ++half)
      total[half] += widened(lanes + half * LANES / 2);
  }
  return sum_of(total[0] + total[1]);
}

// Prefetches the rows of a matrix that are read next, line by line while other rows are computed. That keeps more
// reads in flight than loads alone would. at: the first entry, which may lie beyond the matrix, since a prefetch never
// faults. stride: bytes from row to row. size: bytes of an entry. rows: the number of rows.
struct RowsAhead {
  const char* at = nullptr;
  int64_t stride = 0;
  int size = 0, rows = 0;

  // Prefetches a line of each row if one begins at this column, counted from ``at``.
  void fetch(int column) const {
    if (column * size % LINE) return;
    for (int r = 0; r < rows; ++r) __builtin_prefetch(at + r * stride + column * size, 0, 3);
  }
};

// Adds x[r] · A[j], or |x[r]| · A[j], over some columns to dots[r][j], for R rows of x, a multiple of 4, and J rows of
// A. Rows of dots have k numbers.
template <int R, int J, bool ABSOLUTE>
void dot_tile(const float* x, int64_t x_stride, const float* A, int64_t stride, int columns, float* dots, int k,
              const RowsAhead& ahead = {}) {
  Vec total[R][J] = {};
  for (int c = 0; c < columns; c += LANES) {
    ahead.fetch(c);
    Vec a[J];
    UNROLLED for (int j = 0; j < J; ++j) a[j] = load(A + j * stride + c);
    UNROLLED for (int r = 0; r < R; ++r) {
      const Vec value = held(load_as<ABSOLUTE>(x + r * x_stride + c));
      UNROLLED for (int j = 0; j < J; ++j) total[r][j] += value * a[j];
    }
  }
  UNROLLED for (int j = 0; j < J; ++j)
    UNROLLED for (int r0 = 0; r0 < R; r0 += 4) {
      float sums[4];
      sum4(&total[r0][j], J, sums);
      UNROLLED for (int r = 0; r < 4; ++r) dots[(r0 + r) * k + j] += sums[r];
    }
}

// Adds Σ_j B[r][j] A[j] to total[r] for ROWS rows and W registers of columns.
template <int W>
inline void add_outer(const float* B, int64_t b_stride, int k, const float* A, int64_t stride, Vec (&total)[ROWS][W]) {
  for (int j = 0; j < k; ++j) {
    Vec a[W];
    UNROLLED for (int w = 0; w < W; ++w) a[w] = load(A + j * stride + w * LANES);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) total[r][w] += B[r * b_stride + j] * a[w];
  }
}

// Writes Σ_j B[r][j] A[j] to out[r], or adds it, for the same tile. Rows of B have k numbers.
template <int W, bool ADD>
inline void outer_tile(const float* B, int k, const float* A, int64_t stride, float* out, int64_t out_stride) {
  Vec total[ROWS][W] = {};
  if (ADD)
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) total[r][w] = load(out + r * out_stride + w * LANES);
  add_outer<W>(B, k, k, A, stride, total);
  UNROLLED for (int r = 0; r < ROWS; ++r)
    UNROLLED for (int w = 0; w < W; ++w) store(out + r * out_stride + w * LANES, total[r][w]);
}

// Does the same for ROWS rows and any number of columns.
template <bool ADD = false>
void outer(const float* B, int k, const float* A, int64_t stride, int columns, float* out, int64_t out_stride) {
  int c = 0;
  for (; c + WIDTH * LANES <= columns; c += WIDTH * LANES)
    outer_tile<WIDTH, ADD>(B, k, A + c, stride, out + c, out_stride);
  for (; c < columns; c += LANES) outer_tile<1, ADD>(B, k, A + c, stride, out + c, out_stride);
}

// Adds Σ_r B[r][j] x[r], or Σ_r B[r][j] |x[r]|, to P[j] for R rows and W registers of columns.
template <int R, int W, bool ABSOLUTE>
inline void project_tile(const float* B, int64_t b_stride, int k, const float* x, int64_t x_stride, float* P,
                         int64_t stride) {
  Vec value[R][W];
  UNROLLED for (int r = 0; r < R; ++r)
    UNROLLED for (int w = 0; w < W; ++w) value[r][w] = load_as<ABSOLUTE>(x + r * x_stride + w * LANES);
  for (int j = 0; j < k; ++j) {
    Vec total[W];
    UNROLLED for (int w = 0; w < W; ++w) total[w] = load(P + j * stride + w * LANES);
    UNROLLED for (int r = 0; r < R; ++r)
      UNROLLED for (int w = 0; w < W; ++w) total[w] += B[r * b_stride + j] * value[r][w];
    UNROLLED for (int w = 0; w < W; ++w) store(P + j * stride + w * LANES, total[w]);
  }
}

// Does the same for R rows and any number of columns.
template <int R, int W, bool ABSOLUTE>
void project_rows(const float* B, int64_t b_stride, int k, const float* x, int64_t x_stride, int columns, float* P,
                  int64_t stride) {
  int c = 0;
  for (; c + W * LANES <= columns; c += W * LANES)
    project_tile<R, W, ABSOLUTE>(B, b_stride, k, x + c, x_stride, P + c, stride);
  for (; c < columns; c += LANES) project_tile<R, 1, ABSOLUTE>(B, b_stride, k, x + c, x_stride, P + c, stride);
}

// Does the same for any number of columns and a multiple of ROWS rows. It takes 2 · ROWS rows at a time, since P is
// read and written once for each such block.
template <bool ABSOLUTE>
void project(const float* B, int64_t b_stride, int k, const float* x, int64_t x_stride, int rows, int columns,
             float* P, int64_t stride) {
  int r = 0;
  for (; r + 2 * ROWS <= rows; r += 2 * ROWS)
    project_rows<2 * ROWS, WIDTH / 2, ABSOLUTE>(B + r * b_stride, b_stride, k, x + r * x_stride, x_stride, columns, P,
                                                stride);
  if (r < rows)
    project_rows<ROWS, WIDTH, ABSOLUTE>(B + r * b_stride, b_stride, k, x + r * x_stride, x_stride, columns, P, stride);
}

// Adds Σ_r left[r][j] x[r] to out[j] for J rows of out and W registers of columns, in float64. Rows of x and of out
// have ``stride`` numbers, and left[r][j] lies at r · by_row + j · by_rank.
template <int J, int W>
inline void combine_tile(const double* left, int64_t by_row, int64_t by_rank, const double* x, int64_t stride,
                         int rows, double* out) {
  DoubleVec total[J][W] = {};
  for (int r = 0; r < rows; ++r) {
    const DoubleVec* row = reinterpret_cast<const DoubleVec*>(x + r * stride);
    UNROLLED for (int j = 0; j < J; ++j)
      UNROLLED for (int w = 0; w < W; ++w) total[j][w] += left[r * by_row + j * by_rank] * row[w];
  }
  UNROLLED for (int j = 0; j < J; ++j)
    UNROLLED for (int w = 0; w < W; ++w) reinterpret_cast<DoubleVec*>(out + j * stride)[w] += total[j][w];
}

// Does the same for any multiple of LANES / 2 columns.
template <int J>
void combine_block(const double* left, int64_t by_row, int64_t by_rank, const double* x, int64_t stride,
                   int64_t columns, int rows, double* out) {
  constexpr int64_t size = WIDTH * LANES / 2;
  int64_t c = 0;
  for (; c + size <= columns; c += size) combine_tile<J, WIDTH>(left, by_row, by_rank, x + c, stride, rows, out + c);
  for (; c < columns; c += LANES / 2) combine_tile<J, 1>(left, by_row, by_rank, x + c, stride, rows, out + c);
}

inline DoubleVec load_double(const float* x) { return widened(x); }
inline DoubleVec load_double(const double* x) { return *reinterpret_cast<const DoubleVec*>(x); }

// Adds x[i] · y[j] to gram[i][j] in float64, for I rows of x and J rows of y. Rows of both have ``stride`` numbers, of
// which the first ``count``, a multiple of LANES / 2, are multiplied.
template <int I, int J, class Number>
inline void gram_tile(const Number* x, const Number* y, int64_t stride, int64_t count, double* gram,
                      int64_t gram_stride) {
  DoubleVec total[I][J] = {};
  for (int64_t c = 0; c < count; c += LANES / 2) {
    DoubleVec b[J];
    UNROLLED for (int j = 0; j < J; ++j) b[j] = load_double(y + j * stride + c);
    UNROLLED for (int i = 0; i < I; ++i) {
      const DoubleVec a = load_double(x + i * stride + c);
      UNROLLED for (int j = 0; j < J; ++j) total[i][j] += a * b[j];
    }
  }
  UNROLLED for (int i = 0; i < I; ++i)
    UNROLLED for (int j = 0; j < J; ++j) gram[i * gram_stride + j] += sum_of(total[i][j]);
}

// Executes ``call`` for each block of at most RANKS of k ranks. In it ``j0`` is the first rank of the block, and the
// constant ``J`` is the number of ranks in the block.
#define BY_RANKS(k, call)                                                          \
  for (int j0 = 0; j0 < k; j0 += RANKS) switch (std::min(RANKS, int(k) - j0)) {    \
    case 1: { constexpr int J = 1; call; break; }                                  \
    case 2: { constexpr int J = 2; call; break; }                                  \
    case 3: { constexpr int J = 3; call; break; }                                  \
    default: { constexpr int J = RANKS; call; break; }                             \
  }

// `padded` and `padded_double` round q up to whole registers of float32 and of float64 numbers.
int64_t padded(int64_t q) { return (q + LANES - 1) / LANES * LANES; }
int64_t padded_double(int64_t q) { return (q + LANES / 2 - 1) / (LANES / 2) * (LANES / 2); }

// Returns how many floats apart rows of q numbers are held: whole registers, and one more register where rows would
// otherwise begin at multiples of 256 bytes and compete for the same sets of the cache.
int64_t row_stride(int64_t q) { return padded(q) % 64 ? padded(q) : padded(q) + LANES; }

// Copies ``stride`` columns of A [k, q] from column c0 on to out [k, stride] as float64, with zeros beyond q.
void read_rows(const float* A, int64_t k, int64_t q, int64_t c0, int64_t stride, double* out) {
  const int64_t here = std::min(stride, q - c0);
  for (int64_t j = 0; j < k; ++j, out += stride) {
    std::copy_n(A + j * q + c0, here, out);
    std::fill(out + here, out + stride, 0.0);
  }
}

// Adds x yᵀ to gram [k, k] in float64. x and y have k rows of ``stride`` numbers, of which the first ``count`` are
// multiplied. Rows of gram have ``gram_stride`` numbers.
void add_products(const float* x, const float* y, int64_t k, int64_t stride, int64_t count, double* gram,
                  int64_t gram_stride) {
  int64_t i = 0;
  auto add = [&](auto rows) {
    for (; i + rows() <= k; i += rows())
      BY_RANKS(k, (gram_tile<rows(), J>(x + i * stride, y + j0 * stride, stride, count, gram + i * gram_stride + j0,
                                        gram_stride)))
  };
  add(std::integral_constant<int, RANKS>{});
  add(std::integral_constant<int, 2>{});
  add(std::integral_constant<int, 1>{});
}

// Adds the lower triangle of x xᵀ to gram [k, k], in blocks that may reach beyond the diagonal. x: [k, stride].
void add_gram(const double* x, int64_t k, int64_t stride, double* gram) {
  constexpr int J = 4;  // RANKS · J sums at a time hide the latency of an addition.
  int64_t i = 0;
  for (; i + RANKS <= k / J * J; i += RANKS)
    for (int64_t j = 0; j <= i; j += J)
      gram_tile<RANKS, J>(x + i * stride, x + j * stride, stride, stride, gram + i * k + j, k);
  for (; i < k; ++i)
    BY_RANKS(i + 1, (gram_tile<1, J>(x + i * stride, x + j0 * stride, stride, stride, gram + i * k + j0, k)))
}

// Adds the lower triangle of x xᵀ to gram [K, K] in float64. x: [K, q]. K is so small that all sums lie in registers.
template <int K>
void add_small_gram(const float* x, int64_t q, double* gram) {
  constexpr int SUMS = 4 / K > 1 ? 4 / K : 1, SIZE = SUMS * LANES / 2;
  DoubleVec total[SUMS][K][K] = {};
  double tail[K][SIZE];
  for (int64_t c = 0; c < q; c += SIZE) {
    UNROLLED for (int s = 0; s < SUMS; ++s) {
      DoubleVec row[K];
      if (c + SIZE <= q) {
        UNROLLED for (int j = 0; j < K; ++j)
          row[j] = widened(x + j * q + c + s * LANES / 2);
      } else {
        if (s == 0)
          for (int j = 0; j < K; ++j) std::fill(std::copy(x + j * q + c, x + j * q + q, tail[j]), tail[j] + SIZE, 0.0);
        UNROLLED for (int j = 0; j < K; ++j) row[j] = *reinterpret_cast<const DoubleVec*>(tail[j] + s * LANES / 2);
      }
      UNROLLED for (int i = 0; i < K; ++i)
        UNROLLED for (int j = 0; j <= i; ++j) total[s][i][j] += row[i] * row[j];
    }
  }
  for (int i = 0; i < K; ++i)
    for (int j = 0; j <= i; ++j)
      for (int s = 0; s < SUMS; ++s) gram[i * K + j] += sum_of(total[s][i][j]);
}

// Copies the lower triangle of gram [k, k] to the upper one.
void mirror(double* gram, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < i; ++j) gram[j * k + i] = gram[i * k + j];
}

}  // namespace
