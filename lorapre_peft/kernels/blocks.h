// Pieces of matrices in registers: reading, rounding and writing them, and the products that a step is made of.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#ifndef LANES                // of a vector register, float32
#define LANES 8
#endif
constexpr int ROWS = 4;      // that share each load of A
constexpr int DOT_ROWS = LANES == 16 ? 8 : 4, DOT_RANKS = 2;  // that `dot_tile` multiplies with each other
constexpr int STEP_WIDTH = LANES == 16 ? 2 : 1;  // registers of ROWS rows that an update is computed of at once
constexpr int CHUNK = 256;   // columns whose buffers stay in the first-level cache; a multiple of LANES
constexpr int NARROW = 32;   // up to this many columns, rows are what a register holds
constexpr int RANKS = LANES == 16 ? 4 : 2;  // of a factor that are in registers at once, with sums for each of ROWS rows
constexpr int WIDTH = LANES == 16 ? 4 : 2;  // registers along a row that are held at once, likewise
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(4 * LANES), aligned(8), may_alias));  // half as many
typedef float HalfVec __attribute__((vector_size(2 * LANES), aligned(4), may_alias));       // as many as those

// float32 numbers as float64.
inline DoubleVec widened(const float* x) {
#if LANES == 16
  return (DoubleVec)_mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__AVX2__)
  return (DoubleVec)_mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(x), DoubleVec);
#endif
}

typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Index8 __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Index8){__VA_ARGS__})
#endif

// Before loops whose arrays of registers would else lie in memory.
#define UNROLLED _Pragma("GCC unroll 16")

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }

// NaN becomes the bound, as with a CPU's instruction.
inline Vec at_least(Vec x, float low) {
#if LANES == 16
  return (Vec)_mm512_max_ps((__m512)x, _mm512_set1_ps(low));
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)x, _mm256_set1_ps(low));
#else
  return x > low ? x : Vec{} + low;
#endif
}
inline Vec at_most(Vec x, float high) {
#if LANES == 16
  return (Vec)_mm512_min_ps((__m512)x, _mm512_set1_ps(high));
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)x, _mm256_set1_ps(high));
#else
  return x < high ? x : Vec{} + high;
#endif
}

// x / (√square + eps) to about two units in the last place. Where there is an instruction for an estimate of 1/√ and of 1/x, one Newton
// step on each is several times faster than the exact root and quotient.
inline Vec over_root(Vec x, Vec square, float eps) {
#if LANES == 16 || defined(__AVX2__)
  square = at_most(at_least(square, FLT_MIN), FLT_MAX);
#if LANES == 16
  Vec root = (Vec)_mm512_rsqrt14_ps((__m512)square);
#else
  Vec root = (Vec)_mm256_rsqrt_ps((__m256)square);
#endif
  const Vec near = square * root, rest = 0.5f - near * (0.5f * root);
  root = near + near * rest + eps;
#if LANES == 16
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)root);
#else
  const Vec inverse = (Vec)_mm256_rcp_ps((__m256)root);
#endif
  x *= inverse;
  return x + x * (1.f - root * inverse);
#else
  for (int i = 0; i < LANES; ++i) x[i] /= std::sqrt(square[i]) + eps;
  return x;
#endif
}

// The sums of four registers' lanes.
inline void sum4(const Vec* v, int stride, float* out) {
#if LANES == 16 || defined(__AVX2__)
  __m256 half[4];
  UNROLLED for (int i = 0; i < 4; ++i) {
#if LANES == 16
    const __m512 whole = (__m512)v[i * stride];
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
    half[i] = (__m256)v[i * stride];
#endif
  }
  const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    out[i] = 0;
    for (int lane = 0; lane < LANES; ++lane) out[i] += v[i * stride][lane];
  }
#endif
}

inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

// The bits of a float16 number as float32; written so that compilers make vector instructions of it.
inline float from_half(uint32_t half) {
  constexpr uint32_t EXPONENT = 0x0F800000, REBIAS = (127 - 15) << 23;
  const uint32_t bits = (half & 0x7FFF) << 13, exponent = bits & EXPONENT;
  const uint32_t rest = exponent == EXPONENT ? (128 - 16) << 23 : 0;            // infinity and NaN
  const float small = from_bits(bits + REBIAS + (1 << 23)) - from_bits(113 << 23);  // zero and what has no leading 1
  const uint32_t found = exponent == 0 ? to_bits(small) : bits + REBIAS + rest;
  return from_bits(found | (half & 0x8000) << 16);
}

