"""An independent float64 statement of both update rules in numpy, written from the method's equations.

It shares no code with the package: the reference and every fast path are compared with it. A matrix is p×q, its
factors are B [p, k] and A [k, q]. `Adam.step` and `Muon.step` take a gradient and return the direction u of
θ ← θ − lr (u + λ θ).
"""

import numpy as np


def hashed_rows(k, q):
    """The rows that directions of `als` start from: two rounds of lowbias32 on 0, 1, 2, …, the upper 24 bits as a
    number in [0, 1).
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
    """(gram + ridge I)⁻¹ target"""
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), target)


def right_fit(x, a, ridge):
    """x Aᵀ (A Aᵀ + ridge I)⁻¹"""
    return solve(a @ a.T, ridge, a @ x.T).T


def relative(gram, damping):
    """δ' of `als`: relative to the mean diagonal of the Gram matrix that it is added to."""
    return damping * np.trace(gram) / len(gram)


class Factors:
    """M ≈ B A following M ← decay · M + weight · x. ``a``: the random start of `newton`; `als` starts from zeros."""

    def __init__(self, rule, decay, weight, k, a=None, damping=1e-6):
        self.rule, self.decay, self.weight, self.k, self.damping = rule, decay, weight, k, damping
        self.a, self.b = (None, None) if a is None else (np.array(a, dtype=np.float64), None)

    def meet(self, x):
        """Make zeros of the first x's shape, and start directions of `als` whose row of A is zero."""
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
        return self.b @ self.a

    def fit(self, x):
        """X, the coefficients of x in the row space of A."""
        ridge = self.damping if self.rule == "newton" else relative(self.a @ self.a.T, self.damping)
        return right_fit(x, self.a, ridge)

    def follow(self, x):
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
    """C of the method, section 3: no normalised update of exact Adam is longer."""
    beta1, beta2 = betas
    return (1 - beta1) / np.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


class Adam:
    """Factored Adam (Algorithm 1 for `newton`; the tracked rule for `als`). starts: (m_A, v_A) of `newton`.

    second: the rank of v; None: 1 for `als` and k for `newton`.
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
        """Go on with these decays."""
        self.betas = betas
        root2 = np.sqrt(betas[1])
        self.m.decay, self.m.weight = betas[0], 1 - betas[0]
        self.v.decay, self.v.weight = root2, 1 - root2

    def step(self, g):
        g = np.asarray(g, dtype=np.float64)
        beta1, beta2 = self.betas
        if self.rule == "als" and not self.energy:
            self.t = 0
            if not g.any():
                return np.zeros_like(g)  # t counts from the first gradient that is not zero
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
        u = m_hat / (np.sqrt(v / (1 - beta2**self.t)) + self.eps)
        return u if self.rule == "newton" else np.clip(u, -bound(self.betas), bound(self.betas))


def newton_schulz(m, steps=5):
    """Muon's quintic, applied to the singular values of m, its Frobenius norm divided out first; zero stays zero."""
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    s = s / (np.linalg.norm(s) or 1.0)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


class Muon:
    """Factored Muon (Algorithm 2 for `newton`; the same sweep on μ M + g for `als`). start: m_A of `newton`."""

    def __init__(self, rule, k, *, momentum=0.95, rho=None, nesterov=False, damping=1e-6, start=None):
        self.rule, self.nesterov, self.rho, self.t = rule, nesterov, 1.0 if rho is None else rho, 0
        self.m = Factors(rule, None, 1.0, k, start, damping)
        self.redecay(momentum)

    def redecay(self, momentum):
        """Go on with this decay."""
        self.mu = self.m.decay = momentum

    def step(self, g):
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
            # The heavy-ball sum is the EMA divided by 1−μ; its bias is taken out and put back around the residual.
            corrected = (1 - self.mu**self.t) / (1 - self.mu)
            inside = self.m.fit(g) @ self.m.a
            m = self.mu * self.m.product + inside
            m = m + min(1.0, self.rho / (1 - self.mu**self.t)) * corrected * (g - inside)
        self.m.follow(g)
        return newton_schulz(g + self.mu * m if self.nesterov else m)


class ExactAdam:
    """Adam's own moments, uncompressed."""

    def __init__(self, betas=(0.9, 0.95)):
        self.betas, self.t, self.m, self.v = betas, 0, 0.0, 0.0

    def step(self, g):
        g = np.asarray(g, dtype=np.float64)
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        return (self.m / (1 - beta1**self.t)) / np.sqrt(self.v / (1 - beta2**self.t))


def train(method, theta, gradients, lr, weight_decay=0.0):
    """θ after every step of ``method`` along a given stream of gradients: a list of float64 arrays."""
    path = []
    for g in gradients:
        theta = theta - lr * (method.step(g) + weight_decay * theta)
        path.append(theta)
    return path


def gradients(shape, steps, seed=0, rank=3, noise=1.0, dtype=np.float64):
    """A stream of gradients of shape (p, ...): a drifting rank-``rank`` signal plus ``noise`` times white noise."""
    p, q = shape[0], int(np.prod(shape[1:]))
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(p, rank)), rng.normal(size=(rank, q))
    return [
        (left * (1 + 0.5 * rng.normal(size=rank)) @ right + noise * rng.normal(size=(p, q)))
        .astype(dtype)
        .reshape(shape)
        for _ in range(steps)
    ]
