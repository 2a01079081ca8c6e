// Adam's row part for some rows of one matrix: what needs the gradient, without any p×q temporary.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "linalg.h"

namespace {

constexpr int BLOCK = 32;               // rows that are read together, at most; a multiple of ROWS
constexpr int64_t BLOCK_ENTRIES = 1 << 16;  // entries that are read together: a quarter of a megabyte stays in the second-level cache

// One of the two factored moments, M ≈ B A, in one step. With X = x Aᵀ R its rows become B' = keep · B + gain · X, and the update takes
// (by_B · B + by_X · X) A. x is the gradient for m, its absolute value for v.
struct Moment {
  int k = 0, gram_columns = 0;
  float *B = nullptr, *A = nullptr;  // the state, [p, k] and [k, q]
  float keep = 0, gain = 0, by_B = 0, by_X = 0;
  std::vector<float> R, padded_A;  // [k, k]; A with rows of whole registers
  std::vector<double> gram;        // A Aᵀ [k, k]
};

// One matrix in one step: everything that the row part reads.
struct Step {
  int64_t p, q, stride;  // stride: of rows of x, A and Bᵀx, in whole registers
  const void* grad;
  void* param;
  Type grad_type, param_type;
  Moment moment[2];  // m and v
  bool projects_new;  // the sums that A' comes from take the new B
  bool metrics, stochastic;
  float g_scale, residual, eps, lr, decay, bound;  // lr: times update_scale; decay: lr · λ
  uint32_t key, salted;  // for random bits
};

// What some rows leave behind for the columns: B'ᵀx (or Bᵀx) [k, stride], and B'ᵀ[B' | B] [k, 2k] (or BᵀB [k, k]).
struct Sums {
  std::vector<float> P[2];
  std::vector<double> grams[2];
  float largest = 0;
  int64_t clamped = 0;
  double captured = 0;

  void reset(const Step& step) {
    for (int s = 0; s < 2; ++s) {
      P[s].assign(step.moment[s].k * (step.stride + ROWS), 0.f);
      grams[s].assign(size_t(step.moment[s].k) * step.moment[s].gram_columns, 0.0);
    }
    largest = 0, clamped = 0, captured = 0;
  }

  void add(const Sums& other) {
    for (int s = 0; s < 2; ++s) {
      for (size_t i = 0; i < P[s].size(); ++i) P[s][i] += other.P[s][i];
      for (size_t i = 0; i < grams[s].size(); ++i) grams[s][i] += other.grams[s][i];
    }
    largest = std::max(largest, other.largest), clamped += other.clamped, captured += other.captured;
  }
};

// Room that a thread keeps from matrix to matrix.
struct Scratch {
  std::vector<float> x, rows, columns;
  std::vector<double> held, sums, work, small;
};

class Rows {
 public:
  Rows(const Step& step, Scratch& scratch, Sums& sums) : s(step), scratch(scratch), sums(sums) {}

  void run(int64_t begin, int64_t end) { s.q <= NARROW ? narrow(begin, end) : wide(begin, end); }

 private:
  const Step& s;
  Scratch& scratch;
  Sums& sums;

  // The normalised update (m + residual · g)/(√(root² + g²) + eps) of some entries, in place of m = C A_m; root = s v_B v_A. All three
  // have room for whole registers.
  void normalise(float* m, const float* root, const float* g, int count) {
    for (int c = 0; c < count; c += LANES) {
      const Vec v = load(root + c), x = load(g + c);
      store(m + c, over_root(load(m + c) + s.residual * x, v * v + x * x, s.eps));
    }
    if (s.metrics)
      for (int c = 0; c < count; ++c)
        sums.largest = std::max(sums.largest, std::fabs(m[c])), sums.clamped += std::fabs(m[c]) > s.bound;
  }

  // θ ← θ − lr (clamped u + λ θ) for ``count`` weights that follow each other from ``at`` on; u has room for whole registers.
  void move(const float* u, int64_t at, int count) {
    auto moved = [&](Vec old, int c) {
      return old - (s.lr * at_most(at_least(load(u + c), -s.bound), s.bound) + s.decay * old);
    };
    if (s.param_type == FLOAT32) {
      float* theta = static_cast<float*>(s.param) + at;
      int c = 0;
      for (; c + LANES <= count; c += LANES) store(theta + c, moved(load(theta + c), c));
      if (c == count) return;
      float tail[LANES] = {};
      std::copy(theta + c, theta + count, tail);
      store(tail, moved(load(tail), c));
      std::copy_n(tail, count - c, theta + c);
      return;
    }
    float theta[CHUNK];
    for (int from = 0; from < count; from += CHUNK) {
      const int here = std::min(CHUNK, count - from);
      read(s.param, s.param_type, at + from, here, theta);
      for (int c = 0; c < here; c += LANES) store(theta + c, moved(load(theta + c), from + c));
      const uint32_t counter = uint32_t(at + from);
      if (s.stochastic)
        for (int c = 0; c < here; ++c) theta[c] = stochastic(theta[c], counter + c, s.key, s.salted);
      else
        for (int c = 0; c < here; ++c) theta[c] = round_to(s.param_type, theta[c]);
      write(s.param, s.param_type, at + from, here, theta);
    }
  }

