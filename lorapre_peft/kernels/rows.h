// What the row part of Adam's step reads and leaves behind, and what its two forms share: how weights are written.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "blocks.h"

namespace {

// One of the two factored moments, M ≈ B A, in one step. With X = x Aᵀ R its rows become B' = keep · B + gain · X, and
// the update takes (by_B · B + by_X · X) A. x is the gradient for m, its absolute value for v.
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

// One matrix in one step: everything that the row part reads. Without a second moment, of rank 0, `param` takes the
// momentum itself, in float32, and keeps no weights.
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

// What some rows leave behind: their products with A [rows, k], of the gradient as it is, from `look` to `run`; and
// for the columns B'ᵀx (or Bᵀx) [k, stride], and B'ᵀ[B' | B] [k, 2k] (or BᵀB [k, k]).
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

// Prefetches the memory that a thread's next matrix reads, piece by piece while the thread computes this one.
class Prefetcher {
 public:
  void clear() { spans.clear(), now = 0; }
  void add(const void* from, int64_t bytes) {
    spans.push_back({static_cast<const char*>(from), static_cast<const char*>(from) + bytes});
  }
  // Says how many times `fetch` will be called. A part of a split matrix may have no rows, and calls it never.
  void split(int64_t calls) {
    int64_t lines = 0;
    for (const Span& span : spans) lines += (span.end - span.at + LINE - 1) / LINE;
    share = calls ? (lines + calls - 1) / calls : 0;
  }
  void fetch() {
    for (int64_t left = share; left && now < spans.size(); --left) {
      Span& span = spans[now];
      __builtin_prefetch(span.at, 0, 2);
      span.at += LINE;
      if (span.at >= span.end) ++now;
    }
  }

 private:
  struct Span { const char *at, *end; };
  std::vector<Span> spans;
  size_t now = 0;
  int64_t share = 0;
};

// Room that a thread keeps from matrix to matrix.
struct Scratch {
  Prefetcher next;
  std::vector<float> rows, columns, cross;
  std::vector<double> held, sums, work, small;
};

// The row part for some rows of one matrix: what needs the gradient, without any p×q temporary. Along a register lie
// entries of a row in `WideRows`, of a column in `NarrowRows`.
class Rows {
 public:
  Rows(const Step& step, Scratch& scratch, Sums& sums) : s(step), scratch(scratch), sums(sums) {}

 protected:
  const Step& s;
  Scratch& scratch;
  Sums& sums;

  // What is recorded of a normalised update.
  void look_at(const float* u, int count) {
    if (s.metrics)
      for (int c = 0; c < count; ++c)
        sums.largest = std::max(sums.largest, std::fabs(u[c])), sums.clamped += std::fabs(u[c]) > s.bound;
  }

  // θ ← θ − lr (clamped u + λ θ) for ``count`` neighbouring weights from ``at`` on; u has room for whole registers.
  void move(const float* u, int64_t at, int count) {
    if (!s.moment[1].k) return void(std::copy_n(u, count, static_cast<float*>(s.param) + at));
    const float lr = s.lr, decay = s.decay, bound = s.bound;
    auto moved = [=](Vec old, int c) {
      return old - (lr * at_most(at_least(load(u + c), -bound), bound) + decay * old);
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
      write(s.param, s.param_type, at + from, here, theta);
    }
  }

  RowsAhead param_ahead(int64_t row, int64_t column) const {
    const int size = size_of(s.param_type);
    return {static_cast<const char*>(s.param) + (row * s.q + column) * size, s.q * size, size, ROWS};
  }
};

}  // namespace
