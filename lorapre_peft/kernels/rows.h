// Adam's row part for some rows of one matrix: what needs the gradient, without any p×q temporary.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "linalg.h"

namespace {

// Below this Σ g² is summed in float64 alone: no square that float32 loses, of up to 1e10, then counts.
constexpr double SMALL_SQUARE = 1e-20;
constexpr int PACKED_RANKS = 10; // of both moments, up to which A and Bᵀx are used where they are
constexpr int BLOCK = 64;        // rows whose factors are followed together; a multiple of ROWS
constexpr int FOLLOWED = 3072;   // columns times ranks whose parts of A and Bᵀx fill half of the first-level cache
constexpr int STEP_CHUNK = 512;  // the most columns of a tile of `wide`
constexpr int LOOK_CHUNK = 512;  // columns that `look` takes at once: DOT_ROWS rows of them stay in the first-level cache

// One of the two factored moments, M ≈ B A, in one step. With X = x Aᵀ R its rows become B' = keep · B + gain · X, and the update takes
// (by_B · B + by_X · X) A. x is the gradient for m, its absolute value for v.
struct Moment {
  int k = 0, gram_columns = 0;
  float *B = nullptr, *A = nullptr;  // the state, [p, k] and [k, q]
  float keep = 0, gain = 0, by_B = 0, by_X = 0;
  std::vector<float> R;      // [k, k] in rows of whole registers
  std::vector<float> own_A;  // a copy of A [k, stride] where the state's is not read in place
  std::vector<double> gram;  // A Aᵀ [k, k]
  bool restarts = false;     // directions whose row of A was zero: only the copy has their new one
  double old_square = 0;     // ‖A‖²_F before that
};

// One matrix in one step: everything that the row part reads. Without a second moment, of rank 0, `param` takes the momentum itself, in
// float32, and keeps no weights.
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

// What some rows leave behind: their products with A [rows, k], of the gradient as it is, from `look` to `run`; and for the columns
// B'ᵀx (or Bᵀx) [k, stride], and B'ᵀ[B' | B] [k, 2k] (or BᵀB [k, k]).
struct Sums {
  std::vector<float> dots[2], P[2];
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
  std::vector<float> rows, columns, cross;
  std::vector<double> held, sums, work, small;
};

class Rows {
 public:
  Rows(const Step& step, Scratch& scratch, Sums& sums) : s(step), scratch(scratch), sums(sums) {}

  // Σ g² of some rows, and what `run` needs of them before ‖g‖ is known. ``later`` is memory that it will need as well.
  double look(int64_t begin, int64_t end, std::vector<Later> later) {
    double square = s.q <= NARROW ? 0 : look_wide(begin, end);
    if (!(square > SMALL_SQUARE && square <= FLT_MAX))  // float32 products may have lost something
      square = sum_of_squares(s.grad, s.grad_type, begin * s.q, end * s.q, std::move(later));
    return square;
  }

  void run(int64_t begin, int64_t end) { s.q <= NARROW ? narrow(begin, end) : wide(begin, end); }

 private:
  const Step& s;
  Scratch& scratch;
  Sums& sums;

  // The normalised update (m + residual · g)/(√(root² + g²) + eps) of some entries, in place of m = C A_m; root = s v_B v_A. All three
  // have room for whole registers.
  void normalise(float* m, const float* root, const float* g, int count, const Ahead& ahead) {
    for (int c = 0; c < count; c += LANES) {
      ahead.fetch(c);
      const Vec v = load(root + c), x = load(g + c);
      const Vec momentum = load(m + c) + s.residual * x;
      store(m + c, s.moment[1].k ? over_root(momentum, v * v + x * x, s.eps) : momentum);
    }
    look_at(m, count);
  }

  // What is recorded of a normalised update.
  void look_at(const float* u, int count) {
    if (s.metrics)
      for (int c = 0; c < count; ++c)
        sums.largest = std::max(sums.largest, std::fabs(u[c])), sums.clamped += std::fabs(u[c]) > s.bound;
  }