// To float16's nearest, ties to even, as torch rounds: the bits.
inline uint16_t to_half(float x) {
  constexpr uint32_t INFINITE = 0x7F800000, TOO_LARGE = (127 + 16) << 23, NORMAL = 113 << 23, SHIFT = ((127 - 15) + (23 - 10) + 1) << 23;
  const uint32_t sign = to_bits(x) & 0x80000000u, bits = to_bits(x) ^ sign;
  const uint32_t small = to_bits(from_bits(bits) + from_bits(SHIFT)) - SHIFT;  // the addition rounds
  const uint32_t normal = (bits - ((127 - 15) << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  const uint32_t found = bits >= TOO_LARGE ? (bits > INFINITE ? 0x7E00 : 0x7C00) : bits < NORMAL ? small : normal;
  return uint16_t(found | sign >> 16);
}

void read(const void* x, Type type, int64_t at, int count, float* out) {
  if (type == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(x) + at, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x) + at;
  if (type == BFLOAT16)
    for (int c = 0; c < count; ++c) out[c] = from_bits(uint32_t(from[c]) << 16);
  else
    for (int c = 0; c < count; ++c) out[c] = from_half(from[c]);
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

inline int size_of(Type type) { return type == FLOAT32 ? 4 : 2; }

// Rounded to the nearest; bfloat16 numbers that ``stochastic`` has made stay what they are.
void write(void* x, Type type, int64_t at, int count, const float* values) {
  if (type == FLOAT32) {
    std::memcpy(static_cast<float*>(x) + at, values, count * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(x) + at;
  if (type == BFLOAT16)
    for (int c = 0; c < count; ++c) to[c] = to_bits(nearest(values[c])) >> 16;
  else
    for (int c = 0; c < count; ++c) to[c] = to_half(values[c]);
}

void scale(float* x, int64_t count, float by) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, by * load(x + i));
  for (; i < count; ++i) x[i] *= by;
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

// to[c][r] = from[r][c] for C columns, and back: few enough for the compiler to interleave them in registers.
template <int C>
void split_columns(const float* from, int rows, float* to, int64_t to_stride) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < C; ++c) to[c * to_stride + r] = from[r * C + c];
}

template <int C>
void join_columns(const float* from, int64_t from_stride, int rows, float* to) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < C; ++c) to[r * C + c] = from[c * from_stride + r];
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

// Some rows of x from `at` on, as columns × rows. flat: room for them.
void read_transposed(const void* x, Type type, int64_t at, int rows, int columns, float* flat, float (*out)[CHUNK]) {
  const float* from = type == FLOAT32 ? static_cast<const float*>(x) + at : flat;
  if (type != FLOAT32) read(x, type, at, rows * columns, flat);
  transpose(from, columns, rows, columns, *out, CHUNK);
}

typedef int32_t Bits __attribute__((vector_size(4 * LANES), may_alias));

inline Vec absolute(Vec x) { return (Vec)((Bits)x & 0x7FFFFFFF); }

template <bool ABSOLUTE>
inline Vec load_as(const float* x) {
  const Vec value = load(x);
  return ABSOLUTE ? absolute(value) : value;
}

// Σ x² of DOT_ROWS rows; each column's squares are added in float32, all else in float64.
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
  double sum = 0;
  for (int lane = 0; lane < LANES / 2; ++lane) sum += total[0][lane] + total[1][lane];
  return sum;
}

// Rows of a matrix that will be read next, of entries of ``size`` bytes: they are asked for a register at a time while others are computed, for
// that keeps more reads in flight than waiting for them does.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0;
  int size = 0, rows = 0;

  void fetch(int column) const {
    for (int r = 0; r < rows; ++r) __builtin_prefetch(at + r * stride + column * size, 0, 3);
  }
};

