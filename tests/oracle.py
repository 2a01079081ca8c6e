"""An independent float64 statement of both update rules in numpy, written from the method's equations.

It shares no code with the package: the reference and every fast path are compared with it. A matrix is p×q, its
factors are B [p, k] and A [k, q]. `Adam.step` and `Muon.step` take a gradient and return the direction u of
θ ← θ − lr (u + λ θ).
"""

import numpy as np


def spectral_start(x, k):
    """Best rank-k approximation of x (Eckart and Young) as factors of equal Frobenius norms."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return u[:, :k] * np.sqrt(s[:k]), np.sqrt(s[:k])[:, None] * vh[:k]


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
    """M ≈ B A following M ← decay · M + weight · x. ``a``: the random start of `newton`; `als` starts from x."""

    def __init__(self, rule, decay, weight, k, a=None, damping=1e-6):
        self.rule, self.decay, self.weight, self.k, self.damping = rule, decay, weight, k, damping
        self.a, self.b = (None, None) if a is None else (np.array(a, dtype=np.float64), None)

    @property
    def product(self):
        return self.b @ self.a

    def start(self, x):
        self.b, self.a = spectral_start(self.weight * x, self.k)

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
        a_new = solve(gram, relative(gram, self.damping), target)
        norm_b, norm_a = np.linalg.norm(b_new), np.linalg.norm(a_new)
        self.b, self.a = b_new * np.sqrt(norm_a / norm_b), a_new * np.sqrt(norm_b / norm_a)


def bound(betas):
    """C of the method, section 3: no normalised update of exact Adam is longer."""
    beta1, beta2 = betas
    return (1 - beta1) / np.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


class Adam:
    """Factored Adam (Algorithm 1 for `newton`; the tracked rule for `als`). starts: (m_A, v_A) of `newton`."""

    def __init__(self, rule, k, *, betas=(0.9, 0.95), eps=1e-8, rho=None, damping=1e-6, starts=(None, None)):
        self.rule, self.eps, self.rho = rule, eps, 1.0 if rho is None else rho
        self.m = Factors(rule, None, None, k, starts[0], damping)
        self.v = Factors(rule, None, None, k, starts[1], damping)
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
        start = self.t == 0
        if self.rule == "als" and start and not g.any():
            return np.zeros_like(g)  # t counts from the first gradient that is not zero
        self.t += 1
        if self.rule == "newton":
            if start:
                self.m.b, self.v.b = np.zeros((len(g), self.m.k)), np.zeros((len(g), self.v.k))
            m = beta1 * self.m.product + (1 - beta1) * g
            v = beta2 * self.v.product**2 + (1 - beta2) * g**2
        elif start:
            m, v = (1 - beta1) * g, (1 - beta2) * g**2
            self.m.start(g)
            self.v.b, self.v.a = spectral_start(np.sqrt(1 - beta2) * np.abs(g), self.v.k)
        else:
            m = (beta1 * self.m.b + (1 - beta1 - self.rho) * self.m.fit(g)) @ self.m.a + self.rho * g
            c = self.energy / np.sum(self.v.product**2)
            v = beta2 * c * self.v.product**2 + (1 - beta2) * g**2
        if self.rule == "newton" or not start:
            self.m.follow(g)
            self.v.follow(np.abs(g))
        self.energy = beta2 * self.energy + (1 - beta2) * np.sum(g**2)
        u = (m / (1 - beta1**self.t)) / (np.sqrt(v / (1 - beta2**self.t)) + self.eps)
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
        self.rule, self.nesterov, self.average_rho = rule, nesterov, 1.0 if rho is None else rho
        self.m = Factors(rule, None, 1.0, k, start, damping)
        self.redecay(momentum)

    def redecay(self, momentum):
        """Go on with this decay."""
        self.mu = self.m.decay = momentum
        self.rho = self.average_rho / (1 - momentum)

    def step(self, g):
        g = np.asarray(g, dtype=np.float64)
        if self.m.b is None and self.rule == "als":
            if not g.any():
                return np.zeros_like(g)
            m = g
            self.m.start(g)
        else:
            if self.m.b is None:
                self.m.b = np.zeros((len(g), self.m.k))
            if self.rule == "newton":
                m = self.mu * self.m.product + g
            else:
                m = (self.mu * self.m.b + (1 - self.rho) * self.m.fit(g)) @ self.m.a + self.rho * g
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
