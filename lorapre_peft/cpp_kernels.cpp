// Adam's row part for all matrices of a bucket, and the sums that are larger than k×k, on a CPU, without any p×q temporary.
//
// Compiled by cpp_backend.py, which says what the arguments are. A matrix is p×q and row-major, its factors are B [p, k] and
// A [k, q]; the first of two moments is m, the second v. Work is cut into tasks by shape alone and every sum has a fixed order, so that
// the result does not depend on the number of threads. Products are float32, Gram matrices float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpp_blocks.h"

namespace {

// The fields of cpp_backend.Adam, one for one.
struct Adam {
  int64_t n, p, q, k, splits, first_row;
  const void* const* grads;  // of n matrices
  void* const* params;
  const float *B, *A, *R;    // [2, n, p, k], [2, n, k, q], [2, n, k, k]
  float *B_new, *projected;  // [2, n, p, k]; [splits, 2, n, k, q]
  double* grams;             // [splits, 2, n, k, 2k] if projects_new, else [splits, 2, n, k, k]
  const float* table;        // [13, n], the rows of eager.TABLE
  const int64_t* keys;       // [2, n] for stochastic rounding, or null
  float* largest;            // [splits, n] for metrics, or null
  int64_t* clamped;
  float bound;
  int32_t grad_type, param_type, projects_new, threads;
};

// Some rows of one matrix.
struct Task {
  const Adam& all;
  const int64_t i, begin, end, q;
  const int k, gram_columns;
  const Type grad_type, param_type;
  float g_scale, keep[2], gain[2], c_B, c_X, residual, v_scale, eps, step, decay;
  bool updates;
  uint32_t key, salted;
  float most = 0;
  int64_t over = 0;

  Task(const Adam& a, int64_t i, int64_t begin, int64_t end)
      : all(a), i(i), begin(begin), end(end), q(a.q), k(int(a.k)), gram_columns(a.projects_new ? 2 * k : k),
        grad_type(Type(a.grad_type)), param_type(Type(a.param_type)) {
    auto scalar = [&](int row) { return a.table[row * a.n + i]; };
    g_scale = scalar(0), keep[0] = scalar(1), gain[0] = scalar(2), keep[1] = scalar(3), gain[1] = scalar(4);
    c_B = scalar(5), c_X = scalar(6), residual = scalar(7), v_scale = scalar(8), eps = scalar(9);
    step = scalar(10), decay = scalar(11), updates = scalar(12) > 0;
    key = a.keys ? uint32_t(a.keys[i]) : 0, salted = a.keys ? uint32_t(a.keys[a.n + i]) : 0;
  }

  // u: C A_m, v: s v_B v_A, g: the gradient, theta: the weights, of entries whose counters for random bits are at + stride · c; u
  // becomes the new weights, rounded to their type.
  void update(float* __restrict u, const float* __restrict v, const float* __restrict g, const float* __restrict theta,
              int count, int64_t at, int64_t stride) {
    for (int c = 0; c < count; ++c) u[c] = (u[c] + residual * g[c]) / (std::sqrt(v[c] * v[c] + g[c] * g[c]) + eps);
    const float bound = all.bound;
    if (all.largest && updates)
      for (int c = 0; c < count; ++c) most = std::max(most, std::fabs(u[c])), over += std::fabs(u[c]) > bound;
    for (int c = 0; c < count; ++c) {
      const float clipped = u[c] > bound ? bound : u[c] < -bound ? -bound : u[c];
      u[c] = theta[c] - (step * clipped + decay * theta[c]);
    }
    if (param_type == FLOAT32) return;
    const uint32_t counter = uint32_t(all.first_row * q + at), by = uint32_t(stride);
    if (all.keys)
      for (int c = 0; c < count; ++c) u[c] = stochastic(u[c], counter + c * by, key, salted);
    else
      for (int c = 0; c < count; ++c) u[c] = nearest(u[c]);
  }

