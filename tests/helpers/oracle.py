"""This module states both update rules independently, in float64 and numpy, from the method's equations.

It shares no code with the package. The reference and every fast path are compared with it. A matrix is p×q, and its
factors are B [p, k] and A [k, q]. `Adam.step` and `Muon.step` take a gradient [p, q] and return the direction u [p, q]
of θ ← θ − lr (u + λ θ).
"""

import numpy as np


def hashed_rows(k, q):
    """Return the rows [k, q] from which directions of `als` start.

    They are two rounds of the hash lowbias32 on 0, 1, 2, …, of which the upper 24 bits make a number in [0, 1).
    """
    bits, mask = np.arange(k * q, dtype=np.uint64), np.uint64(0xFFFFFFFF)

    def lowbias32(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & mask
        return x ^ (x >> np.uint64(16))

    for key in (np.uint64(0), lowbias32(np.uint64(0x9E3779B9))):
        bits = lowbias32(bits ^ key)
    return (bits >> np.uint64(8)).astype(np.float64).reshape(k, q) / 2**24


def solve(gram, ridge, target):
    """Return (gram + ridge I)⁻¹ target."""
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), target)


def right_fit(x, a, ridge):
    """Return x Aᵀ (A Aᵀ + ridge I)⁻¹, where A is ``a``."""
    return solve(a @ a.T, ridge, a @ x.T).T


def relative(gram, damping):
    """Return δ' of `als`, which is ``damping`` times the mean diagonal of the Gram matrix it is added to."""
    return damping * np.trace(gram) / len(gram)


class Factors:
    """Holds M ≈ B A, which follows M ← decay · M + weight · x.

    Args:
        rule: ``"als"`` or ``"newton"``.
        decay, weight: numbers of the running average.
        k: rank.
        a: random start of A for `newton`. `als` starts from zeros.
        damping: δ, absolute for `newton` and relative for `als`.
    """

    def __init__(self, rule, decay, weight, k, a=None, damping=1e-6):
        self.rule, self.decay, self.weight, self.k, self.damping = rule, decay, weight, k, damping
        self.a, self.b = (None, None) if a is None else (np.array(a, dtype=np.float64), None)

    def meet(self, x):
        """Make factors of zeros for the first x, and start the directions of `als` whose row of A is zero."""
        p, q = x.shape
        self.b = np.zeros((p, self.k)) if self.b is None else self.b
        self.a = np.zeros((self.k, q)) if self.a is None else self.a
        zero = ~self.a.any(axis=1)
        if self.rule == "als" and zero.any():
            square = 1.0 if zero.all() else np.mean(np.sum(self.a[~zero] ** 2, axis=1))
            self.a, self.b = self.a.copy(), self.b.copy()
            self.a[zero] = np.sqrt(3 * square / q) * hashed_rows(self.k, q)[zero]
            self.b[:, zero] = 0

    @property
    def product(self):
        """Return B A [p, q]."""
        return self.b @ self.a

    def fit(self, x):
        """Return X [p, k], the coefficients of x in the row space of A."""
        ridge = self.damping if self.rule == "newton" else relative(self.a @ self.a.T, self.damping)
        return right_fit(x, self.a, ridge)

    def follow(self, x):
        """Move both factors on by x, as the rule says."""
        b, a, decay, weight = self.b, self.a, self.decay, self.weight
        if self.rule == "newton":
            keep = np.sqrt(decay)
            gain = weight * (1 - keep) / (1 - decay)
            self.b = keep * b + gain * self.fit(x)
            self.a = keep * a + gain * right_fit(x.T, b.T, self.damping).T
            return
        b_new = decay * b + weight * self.fit(x)
        gram = b_new.T @ b_new
        target = decay * b_new.T @ b @ a + weight * b_new.T @ x
        root = np.linalg.cholesky(gram + relative(gram, self.damping) * np.eye(self.k))
        b_new, a_new = np.linalg.solve(root, b_new.T).T, np.linalg.solve(root, target)
        norm_b, norm_a = np.linalg.norm(b_new), np.linalg.norm(a_new)
        self.b, self.a = b_new * np.sqrt(norm_a / norm_b), a_new * np.sqrt(norm_b / norm_a)


def bound(betas):
    """Return C = (1−β1)/√((1−β2)(1−β1²/β2)). No entry of exact Adam's normalised update m/√v is larger."""
    beta1, beta2 = betas
    return (1 - beta1) / np.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


