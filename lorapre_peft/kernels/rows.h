// This file holds what the stages `look` and `rows` read and leave behind, and what `WideRows` and `NarrowRows`, which
// compute them, share: how weights are written. kernels.cpp lists the stages of a step.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "blocks.h"

namespace {

// Holds one of the two factored moments, M ≈ B A, in one step. x is the gradient g for m, and |g| for v. The row part
//
//   X = x Aᵀ R,   B' = keep · B + gain · X,   C = by_B · B + by_X · X
//
// yields the fit X of x by the rows of A, the new B', and the factor C of the product C A that the update takes.
struct Moment {
  int k = 0, gram_columns = 0;       // `Sums::grams` has ``gram_columns`` columns.
  float *B = nullptr, *A = nullptr;  // They are the state, [p, k] and [k, q].
  float keep = 0, gain = 0, by_B = 0, by_X = 0;
  std::vector<float> R;      // It is [k, k] in rows of whole registers.
  std::vector<float> own_A;  // It is a copy of A, [k, stride], or empty where the state's A is read in place.
  std::vector<double> gram;  // It is A Aᵀ, [k, k].
  // This is whether directions start anew, because their row of A was zero. `begin` writes their new rows into the
  // copy only, and `prepare` into the state.
  bool restarts = false;
  double old_square = 0;  // It is ‖A‖²_F before any restart.
};

// Holds all that `look` and `rows` read of one matrix. With g_scale times the gradient as g, and each moment's own C,
// the update and the new weight are
//
//   u = (C m_A + residual · g) / (√((C v_A)² + g²) + eps),   θ' = θ − (lr · u + decay · θ),
//
// where u is clamped to ±bound in between. Without a second moment, whose rank is then 0, u = C m_A + residual · g is
// written to ``param`` in float32, and there are no weights.
struct Step {
  int64_t p, q, stride;  // Rows of `Moment::own_A` and `Sums::P` have ``stride`` numbers, which are whole registers.
  const void* grad;
  void* param;
  Type grad_type, param_type;
  Moment moment[2];  // They are m and v.
  bool projects_new;  // A' comes from sums with the new B (`als`) and not with the old one (`newton`).
  bool metrics, stochastic;
  float g_scale, residual, eps, lr, decay, bound;  // The option update_scale is part of lr, and decay is lr · λ.
  uint32_t key, salted;  // They are the keys of the random bits for stochastic rounding.
};

// Holds what some rows leave behind. dots is x Aᵀ of the gradient before scaling, [rows, k], which `look` leaves to
// `rows` for wide matrices. For `finish`, P is B'ᵀx [k, stride] and grams is B'ᵀ[B' | B] [k, 2k], or for `newton` Bᵀx
// and BᵀB [k, k]. For the metrics there are the largest |u|, the number of entries to clamp, and ‖X A‖²_F of m.
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

// Prefetches the memory that a thread's next matrix reads, piece by piece while the thread computes the current one.
class Prefetcher {
 public:
  void clear() { spans.clear(), now = 0; }
  void add(const void* from, int64_t bytes) {
    spans.push_back({static_cast<const char*>(from), static_cast<const char*>(from) + bytes});
  }
  // Divides all lines evenly among ``calls`` calls of `fetch`. A part of a split matrix may have no rows: calls is
  // then 0.
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

// Holds buffers that a thread keeps from matrix to matrix. Each stage uses them in its own way.
struct Scratch {
  Prefetcher next;
  std::vector<float> rows, columns, cross;
  std::vector<double> held, sums, work, small;
};

// Computes what needs the gradient, for some rows of one matrix and without any p×q temporary. A register holds
// entries of a row in `WideRows`, and entries of a column in `NarrowRows`.
class Rows {
 public:
  Rows(const Step& step, Scratch& scratch, Sums& sums) : s(step), scratch(scratch), sums(sums) {}

 protected:
  const Step& s;
  Scratch& scratch;
  Sums& sums;

  // Records the figures of ``count`` entries of the update for the metrics.
  void look_at(const float* u, int count) {
    if (s.metrics)
      for (int c = 0; c < count; ++c)
        sums.largest = std::max(sums.largest, std::fabs(u[c])), sums.clamped += std::fabs(u[c]) > s.bound;
  }

  // Clamps u and moves ``count`` neighbouring weights from index ``at`` on by it, or writes u as the momentum (see
  // `Step`). u has room for whole registers.
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
