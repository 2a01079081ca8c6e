// This file computes LoRA-Pre AdamW's whole step on a CPU, for many matrices in one call. It reads and writes
// gradients, weights and state where they lie, without any p×q temporary. Matrices without a second moment are Muon's:
// for them it computes the momentum, and Python orthogonalizes it and moves the weights. `norms` computes norms of
// tensors.
//
// build.py compiles the file, and cpp.py says what the arguments are. A matrix is p×q and row-major. The factors of a
// moment are B [p, k] and A [k, q]. The first moment is m, and the second is v. Work is divided by shape alone and
// every sum has a fixed order, so that the result depends neither on the number of threads nor on which matrices share
// a step.
//
// Factors and products with the gradient are float32. k×k matrices are float64 up to their products with a factor.
// There are two exceptions: B'ᵀB of wide matrices is summed in float32, and so is A' A'ᵀ of `als` within a chunk of
// columns.
//
// A step has five stages. This is what they are in the other backends (Triton: gpu/{passes,numbers,factors}.py, eager:
// eager.py and lowrank/moments.py):
//
//   stage    what it does                              Triton                      eager
//   begin    forms A Aᵀ, finds zero rows of A          _row_squares, _start        Moment.__init__
//   look     computes ‖g‖² and, if wide, x Aᵀ          _fit                        Eager.norms, follow_rows
//   prepare  computes R and all numbers of a matrix    _numbers                    _prepare, adam_scalars, adam_table
//   rows     writes B' and weights, sums over rows     _rows, _update              Eager.adam or Eager.momentum
//   finish   writes A', balances B' and A'             _solve, _columns, _balance  move_on
//
// Each is a method of `Task`. `WideRows` and `NarrowRows` compute `look` and `rows`, the latter in their method `run`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <vector>

#include "blocks.h"
#include "linalg.h"
#include "narrow_rows.h"
#include "wide_rows.h"

namespace {

// The rows of a matrix are split into at most this many parts.
constexpr int64_t MAX_SPLITS = 16;
// A matrix of up to this many entries stays in the second-level cache for the whole step, with its gradient and state.
constexpr int64_t CACHED_ENTRIES = 1 << 17;
// A Σ g² that is not above this is summed again in float64. In a larger one, the squares that float32 loses to
// underflow do not count, even if there are 1e10 of them.
constexpr double SMALL_SQUARE = 1e-20;
// This is the largest gradient norm whose square float32 holds.
const double MAX_NORM = std::sqrt(double(std::numeric_limits<float>::max()));

// Fields and their order are those of cpp.HostTable.shapes, of table.OPTIONS with Muon's nesterov at the end, of
// table.POINTERS after gradient and weights, and of cpp.FOUND.
struct Shape { int64_t p, q, m_rank, v_rank, group, position, grad_type, param_type; };
struct Options {
  double beta1, beta2, lr, weight_decay, eps, residual_weight, update_scale;
  double max_norm, sign, bound, newton, damping, seed, stochastic, skips_zeros, nesterov;
};
struct Pointers {
  const void* grad;
  void* param;
  // v_energy and v_scale are null for `newton`. For Muon, v_B and v_A are null as well.
  float *step, *m_B, *m_A, *v_B, *v_A, *v_energy, *v_scale;

  Pointers(void* const* table, int64_t n, int64_t i)
      : grad(table[i]), param(table[n + i]), step(f(table[2 * n + i])),
        m_B(f(table[3 * n + i])), m_A(f(table[4 * n + i])), v_B(f(table[5 * n + i])), v_A(f(table[6 * n + i])),
        v_energy(f(table[7 * n + i])), v_scale(f(table[8 * n + i])) {}

 private:
  static float* f(void* at) { return static_cast<float*>(at); }
};
struct Found { double norm, largest, clamped, captured; };

// Takes one matrix through the stages of its step, in the order in which their methods are declared.
class Task {
 public:
  Task(const Shape& shape, const Options& options, Pointers at, Found& found, int64_t split_entries, bool metrics,
       Step& step)
      : shape(shape), o(options), at(at), found(found), metrics(metrics), s(step),
        parts(std::clamp<int64_t>(shape.p * shape.q / split_entries, 1, std::min(MAX_SPLITS, shape.p))) {}

