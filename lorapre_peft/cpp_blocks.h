// Pieces of matrices in registers: reading, rounding and writing them, and the products that `cpp_kernels.cpp` is made of.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int ROWS = 4;      // that share each load of A
constexpr int CHUNK = 256;   // columns whose buffers stay in the first-level cache; a multiple of LANES
constexpr int RANKS = 4;     // of a factor that are in registers at once
constexpr int BLOCK = 32;    // rows that go through a chunk together; a multiple of ROWS
constexpr int NARROW = 32;   // up to this many columns, rows are what a register holds
#ifndef LANES                // of a vector register, float32
#define LANES 8
#endif
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(4 * LANES), aligned(8), may_alias));  // half as many
typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Index8 __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Index8){__VA_ARGS__})
#endif

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }

// The sums of four registers' lanes.
inline void sum4(const Vec* v, int stride, float* out) {
  Vec8 half[4], pair[2];
  for (int i = 0; i < 4; ++i) {
    float lanes[LANES];
    store(lanes, v[i * stride]);
    half[i] = *reinterpret_cast<const Vec8*>(lanes);
    if (LANES == 16) half[i] += *reinterpret_cast<const Vec8*>(lanes + LANES - 8);
  }
  for (int i = 0; i < 2; ++i)
    pair[i] = SHUFFLE(half[2 * i], half[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
              SHUFFLE(half[2 * i], half[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Vec8 four = SHUFFLE(pair[0], pair[1], 0, 1, 8, 9, 4, 5, 12, 13) +
                    SHUFFLE(pair[0], pair[1], 2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) out[i] = four[i] + four[i + 4];
}

inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

void read(const void* x, Type type, int64_t at, int count, float* out) {
  if (type == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(x) + at, count * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x) + at;
    for (int c = 0; c < count; ++c) out[c] = from_bits(uint32_t(from[c]) << 16);
  }
}

// To bfloat16's nearest, ties to even, as torch rounds; NaN stays NaN.
inline float nearest(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return from_bits(x == x ? rounded : 0x7FC00000u);
}

// One round of lowbias32, as in rounding.py.
inline uint32_t mix(uint32_t bits, uint32_t key) {
  bits ^= key;
  bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
  bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
  return bits ^ (bits >> 16);
}

// To one of bfloat16's neighbours at random; infinity and NaN stay what they are.
inline float stochastic(float x, uint32_t counter, uint32_t key, uint32_t salted) {
  const uint32_t bits = to_bits(x), random = mix(mix(counter, key), salted) & 0xFFFF;
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return from_bits(finite ? (bits + random) & 0xFFFF0000u : x == x ? bits : 0x7FC00000u);
}

void write(void* x, Type type, int64_t at, int count, const float* values) {
  if (type == FLOAT32) {
    std::memcpy(static_cast<float*>(x) + at, values, count * sizeof(float));
  } else {
    uint16_t* to = static_cast<uint16_t*>(x) + at;
    for (int c = 0; c < count; ++c) to[c] = to_bits(values[c]) >> 16;
  }
}

// to[c][r] = from[r][c] for 8 × 8 entries: pairs of rows interleaved, then pairs of pairs, then halves exchanged.
inline void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec8 row[8], pair[8], four[8];
  for (int r = 0; r < 8; ++r) row[r] = *reinterpret_cast<const Vec8*>(from + r * from_stride);
  for (int r = 0; r < 8; r += 2) {
    pair[r] = SHUFFLE(row[r], row[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pair[r + 1] = SHUFFLE(row[r], row[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4)
    for (int half = 0; half < 2; ++half) {
      four[r + 2 * half] = SHUFFLE(pair[r + half], pair[r + 2 + half], 0, 1, 8, 9, 4, 5, 12, 13);
      four[r + 2 * half + 1] = SHUFFLE(pair[r + half], pair[r + 2 + half], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int c = 0; c < 4; ++c) {
    *reinterpret_cast<Vec8*>(to + c * to_stride) = SHUFFLE(four[c], four[c + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Vec8*>(to + (c + 4) * to_stride) = SHUFFLE(four[c], four[c + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// to[c][r] = from[r][c].
void transpose(const float* from, int64_t from_stride, int rows, int columns, float* to, int64_t to_stride) {
  const int whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int r = 0; r < whole_rows; r += 8)
    for (int c = 0; c < whole_columns; c += 8)
      transpose8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int c = 0; c < columns; ++c)
    for (int r = c < whole_columns ? whole_rows : 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

// Some rows of x from `at` on, as columns × rows, and back. flat: room for them.
void read_transposed(const void* x, Type type, int64_t at, int rows, int columns, float* flat, float (*out)[CHUNK]) {
  const float* from = type == FLOAT32 ? static_cast<const float*>(x) + at : flat;
  if (type != FLOAT32) read(x, type, at, rows * columns, flat);
  transpose(from, columns, rows, columns, *out, CHUNK);
}

void write_transposed(void* x, Type type, int64_t at, int rows, int columns, float* flat, const float (*values)[CHUNK]) {
  float* to = type == FLOAT32 ? static_cast<float*>(x) + at : flat;
  transpose(*values, CHUNK, columns, rows, to, columns);
  if (type != FLOAT32) write(x, type, at, rows * columns, flat);
}

// dots[r][j] += x[r] · A[j] over some columns, for J rows of A.
template <int J>
void dot_block(const float (*x)[CHUNK], const float* A, int64_t stride, int columns, float* dots, int k) {
  Vec total[ROWS][J] = {};
  for (int c = 0; c < columns; c += LANES) {
    Vec a[J];
    for (int j = 0; j < J; ++j) a[j] = load(A + j * stride + c);
    for (int r = 0; r < ROWS; ++r) {
      Vec value = load(x[r] + c);
      for (int j = 0; j < J; ++j) total[r][j] += value * a[j];
    }
  }
  static_assert(ROWS == 4);
  for (int j = 0; j < J; ++j) {
    float sums[ROWS];
    sum4(&total[0][j], J, sums);
    for (int r = 0; r < ROWS; ++r) dots[r * k + j] += sums[r];
  }
}

// out[r] (+)= Σ_j B[r][j] A[j] over some columns.
template <int J>
void outer_block(const float* B, int k, const float* A, int64_t stride, int columns, float (*out)[CHUNK], bool add) {
  for (int c = 0; c < columns; c += LANES) {
    Vec a[J];
    for (int j = 0; j < J; ++j) a[j] = load(A + j * stride + c);
    for (int r = 0; r < ROWS; ++r) {
      Vec value = B[r * k] * a[0];
      for (int j = 1; j < J; ++j) value += B[r * k + j] * a[j];
      store(out[r] + c, add ? load(out[r] + c) + value : value);
    }
  }
}

// P[j] += Σ_r B[r][j] x[r] over some columns.
template <int J>
void project_block(const float* B, int k, const float (*x)[CHUNK], int columns, float* P, int64_t stride) {
  for (int c = 0; c < columns; c += LANES) {
    Vec value[ROWS];
    for (int r = 0; r < ROWS; ++r) value[r] = load(x[r] + c);
    for (int j = 0; j < J; ++j) {
      Vec total = load(P + j * stride + c);
      for (int r = 0; r < ROWS; ++r) total += B[r * k + j] * value[r];
      store(P + j * stride + c, total);
    }
  }
}

// out[j] += Σ_r left[r][j] x[r], of rows of ``stride`` numbers, a multiple of LANES; left[r][j] lies at r · by_row + j · by_rank.
template <int J>
void combine_block(const double* left, int64_t by_row, int64_t by_rank, const double* x, int64_t stride, int rows, double* out) {
  for (int64_t c = 0; c < stride; c += LANES) {
    DoubleVec total[J][2] = {};
    for (int r = 0; r < rows; ++r) {
      const DoubleVec* row = reinterpret_cast<const DoubleVec*>(x + r * stride + c);
      for (int j = 0; j < J; ++j)
        for (int half = 0; half < 2; ++half) total[j][half] += left[r * by_row + j * by_rank] * row[half];
    }
    for (int j = 0; j < J; ++j)
      for (int half = 0; half < 2; ++half) reinterpret_cast<DoubleVec*>(out + j * stride + c)[half] += total[j][half];
  }
}

// gram[j] += x · y[j], of rows of ``stride`` numbers, a multiple of LANES.
template <int J>
void gram_block(const double* x, const double* y, int64_t stride, double* gram) {
  DoubleVec total[J] = {};
  for (int64_t c = 0; c < stride; c += LANES / 2) {
    const DoubleVec value = *reinterpret_cast<const DoubleVec*>(x + c);
    for (int j = 0; j < J; ++j) total[j] += value * *reinterpret_cast<const DoubleVec*>(y + j * stride + c);
  }
  for (int j = 0; j < J; ++j)
    for (int lane = 0; lane < LANES / 2; ++lane) gram[j] += total[j][lane];
}

#define BY_RANKS(k, call)                                                          \
  for (int j0 = 0; j0 < k; j0 += RANKS) switch (std::min(RANKS, int(k) - j0)) {    \
    case 1: { constexpr int J = 1; call; break; }                                  \
    case 2: { constexpr int J = 2; call; break; }                                  \
    case 3: { constexpr int J = 3; call; break; }                                  \
    default: { constexpr int J = RANKS; call; break; }                             \
  }

int64_t padded(int64_t q) { return (q + LANES - 1) / LANES * LANES; }

// From column c0 on ``stride`` columns of A [k, q] as float64, zeros beyond q.
void read_rows(const float* A, int64_t k, int64_t q, int64_t c0, int64_t stride, double* out) {
  const int64_t here = std::min(stride, q - c0);
  for (int64_t j = 0; j < k; ++j, out += stride) {
    std::copy_n(A + j * q + c0, here, out);
    std::fill(out + here, out + stride, 0.0);
  }
}

// The lower triangle of x xᵀ, of k rows of ``stride`` numbers, added to gram; and the upper one from the lower.
void add_gram(const double* x, int64_t k, int64_t stride, double* gram) {
  for (int64_t i = 0; i < k; ++i)
    BY_RANKS(i + 1, gram_block<J>(x + i * stride, x + j0 * stride, stride, gram + i * k + j0))
}

void mirror(double* gram, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < i; ++j) gram[j * k + i] = gram[i * k + j];
}

}  // namespace
