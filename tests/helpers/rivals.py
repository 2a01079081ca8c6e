"""This module states the rival optimizers in float64 and numpy, from their papers' equations.

It shares no code with the packages and classes under test. Each class trains one matrix [p, q], and
``step(gradient, theta)`` returns the matrix after the step. Weight decay is 0.
"""

import copy

import numpy as np
from roundoff import TRIES, disturbed, gamma


class Rule:
    """Holds the options as attributes and a count of steps, and takes the step θ ← θ − lr u.

    A subclass defines ``u(g, theta)``, which returns the update u [p, q] of a gradient g [p, q].
    """

    def __init__(self, lr, **options):
        self.t, self.lr = 0, lr
        vars(self).update(options)

    def step(self, g, theta):
        """Return θ [p, q] after one step."""
        self.t += 1
        return theta - self.lr * self.u(g, theta)


def moments(rule, x):
    """Return Adam's m and v after one more x, which the rule's attributes m and v keep."""
    beta1, beta2 = rule.betas
    rule.m = beta1 * getattr(rule, "m", 0.0) + (1 - beta1) * x
    rule.v = beta2 * getattr(rule, "v", 0.0) + (1 - beta2) * x**2
    return rule.m, rule.v


def corrected(rule, m, v):
    """Return m̂/(√v̂ + ε)."""
    beta1, beta2 = rule.betas
    return m / (1 - beta1**rule.t) / (np.sqrt(v / (1 - beta2**rule.t)) + rule.eps)


def late(rule):
    """Return √(1−β2ᵗ)/(1−β1ᵗ).

    GaLore, Fira, APOLLO and Conda multiply m/(√v + ε) by it, so that ε is not corrected.
    """
    beta1, beta2 = rule.betas
    return np.sqrt(1 - beta2**rule.t) / (1 - beta1**rule.t)


def best_left(g, rank):
    """Return the ``rank`` leading left singular vectors of g: [p, rank]."""
    return np.linalg.svd(g, full_matrices=False)[0][:, :rank]


def limit(rule, x, name="norm", growth=1.01):
    """Return x, shortened so that its norm grows at most by the factor ``growth`` a step (Fira's limiter).

    name: attribute of the rule that holds the norm of the step before.
    """
    last, norm = vars(rule).get(name), np.linalg.norm(x)
    if last is not None and norm > growth * last:
        x, norm = x * (growth * last / norm), growth * last
    vars(rule)[name] = norm
    return x


class Adam(Rule):
    """Implements Adam."""

    def u(self, g, theta):
        """Return m̂/(√v̂ + ε)."""
        return corrected(self, *moments(self, g))