  int64_t splits() const { return parts; }

  // Queues what the step reads for prefetching, and of the weights only the beginning. A matrix that does not fit the
  // cache queues nothing.
  void prefetch(Prefetcher& next) const {
    if (shape.p * shape.q > CACHED_ENTRIES) return;
    const int64_t size = sizeof(float);
    next.add(at.m_A, shape.q * shape.m_rank * size), next.add(at.v_A, shape.q * shape.v_rank * size);
    // `look` prefetches the gradient of a wide matrix itself. Prefetching it here made steps faster on a CPU with 16
    // lanes and a second-level cache of 2 MB, and a tenth slower on one with 8 lanes and 512 kB.
    if (LANES == 16 || shape.q <= NARROW) next.add(at.grad, shape.p * shape.q * size_of(Type(shape.grad_type)));
    next.add(at.m_B, shape.p * shape.m_rank * size), next.add(at.v_B, shape.p * shape.v_rank * size);
    next.add(at.param, std::min<int64_t>(shape.p * shape.q, CHUNK * LANES) * size_of(Type(shape.param_type)));
  }

  // Sets up what `look` needs: both factors A as they are read, with new rows for directions that start anew.
  void begin(Scratch& scratch) {
    s.p = shape.p, s.q = shape.q, s.stride = row_stride(shape.q);
    s.grad = at.grad, s.param = at.param, s.grad_type = Type(shape.grad_type), s.param_type = Type(shape.param_type);
    s.projects_new = o.newton == 0, s.metrics = metrics, s.stochastic = o.stochastic && s.param_type == BFLOAT16;
    moment(0, int(shape.m_rank), at.m_B, at.m_A, scratch);
    moment(1, int(shape.v_rank), at.v_B, at.v_A, scratch);
  }

  // Returns Σ g² of one part of the rows. For wide matrices it also leaves x Aᵀ in ``sums.dots``.
  double look(int64_t split, Scratch& scratch, Sums& sums) const {
    const int64_t begin = first_row(split), end = first_row(split + 1);
    const double square = s.q <= NARROW ? 0 : WideRows(s, scratch, sums).look(begin, end);
    if (square > SMALL_SQUARE && square <= FLT_MAX) return square;
    // Squares may have underflowed or overflowed in float32, or none was computed.
    return sum_of_squares(s.grad, s.grad_type, begin * s.q, end * s.q);
  }

  // Computes all else that `rows` needs, from ‖g‖², and writes restarted directions into the state. It returns false
  // if the gradient is not usable, in which case the state has not changed.
  bool prepare(double square, Scratch& scratch) {
    norm = found.norm = std::sqrt(square);
    if (!(norm <= MAX_NORM)) return false;
    if (o.skips_zeros && norm == 0) {  // An expert without tokens is left alone, as if it had no gradient.
      found.norm = -1;
      return false;
    }
    const bool newton = o.newton != 0;
    const double clip = norm > o.max_norm ? o.max_norm / norm : 1;
    norm = found.norm = norm * clip;
    const bool started = newton || (shape.v_rank ? *at.v_energy : s.moment[0].old_square) > 0;
    count = started ? *at.step + 1 : norm > 0;
    const double t = std::max(count, 1.0);
    s.key = mix(mix(uint32_t(o.seed) + uint32_t(shape.position), 0) + uint32_t(count), 0);
    s.salted = mix(s.key + 0x9E3779B9u, 0);

    // With √v̂ = root · √(β2/(1−β2) c (v_B v_A)² + g²), the root is divided out of the momentum and of ε.
    const double ema = 1 - std::pow(o.beta1, t), root = std::sqrt((1 - o.beta2) / (1 - std::pow(o.beta2, t)));
    const double scale = !shape.v_rank ? o.nesterov ? o.beta1 : 1 : 1 / (ema * root);
    const double residual = newton ? weight : std::min(ema, o.residual_weight) * (weight / (1 - o.beta1));
    s.g_scale = float(clip * o.sign), s.residual = float(residual * scale + o.nesterov), s.eps = float(o.eps / root);
    s.lr = float(o.lr * o.update_scale), s.decay = float(o.lr * o.weight_decay), s.bound = float(o.bound);
    row_part(s.moment[0], o.beta1, weight, scratch);
    s.moment[0].by_B = float(o.beta1 * scale), s.moment[0].by_X = float(newton ? 0 : (weight - residual) * scale);
    if (!shape.v_rank) return true;
    const double c = newton ? 1 : double(*at.v_scale);
    const double root2 = std::sqrt(o.beta2);
    row_part(s.moment[1], root2, 1 - root2, scratch);
    s.moment[1].by_B = float(std::sqrt(c * o.beta2 / (1 - o.beta2))), s.moment[1].by_X = 0;
    return true;
  }

