"""This module measures how closely different forms of the step of `als` follow an exact average.

`python -m eval.sweeps` prints the table of ``docs/rules.md`` in a minute on one core. A form is a choice of the
factors B and A of one product B A. The factors decide what float32 and the damping of the next step do to the product.
The package has the form ``orthonormal``. The others are here to be compared with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lorapre_peft.optim.reference import damped, restarted

BETA, DAMPING, STEPS, LAST = 0.9, 1e-6, 120, 30
SHAPES = [(8, 64, 7), (8, 64, 2), (64, 8, 2), (20, 12, 4), (64, 96, 8)]  # Each is (p, q, k).


def norms(B: Tensor, A: Tensor) -> Tensor:
    """Return the identity [k, k], so that `sweep` only makes the Frobenius norms equal."""
    return torch.eye(len(A), dtype=torch.float64)


def orthonormal(B: Tensor, A: Tensor) -> Tensor:
    """Return the turn [k, k] that makes B's columns orthonormal, by the Cholesky factor of BᵀB.

    A then has all of the scale.
    """
    return torch.linalg.inv(torch.linalg.cholesky(damped(B.mT @ B, DAMPING))).mT


def singular(B: Tensor, A: Tensor) -> Tensor:
    """Return the turn [k, k] that makes BᵀB and A Aᵀ the same diagonal matrix, that of B A's singular values."""
    root = torch.linalg.cholesky(damped(B.mT @ B, DAMPING))
    values, vectors = torch.linalg.eigh(root.mT @ (A @ A.mT) @ root)
    return torch.linalg.inv(root).mT @ vectors * values.clamp_min(1e-20 * values.max()) ** 0.25


def sweep(B: Tensor, A: Tensor, x: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factors B [p, k] and A [k, q] in float32 after one step with the matrix x [p, q].

    As in the package, products are float32 and k×k matrices float64. turn: function of B and A that returns T [k, k],
    by which B is multiplied and whose inverse A is multiplied by.
    """
    B, A = restarted(B, A)
    X = x @ A.mT @ torch.linalg.inv(damped(A.double() @ A.double().mT, DAMPING)).float()
    new = BETA * B + (1 - BETA) * X
    wide, P = new.double(), (new.mT @ x).double()
    A = torch.linalg.inv(damped(wide.mT @ wide, DAMPING)) @ (BETA * wide.mT @ B.double() @ A.double() + (1 - BETA) * P)
    T = turn(wide, A)
    B, A = new @ T.float(), torch.linalg.inv(T) @ A
    balance = (A.norm() / B.norm()).sqrt()
    return B * balance, (A / balance).float()


def streams(p: int, q: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield by name four streams of gradients [p, q].

    They have one direction, halving singular values, three directions that drift in noise, and noise alone.
    """
    for kind in ("rank one", "halving", "drifting", "noise"):
        draw = torch.Generator().manual_seed(1)
        rank = {"rank one": 1, "halving": min(p, q), "drifting": 3, "noise": 0}[kind]
        left, right = torch.randn(p, rank, generator=draw), torch.randn(rank, q, generator=draw)
        size = 0.5 ** torch.arange(rank) if kind == "halving" else torch.ones(rank)
        noise = {"rank one": 0.0, "halving": 0.02, "drifting": 1.0, "noise": 1.0}[kind]
        found = []
        for _ in range(STEPS):
            left = left + 0.1 * torch.randn(p, rank, generator=draw) * (kind == "drifting")
            weight = size * (1 + 0.5 * torch.randn(rank, generator=draw))
            found.append((left * weight) @ right + noise * torch.randn(p, q, generator=draw))
        yield kind, found


def error(stream: list[Tensor], k: int, turn: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Return the mean of ‖B A − m‖/‖m‖ over the last steps, and the largest condition number of B there.

    stream: gradients [p, q] of all steps. k: rank. turn: as in `sweep`.
    """
    p, q = stream[0].shape
    B, A, m, errors, conditions = torch.zeros(p, k), torch.zeros(k, q), torch.zeros(p, q, dtype=torch.float64), [], []
    for g in stream:
        m = BETA * m + (1 - BETA) * g.double()
        B, A = sweep(B, A, g, turn)
        errors.append(((B.double() @ A.double() - m).norm() / m.norm()).item())
        conditions.append(torch.linalg.cond(B.double()).item())
    return sum(errors[-LAST:]) / LAST, max(conditions[-LAST:])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table as Markdown. argv: arguments of the command line. None stands for the process's own."""
    argparse.ArgumentParser(prog="python -m eval.sweeps", description=__doc__.splitlines()[0]).parse_args(argv)
    forms = [norms, orthonormal, singular]
    print(
        "| gradients | p×q, k | " + " | ".join(form.__name__ for form in forms) + " |\n|---|---|" + "---|" * len(forms)
    )
    for p, q, k in SHAPES:
        for kind, stream in streams(p, q):
            cells = (f"{e:.1e} ({c:.0e})" for e, c in (error(stream, k, form) for form in forms))
            print(f"| {kind} | {p}×{q}, {k} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
