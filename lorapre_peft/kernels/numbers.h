// This file holds what is done with numbers in registers: they are read, rounded and written, and small matrices of
// them are transposed.

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

// A vector register holds this many float32 numbers.
#ifndef LANES
#define LANES 8
#endif
// A tile has this many rows, so that each register of A that is loaded serves all of them.
constexpr int ROWS = 4;
// `look` multiplies tiles of this many rows of the gradient with this many rows of A.
constexpr int DOT_ROWS = LANES == 16 ? 8 : 4, DOT_RANKS = 2;
// An update is computed in tiles of ROWS rows and this many registers along each row.
constexpr int STEP_WIDTH = 2;
constexpr int LINE = 64;  // A cache line has this many bytes.
// Loops over long rows or columns use buffers of this many numbers, which stay in the first-level cache. It is a
// multiple of LANES.
constexpr int CHUNK = 256;
// A matrix of up to this many columns is narrow: a register then holds entries of a column instead of a row.
constexpr int NARROW = 32;
// Narrow matrices are computed in blocks of this many rows, whose buffers stay in the first-level cache. It is a
// multiple of LANES.
constexpr int HEIGHT = 128;
// Registers hold this many ranks of a factor at once, together with the sums for ROWS rows.
constexpr int RANKS = LANES == 16 ? 4 : 2;
// A tile of ROWS rows, or of RANKS ranks, has this many registers along each row.
constexpr int WIDTH = LANES == 16 ? 4 : 2;
// Vec holds LANES numbers. DoubleVec and HalfVec hold LANES / 2.
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
typedef float HalfVec __attribute__((vector_size(2 * LANES), aligned(4), may_alias));

// Unrolls the loop that follows. Otherwise compilers would keep the loop's array of registers in memory.
#define UNROLLED _Pragma("GCC unroll 16")

// Returns LANES / 2 numbers from x on as float64.
inline DoubleVec widened(const float* x) {
#if LANES == 16
  return (DoubleVec)_mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__AVX2__)
  return (DoubleVec)_mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(x), DoubleVec);
#endif
}

inline double sum_of(DoubleVec v) {
#if LANES == 16
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double sum = 0;
  UNROLLED for (int lane = 0; lane < LANES / 2; ++lane) sum += v[lane];
  return sum;
#endif
}

typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Index8 __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Index8){__VA_ARGS__})
#endif

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }

// Returns x and forces it into a register. Otherwise the compiler reloads an operand of two products, and these loops
// are bound by loads.
inline Vec held(Vec x) {
#if LANES == 8 && defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

// `at_least` and `at_most` return NaN where x is NaN: of two operands the instructions of x86 then return the second.
inline Vec at_least(Vec x, float low) {
#if LANES == 16
  return (Vec)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
  return x < low ? Vec{} + low : x;
#endif
}
inline Vec at_most(Vec x, float high) {
#if LANES == 16
  return (Vec)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
  return x > high ? Vec{} + high : x;
#endif
}

// Returns x / (√square + eps) to about two units in the last place. x86 has instructions that estimate 1/√x and 1/x,
// and one Newton step on each estimate is several times faster than the exact root and quotient.
inline Vec over_root(Vec x, Vec square, float eps) {
#if LANES == 16 || defined(__AVX2__)
  // The estimates at 0 and at infinity would lead to NaN.
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

// Writes the sum of the lanes of each of four registers, which lie ``stride`` registers apart.
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

// Returns the float16 number of these bits as float32. The expressions are such that compilers vectorise them.
inline float from_half(uint32_t half) {
  constexpr uint32_t EXPONENT = 0x0F800000, REBIAS = (127 - 15) << 23;
  const uint32_t bits = (half & 0x7FFF) << 13, exponent = bits & EXPONENT;
  const uint32_t rest = exponent == EXPONENT ? (128 - 16) << 23 : 0;  // Infinity and NaN need it.
  const float small = from_bits(bits + REBIAS + (1 << 23)) - from_bits(113 << 23);  // Zero and subnormals become this.
  const uint32_t found = exponent == 0 ? to_bits(small) : bits + REBIAS + rest;
  return from_bits(found | (half & 0x8000) << 16);
}

// Returns the bits of the float16 number nearest to x, with ties to even as in torch.
inline uint16_t to_half(float x) {
  constexpr uint32_t INFINITE = 0x7F800000, TOO_LARGE = (127 + 16) << 23, NORMAL = 113 << 23,
                     SHIFT = ((127 - 15) + (23 - 10) + 1) << 23;
  const uint32_t sign = to_bits(x) & 0x80000000u, bits = to_bits(x) ^ sign;
  const uint32_t small = to_bits(from_bits(bits) + from_bits(SHIFT)) - SHIFT;  // The addition rounds.
  const uint32_t normal = (bits - ((127 - 15) << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  const uint32_t found = bits >= TOO_LARGE ? (bits > INFINITE ? 0x7E00 : 0x7C00) : bits < NORMAL ? small : normal;
  return uint16_t(found | sign >> 16);
}

// Copies ``count`` entries of x from index ``at`` on to out, as float32.
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

// Returns the bfloat16 number nearest to x, with ties to even as in torch. NaN stays NaN.
inline float nearest(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return from_bits(x == x ? rounded : 0x7FC00000u);
}

// Returns the hash lowbias32 of bits xor key, which is one of the two rounds of rounding.random_bits.
inline uint32_t mix(uint32_t bits, uint32_t key) {
  bits ^= key;
  bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
  bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
  return bits ^ (bits >> 16);
}

// Returns one of the two bfloat16 neighbours of x at random, such that the expectation is x. Infinity stays infinity,
// and NaN stays NaN. The arguments after x choose the random bits, as in rounding.random_bits.
inline float stochastic(float x, uint32_t counter, uint32_t key, uint32_t salted) {
  const uint32_t bits = to_bits(x), random = mix(mix(counter, key), salted) & 0xFFFF;
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return from_bits(finite ? (bits + random) & 0xFFFF0000u : x == x ? bits : 0x7FC00000u);
}

inline int size_of(Type type) { return type == FLOAT32 ? 4 : 2; }

// Writes ``count`` values to x from index ``at`` on, rounded to the nearest. Values that `stochastic` has returned do
// not change.
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

// Writes to[c][r] = from[r][c] for 8 × 8 entries. It interleaves pairs of rows, then pairs of pairs, and then
// exchanges halves.
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

// `split_columns` writes to[c][r] = from[r][c] for C columns, and `join_columns` is its inverse. C is so small that
// compilers interleave the columns in registers.
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

// Writes to[c][r] = from[r][c].
void transpose(const float* from, int64_t from_stride, int rows, int columns, float* to, int64_t to_stride) {
  const int whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int r = 0; r < whole_rows; r += 8)
    for (int c = 0; c < whole_columns; c += 8)
      transpose8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int c = 0; c < columns; ++c)
    for (int r = c < whole_columns ? whole_rows : 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

// Writes rows of x [rows, columns], of which the first begins at index ``at``, as the columns of out [columns,
// HEIGHT], in float32. flat: a buffer for rows · columns numbers.
void read_transposed(const void* x, Type type, int64_t at, int rows, int columns, float* flat,
                     float (*out)[HEIGHT]) {
  const float* from = type == FLOAT32 ? static_cast<const float*>(x) + at : flat;
  if (type != FLOAT32) read(x, type, at, rows * columns, flat);
  transpose(from, columns, rows, columns, *out, HEIGHT);
}

}  // namespace