  // Writes B' and the weights of one part of the rows, and writes to ``sums`` what `finish` needs of them.
  void rows(int64_t split, Scratch& scratch, Sums& sums) {
    sums.reset(s);
    const int64_t begin = first_row(split), end = first_row(split + 1);
    s.q <= NARROW ? NarrowRows(s, scratch, sums).run(begin, end) : WideRows(s, scratch, sums).run(begin, end);
  }

  // Writes both moments' factors and the numbers of the state, from the sums over all rows.
  void finish(const Sums& sums, Scratch& scratch) {
    columns(0, sums, o.beta1, weight, scratch);
    *at.step = float(count);
    found.largest = sums.largest, found.clamped = double(sums.clamped), found.captured = sums.captured;
    if (!shape.v_rank) return;
    const double root2 = std::sqrt(o.beta2), squared_norm = columns(1, sums, root2, 1 - root2, scratch);
    if (!o.newton) {
      const double energy = o.beta2 * *at.v_energy + (1 - o.beta2) * norm * norm;
      *at.v_energy = float(energy);
      const double c = energy / std::max(squared_norm, std::numeric_limits<double>::min());
      *at.v_scale = float(std::min<double>(c, std::numeric_limits<float>::max()));
    }
  }

 private:
  const Shape& shape;
  const Options& o;
  const Pointers at;
  Found& found;
  const bool metrics;
  Step& s;
  const int64_t parts;
  const double weight = shape.v_rank ? 1 - o.beta1 : 1;  // Adam's m is an average of gradients, and Muon's is a sum.
  double norm = 0, count = 0;  // They are ‖g‖ after clipping, and the new count of steps.

  int64_t first_row(int64_t split) const { return std::min(shape.p, split * ((shape.p + parts - 1) / parts)); }

  // Sets up one moment: its factors, A Aᵀ, and a copy of A if one is needed. As in rules.Als.restart, a direction
  // whose row of A is zero starts anew from a test row, which is in the copy only until `prepare`.
  void moment(int i, int k, float* B, float* A, Scratch& scratch) {
    Moment& m = s.moment[i];
    m.k = k, m.B = B, m.A = A, m.gram_columns = s.projects_new ? 2 * k : k;
    m.own_A.clear();
    m.gram.resize(k * k);
    gram_of(A, k, s.q, m.gram.data(), scratch.sums);
    m.old_square = trace(m.gram.data(), k, k);
    int alive = 0;
    for (int j = 0; j < k; ++j) alive += m.gram[j * k + j] != 0;
    m.restarts = !o.newton && alive < k;
    // Rows of whole registers are read where they lie, and so are narrow matrices.
    if (!m.restarts && (s.q <= NARROW || s.q % LANES == 0)) return;
    m.own_A.assign(k * s.stride, 0.f);
    for (int j = 0; j < k; ++j) std::copy_n(A + j * s.q, s.q, m.own_A.data() + j * s.stride);
    if (!m.restarts) return;
    const double length = std::sqrt(3.0 / s.q * (alive ? m.old_square / alive : 1));
    for (int j = 0; j < k; ++j) {
      if (m.gram[j * k + j] != 0) continue;
      for (int64_t c = 0; c < s.q; ++c) {
        const uint32_t bits = mix(mix(uint32_t(j * s.q + c), 0), mix(0x9E3779B9u, 0));
        m.own_A[j * s.stride + c] = float(bits >> 8) * 0x1p-24f * float(length);
      }
    }
  }

  // Writes restarted directions into the state, which are the copy's rows of A and zeros in B, and updates A Aᵀ.
  void restart(Moment& m, Scratch& scratch) {
    for (int j = 0; j < m.k; ++j) {
      if (m.gram[j * m.k + j] != 0) continue;
      std::copy_n(m.own_A.data() + j * s.stride, s.q, m.A + j * s.q);
      for (int64_t r = 0; r < s.p; ++r) m.B[r * m.k + j] = 0;
    }
    gram_of(m.A, m.k, s.q, m.gram.data(), scratch.sums);
  }