// dots[r][j] += x[r] · A[j], or |x[r]| · A[j], over some columns, for R rows of x, a multiple of 4, and J of A.
template <int R, int J, bool ABSOLUTE>
void dot_tile(const float* x, int64_t x_stride, const float* A, int64_t stride, int columns, float* dots, int k, const Ahead& ahead = {}) {
  Vec total[R][J] = {};
  for (int c = 0; c < columns; c += LANES) {
    ahead.fetch(c);
    Vec a[J];
    UNROLLED for (int j = 0; j < J; ++j) a[j] = load(A + j * stride + c);
    UNROLLED for (int r = 0; r < R; ++r) {
      const Vec value = load_as<ABSOLUTE>(x + r * x_stride + c);
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

// total[r] += Σ_j C[r][j] A[j] and P[j] += Σ_r B[r][j] x[r], for ROWS rows and W registers of columns.
template <int W>
inline void follow_tile(const float* B, const float* C, int64_t b_stride, int k, const float* A, int64_t a_stride, float* P, int64_t p_stride,
                        const Vec (&x)[ROWS][W], Vec (&total)[ROWS][W]) {
  for (int j = 0; j < k; ++j) {
    Vec a[W], p[W];
    UNROLLED for (int w = 0; w < W; ++w) a[w] = load(A + j * a_stride + w * LANES), p[w] = load(P + j * p_stride + w * LANES);
    UNROLLED for (int r = 0; r < ROWS; ++r) {
      const float c = C[r * b_stride + j], b = B[r * b_stride + j];
      UNROLLED for (int w = 0; w < W; ++w) total[r][w] += c * a[w], p[w] += b * x[r][w];
    }
    UNROLLED for (int w = 0; w < W; ++w) store(P + j * p_stride + w * LANES, p[w]);
  }
}

// out[r] = Σ_j B[r][j] A[j], or added to what is there, for ROWS rows and W registers of columns.
template <int W, bool ADD>
inline void outer_tile(const float* B, int k, const float* A, int64_t stride, float* out, int64_t out_stride) {
  Vec total[ROWS][W] = {};
  if (ADD)
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) total[r][w] = load(out + r * out_stride + w * LANES);
  for (int j = 0; j < k; ++j) {
    Vec a[W];
    UNROLLED for (int w = 0; w < W; ++w) a[w] = load(A + j * stride + w * LANES);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) total[r][w] += B[r * k + j] * a[w];
  }
  UNROLLED for (int r = 0; r < ROWS; ++r)
    UNROLLED for (int w = 0; w < W; ++w) store(out + r * out_stride + w * LANES, total[r][w]);
}

// The same over some columns, a multiple of LANES.
template <bool ADD = false>
void outer(const float* B, int k, const float* A, int64_t stride, int columns, float* out, int64_t out_stride) {
  int c = 0;
  for (; c + WIDTH * LANES <= columns; c += WIDTH * LANES) outer_tile<WIDTH, ADD>(B, k, A + c, stride, out + c, out_stride);
  for (; c < columns; c += LANES) outer_tile<1, ADD>(B, k, A + c, stride, out + c, out_stride);
}

// P[j] += Σ_r B[r][j] x[r], or |x[r]|, for R rows and W registers of columns.
template <int R, int W, bool ABSOLUTE>
inline void project_tile(const float* B, int64_t b_stride, int k, const float* x, int64_t x_stride, float* P, int64_t stride) {
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

template <int R, int W, bool ABSOLUTE>
void project_rows(const float* B, int64_t b_stride, int k, const float* x, int64_t x_stride, int columns, float* P, int64_t stride) {
  int c = 0;
  for (; c + W * LANES <= columns; c += W * LANES) project_tile<R, W, ABSOLUTE>(B, b_stride, k, x + c, x_stride, P + c, stride);
  for (; c < columns; c += LANES) project_tile<R, 1, ABSOLUTE>(B, b_stride, k, x + c, x_stride, P + c, stride);
}

// The same for some rows, a multiple of ROWS, and columns, a multiple of LANES: two blocks of rows at a time, for each reads and writes P.
template <bool ABSOLUTE>
void project(const float* B, int64_t b_stride, int k, const float* x, int64_t x_stride, int rows, int columns, float* P, int64_t stride) {
  int r = 0;
  for (; r + 2 * ROWS <= rows; r += 2 * ROWS)
    project_rows<2 * ROWS, WIDTH / 2, ABSOLUTE>(B + r * b_stride, b_stride, k, x + r * x_stride, x_stride, columns, P, stride);
  if (r < rows) project_rows<ROWS, WIDTH, ABSOLUTE>(B + r * b_stride, b_stride, k, x + r * x_stride, x_stride, columns, P, stride);
}

// out[j] += Σ_r left[r][j] x[r] over some columns, of rows of ``stride`` numbers; left[r][j] lies at r · by_row + j · by_rank.
template <int J, int W>
inline void combine_tile(const double* left, int64_t by_row, int64_t by_rank, const double* x, int64_t stride, int rows, double* out) {
  DoubleVec total[J][W] = {};
  for (int r = 0; r < rows; ++r) {
    const DoubleVec* row = reinterpret_cast<const DoubleVec*>(x + r * stride);
    UNROLLED for (int j = 0; j < J; ++j)
      UNROLLED for (int w = 0; w < W; ++w) total[j][w] += left[r * by_row + j * by_rank] * row[w];
  }
  UNROLLED for (int j = 0; j < J; ++j)
    UNROLLED for (int w = 0; w < W; ++w) reinterpret_cast<DoubleVec*>(out + j * stride)[w] += total[j][w];
}

// The same over some columns, a multiple of LANES / 2.
template <int J>
void combine_block(const double* left, int64_t by_row, int64_t by_rank, const double* x, int64_t stride, int64_t columns, int rows, double* out) {
  constexpr int64_t size = WIDTH * LANES / 2;
  int64_t c = 0;
  for (; c + size <= columns; c += size) combine_tile<J, WIDTH>(left, by_row, by_rank, x + c, stride, rows, out + c);
  for (; c < columns; c += LANES / 2) combine_tile<J, 1>(left, by_row, by_rank, x + c, stride, rows, out + c);
}

// gram[i][j] += x[i] · y[j], of the first ``count`` numbers, a multiple of LANES, of rows of ``stride`` numbers.
template <int I, int J>
inline void gram_tile(const double* x, const double* y, int64_t stride, int64_t count, double* gram, int64_t gram_stride) {
  DoubleVec total[I][J] = {};
  for (int64_t c = 0; c < count; c += LANES / 2) {
    DoubleVec b[J];
    UNROLLED for (int j = 0; j < J; ++j) b[j] = *reinterpret_cast<const DoubleVec*>(y + j * stride + c);
    UNROLLED for (int i = 0; i < I; ++i) {
      const DoubleVec a = *reinterpret_cast<const DoubleVec*>(x + i * stride + c);
      UNROLLED for (int j = 0; j < J; ++j) total[i][j] += a * b[j];
    }
  }
  UNROLLED for (int i = 0; i < I; ++i)
    UNROLLED for (int j = 0; j < J; ++j)
      for (int lane = 0; lane < LANES / 2; ++lane) gram[i * gram_stride + j] += total[i][j][lane];
}

#define BY_RANKS(k, call)                                                          \
  for (int j0 = 0; j0 < k; j0 += RANKS) switch (std::min(RANKS, int(k) - j0)) {    \
    case 1: { constexpr int J = 1; call; break; }                                  \
    case 2: { constexpr int J = 2; call; break; }                                  \
    case 3: { constexpr int J = 3; call; break; }                                  \
    default: { constexpr int J = RANKS; call; break; }                             \
  }

int64_t padded(int64_t q) { return (q + LANES - 1) / LANES * LANES; }
int64_t padded_double(int64_t q) { return (q + LANES / 2 - 1) / (LANES / 2) * (LANES / 2); }

// Whole registers, and one more where rows would else begin at multiples of 256 bytes and compete for the same places of the cache.
int64_t row_stride(int64_t q) { return padded(q) % 64 ? padded(q) : padded(q) + LANES; }

// From column c0 on ``stride`` columns of A [k, q] as float64, zeros beyond q.
void read_rows(const float* A, int64_t k, int64_t q, int64_t c0, int64_t stride, double* out) {
  const int64_t here = std::min(stride, q - c0);
  for (int64_t j = 0; j < k; ++j, out += stride) {
    std::copy_n(A + j * q + c0, here, out);
    std::fill(out + here, out + stride, 0.0);
  }
}

// x yᵀ of k and l rows of ``stride`` numbers, the first ``count`` of each, added to gram [k, l].
void add_products(const double* x, int64_t k, const double* y, int64_t l, int64_t stride, int64_t count, double* gram) {
  int64_t i = 0;
  for (; i + RANKS <= k; i += RANKS)
    BY_RANKS(l, (gram_tile<RANKS, J>(x + i * stride, y + j0 * stride, stride, count, gram + i * l + j0, l)))
  for (; i < k; ++i) BY_RANKS(l, (gram_tile<1, J>(x + i * stride, y + j0 * stride, stride, count, gram + i * l + j0, l)))
}

// The lower triangle of x xᵀ, of k rows of ``stride`` numbers, added to gram, in blocks; and the upper one from the lower.
void add_gram(const double* x, int64_t k, int64_t stride, double* gram) {
  int64_t i = 0;
  for (; i + RANKS <= k; i += RANKS)
    for (int64_t j = 0; j <= i; j += RANKS)
      gram_tile<RANKS, RANKS>(x + i * stride, x + j * stride, stride, stride, gram + i * k + j, k);
  for (; i < k; ++i)
    BY_RANKS(i + 1, (gram_tile<1, J>(x + i * stride, x + j0 * stride, stride, stride, gram + i * k + j0, k)))
}

// x xᵀ of K rows of q float32 numbers, added to gram: few enough for all sums to lie in registers.
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
      for (int s = 0; s < SUMS; ++s)
        for (int lane = 0; lane < LANES / 2; ++lane) gram[i * K + j] += total[s][i][j][lane];
}

void mirror(double* gram, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < i; ++j) gram[j * k + i] = gram[i * k + j];
}

}  // namespace
