// This file holds the stages `look` and `rows` for matrices of more than NARROW columns, where a register holds
// entries of a row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace {

// These are the best of a few values, measured on a CPU with 16 lanes and a first-level cache of 48 kB, and on one
// with 8 lanes and 32 kB.
//
// `run` uses A and Bᵀx where they lie if both ranks together are at most this. Otherwise it packs them (see `pack`).
constexpr int PACKED_RANKS = LANES == 16 ? 10 : 8;
// `run` takes at most this many columns at a time.
constexpr int STEP_CHUNK = LANES == 16 ? 512 : 256;
// `look` takes this many columns at a time. DOT_ROWS rows of them fit the first-level cache.
constexpr int LOOK_CHUNK = 512;
// `follow` takes this many rows at a time. It is a multiple of ROWS.
constexpr int BLOCK = 128;
// The columns that are packed at a time, times the ranks, are about this many. A and Bᵀx then take 48 kB.
constexpr int FOLLOWED = 6144;

class WideRows : public Rows {
 public:
  using Rows::Rows;

  // Writes g m_Aᵀ and |g| v_Aᵀ of some rows to ``sums.dots``, with the gradient before scaling as g, and returns Σ g².
  double look(int64_t begin, int64_t end) {
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
        RowsAhead ahead = c0 + LOOK_CHUNK < s.q ? grad_ahead(first, c0 + LOOK_CHUNK) : grad_ahead(first + DOT_ROWS, 0);
        ahead.rows = (DOT_ROWS + sweeps - 1) / sweeps;
        for (int i = 0; i < 2; ++i) {
          const int k = s.moment[i].k;
          float* dots = sums.dots[i].data() + (first - begin) * k;
          int j = 0;
          for (; j + DOT_RANKS <= k; j += DOT_RANKS, ahead.at += ahead.rows * ahead.stride)
            look_tile<DOT_RANKS>(i, x, stride, j, c0, columns, dots, ahead);
          for (; j < k; ++j, ahead.at += ahead.rows * ahead.stride)
            look_tile<1>(i, x, stride, j, c0, columns, dots, ahead);
        }
      }
    }
    return square;
  }

  // Computes the stage `rows`: it writes B' into the state, moves the weights, and adds up P and grams in ``sums``.
  void run(int64_t begin, int64_t end) {
    const int64_t q = s.q;
    constexpr int SIZE = STEP_WIDTH * LANES;
    const int ranks = s.moment[0].k + s.moment[1].k;
    const int chunk = std::clamp(FOLLOWED / ranks / SIZE * SIZE, SIZE, STEP_CHUNK);
    alignas(64) float x[ROWS * STEP_CHUNK], u[ROWS * STEP_CHUNK];
    start_block(end - begin);
    const bool packed = ranks > PACKED_RANKS;
    if (packed) scratch.columns.resize(2 * ranks * chunk);
    scratch.next.split((end - begin + ROWS - 1) / ROWS * ((q + SIZE - 1) / SIZE));
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
          const RowsAhead grad = grad_ahead(next_row, next_column), param = param_ahead(next_row, next_column);
          read_tile(first + r0, rows, ROWS, c0, columns, s.g_scale, x, STEP_CHUNK);
          project_moment(0, r0, x, columns);
          project_moment(1, r0, x, columns);
          int c = 0;
          for (; c + SIZE <= columns; c += SIZE) {
            scratch.next.fetch();
            momentum_tile<STEP_WIDTH>(r0, c, x + c, u + c, grad, param);
          }
          for (; c < columns; c += LANES) momentum_tile<1>(r0, c, x + c, u + c, grad, param);
          if (s.moment[1].k) {
            for (c = 0; c + SIZE <= columns; c += SIZE) normalise_tile<STEP_WIDTH>(r0, c, x + c, u + c);
            for (; c < columns; c += LANES) normalise_tile<1>(r0, c, x + c, u + c);
          }
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
        for (int l = moment.k; l < moment.gram_columns; ++l)
          gram[l] += block[i].cross[j * block[i].stride + l - moment.k];
      }
    }
  }


 private:
  // Adds the products of DOT_ROWS rows of x with J rows of A, from row j on, over some columns to ``dots``.
  template <int J>
  void look_tile(int i, const float* x, int64_t stride, int j, int64_t c0, int columns, float* dots,
                 const RowsAhead& ahead) const {
    const int k = s.moment[i].k;
    const float* a = A(i) + j * A_stride(i) + c0;
    i ? dot_tile<DOT_ROWS, J, true>(x, stride, a, A_stride(i), columns, dots + j, k, ahead)
      : dot_tile<DOT_ROWS, J, false>(x, stride, a, A_stride(i), columns, dots + j, k, ahead);
  }

  // Copies ``count`` rows of the gradient from row ``first`` and column c0 on to x, as float32 times ``scale``. x has
  // ``rows`` rows of ``stride`` numbers, of which ``columns`` are written, with zeros where there is no entry.
  void read_tile(int64_t first, int count, int rows, int64_t c0, int columns, float scale, float* x,
                 int stride) const {
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

  // Returns a moment's A in rows of whole registers. `A_stride` is the distance between its rows.
  const float* A(int i) const { return s.moment[i].own_A.empty() ? s.moment[i].A : s.moment[i].own_A.data(); }
  int64_t A_stride(int i) const { return s.moment[i].own_A.empty() ? s.q : s.stride; }

  RowsAhead grad_ahead(int64_t row, int64_t column) const {
    const int size = size_of(s.grad_type);
    return {static_cast<const char*>(s.grad) + (row * s.q + column) * size, s.q * size, size, ROWS};
  }

  // Holds where a moment's A and Bᵀx lie, from some column on, and the distance between their rows.
  struct Tile {
    const float* A;
    float* P;
    int64_t A_stride, P_stride;
  } tile[2];

  void place(int64_t c0) {
    for (int i = 0; i < 2; ++i) tile[i] = {A(i) + c0, sums.P[i].data() + c0, A_stride(i), s.stride};
  }

  // Copies some columns of A to a buffer, and makes room there for Bᵀx, which starts at zero. Where they lie, the rows
  // of many ranks are in as many pages and compete for the same sets of the cache.
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

  // Adds the packed columns of Bᵀx to ``sums``.
  void add_packed(int64_t c0, int columns) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < s.moment[i].k; ++j) {
        const float* from = tile[i].P + j * tile[i].P_stride;
        float* P = sums.P[i].data() + j * s.stride + c0;
        for (int c = 0; c < columns; c += LANES) store(P + c, load(P + c) + load(from + c));
      }
  }

  // Adds the part of ROWS rows to a moment's B'ᵀx, or Bᵀx. It is inlined, because a call costs as much as two
  // registers of each row.
  inline __attribute__((always_inline)) void project_moment(int i, int r0, const float* x, int columns) {
    const int k = s.moment[i].k;
    const int64_t stride = block[i].stride;
    const float* left = block[i].left + r0 * stride;
    if (i)
      project_rows<ROWS, STEP_WIDTH, true>(left, stride, k, x, STEP_CHUNK, columns, tile[i].P, tile[i].P_stride);
    else
      project_rows<ROWS, STEP_WIDTH, false>(left, stride, k, x, STEP_CHUNK, columns, tile[i].P, tile[i].P_stride);
  }

  // Writes C m_A + residual · g to u for ROWS rows and W registers of columns, and prefetches what is read next.
  template <int W>
  void momentum_tile(int r0, int c, const float* x, float* u, const RowsAhead& grad, const RowsAhead& param) {
    UNROLLED for (int w = 0; w < W; ++w) grad.fetch(c + w * LANES), param.fetch(c + w * LANES);
    Vec total[ROWS][W];
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) total[r][w] = s.residual * load(x + r * STEP_CHUNK + w * LANES);
    add_outer<W>(block[0].C + r0 * block[0].stride, block[0].stride, s.moment[0].k, tile[0].A + c, tile[0].A_stride,
                 total);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) store(u + r * STEP_CHUNK + w * LANES, total[r][w]);
  }

  // Divides u by √((C v_A)² + g²) + eps for the same tile.
  template <int W>
  void normalise_tile(int r0, int c, const float* x, float* u) {
    Vec root[ROWS][W] = {};
    add_outer<W>(block[1].C + r0 * block[1].stride, block[1].stride, s.moment[1].k, tile[1].A + c, tile[1].A_stride,
                 root);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      UNROLLED for (int w = 0; w < W; ++w) {
        const Vec v = root[r][w], g = load(x + r * STEP_CHUNK + w * LANES);
        float* to = u + r * STEP_CHUNK + w * LANES;
        store(to, over_root(load(to), v * v + g * g, s.eps));
      }
  }

  // Holds a block of rows of one moment. The rows have ``stride`` numbers. old is B, now is B', C is that of `Moment`,
  // and left is B' for `als` and B for `newton`. Sums over all rows are cross = B'ᵀB in float32, and the lower
  // triangle of gram = leftᵀ left in float64, for which held is left in float64.
  struct Block {
    int64_t stride;
    float *old, *now, *C, *left, *cross;
    double *held, *gram;
  } block[2];

  void start_block(int64_t rows) {
    const int64_t stride = padded(std::max(s.moment[0].k, s.moment[1].k));
    const int64_t size = std::min<int64_t>(BLOCK, (rows + ROWS - 1) / ROWS * ROWS) * stride;
    scratch.rows.assign(6 * size, 0.f);
    scratch.cross.assign(2 * stride * stride, 0.f);
    scratch.held.assign(size, 0.0);
    scratch.sums.assign(2 * stride * stride, 0.0);
    for (int i = 0; i < 2; ++i) {
      float *own = scratch.rows.data() + 3 * i * size, *left = s.projects_new ? own + size : own;
      float* cross = scratch.cross.data() + i * stride * stride;
      double* gram = scratch.sums.data() + i * stride * stride;
      block[i] = {stride, own, own + size, own + 2 * size, left, cross, scratch.held.data(), gram};
    }
  }

  // Computes B' and C of ``count`` rows from dots, writes B' into the state, and adds to the block's gram and cross.
  void follow(int i, int64_t first, int count, const float* dots) {
    const Moment& moment = s.moment[i];
    const int k = moment.k;
    const Block& b = block[i];
    const float scale = i ? std::fabs(s.g_scale) : s.g_scale;
    for (int r = 0; r < count; r += ROWS)
      outer(dots + r * k, k, moment.R.data(), padded(k), int(padded(k)), b.C + r * b.stride, b.stride);
    for (int r = 0; r < count; ++r) {
      float *state = moment.B + (first + r) * k, *fit = b.C + r * b.stride;
      float *old = b.old + r * b.stride, *now = b.now + r * b.stride;
      std::copy_n(state, k, old);
      for (int j = 0; j < k; j += LANES) store(fit + j, scale * load(fit + j));
      if (s.metrics && i == 0)  // ‖X A‖² is the sum of X (A Aᵀ) Xᵀ over the rows of X.
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
    BY_RANKS(k, (combine_block<J>(b.held + j0, b.stride, 1, b.held, b.stride, padded_double(j0 + J), count,
                                  b.gram + j0 * b.stride)))
    if (!s.projects_new) return;
    const int whole = (count + ROWS - 1) / ROWS * ROWS;
    std::fill(b.now + count * b.stride, b.now + whole * b.stride, 0.f);  // These rows may hold an earlier block.
    project<false>(b.now, b.stride, k, b.old, b.stride, whole, int(padded(k)), b.cross, b.stride);
  }
};

}  // namespace