  // Entries of a register lie along a row.
  void wide(int64_t begin, int64_t end) {
    const int64_t q = s.q, stride = s.stride, whole = padded(q);
    const int block = int(std::clamp<int64_t>(BLOCK_ENTRIES / stride / ROWS * ROWS, ROWS, BLOCK));
    const int most = std::max(s.moment[0].k, s.moment[1].k), size = BLOCK * most;
    alignas(64) float m[ROWS][CHUNK], root[ROWS][CHUNK];
    scratch.x.resize(block * stride);
    scratch.rows.resize(8 * size);
    float* x = scratch.x.data();
    float *dots[2], *B[2], *B_new[2], *C[2];
    double *held[2], *gram_sums[2];
    const int64_t gram_stride = padded(2 * most);
    scratch.held.resize(2 * BLOCK * gram_stride);
    scratch.sums.assign(2 * most * gram_stride, 0.0);
    for (int i = 0; i < 2; ++i) {
      float* own = scratch.rows.data() + 4 * i * size;
      dots[i] = own, B[i] = own + size, B_new[i] = own + 2 * size, C[i] = own + 3 * size;
      held[i] = scratch.held.data() + i * BLOCK * gram_stride, gram_sums[i] = scratch.sums.data() + i * most * gram_stride;
    }
    std::fill(scratch.held.begin(), scratch.held.end(), 0.0);

    for (int64_t first = begin; first < end; first += block) {
      const int count = int(std::min<int64_t>(block, end - first)), whole_rows = (count + ROWS - 1) / ROWS * ROWS;
      for (int r = 0; r < whole_rows; ++r) {
        float* row = x + r * stride;
        const int64_t here = r < count ? q : 0;
        if (here) read(s.grad, s.grad_type, (first + r) * q, int(here), row);
        std::fill(row + here, row + stride, 0.f);
        if (s.g_scale != 1)
          for (int64_t c = 0; c < here; ++c) row[c] *= s.g_scale;
      }
      std::fill(scratch.rows.begin(), scratch.rows.end(), 0.f);
      const Moment &mm = s.moment[0], &mv = s.moment[1];
      for (int64_t c0 = 0; c0 < whole; c0 += CHUNK) {
        const int columns = int(std::min<int64_t>(CHUNK, whole - c0));
        for (int r0 = 0; r0 < whole_rows; r0 += ROWS) {
          const float* tile = x + r0 * stride + c0;
          prefetch(first + r0, std::min(ROWS, count - r0), c0, int(std::min<int64_t>(CHUNK, q - c0)));
          BY_RANKS(mm.k, (dot_block<J, false>(tile, stride, A(0) + j0 * stride + c0, stride, columns, dots[0] + r0 * mm.k + j0, mm.k)))
          BY_RANKS(mv.k, (dot_block<J, true>(tile, stride, A(1) + j0 * stride + c0, stride, columns, dots[1] + r0 * mv.k + j0, mv.k)))
        }
      }
      for (int i = 0; i < 2; ++i) follow(s.moment[i], first, count, dots[i], B[i], B_new[i], C[i], held[i], gram_stride, gram_sums[i], i == 0);
      for (int64_t c0 = 0; c0 < whole; c0 += CHUNK) {
        const int columns = int(std::min<int64_t>(CHUNK, whole - c0)), here = int(std::min<int64_t>(CHUNK, q - c0));
        project<false>((s.projects_new ? B_new : B)[0], mm.k, x + c0, stride, whole_rows, columns, sums.P[0].data() + c0, stride);
        project<true>((s.projects_new ? B_new : B)[1], mv.k, x + c0, stride, whole_rows, columns, sums.P[1].data() + c0, stride);
        for (int r0 = 0; r0 < whole_rows; r0 += ROWS) {
          const float* tile = x + r0 * stride + c0;
          outer(C[0] + r0 * mm.k, mm.k, A(0) + c0, stride, columns, *m, CHUNK);
          outer(C[1] + r0 * mv.k, mv.k, A(1) + c0, stride, columns, *root, CHUNK);
          for (int r = 0; r < std::min(ROWS, count - r0); ++r) {
            normalise(m[r], root[r], tile + r * stride, here);
            move(m[r], (first + r0 + r) * q + c0, here);
          }
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      const Moment& moment = s.moment[i];
      for (int j = 0; j < moment.k; ++j)
        for (int l = 0; l < moment.gram_columns; ++l)
          sums.grams[i][j * moment.gram_columns + l] += gram_sums[i][j * gram_stride + l];
    }
  }

  // Have the weights of some rows and columns on their way while the products of the gradient are computed.
  void prefetch(int64_t row, int rows, int64_t column, int columns) const {
    const int size = s.param_type == FLOAT32 ? 4 : 2;
    for (int r = 0; r < rows; ++r) {
      const char* at = static_cast<const char*>(s.param) + ((row + r) * s.q + column) * size;
      for (int c = 0; c < columns * size; c += 64) __builtin_prefetch(at + c, 1, 2);
    }
  }

  const float* A(int i) const { return s.moment[i].padded_A.empty() ? s.moment[i].A : s.moment[i].padded_A.data(); }

  // From dots = x Aᵀ of some rows: B' into the state, what the update multiplies A by, and the sums of B'ᵀ[B' | B].
  void follow(const Moment& moment, int64_t first, int count, const float* dots, float* B, float* B_new, float* C,
              double* held, int64_t gram_stride, double* gram_sums, bool first_moment) {
    const int k = moment.k;
    for (int r = 0; r < count; ++r) {
      float *state = moment.B + (first + r) * k, *old = B + r * k, *now = B_new + r * k, *fit = C + r * k;
      const float* dot = dots + r * k;
      for (int l = 0; l < k; ++l)
        for (int j = 0; j < k; ++j) fit[j] += dot[l] * moment.R[l * k + j];
      if (s.metrics && first_moment)  // ‖X A‖² = Σ X (A Aᵀ) Xᵀ over the rows of X
        for (int j = 0; j < k; ++j)
          for (int l = 0; l < k; ++l) sums.captured += moment.gram[j * k + l] * fit[j] * fit[l];
      for (int j = 0; j < k; ++j) {
        old[j] = state[j];
        now[j] = moment.keep * old[j] + moment.gain * fit[j];
        fit[j] = moment.by_B * old[j] + moment.by_X * fit[j];
        state[j] = now[j];
      }
      double* both = held + r * gram_stride;
      std::copy_n(s.projects_new ? now : old, k, both);
      if (s.projects_new) std::copy_n(old, k, both + k);
    }
    BY_RANKS(k, (combine_block<J>(held + j0, gram_stride, 1, held, gram_stride, count, gram_sums + j0 * gram_stride)))
  }

  // Entries of a register lie along a column: the same with the roles of rows and columns exchanged, for at most NARROW columns.
  void narrow(int64_t begin, int64_t end) {
    alignas(64) float x[NARROW][CHUNK], u[NARROW][CHUNK], root[ROWS][CHUNK], flat[NARROW * CHUNK];
    const int q = int(s.q), blocks = (q + ROWS - 1) / ROWS * ROWS;
    const int most = std::max(s.moment[0].k, s.moment[1].k);
    std::fill(x[q], x[q] + (blocks - q) * CHUNK, 0.f);
    // Aᵀ of both moments [blocks, k], with rows of zeros up to whole blocks, and P transposed likewise.
    scratch.columns.assign(4 * blocks * most, 0.f);
    float *A[2], *P[2];
    for (int i = 0; i < 2; ++i) {
      const Moment& moment = s.moment[i];
      A[i] = scratch.columns.data() + 2 * i * blocks * most, P[i] = A[i] + blocks * most;
      for (int j = 0; j < moment.k; ++j)
        for (int c = 0; c < q; ++c) A[i][c * moment.k + j] = moment.A[j * q + c];
    }
    // [k, CHUNK] of both moments: x Aᵀ, then what the update's products take for B; old B; B'.
    scratch.rows.resize(6 * most * CHUNK);
    float *C[2], *B[2], *B_new[2];
    for (int i = 0; i < 2; ++i) {
      C[i] = scratch.rows.data() + 3 * i * most * CHUNK;
      B[i] = C[i] + most * CHUNK, B_new[i] = B[i] + most * CHUNK;
    }

    for (int64_t first = begin; first < end; first += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, end - first)), whole = int(padded(count));
      read_transposed(s.grad, s.grad_type, first * q, count, q, flat, x);
      for (int c = 0; c < q; ++c) {
        std::fill(x[c] + count, x[c] + whole, 0.f);
        if (s.g_scale != 1)
          for (int r = 0; r < whole; ++r) x[c][r] *= s.g_scale;
      }
      for (int i = 0; i < 2; ++i) {
        const Moment& moment = s.moment[i];
        const int k = moment.k;
        std::fill_n(C[i], k * CHUNK, 0.f);
        i ? project<true>(A[i], k, x[0], CHUNK, blocks, whole, C[i], CHUNK)
          : project<false>(A[i], k, x[0], CHUNK, blocks, whole, C[i], CHUNK);
        follow_transposed(moment, first, count, whole, C[i], B[i], B_new[i], i);
        const float* left = s.projects_new ? B_new[i] : B[i];
        for (int c0 = 0; c0 < q; c0 += ROWS) {
          if (i) BY_RANKS(k, (dot_block<J, true>(x[c0], CHUNK, left + j0 * CHUNK, CHUNK, whole, P[i] + c0 * k + j0, k)))
          else BY_RANKS(k, (dot_block<J, false>(x[c0], CHUNK, left + j0 * CHUNK, CHUNK, whole, P[i] + c0 * k + j0, k)))
        }
      }
      for (int c0 = 0; c0 < q; c0 += ROWS) {
        outer(A[0] + c0 * s.moment[0].k, s.moment[0].k, C[0], CHUNK, whole, u[c0], CHUNK);
        outer(A[1] + c0 * s.moment[1].k, s.moment[1].k, C[1], CHUNK, whole, *root, CHUNK);
        for (int c = c0; c < std::min(q, c0 + ROWS); ++c) normalise(u[c], root[c - c0], x[c], count);
      }
      transpose(*u, CHUNK, q, count, flat, q);
      move(flat, first * q, count * q);
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < s.moment[i].k; ++j)
        for (int c = 0; c < q; ++c) sums.P[i][j * s.stride + c] += P[i][c * s.moment[i].k + j];
  }