  // Computes R = (A Aᵀ + damping)⁻¹, keep and gain of a moment with this decay and weight, as in rules.Als and
  // rules.Newton.
  void row_part(Moment& m, double decay, double weight, Scratch& scratch) {
    const int k = m.k;
    double keep = decay, gain = weight, unit = 1, ridge = o.damping;
    if (o.newton) {
      keep = std::sqrt(decay), gain = weight * (1 - keep) / (1 - decay);
    } else {
      if (m.restarts) restart(m, scratch);
      const double length = std::sqrt(trace(m.gram.data(), k, k));
      const double size = std::max(keep * std::sqrt(m.old_square) * length, gain * norm);
      unit = length / std::max(size, MIN_FACTOR_NORM * MIN_FACTOR_NORM);
      ridge = o.damping * length * length / k;
    }
    m.keep = float(keep * unit), m.gain = float(gain * unit);
    scratch.small.resize(k * k);
    damped_inverse(m.gram.data(), k, k, ridge, scratch.small.data(), scratch.work);
    m.R.assign(k * padded(k), 0.f);
    for (int j = 0; j < k; ++j) std::copy_n(scratch.small.data() + j * k, k, m.R.data() + j * padded(k));
  }

  // Writes A', and for `als` also B' with orthonormal columns and equal norms of both. It returns ‖B'A'‖²_F, or NaN
  // for `newton`.
  double columns(int i, const Sums& sums, double decay, double weight, Scratch& scratch) {
    const Moment& m = s.moment[i];
    const int k = m.k;
    const double* grams = sums.grams[i].data();
    std::vector<double>&inverse = scratch.small, &W = scratch.held, &gram_A = scratch.sums;
    inverse.resize(k * k), W.assign(2 * k * k, 0.0), gram_A.resize(k * k);
    if (o.newton) {
      const double root = std::sqrt(decay), gain = weight * (1 - root) / (1 - decay);
      damped_inverse(grams, k, k, o.damping, inverse.data(), scratch.work);
      for (int r = 0; r < k; ++r) {
        W[r * 2 * k + r] = root;
        for (int c = 0; c < k; ++c) W[r * 2 * k + k + c] = gain * inverse[r * k + c];
      }
    } else {
      inverse_root(grams, k, 2 * k, o.damping * trace(grams, k, 2 * k) / k, inverse.data());
      for (int r = 0; r < k; ++r)
        for (int l = 0; l <= r; ++l) {
          const double part = decay * inverse[r * k + l];
          for (int c = 0; c < k; ++c) W[r * 2 * k + c] += part * grams[l * 2 * k + k + c];
          W[r * 2 * k + k + l] = weight * inverse[r * k + l];
        }
    }
    if (o.newton) {
      wide_columns(W.data(), m.A, sums.P[i].data(), s.stride, k, s.q, scratch.work);
      return std::numeric_limits<double>::quiet_NaN();
    }
    columns_of(W.data(), m.A, sums.P[i].data(), s.stride, k, s.q, m.A, gram_A.data(), scratch.columns);
    // This is the Gram matrix of B' L⁻ᵀ, whose columns are orthonormal up to the damping.
    std::vector<double>&half = scratch.work, &gram_B = scratch.held;
    half.assign(k * k, 0.0), gram_B.assign(k * k, 0.0);
    for (int r = 0; r < k; ++r)
      for (int l = 0; l <= r; ++l)
        for (int c = 0; c < k; ++c) half[r * k + c] += inverse[r * k + l] * grams[l * 2 * k + c];
    for (int r = 0; r < k; ++r)
      for (int c = 0; c < k; ++c)
        for (int l = 0; l <= c; ++l) gram_B[r * k + c] += half[r * k + l] * inverse[c * k + l];
    const double norm_B = std::sqrt(trace(gram_B.data(), k, k)), norm_A = std::sqrt(trace(gram_A.data(), k, k));
    const double common = std::max(std::sqrt(norm_B) * std::sqrt(norm_A), MIN_FACTOR_NORM);
    const double tiny = std::numeric_limits<float>::min();
    const double by_B = common / std::max(norm_B, tiny), by_A = common / std::max(norm_A, tiny);
    constexpr double most = std::numeric_limits<float>::max();
    for (double& entry : inverse) entry = std::clamp(entry * by_B, -most, most);  // L⁻¹ is huge if B' is zero.
    scratch.rows.assign(inverse.begin(), inverse.end());
    turn(m.B, s.p, k, scratch.rows.data());
    scale(m.A, s.q * k, float(by_A));
    double square = 0;
    for (int r = 0; r < k; ++r)
      for (int c = 0; c < k; ++c) square += gram_B[r * k + c] * gram_A[r * k + c];
    return square * by_B * by_B * by_A * by_A;
  }
};

}  // namespace