  // Entries of a register lie along a row. sums: [2, k, q padded], grams: [2, k, gram_columns].
  void wide(std::vector<float>& columns, std::vector<float>& rows, float* sums, double* grams) {
    alignas(64) float x[ROWS][CHUNK], size[ROWS][CHUNK], m[ROWS][CHUNK], root[ROWS][CHUNK];
    const int64_t stride = padded(q), n = all.n, p = all.p;
    // A of both moments, with columns of zeros up to whole registers.
    const float* A[2];
    for (int s = 0; s < 2; ++s) {
      A[s] = all.A + (s * n + i) * k * q;
      if (stride == q) continue;
      float* to = columns.data() + s * k * stride;
      for (int j = 0; j < k; ++j) {
        std::memcpy(to + j * stride, A[s] + j * q, q * sizeof(float));
        std::fill(to + j * stride + q, to + (j + 1) * stride, 0.f);
      }
      A[s] = to;
    }
    // Of both moments: B' and B, or B alone, of a block [BLOCK, gram_stride], and the sums of their products [k, gram_stride].
    const int64_t gram_stride = padded(gram_columns);
    std::vector<double> held(2 * BLOCK * gram_stride), gram_sums(2 * k * gram_stride);
    float *dots = rows.data(), *B = dots + 2 * BLOCK * k, *B_new = B + 2 * BLOCK * k, *C = B_new + 2 * BLOCK * k;

    for (int64_t first = begin; first < end; first += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, end - first));
      std::fill(rows.begin(), rows.end(), 0.f);
      auto read_block = [&](int r0, int64_t c0) {
        const int here = int(std::min<int64_t>(CHUNK, q - c0)), whole = int(padded(here));
        for (int r = 0; r < ROWS; ++r) {
          const bool inside = r0 + r < count;
          if (inside) read(all.grads[i], grad_type, (first + r0 + r) * q + c0, here, x[r]);
          std::fill(x[r] + (inside ? here : 0), x[r] + whole, 0.f);
          for (int c = 0; c < whole; ++c) x[r][c] *= g_scale;
          for (int c = 0; c < whole; ++c) size[r][c] = std::fabs(x[r][c]);
        }
        return whole;
      };

      for (int64_t c0 = 0; c0 < q; c0 += CHUNK)
        for (int r0 = 0; r0 < count; r0 += ROWS) {
          const int whole = read_block(r0, c0);
          BY_RANKS(k, dot_block<J>(x, A[0] + j0 * stride + c0, stride, whole, dots + r0 * k + j0, k))
          BY_RANKS(k, dot_block<J>(size, A[1] + j0 * stride + c0, stride, whole, dots + (BLOCK + r0) * k + j0, k))
        }

      // B' = keep · B + gain · X with X = dots R, and what the update's two products take for B.
      for (int s = 0; s < 2; ++s) {
        const float* R = all.R + (s * n + i) * k * k;
        const float by_B = s == 0 ? c_B : v_scale, by_X = s == 0 ? c_X : 0;
        for (int r = 0; r < count; ++r) {
          const int64_t at = ((s * n + i) * p + first + r) * k, own = (s * BLOCK + r) * k;
          const float *dot = dots + own, *old = all.B + at;
          float *here = B + own, *now = B_new + own, *c = C + own, *fit = c;
          for (int l = 0; l < k; ++l)
            for (int j = 0; j < k; ++j) fit[j] += dot[l] * R[l * k + j];
          for (int j = 0; j < k; ++j) {
            here[j] = old[j];
            now[j] = keep[s] * old[j] + gain[s] * fit[j];
            c[j] = by_B * old[j] + by_X * fit[j];
          }
          std::memcpy(all.B_new + at, now, k * sizeof(float));
          double* both = held.data() + (s * BLOCK + r) * gram_stride;
          std::copy_n(all.projects_new ? now : here, k, both);
          if (all.projects_new) std::copy_n(here, k, both + k);
        }
        const double* both = held.data() + s * BLOCK * gram_stride;
        double* to = gram_sums.data() + s * k * gram_stride;
        BY_RANKS(k, combine_block<J>(both + j0, gram_stride, 1, both, gram_stride, count, to + j0 * gram_stride))
      }