  // θ ← θ − lr (clamped u + λ θ) for ``count`` weights that follow each other from ``at`` on; u has room for whole registers.
  void move(const float* u, int64_t at, int count) {
    if (!s.moment[1].k) return void(std::copy_n(u, count, static_cast<float*>(s.param) + at));
    const float lr = s.lr, decay = s.decay, bound = s.bound;
    auto moved = [=](Vec old, int c) { return old - (lr * at_most(at_least(load(u + c), -bound), bound) + decay * old); };
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
      write(s.param, s.param_type, at + from, here, theta);
    }
  }

  // Rows of the gradient in float32, times ``scale``, in whole registers and ``rows`` rows of ``stride`` numbers: zeros where there is none.
  void read_tile(int64_t first, int count, int rows, int64_t c0, int columns, float scale, float* x, int stride) const {
    const int here = int(std::min<int64_t>(columns, s.q - c0));
    for (int r = 0; r < rows; ++r, x += stride) {
      if (r < count && here == columns && s.grad_type == FLOAT32) {
        const float* from = static_cast<const float*>(s.grad) + (first + r) * s.q + c0;
        for (int c = 0; c < columns; c += LANES) store(x + c, scale * load(from + c));
        continue;
      }
      if (r < count) read(s.grad, s.grad_type, (first + r) * s.q + c0, here, x);
      std::fill(x + (r < count ? here : 0), x + columns, 0.f);
      for (int c = 0; c < columns; c += LANES) store(x + c, scale * load(x + c));
    }
  }

  // A moment's factor A as the kernels read it: rows of whole registers, ``stride`` apart.
  const float* A(int i) const { return s.moment[i].own_A.empty() ? s.moment[i].A : s.moment[i].own_A.data(); }
  int64_t A_stride(int i) const { return s.moment[i].own_A.empty() ? s.q : s.stride; }

  // The products of the gradient's rows with A into ``sums.dots``, and Σ g².
  double look_wide(int64_t begin, int64_t end) {
    alignas(64) float copy[DOT_ROWS * LOOK_CHUNK];
    const int sweeps = (s.moment[0].k + DOT_RANKS - 1) / DOT_RANKS + (s.moment[1].k + DOT_RANKS - 1) / DOT_RANKS;
    double square = 0;
    for (int i = 0; i < 2; ++i) sums.dots[i].assign((end - begin + DOT_ROWS) * s.moment[i].k, 0.f);
    for (int64_t first = begin; first < end; first += DOT_ROWS) {
      const int count = int(std::min<int64_t>(DOT_ROWS, end - first));
      for (int64_t c0 = 0; c0 < s.q; c0 += LOOK_CHUNK) {
        const int columns = int(std::min<int64_t>(LOOK_CHUNK, padded(s.q - c0)));
        const float* x = static_cast<const float*>(s.grad) + first * s.q + c0;
        int64_t stride = s.q;
        if (s.grad_type != FLOAT32 || count < DOT_ROWS || c0 + columns > s.q) {
          read_tile(first, count, DOT_ROWS, c0, columns, 1, copy, LOOK_CHUNK);
          x = copy, stride = LOOK_CHUNK;
        }
        square += square_tile(x, stride, columns);
        Ahead ahead = c0 + LOOK_CHUNK < s.q ? grad_ahead(first, c0 + LOOK_CHUNK) : grad_ahead(first + DOT_ROWS, 0);
        ahead.rows = (DOT_ROWS + sweeps - 1) / sweeps;
        for (int i = 0; i < 2; ++i) {
          const int k = s.moment[i].k;
          const int64_t a_stride = A_stride(i);
          const float* a = A(i) + c0;
          float* dots = sums.dots[i].data() + (first - begin) * k;
          int j = 0;
          for (; j + DOT_RANKS <= k; j += DOT_RANKS, ahead.at += ahead.rows * ahead.stride)
            i ? dot_tile<DOT_ROWS, DOT_RANKS, true>(x, stride, a + j * a_stride, a_stride, columns, dots + j, k, ahead)
              : dot_tile<DOT_ROWS, DOT_RANKS, false>(x, stride, a + j * a_stride, a_stride, columns, dots + j, k, ahead);
          for (; j < k; ++j, ahead.at += ahead.rows * ahead.stride)
            i ? dot_tile<DOT_ROWS, 1, true>(x, stride, a + j * a_stride, a_stride, columns, dots + j, k, ahead)
              : dot_tile<DOT_ROWS, 1, false>(x, stride, a + j * a_stride, a_stride, columns, dots + j, k, ahead);
        }
      }
    }
    return square;
  }