extern "C" {

// Takes one step of n matrices. order: their numbers, the largest first, so that no thread is left alone with a large
// one at the end. The rows of a matrix are split into p·q / split_entries parts, rounded down, but at most MAX_SPLITS.
// Threads share these parts. Split matrices are taken together as far as their `Sums` fit into sum_bytes.
void step_matrices(const Shape* shapes, const Options* options, void* const* pointers, Found* found,
                   const int64_t* order, int64_t n, int64_t split_entries, int64_t sum_bytes, int32_t metrics,
                   int32_t threads) {
  auto task = [&](int64_t i, Step& step) {
    return Task(shapes[i], options[shapes[i].group], Pointers(pointers, n, i), found[i], split_entries, metrics, step);
  };
  Step unused;
  int64_t first = 0;
  while (first < n && task(order[first], unused).splits() > 1) {
    // This takes as many split matrices as sum_bytes has room for, and at least one.
    std::vector<Task> large;
    std::deque<Step> steps;
    std::vector<int64_t> part_of, starts;
    int64_t bytes = 0;
    for (; first < n; ++first) {
      Task one = task(order[first], steps.emplace_back());
      const Shape& shape = shapes[order[first]];
      const int64_t splits = one.splits(), ranks = shape.m_rank + shape.v_rank;
      const int64_t more = ranks * (splits * row_stride(shape.q) + shape.p) * int64_t(sizeof(float));
      if (splits == 1 || (!large.empty() && bytes + more > sum_bytes)) break;
      starts.push_back(part_of.size());
      for (int64_t split = 0; split < splits; ++split) part_of.push_back(large.size());
      large.push_back(one), bytes += more;
    }
    const int64_t parts = part_of.size(), count = large.size();
    std::vector<double> squares(parts);
    std::vector<Sums> sums(parts);
    std::vector<char> usable(count);
#pragma omp parallel num_threads(threads)
    {
      Scratch scratch;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) large[i].begin(scratch);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < parts; ++i)
        squares[i] = large[part_of[i]].look(i - starts[part_of[i]], scratch, sums[i]);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) {
        double square = 0;
        for (int64_t split = 0; split < large[i].splits(); ++split) square += squares[starts[i] + split];
        usable[i] = large[i].prepare(square, scratch);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < parts; ++i)
        if (usable[part_of[i]]) large[part_of[i]].rows(i - starts[part_of[i]], scratch, sums[i]);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) {
        if (!usable[i]) continue;
        for (int64_t split = 1; split < large[i].splits(); ++split) sums[starts[i]].add(sums[starts[i] + split]);
        large[i].finish(sums[starts[i]], scratch);
      }
    }
  }
  std::atomic<int64_t> taken{first};
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
    Sums sums;
    Step step, unused;
    for (int64_t i = taken++, next; i < n; i = next) {
      next = taken++;
      if (next < n) task(order[next], unused).prefetch(scratch.next);
      Task one = task(order[i], step);
      one.begin(scratch);
      if (one.prepare(one.look(0, scratch, sums), scratch)) {
        one.rows(0, scratch, sums);
        one.finish(sums, scratch);
      }
      scratch.next.clear();
    }
  }
}

// Writes ‖x‖₂ of n tensors of one type to out, accumulated in float64.
void norms(const void* const* x, const int64_t* sizes, int64_t n, int32_t type, double* out, int32_t threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(sum_of_squares(x[i], Type(type), 0, sizes[i]));
}

}  // extern "C"
