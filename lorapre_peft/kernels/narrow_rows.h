// This file holds the stage `rows` for matrices of at most NARROW columns, where a register holds entries of a column.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace {

class NarrowRows : public Rows {
 public:
  using Rows::Rows;

  // Does what `WideRows::run` does, with the roles of rows and columns exchanged. It also computes x Aᵀ, which `look`
  // leaves out for narrow matrices.
  void run(int64_t begin, int64_t end) {
    alignas(64) float x[NARROW][HEIGHT], u[NARROW][HEIGHT], root[ROWS][HEIGHT];
    alignas(64) float flat[NARROW * HEIGHT];
    const int q = int(s.q), blocks = (q + ROWS - 1) / ROWS * ROWS;
    const int most = std::max(s.moment[0].k, s.moment[1].k);
    std::fill(x[q], x[q] + (blocks - q) * HEIGHT, 0.f);
    // A and P hold the transposes of both moments' A and Bᵀx, [blocks, k], with zeros in the rows beyond q.
    scratch.columns.assign(4 * blocks * most, 0.f);
    float *A[2], *P[2];
    for (int i = 0; i < 2; ++i) {
      const Moment& moment = s.moment[i];
      A[i] = scratch.columns.data() + 2 * i * blocks * most, P[i] = A[i] + blocks * most;
      for (int j = 0; j < moment.k; ++j)
        for (int c = 0; c < q; ++c) A[i][c * moment.k + j] = moment.A[j * q + c];
    }
    // These are transposed as well, [k, HEIGHT] of both moments: C, which holds x Aᵀ at first, the old B, and B'.
    scratch.rows.resize(6 * most * HEIGHT);
    float *C[2], *B[2], *B_new[2];
    for (int i = 0; i < 2; ++i) {
      C[i] = scratch.rows.data() + 3 * i * most * HEIGHT;
      B[i] = C[i] + most * HEIGHT, B_new[i] = B[i] + most * HEIGHT;
    }

    scratch.next.split((end - begin + HEIGHT - 1) / HEIGHT * q);
    for (int64_t first = begin; first < end; first += HEIGHT) {
      const int count = int(std::min<int64_t>(HEIGHT, end - first)), whole = int(padded(count));
      read_transposed(s.grad, s.grad_type, first * q, count, q, flat, x);
      for (int c = 0; c < q; ++c) {
        std::fill(x[c] + count, x[c] + whole, 0.f);
        if (s.g_scale != 1)
          for (int r = 0; r < whole; ++r) x[c][r] *= s.g_scale;
      }
      for (int i = 0; i < 2; ++i) {
        const Moment& moment = s.moment[i];
        const int k = moment.k;
        std::fill_n(C[i], k * HEIGHT, 0.f);
        i ? project<true>(A[i], k, k, x[0], HEIGHT, blocks, whole, C[i], HEIGHT)
          : project<false>(A[i], k, k, x[0], HEIGHT, blocks, whole, C[i], HEIGHT);
        follow_transposed(moment, first, count, whole, C[i], B[i], B_new[i], i);
        const float* left = s.projects_new ? B_new[i] : B[i];
        for (int c0 = 0; c0 < q; c0 += ROWS) {
          // The weights of the next block are q runs of HEIGHT entries. Of each ROWS runs, the first is prefetched
          // with the products of m, the second with those of v, and the others in the loop below.
          RowsAhead param = param_ahead(first + HEIGHT, (c0 + i) * HEIGHT);
          param.rows = 1;
          const float* from = x[c0];
          float* to = P[i] + c0 * k;
          if (i)
            BY_RANKS(k, (dot_tile<ROWS, J, true>(from, HEIGHT, left + j0 * HEIGHT, HEIGHT, whole, to + j0, k, param)))
          else
            BY_RANKS(k, (dot_tile<ROWS, J, false>(from, HEIGHT, left + j0 * HEIGHT, HEIGHT, whole, to + j0, k, param)))
        }
      }
      for (int c0 = 0; c0 < q; c0 += ROWS) {
        outer(A[0] + c0 * s.moment[0].k, s.moment[0].k, C[0], HEIGHT, whole, u[c0], HEIGHT);
        outer(A[1] + c0 * s.moment[1].k, s.moment[1].k, C[1], HEIGHT, whole, *root, HEIGHT);
        for (int c = c0; c < std::min(q, c0 + ROWS); ++c) {
          RowsAhead param = param_ahead(first + HEIGHT, c * HEIGHT);
          param.rows = c - c0 >= 2;
          scratch.next.fetch();
          normalise(u[c], root[c - c0], x[c], count, param);
        }
      }
      transpose(*u, HEIGHT, q, count, flat, q);
      move(flat, first * q, count * q);
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < s.moment[i].k; ++j)
        for (int c = 0; c < q; ++c) sums.P[i][j * s.stride + c] += P[i][c * s.moment[i].k + j];
  }