  // `follow` of a block of rows that lie along registers. C: x Aᵀ [k, CHUNK], and then what the update multiplies A by.
  void follow_transposed(const Moment& moment, int64_t first, int count, int whole, float* C, float* B, float* B_new, int i) {
    const int k = moment.k;
    switch (k) {
      case 1: std::copy_n(moment.B + first, count, B); break;
      case 2: split_columns<2>(moment.B + first * k, count, B, CHUNK); break;
      case 4: split_columns<4>(moment.B + first * k, count, B, CHUNK); break;
      default: transpose(moment.B + first * k, k, count, k, B, CHUNK);
    }
    for (int j = 0; j < k; ++j) {
      std::fill_n(B + j * CHUNK + count, whole - count, 0.f);
      for (int r = 0; r < whole; r += LANES) {
        Vec fit = {};
        for (int l = 0; l < k; ++l) fit += moment.R[l * k + j] * load(C + l * CHUNK + r);
        store(B_new + j * CHUNK + r, fit);
      }
    }
    if (s.metrics && i == 0)
      for (int j = 0; j < k; ++j)
        for (int l = 0; l < k; ++l)
          for (int r = 0; r < count; ++r) sums.captured += moment.gram[j * k + l] * B_new[j * CHUNK + r] * B_new[l * CHUNK + r];
    for (int j = 0; j < k; ++j)
      for (int at = j * CHUNK; at < j * CHUNK + whole; at += LANES) {
        const Vec fit = load(B_new + at), old = load(B + at);
        store(B_new + at, moment.keep * old + moment.gain * fit);
        store(C + at, moment.by_B * old + moment.by_X * fit);
      }
    switch (k) {
      case 1: std::copy_n(B_new, count, moment.B + first); break;
      case 2: join_columns<2>(B_new, CHUNK, count, moment.B + first * k); break;
      case 4: join_columns<4>(B_new, CHUNK, count, moment.B + first * k); break;
      default: transpose(B_new, CHUNK, k, count, moment.B + first * k, k);
    }
    // The rows of Bᵀ side by side in float64: B' and B, or B alone.
    const int width = moment.gram_columns;
    scratch.held.resize(2 * k * CHUNK);
    double* held = scratch.held.data();
    for (int j = 0; j < width; ++j) {
      const float* from = s.projects_new && j < k ? B_new + j * CHUNK : B + (j % k) * CHUNK;
      std::copy_n(from, whole, held + j * CHUNK);
    }
    add_products(held, k, held, width, CHUNK, whole, sums.grams[i].data());
  }
};

// B ← B Lᵀ of rows of K numbers, L lower triangular.
template <int K>
void turn_rows(float* B, int64_t p, const float* L) {
  for (int64_t r = 0; r < p; ++r, B += K) {
    float row[K];
    for (int j = 0; j < K; ++j) {
      row[j] = 0;
      for (int l = 0; l <= j; ++l) row[j] += B[l] * L[j * K + l];
    }
    for (int j = 0; j < K; ++j) B[j] = row[j];
  }
}

// The same for any k, by blocks of rows; the smallest are unrolled.
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