class Adam:
    """Implements Adam with factored moments: Algorithm 1 for `newton`, and the tracked rule for `als`.

    Args:
        rule: ``"als"`` or ``"newton"``.
        k: rank of m.
        second: rank of v. None stands for 1 with `als` and for k with `newton`.
        betas, eps: decay rates (β1, β2) and ε of Adam.
        rho: weight ρ of the residual with `als`. None stands for 1.
        damping: as in `Factors`.
        starts: (m_A, v_A) with which `newton` starts.
    """

    def __init__(
        self, rule, k, *, second=None, betas=(0.9, 0.95), eps=1e-8, rho=None, damping=1e-6, starts=(None, None)
    ):
        self.rule, self.eps, self.rho = rule, eps, 1.0 if rho is None else rho
        self.m = Factors(rule, None, None, k, starts[0], damping)
        self.v = Factors(rule, None, None, second or (1 if rule == "als" else k), starts[1], damping)
        self.redecay(betas)
        self.t, self.energy = 0, 0.0

    def redecay(self, betas):
        """Use these decays from now on."""
        self.betas = betas
        root2 = np.sqrt(betas[1])
        self.m.decay, self.m.weight = betas[0], 1 - betas[0]
        self.v.decay, self.v.weight = root2, 1 - root2

    def step(self, g):
        """Return u = m̂/(√v̂ + ε) [p, q], which `als` clamps at `bound`, and move the moments on.

        ``unclamped`` holds u as it was before the clamp.
        """
        g = np.asarray(g, dtype=np.float64)
        beta1, beta2 = self.betas
        if self.rule == "als" and not self.energy:
            self.t = 0
            if not g.any():
                return np.zeros_like(g)  # t is counted from the first gradient that is not zero.
        self.t += 1
        self.m.meet(g)
        self.v.meet(g)
        if self.rule == "newton":
            m_hat = (beta1 * self.m.product + (1 - beta1) * g) / (1 - beta1**self.t)
            v = beta2 * self.v.product**2 + (1 - beta2) * g**2
        else:
            inside = self.m.fit(g) @ self.m.a
            m_hat = (beta1 * self.m.product + (1 - beta1) * inside) / (1 - beta1**self.t)
            m_hat = m_hat + min(1.0, self.rho / (1 - beta1**self.t)) * (g - inside)
            square = self.v.product**2
            c = self.energy / np.sum(square) if self.energy else 0.0
            v = beta2 * c * square + (1 - beta2) * g**2
        self.m.follow(g)
        self.v.follow(np.abs(g))
        self.energy = beta2 * self.energy + (1 - beta2) * np.sum(g**2)
        self.unclamped = m_hat / (np.sqrt(v / (1 - beta2**self.t)) + self.eps)
        limit = np.inf if self.rule == "newton" else bound(self.betas)
        return np.clip(self.unclamped, -limit, limit)


def newton_schulz(m, steps=5):
    """Return m after its Frobenius norm is divided out and Muon's quintic is applied to its singular values.

    A matrix of zeros stays zero.
    """
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    s = s / (np.linalg.norm(s) or 1.0)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


class Muon:
    """Implements Muon with a factored momentum: Algorithm 2 for `newton`, and the tracked rule on μ M + g for `als`.

    Args:
        rule: ``"als"`` or ``"newton"``.
        k: rank of the momentum.
        momentum: μ.
        rho: weight ρ of the residual with `als`. None stands for 1.
        nesterov: whether the step follows g + μ m.
        damping: as in `Factors`.
        start: m_A with which `newton` starts.
    """

    def __init__(self, rule, k, *, momentum=0.95, rho=None, nesterov=False, damping=1e-6, start=None):
        self.rule, self.nesterov, self.rho, self.t = rule, nesterov, 1.0 if rho is None else rho, 0
        self.m = Factors(rule, None, 1.0, k, start, damping)
        self.redecay(momentum)

    def redecay(self, momentum):
        """Use this decay from now on."""
        self.mu = self.m.decay = momentum

    def step(self, g):
        """Return u [p, q], the orthogonalised momentum, and move the momentum on."""
        g = np.asarray(g, dtype=np.float64)
        if self.rule == "als" and (self.m.a is None or not self.m.a.any()):
            self.t = 0
            if not g.any():
                return np.zeros_like(g)
        self.t += 1
        self.m.meet(g)
        if self.rule == "newton":
            m = self.mu * self.m.product + g
        else:
            # The heavy-ball sum is the EMA divided by 1−μ. Its bias is taken out, and put back for the residual.
            corrected = (1 - self.mu**self.t) / (1 - self.mu)
            inside = self.m.fit(g) @ self.m.a
            m = self.mu * self.m.product + inside
            m = m + min(1.0, self.rho / (1 - self.mu**self.t)) * corrected * (g - inside)
        self.m.follow(g)
        return newton_schulz(g + self.mu * m if self.nesterov else m)


class ExactAdam:
    """Implements Adam with its own moments, uncompressed and with ε = 0."""

    def __init__(self, betas=(0.9, 0.95)):
        self.betas, self.t, self.m, self.v = betas, 0, 0.0, 0.0

    def step(self, g):
        """Return u = m̂/√v̂ [p, q], and move the moments on."""
        g = np.asarray(g, dtype=np.float64)
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        return (self.m / (1 - beta1**self.t)) / np.sqrt(self.v / (1 - beta2**self.t))


def train(method, theta, gradients, lr, weight_decay=0.0):
    """Return θ after every step of ``method`` along a given stream of gradients: a list of float64 arrays [p, q]."""
    path = []
    for g in gradients:
        theta = theta - lr * (method.step(g) + weight_decay * theta)
        path.append(theta)
    return path


def gradients(shape, steps, seed=0, rank=3, noise=1.0, dtype=np.float64):
    """Return a stream of gradients of shape (p, ...): a drifting signal of rank ``rank`` and white noise.

    noise: standard deviation of the noise.
    """
    p, q = shape[0], int(np.prod(shape[1:]))
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(p, rank)), rng.normal(size=(rank, q))
    return [
        (left * (1 + 0.5 * rng.normal(size=rank)) @ right + noise * rng.normal(size=(p, q)))
        .astype(dtype)
        .reshape(shape)
        for _ in range(steps)
    ]