class AdamMini(Rule):
    """Implements Adam-mini (arXiv 2406.16793, Algorithm 1) with one v for each block of ``rows`` rows."""

    def u(self, g, theta):
        """Return m̂/(√v̂ + ε), where v averages the mean square of each block."""
        beta1, beta2 = self.betas
        blocks = g.reshape(len(g) // self.rows, -1)
        mean = np.repeat((blocks**2).mean(axis=1), self.rows)[:, None]
        self.m = beta1 * getattr(self, "m", 0.0) + (1 - beta1) * g
        self.v = beta2 * getattr(self, "v", 0.0) + (1 - beta2) * mean
        return corrected(self, self.m, self.v)


class Adafactor(Rule):
    """Implements Adafactor (arXiv 1804.04235, Algorithm 4).

    The decay is 1 − t^(−0.8), updates are clipped at a root mean square of 1, and steps are relative to the matrix.
    cap: option that says whether the rate is at most 1/√t.
    """

    def u(self, g, theta):
        """Return the clipped update times θ's root mean square, which is at least 1e-3, for the capped rate."""
        decay = 1 - self.t**-0.8
        self.row = decay * getattr(self, "row", 0.0) + (1 - decay) * (g**2).mean(axis=1)
        self.column = decay * getattr(self, "column", 0.0) + (1 - decay) * (g**2).mean(axis=0)
        update = g / np.sqrt(np.outer(self.row, self.column) / self.row.mean())
        update /= max(1.0, np.sqrt((update**2).mean()))
        rate = min(self.lr, self.t**-0.5) if self.cap else self.lr
        return rate / self.lr * max(1e-3, np.sqrt((theta**2).mean())) * update


class Muon(Rule):
    """Implements Muon with Nesterov momentum of 0.95 and the rate's scale 0.2 √max(p, q) (arXiv 2502.16982)."""

    coefficients = (3.4445, -4.7750, 2.0315)

    def u(self, g, theta):
        """Return the momentum after five quintic Newton–Schulz iterations, times the rate's scale."""
        self.m = 0.95 * getattr(self, "m", 0.0) + 0.05 * g
        x = 0.95 * self.m + 0.05 * g
        x = x.T if len(g) > g.shape[1] else x
        x = x / np.linalg.norm(x)
        a, b, c = self.coefficients
        for _ in range(5):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return 0.2 * np.sqrt(max(g.shape)) * (x.T if len(g) > g.shape[1] else x)


class Shampoo(Rule):
    """Implements Shampoo (arXiv 1802.09568, Algorithm 1).

    The grafting onto Adam's length, the momentum and the start after ``gap`` steps are those of arXiv 2002.09018.
    """

    def u(self, g, theta):
        """Return the corrected momentum of L^(−1/4) g R^(−1/4) at Adam's length, or of Adam's quotient at first."""
        beta1, beta2 = self.betas
        self.L = getattr(self, "L", 0.0) + g @ g.T
        self.R = getattr(self, "R", 0.0) + g.T @ g
        if self.t % self.gap == 0:
            self.roots = [self.root(matrix) for matrix in (self.L, self.R)]
        self.v = beta2 * getattr(self, "v", 0.0) + (1 - beta2) * g**2
        d = adam = g / (np.sqrt(self.v / (1 - beta2**self.t)) + self.eps)
        if self.t >= self.gap:
            d = self.roots[0] @ g @ self.roots[1]
            d *= np.linalg.norm(adam) / np.linalg.norm(d)
        self.m = beta1 * getattr(self, "m", 0.0) + (1 - beta1) * d
        return self.m / (1 - beta1**self.t)

    def root(self, matrix):
        """Return (matrix + damping λ_max I)^(−1/4)."""
        U, values, _ = np.linalg.svd(matrix + self.damping * np.linalg.norm(matrix, 2) * np.eye(len(matrix)))
        return U @ np.diag(values**-0.25) @ U.T


class GaLore(Rule):
    """Implements GaLore (arXiv 2403.03507, Algorithm 2) for p ≤ q, with the projection of the first gradient."""

    def u(self, g, theta):
        """Return Adam's step of the projected gradient, projected back and scaled."""
        self.basis = getattr(self, "basis", best_left(g, self.rank))
        m, v = moments(self, self.basis.T @ g)
        return late(self) * self.scale * self.basis @ (m / (np.sqrt(v) + self.eps))


class Fira(Rule):
    """Implements Fira (arXiv 2410.01623, Algorithm 1) for p ≤ q, with the projection of the first gradient.

    α stands where the authors' package has it.
    """

    def u(self, g, theta):
        """Return Adam's step inside the subspace, and the scaled gradient outside, whose growth is limited."""
        self.basis = getattr(self, "basis", best_left(g, self.rank))
        inside = self.basis.T @ g
        m, v = moments(self, inside)
        direction = m / (np.sqrt(v) + self.eps)
        scaling = np.linalg.norm(direction, axis=0) / np.linalg.norm(inside, axis=0)
        outside = limit(self, (g - self.alpha * self.basis @ inside) * scaling)
        return late(self) * (self.alpha * self.basis @ direction + outside)


class Apollo(Rule):
    """Implements APOLLO (arXiv 2412.05270, Algorithm 1) for p ≤ q and a given projection [r, p].

    by_column: option that says whether each column has a scale, or the matrix has one (APOLLO-Mini).
    """

    def u(self, g, theta):
        """Return the gradient times what Adam does to the length of its projection."""
        small = self.projection @ g
        m, v = moments(self, small)
        axis = 0 if self.by_column else None
        factor = np.linalg.norm(m / (np.sqrt(v) + self.eps), axis=axis) / np.linalg.norm(small, axis=axis)
        return late(self) * limit(self, np.sqrt(self.scale) * g * factor)


class Conda(Rule):
    """Implements Conda (arXiv 2509.24218, Algorithm 1) for p ≤ q.

    Adam's v is held in the momentum's singular basis, which is computed anew every ``gap`` steps.
    """

    def u(self, g, theta):
        """Return Adam's step in the basis, turned back and scaled."""
        beta1, beta2 = self.betas
        self.m = beta1 * getattr(self, "m", 0.0) + (1 - beta1) * g
        if self.t == 1 or self.t % self.gap == 0:
            self.basis = best_left(self.m, len(g))
        self.v = beta2 * getattr(self, "v", 0.0) + (1 - beta2) * (self.basis.T @ g) ** 2
        return late(self) * self.scale * self.basis @ (self.basis.T @ self.m / (np.sqrt(self.v) + self.eps))


class RACS(Rule):
    """Implements RACS (arXiv 2502.07752, Algorithm 1), with the matrices S and Q of Eq. 16 as they stand there."""

    def u(self, g, theta):
        """Return the scaled gradient, whose growth is limited, times α = 0.05."""
        Q = np.eye(len(g))
        for _ in range(5):
            S = np.diag(np.diag(g.T @ Q @ g)) / np.linalg.norm(Q) ** 2
            Q = np.diag(np.diag(g @ S @ g.T)) / np.linalg.norm(S) ** 2
        self.s = 0.9 * getattr(self, "s", 0.0) + 0.1 * np.diag(S)
        self.q = 0.9 * getattr(self, "q", 0.0) + 0.1 * np.diag(Q)
        return 0.05 * limit(self, np.diag(self.q**-0.5) @ g @ np.diag(self.s**-0.5))


class Alice(Rule):
    """Implements Alice (arXiv 2502.07752, Algorithms 3 and 4) for p ≤ q, before the first switch of the subspace."""

    def u(self, g, theta):
        """Return the step inside the subspace and the compensation outside it, times α = 0.3."""
        self.basis = getattr(self, "basis", best_left(g, self.rank))
        sigma = self.basis.T @ g
        self.m = 0.9 * getattr(self, "m", 0.0) + 0.1 * sigma
        self.v = 0.9 * getattr(self, "v", 0.0) + 0.1 * sigma**2
        energy = (g**2).sum(axis=0) - (sigma**2).sum(axis=0)
        self.energy = 0.9 * getattr(self, "energy", 0.0) + 0.1 * energy
        outside = np.sqrt(len(g) - self.rank) * (g - self.basis @ sigma) @ np.diag(self.energy**-0.5)
        return 0.3 * (self.basis @ (self.m / np.sqrt(self.v)) + 0.4 * limit(self, outside))


class MLorc(Rule):
    """Implements MLorc's AdamW (arXiv 2506.01897) with Adam's bias correction.

    sketches: Gaussian matrices [min(p, q), rank], of which each step takes two, for m and for v.
    """

    def u(self, g, theta):
        """Return m̂/(√v̂ + ε) of moments that are compressed after each step.

        Entries of v that the compression has made negative are replaced by the size of their mean.
        """
        if self.t > 1:
            self.m, self.v = (self.compressed(x, 2 * self.t - 4 + i) for i, x in enumerate((self.m, self.v)))
            negative = self.v < 0
            self.v = np.where(negative, -self.v[negative].mean(), self.v) if negative.any() else self.v
        return corrected(self, *moments(self, g))

    def compressed(self, x, number):
        """Return the projection of x [p, q], p ≥ q, on the range of x xᵀ x Ω, with Ω the sketch of that number.

        A wide matrix is transposed first.
        """
        if len(x) < x.shape[1]:
            return self.compressed(x.T, number).T
        Q = np.linalg.qr(x @ (x.T @ (x @ self.sketches[number])))[0]
        return Q @ (Q.T @ x)


class SinkGD(Rule):
    """Implements SinkGD (arXiv 2502.06742, Algorithm 3) by products with diagonal matrices."""

    def u(self, g, theta):
        """Return the gradient after five rounds of normalising rows and columns."""
        p, q = g.shape
        for _ in range(5):
            g = np.sqrt(q) * np.diag(1 / np.linalg.norm(g, axis=1)) @ g
            g = np.sqrt(p) * g @ np.diag(1 / np.linalg.norm(g, axis=0))
        return g


class Scale(Rule):
    """Implements SCALE (arXiv 2506.16659, Algorithm 1).

    A column of the paper's matrix [inputs, outputs] is a row here. Its norm is divided by √q.
    """

    def u(self, g, theta):
        """Return the momentum, or the gradient if ``momentum`` is 0, with every row at the norm √q."""
        self.m = self.momentum * getattr(self, "m", 0.0) + (1 - self.momentum) * g
        return np.sqrt(self.m.shape[1]) * self.m / np.linalg.norm(self.m, axis=1, keepdims=True)


class MoFaSGD(Rule):
    """Implements MoFaSGD (arXiv 2507.08091, Algorithm 1) with dense matrices."""

    def u(self, g, theta):
        """Return U Vᵀ of the momentum."""
        if self.t > 1:
            left, right = self.U @ self.U.T, self.V @ self.V.T
            g = self.beta * self.M + left @ g + g @ right - left @ g @ right
        U, sigma, Vt = np.linalg.svd(g, full_matrices=False)
        self.U, self.V = U[:, : self.rank], Vt[: self.rank].T
        self.M = self.U @ np.diag(sigma[: self.rank]) @ self.V.T
        return self.U @ self.V.T


def room(rule, theta, grads, dtype, *, spectral=False):
    """Return how far a run in arithmetic of ``dtype`` may be from the rule: the largest entry after all steps.

    The rule must not have stepped. The distance is measured by `TRIES` runs whose weights are rounded, and whose
    gradients are disturbed by γ of the operations that a number of a step goes through. These are four sums over rows
    and columns, and some twenty operations by entry. spectral: whether singular vectors are computed. They are then
    those of a matrix that is γ of the largest singular value away.
    """
    size = gamma(4 * sum(theta.shape) + 20, dtype)
    exact = copy.deepcopy(rule)
    expected = theta
    for g in grads:
        expected = exact.step(g, expected)
    found = 0.0
    for seed in range(TRIES):
        rng, rough, value = np.random.default_rng(seed), copy.deepcopy(rule), theta
        for g in grads:
            noise = np.linalg.norm(g, 2) * rng.choice((-1.0, 1.0), g.shape) if spectral else 0.0
            value = disturbed(rough.step(disturbed(g, size, rng) + size * noise, value), gamma(4, dtype), rng)
        found = max(found, np.abs(value - expected).max())
    return found