      const float* left = all.projects_new ? B_new : B;
      for (int64_t c0 = 0; c0 < q; c0 += CHUNK)
        for (int r0 = 0; r0 < count; r0 += ROWS) {
          const int here = int(std::min<int64_t>(CHUNK, q - c0)), whole = read_block(r0, c0);
          const float *left_m = left + r0 * k, *left_v = left + (BLOCK + r0) * k;
          BY_RANKS(k, outer_block<J>(C + r0 * k + j0, k, A[0] + j0 * stride + c0, stride, whole, m, j0 > 0))
          BY_RANKS(k, outer_block<J>(C + (BLOCK + r0) * k + j0, k, A[1] + j0 * stride + c0, stride, whole, root, j0 > 0))
          BY_RANKS(k, project_block<J>(left_m + j0, k, x, whole, sums + j0 * stride + c0, stride))
          BY_RANKS(k, project_block<J>(left_v + j0, k, size, whole, sums + (k + j0) * stride + c0, stride))
          for (int r = 0; updates && r < std::min(ROWS, count - r0); ++r) {
            const int64_t at = (first + r0 + r) * q + c0;
            read(all.params[i], param_type, at, here, size[r]);  // it is used up
            update(m[r], root[r], x[r], size[r], here, at, 1);
            write(all.params[i], param_type, at, here, m[r]);
          }
        }
    }
    for (int j = 0; j < 2 * k; ++j) std::copy_n(gram_sums.data() + j * gram_stride, gram_columns, grams + j * gram_columns);
    for (int s = 0; s < 2; ++s)
      for (int j = 0; j < k; ++j)
        std::memcpy(projected(s) + j * q, sums + (s * k + j) * stride, q * sizeof(float));
  }

  // Entries of a register lie along a column: the same with the roles of rows and columns exchanged, for at most NARROW columns.
  void narrow(std::vector<float>& columns, std::vector<float>& rows, float* sums, double* grams) {
    alignas(64) float x[NARROW][CHUNK], size[NARROW][CHUNK], m[ROWS][CHUNK], root[ROWS][CHUNK], flat[NARROW * CHUNK];
    const int64_t n = all.n, p = all.p;
    const int q = int(this->q), blocks = (q + ROWS - 1) / ROWS * ROWS;
    std::memset(x[q], 0, (blocks - q) * sizeof *x), std::memset(size[q], 0, (blocks - q) * sizeof *size);
    // Aᵀ of both moments [2, blocks, k], with rows of zeros up to whole blocks; BᵀX of both [2, blocks, k].
    std::fill(columns.begin(), columns.end(), 0.f);
    float* A = columns.data();
    for (int s = 0; s < 2; ++s)
      for (int j = 0; j < k; ++j)
        for (int c = 0; c < q; ++c) A[(s * blocks + c) * k + j] = all.A[((s * n + i) * k + j) * q + c];
    // [k, CHUNK] of both moments: x Aᵀ, then what the update's products take for B; old B; B'.
    float *C = rows.data(), *B = C + 2 * k * CHUNK, *B_new = B + 2 * k * CHUNK;
    const float* R = all.R;

    for (int64_t first = begin; first < end; first += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, end - first)), whole = int(padded(count));
      std::fill_n(C, 2 * k * CHUNK, 0.f);
      read_transposed(all.grads[i], grad_type, first * q, count, q, flat, x);
      for (int c = 0; c < q; ++c) {
        std::fill(x[c] + count, x[c] + whole, 0.f);
        for (int r = 0; r < whole; ++r) x[c][r] *= g_scale;
        for (int r = 0; r < whole; ++r) size[c][r] = std::fabs(x[c][r]);
      }
      for (int c0 = 0; c0 < q; c0 += ROWS) {
        BY_RANKS(k, project_block<J>(A + c0 * k + j0, k, x + c0, whole, C + j0 * CHUNK, CHUNK))
        BY_RANKS(k, project_block<J>(A + (blocks + c0) * k + j0, k, size + c0, whole, C + (k + j0) * CHUNK, CHUNK))
      }
      for (int s = 0; s < 2; ++s) {
        const int64_t at = ((s * n + i) * p + first) * k;
        float *here = B + s * k * CHUNK, *now = B_new + s * k * CHUNK, *dots = C + s * k * CHUNK;
        transpose(all.B + at, k, count, k, here, CHUNK);
        for (int j = 0; j < k; ++j) {
          float* fit = now + j * CHUNK;
          std::fill_n(here + j * CHUNK + count, whole - count, 0.f);
          for (int l = 0; l < k; ++l) {
            const float weight = R[((s * n + i) * k + l) * k + j];
            for (int r = 0; r < whole; ++r) fit[r] = (l ? fit[r] : 0.f) + weight * dots[l * CHUNK + r];
          }
        }
        const float by_B = s == 0 ? c_B : v_scale, by_X = s == 0 ? c_X : 0;
        for (int j = 0; j < k; ++j)
          for (int at = j * CHUNK; at < j * CHUNK + whole; ++at) {
            const float fit = now[at];
            now[at] = keep[s] * here[at] + gain[s] * fit;
            dots[at] = by_B * here[at] + by_X * fit;
          }
        transpose(now, CHUNK, k, count, all.B_new + at, k);
        const float* left = all.projects_new ? now : here;
        for (int j = 0; j < k; ++j)
          for (int l = 0; l < gram_columns; ++l) {
            const float *a = left + j * CHUNK, *b = l < k ? left + l * CHUNK : here + (l - k) * CHUNK;
            double total = 0;
#pragma omp simd reduction(+ : total)
            for (int r = 0; r < whole; ++r) total += double(a[r]) * b[r];
            grams[(s * k + j) * gram_columns + l] += total;
          }
      }
      const float* left = all.projects_new ? B_new : B;
      for (int c0 = 0; c0 < q; c0 += ROWS) {
        BY_RANKS(k, dot_block<J>(x + c0, left + j0 * CHUNK, CHUNK, whole, sums + c0 * k + j0, k))
        BY_RANKS(k, dot_block<J>(size + c0, left + (k + j0) * CHUNK, CHUNK, whole, sums + (blocks + c0) * k + j0, k))
      }
      if (!updates) continue;
      read_transposed(all.params[i], param_type, first * q, count, q, flat, size);  // it is used up
      for (int c0 = 0; c0 < q; c0 += ROWS) {
        BY_RANKS(k, outer_block<J>(A + c0 * k + j0, k, C + j0 * CHUNK, CHUNK, whole, m, j0 > 0))
        BY_RANKS(k, outer_block<J>(A + (blocks + c0) * k + j0, k, C + (k + j0) * CHUNK, CHUNK, whole, root, j0 > 0))
        for (int c = c0; c < std::min(q, c0 + ROWS); ++c) {
          update(m[c - c0], root[c - c0], x[c], size[c], count, first * q + c, q);
          std::memcpy(x[c], m[c - c0], count * sizeof(float));
        }
      }
      write_transposed(all.params[i], param_type, first * q, count, q, flat, x);
    }
    for (int s = 0; s < 2; ++s)
      for (int j = 0; j < k; ++j)
        for (int c = 0; c < q; ++c) projected(s)[j * q + c] = sums[(s * blocks + c) * k + j];
  }

  float* projected(int s) const { return all.projected + slot(s) * k * q; }
  int64_t slot(int s) const { return (split * 2 + s) * all.n + i; }
  int64_t split = 0;
};

}  // namespace