  Ahead grad_ahead(int64_t row, int64_t column) const {
    const int size = size_of(s.grad_type);
    return {static_cast<const char*>(s.grad) + (row * s.q + column) * size, s.q * size, size, ROWS};
  }
  Ahead param_ahead(int64_t row, int64_t column) const {
    const int size = size_of(s.param_type);
    return {static_cast<const char*>(s.param) + (row * s.q + column) * size, s.q * size, size, ROWS};
  }

  // Entries of a register lie along a row.
  void wide(int64_t begin, int64_t end) {
    const int64_t q = s.q;
    constexpr int SIZE = STEP_WIDTH * LANES;
    const int ranks = s.moment[0].k + s.moment[1].k;
    const int chunk = std::clamp(FOLLOWED / ranks / SIZE * SIZE, SIZE, STEP_CHUNK);
    alignas(64) float x[ROWS * STEP_CHUNK], u[ROWS * STEP_CHUNK];
    start_block(end - begin);
    const bool packed = ranks > PACKED_RANKS;
    if (packed) scratch.columns.resize(2 * ranks * chunk);
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, end - first));
      for (int i = 0; i < 2; ++i) follow(i, first, count, sums.dots[i].data() + (first - begin) * s.moment[i].k);
      for (int64_t c0 = 0; c0 < q; c0 += chunk) {
        const int here = int(std::min<int64_t>(chunk, q - c0)), columns = int(padded(here));
        packed ? pack(c0, here, chunk) : place(c0);
        for (int r0 = 0; r0 < count; r0 += ROWS) {
          const int rows = std::min(ROWS, count - r0);
          const bool more = r0 + ROWS < count;
          const int64_t next_row = first + (more ? r0 + ROWS : 0), next_column = more ? c0 : c0 + chunk;
          const Ahead grad = grad_ahead(next_row, next_column), param = param_ahead(next_row, next_column);
          read_tile(first + r0, rows, ROWS, c0, columns, s.g_scale, x, STEP_CHUNK);
          int c = 0;
          for (; c + STEP_WIDTH * LANES <= columns; c += STEP_WIDTH * LANES) step_tile<STEP_WIDTH>(r0, c, x + c, u + c, grad, param);
          for (; c < columns; c += LANES) step_tile<1>(r0, c, x + c, u + c, grad, param);
          for (int r = 0; r < rows; ++r) {
            look_at(u + r * STEP_CHUNK, here);
            move(u + r * STEP_CHUNK, (first + r0 + r) * q + c0, here);
          }
        }
        if (packed) add_packed(c0, columns);
      }
    }
    for (int i = 0; i < 2; ++i) {
      const Moment& moment = s.moment[i];
      for (int j = 0; j < moment.k; ++j) {
        double* gram = sums.grams[i].data() + j * moment.gram_columns;
        for (int l = 0; l < moment.k; ++l) gram[l] += block[i].gram[std::max(j, l) * block[i].stride + std::min(j, l)];
        for (int l = moment.k; l < moment.gram_columns; ++l) gram[l] += block[i].cross[j * block[i].stride + l - moment.k];
      }
    }
  }

  // Some columns of a moment's A and of Bᵀx, in rows that lie so far apart.
  struct Tile {
    const float* A;
    float* P;
    int64_t A_stride, P_stride;
  } tile[2];

  void place(int64_t c0) {
    for (int i = 0; i < 2; ++i) tile[i] = {A(i) + c0, sums.P[i].data() + c0, A_stride(i), s.stride};
  }

  // Copies side by side, with zeros for Bᵀx: where they are, the rows of many ranks lie in as many pages and in the same places of a cache.
  void pack(int64_t c0, int here, int chunk) {
    float *to = scratch.columns.data(), *P = to + (s.moment[0].k + s.moment[1].k) * chunk;
    for (int i = 0; i < 2; ++i) {
      tile[i] = {to, P, chunk, chunk};
      for (int j = 0; j < s.moment[i].k; ++j, to += chunk, P += chunk) {
        std::fill(std::copy_n(A(i) + j * A_stride(i) + c0, here, to), to + padded(here), 0.f);
        std::fill_n(P, chunk, 0.f);
      }
    }
  }

  void add_packed(int64_t c0, int columns) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < s.moment[i].k; ++j) {
        const float* from = tile[i].P + j * tile[i].P_stride;
        float* P = sums.P[i].data() + j * s.stride + c0;
        for (int c = 0; c < columns; c += LANES) store(P + c, load(P + c) + load(from + c));
      }
  }

  // ROWS rows and W registers of columns: their part of B'ᵀx, and their normalised update.
  template <int W>
  void step_tile(int r0, int c, const float* x, float* u, const Ahead& grad, const Ahead& param) {
    UNROLLED for (int w = 0; w < W; ++w) grad.fetch(c + w * LANES), param.fetch(c + w * LANES);
    Vec value[ROWS][W], total[ROWS][W];
    const Block &m = block[0], &v = block[1];
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) {
        value[r][w] = load(x + r * STEP_CHUNK + w * LANES);
        total[r][w] = s.residual * value[r][w];
      }
    follow_tile<W>(m.left + r0 * m.stride, m.C + r0 * m.stride, m.stride, s.moment[0].k, tile[0].A + c, tile[0].A_stride, tile[0].P + c, tile[0].P_stride, value, total);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) {
        store(u + r * STEP_CHUNK + w * LANES, total[r][w]);
        value[r][w] = absolute(value[r][w]);
        total[r][w] = Vec{};
      }
    if (!s.moment[1].k) return;
    follow_tile<W>(v.left + r0 * v.stride, v.C + r0 * v.stride, v.stride, s.moment[1].k, tile[1].A + c, tile[1].A_stride, tile[1].P + c, tile[1].P_stride, value, total);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) {
        float* to = u + r * STEP_CHUNK + w * LANES;
        store(to, over_root(load(to), total[r][w] * total[r][w] + value[r][w] * value[r][w], s.eps));
      }
  }

  // A block of rows of one moment, in rows of ``stride`` numbers: B, B', what the update multiplies A by, and ``left``, the one whose products with
  // x are summed. And sums: B'ᵀB, and in float64 ``held``ᵀ ``held``, of B' as well or, for `newton`, of B.
  struct Block {
    int64_t stride;
    float *old, *now, *C, *left, *cross;
    double *held, *gram;
  } block[2];

  void start_block(int64_t rows) {
    const int64_t stride = padded(std::max(s.moment[0].k, s.moment[1].k)), most = std::min<int64_t>(BLOCK, (rows + ROWS - 1) / ROWS * ROWS), size = most * stride;
    scratch.rows.assign(6 * size, 0.f);
    scratch.cross.assign(2 * stride * stride, 0.f);
    scratch.held.assign(most * stride, 0.0);
    scratch.sums.assign(2 * stride * stride, 0.0);
    for (int i = 0; i < 2; ++i) {
      float* own = scratch.rows.data() + 3 * i * size;
      block[i] = {stride, own, own + size, own + 2 * size, s.projects_new ? own + size : own, scratch.cross.data() + i * stride * stride,
                  scratch.held.data(), scratch.sums.data() + i * stride * stride};
    }
  }

  // From dots = g Aᵀ of some rows: B' into the state, what the update multiplies A by, and the sums of B'ᵀ[B' | B].
  void follow(int i, int64_t first, int count, const float* dots) {
    const Moment& moment = s.moment[i];
    const int k = moment.k;
    const Block& b = block[i];
    const float scale = i ? std::fabs(s.g_scale) : s.g_scale;
    for (int r = 0; r < count; r += ROWS) outer(dots + r * k, k, moment.R.data(), padded(k), int(padded(k)), b.C + r * b.stride, b.stride);
    for (int r = 0; r < count; ++r) {
      float *state = moment.B + (first + r) * k, *old = b.old + r * b.stride, *now = b.now + r * b.stride, *fit = b.C + r * b.stride;
      std::copy_n(state, k, old);
      for (int j = 0; j < k; j += LANES) store(fit + j, scale * load(fit + j));
      if (s.metrics && i == 0)  // ‖X A‖² = Σ X (A Aᵀ) Xᵀ over the rows of X
        for (int j = 0; j < k; ++j)
          for (int l = 0; l < k; ++l) sums.captured += moment.gram[j * k + l] * fit[j] * fit[l];
      for (int j = 0; j < k; j += LANES) {
        const Vec X = load(fit + j), B = load(old + j);
        store(now + j, moment.keep * B + moment.gain * X);
        store(fit + j, moment.by_B * B + moment.by_X * X);
      }
      std::copy_n(now, k, state);
      std::copy_n(b.left + r * b.stride, k, b.held + r * b.stride);
    }
    BY_RANKS(k, (combine_block<J>(b.held + j0, b.stride, 1, b.held, b.stride, padded_double(j0 + J), count, b.gram + j0 * b.stride)))
    if (!s.projects_new) return;
    const int whole = (count + ROWS - 1) / ROWS * ROWS;
    std::fill(b.now + count * b.stride, b.now + whole * b.stride, 0.f);  // an earlier block's rows
    project<false>(b.now, b.stride, k, b.old, b.stride, whole, int(padded(k)), b.cross, b.stride);
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
        i ? project<true>(A[i], k, k, x[0], CHUNK, blocks, whole, C[i], CHUNK)
          : project<false>(A[i], k, k, x[0], CHUNK, blocks, whole, C[i], CHUNK);
        follow_transposed(moment, first, count, whole, C[i], B[i], B_new[i], i);
        const float* left = s.projects_new ? B_new[i] : B[i];
        for (int c0 = 0; c0 < q; c0 += ROWS) {
          Ahead param = param_ahead(first + CHUNK, (c0 + i) * CHUNK);
          param.rows = 1;
          if (i) BY_RANKS(k, (dot_tile<ROWS, J, true>(x[c0], CHUNK, left + j0 * CHUNK, CHUNK, whole, P[i] + c0 * k + j0, k, param)))
          else BY_RANKS(k, (dot_tile<ROWS, J, false>(x[c0], CHUNK, left + j0 * CHUNK, CHUNK, whole, P[i] + c0 * k + j0, k, param)))
        }
      }
      for (int c0 = 0; c0 < q; c0 += ROWS) {
        outer(A[0] + c0 * s.moment[0].k, s.moment[0].k, C[0], CHUNK, whole, u[c0], CHUNK);
        outer(A[1] + c0 * s.moment[1].k, s.moment[1].k, C[1], CHUNK, whole, *root, CHUNK);
        for (int c = c0; c < std::min(q, c0 + ROWS); ++c) {
          Ahead param = param_ahead(first + CHUNK, c * CHUNK);
          param.rows = c - c0 >= 2;
          normalise(u[c], root[c - c0], x[c], count, param);
        }
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
        for (int l = 0; l < k; ++l) fit += moment.R[l * padded(k) + j] * load(C + l * CHUNK + r);
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

}  // namespace