 private:
  // Replaces m = C m_A by the update u of `Step`, for ``count`` entries. root: C v_A. The arrays have room for whole
  // registers.
  void normalise(float* m, const float* root, const float* g, int count, const RowsAhead& ahead) {
    for (int c = 0; c < count; c += LANES) {
      ahead.fetch(c);
      const Vec v = load(root + c), x = load(g + c);
      const Vec momentum = load(m + c) + s.residual * x;
      store(m + c, s.moment[1].k ? over_root(momentum, v * v + x * x, s.eps) : momentum);
    }
    look_at(m, count);
  }

  // Does what `WideRows::follow` does, with transposed matrices [k, HEIGHT]. ``C`` holds x Aᵀ at first, and C
  // afterwards.
  void follow_transposed(const Moment& moment, int64_t first, int count, int whole, float* C, float* B, float* B_new,
                         int i) {
    const int k = moment.k;
    switch (k) {
      case 1: std::copy_n(moment.B + first, count, B); break;
      case 2: split_columns<2>(moment.B + first * k, count, B, HEIGHT); break;
      case 4: split_columns<4>(moment.B + first * k, count, B, HEIGHT); break;
      default: transpose(moment.B + first * k, k, count, k, B, HEIGHT);
    }
    for (int j = 0; j < k; ++j) {
      std::fill_n(B + j * HEIGHT + count, whole - count, 0.f);
      for (int r = 0; r < whole; r += LANES) {
        Vec fit = {};
        for (int l = 0; l < k; ++l) fit += moment.R[l * padded(k) + j] * load(C + l * HEIGHT + r);
        store(B_new + j * HEIGHT + r, fit);
      }
    }
    if (s.metrics && i == 0)
      for (int j = 0; j < k; ++j)
        for (int l = 0; l < k; ++l)
          for (int r = 0; r < count; ++r)
            sums.captured += moment.gram[j * k + l] * B_new[j * HEIGHT + r] * B_new[l * HEIGHT + r];
    for (int j = 0; j < k; ++j)
      for (int at = j * HEIGHT; at < j * HEIGHT + whole; at += LANES) {
        const Vec fit = load(B_new + at), old = load(B + at);
        store(B_new + at, moment.keep * old + moment.gain * fit);
        store(C + at, moment.by_B * old + moment.by_X * fit);
      }
    switch (k) {
      case 1: std::copy_n(B_new, count, moment.B + first); break;
      case 2: join_columns<2>(B_new, HEIGHT, count, moment.B + first * k); break;
      case 4: join_columns<4>(B_new, HEIGHT, count, moment.B + first * k); break;
      default: transpose(B_new, HEIGHT, k, count, moment.B + first * k, k);
    }
    const float* left = s.projects_new ? B_new : B;
    double* gram = sums.grams[i].data();
    const int stride = moment.gram_columns;
    add_products(left, left, k, HEIGHT, whole, gram, stride);
    if (s.projects_new) add_products(left, B, k, HEIGHT, whole, gram + k, stride);
  }
};

}  // namespace