extern "C" {

void adam(const Adam* args) {
  const Adam& a = *args;
  const int k = int(a.k), gram_columns = a.projects_new ? 2 * k : k;
  const int64_t rows_per_split = (a.p + a.splits - 1) / a.splits, stride = padded(a.q) + ROWS;
  const bool narrow = a.q <= NARROW;

#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> columns(2 * k * stride), sums(2 * k * stride), rows(narrow ? 6 * k * CHUNK : 8 * BLOCK * k);
    std::vector<double> grams(2 * k * gram_columns);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < a.n * a.splits; ++index) {
      const int64_t split = index % a.splits, begin = split * rows_per_split;
      Task task(a, index / a.splits, begin, std::min(a.p, begin + rows_per_split));
      task.split = split;
      std::fill(sums.begin(), sums.end(), 0.f);
      std::fill(grams.begin(), grams.end(), 0.0);
      narrow ? task.narrow(columns, rows, sums.data(), grams.data())
             : task.wide(columns, rows, sums.data(), grams.data());
      for (int s = 0; s < 2; ++s)
        std::copy_n(grams.data() + s * k * gram_columns, k * gram_columns, a.grams + task.slot(s) * k * gram_columns);
      if (a.largest) {
        a.largest[split * a.n + task.i] = task.most;
        a.clamped[split * a.n + task.i] = task.over;
      }
    }
  }
}

