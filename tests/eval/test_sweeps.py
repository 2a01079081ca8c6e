"""The forms of a sweep that `eval.sweeps` compares: all have the oracle's product, and the table has them all."""

import numpy as np
import oracle
import pytest
import torch
from roundoff import chain, gamma

from eval import sweeps
from eval.sweeps import norms, orthonormal, singular


@pytest.mark.parametrize("turn", [norms, orthonormal, singular])
@pytest.mark.parametrize(("p", "q", "k"), [(8, 64, 2), (64, 8, 2), (20, 12, 4)])
def test_a_sweep_has_the_oracles_product_in_every_form(turn, p, q, k):
    draw = torch.Generator().manual_seed(0)
    B, A, x = (torch.randn(*shape, generator=draw) for shape in ((p, k), (k, q), (p, q)))
    truth = oracle.Factors("als", sweeps.BETA, 1 - sweeps.BETA, k, damping=sweeps.DAMPING)
    truth.b, truth.a = B.double().numpy(), A.double().numpy()
    truth.follow(x.double().numpy())
    found_B, found_A = sweeps.sweep(B, A, x, turn)
    # Each number of the product goes through `chain` operations. The inverse of A Aᵀ amplifies their errors by at most
    # the square of A's condition number, and projections onto B's new columns by that of B's.
    room = gamma(chain((p, q), k)) * np.linalg.cond(A.numpy()) ** 2 * np.linalg.cond(truth.b)
    off = np.linalg.norm((found_B.double() @ found_A.double()).numpy() - truth.product)
    assert off <= room * np.linalg.norm(truth.b) * np.linalg.norm(truth.a)
    assert found_B.norm().item() == pytest.approx(found_A.norm().item(), rel=gamma(p * k + q * k))


def test_the_forms_differ_in_the_factors_as_they_say():
    draw = torch.Generator().manual_seed(0)
    B, A, x = (torch.randn(*shape, generator=draw) for shape in ((20, 4), (4, 12), (20, 12)))
    # Rounding, and the damping as it is amplified by the Gram matrix of the new B before it is turned.
    turned, _ = sweeps.sweep(B, A, x, norms)
    room = gamma(chain((20, 12), 4)) + sweeps.DAMPING * torch.linalg.cond(turned).item() ** 2
    B_new, A_new = sweeps.sweep(B, A, x, orthonormal)
    gram = (B_new.mT @ B_new).double()
    expected = gram.diagonal().mean() * torch.eye(4).double()
    torch.testing.assert_close(gram, expected, rtol=0, atol=room * gram.max().item())
    B_new, A_new = sweeps.sweep(B, A, x, singular)
    grams = (B_new.mT @ B_new).double(), (A_new @ A_new.mT).double()
    torch.testing.assert_close(*grams, rtol=0, atol=room * grams[0].max().item())


def test_the_table_has_a_row_for_each_shape_and_stream(monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "STEPS", 4)
    monkeypatch.setattr(sweeps, "LAST", 2)
    monkeypatch.setattr(sweeps, "SHAPES", [(6, 5, 2)])
    sweeps.main([])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| gradients | p×q, k | norms | orthonormal | singular |"
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {kind}", "6×5, 2"] for kind in ("rank one", "halving", "drifting", "noise")
    ]
    # The package's form follows one direction but for rounding and damping, once a step.
    followed = float(rows[0].split(" | ")[3].split(" (")[0])
    assert followed < 4 * (gamma(chain((6, 5), 2)) + sweeps.DAMPING)