// A Aᵀ of n matrices A [k, q], float64 [k, k].
void gram(const float* A, int64_t n, int64_t k, int64_t q, double* out, int32_t threads) {
  const int64_t stride = std::min<int64_t>(CHUNK, padded(q));
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> part(k * stride);
#pragma omp for
    for (int64_t i = 0; i < n; ++i) {
      std::fill_n(out + i * k * k, k * k, 0.0);
      for (int64_t c0 = 0; c0 < q; c0 += stride) {
        read_rows(A + i * k * q, k, q, c0, stride, part.data());
        add_gram(part.data(), k, stride, out + i * k * k);
      }
      mirror(out + i * k * k, k);
    }
  }
}

// A' = W [A; P] in float64, written as float32, and A' A'ᵀ; of n matrices, W [k, 2k], A and P [k, q].
void columns(const double* W, const float* A, const float* P, int64_t n, int64_t k, int64_t q, float* out, double* gram,
             int32_t threads) {
  const int64_t stride = std::min<int64_t>(CHUNK, padded(q));
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> both(2 * k * stride), made(k * stride);
#pragma omp for
    for (int64_t i = 0; i < n; ++i) {
      const double* weights = W + i * 2 * k * k;
      std::fill_n(gram + i * k * k, k * k, 0.0);
      for (int64_t c0 = 0; c0 < q; c0 += stride) {
        read_rows(A + i * k * q, k, q, c0, stride, both.data());
        read_rows(P + i * k * q, k, q, c0, stride, both.data() + k * stride);
        std::fill(made.begin(), made.end(), 0.0);
        BY_RANKS(k, combine_block<J>(weights + j0 * 2 * k, 1, 2 * k, both.data(), stride, 2 * k, made.data() + j0 * stride))
        for (int64_t j = 0; j < k; ++j)
          std::copy_n(made.data() + j * stride, std::min(stride, q - c0), out + (i * k + j) * q + c0);
        add_gram(made.data(), k, stride, gram + i * k * k);
      }
      mirror(gram + i * k * k, k);
    }
  }
}

// ‖x‖₂ of n tensors of one type, accumulated in float64.
void norms(const void* const* x, const int64_t* sizes, int64_t n, int32_t type, double* out, int32_t threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    float part[CHUNK];
    double total = 0;
    for (int64_t at = 0; at < sizes[i]; at += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, sizes[i] - at));
      read(x[i], Type(type), at, count, part);
      double some = 0;
#pragma omp simd reduction(+ : some)
      for (int c = 0; c < count; ++c) some += double(part[c]) * part[c];
      total += some;
    }
    out[i] = std::sqrt(total);
  }
}

}  // extern "C"
