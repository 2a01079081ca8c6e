"""How far LoRA-Pre's update is from exact Adam's: what is measured, and the report of it."""

import json
import math

import numpy as np
import oracle
import pytest
import torch
from roundoff import gamma

from eval import fidelity
from eval.fidelity import BETAS, Shadow, compared, markdown, plot
from lorapre_peft import LoRAPreAdamW

SHAPE = torch.Size((8, 12))


def gradients(count=5):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def test_a_shadow_has_the_updates_of_its_optimizer():
    shadow = Shadow(lambda params: torch.optim.AdamW(params, lr=1.0, betas=BETAS, weight_decay=0.0), [SHAPE])
    adam = oracle.ExactAdam(BETAS)
    for g in gradients():
        (update,) = shadow.updates([g])
        # ε is 1e-8 of gradients of about 1, whose smallest of 96 is above 1e-3.
        np.testing.assert_allclose(update, adam.step(g.numpy()), rtol=1e-5 + gamma(100), atol=gamma(100))


def test_a_shadow_does_not_change_the_gradients_or_depend_on_weights():
    shadow = Shadow(lambda params: LoRAPreAdamW(params, lr=1.0, betas=BETAS, momentum_rank=2), [SHAPE])
    rule = oracle.Adam("als", 2, betas=BETAS)
    for g in gradients():
        before = g.clone()
        (update,) = shadow.updates([g])
        assert torch.equal(g, before)
        # Thousands of float32 operations, of a sweep whose Gram matrices are conditioned by less than 100.
        np.testing.assert_allclose(update, rule.step(g.numpy()), rtol=0, atol=100 * gamma(1000))


def test_the_condition_is_that_of_the_gram_matrix():
    shadow = Shadow(lambda params: LoRAPreAdamW(params, lr=1.0, betas=BETAS, momentum_rank=3), [SHAPE])
    for g in gradients():
        shadow.updates([g])
    A = shadow.optimizer.state[shadow.params[0]]["m_A"].double().numpy()
    expected = np.linalg.cond(A @ A.T)
    assert shadow.condition(0, "m_A") == pytest.approx(expected, rel=expected * 1e-14)  # of forming A Aᵀ in float64
    shadow.optimizer.state[shadow.params[0]]["m_A"].zero_()
    assert shadow.condition(0, "m_A") == float("inf")


def test_updates_are_compared_by_direction_and_length():
    assert compared(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])) == pytest.approx((1.0, 0.5), rel=1e-15)
    assert compared(torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 0.0]])) == (0.0, 2.0)
    assert math.isnan(compared(torch.zeros(1, 2), torch.ones(1, 2))[0])


def test_a_rank_that_does_not_compress_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    with pytest.raises(ValueError, match="found the momentum rank 5; expected one that compresses matrices of 8×12"):
        fidelity.Fidelity([2, 5], 10).on_train_begin(None, None, None, model=model)


def test_the_command_writes_numbers_tables_and_a_plot(tmp_path, monkeypatch):
    made = {"rule": "als", "rank": 2, "layer": "q_proj", "step": [1, 10, 20], "cosine": [0.9, 0.8, None]}
    made |= {"length": [1.0, 1.1, 1.2]} | {factor: [1.0, 2.0e3, 3.0] for factor in fidelity.GRAMS}
    found = {
        "run": {},
        "series": [made, made | {"layer": "k_proj", "cosine": [0.7, 0.6, 0.5], "v_B": [1.0, None, 1.0]}],
    }
    monkeypatch.setattr(fidelity, "measure", lambda ranks, steps, every: found)
    fidelity.main(["--steps", "20", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "fidelity.json").read_text())["series"] == found["series"]
    assert "| als | 2 | 0.70 (0.60 to 0.80) | 0.50 (0.50 to 0.50) | 1.10 (1.10 to 1.10)" in markdown(found)
    assert "| 2e+03 | 2e+03 | 2e+03 | singular |" in markdown(found)
    assert "| als | 2 | – | 0.50 |" in (tmp_path / "fidelity.md").read_text()
    plot(found, tmp_path / "again.png")
    assert (tmp_path / "fidelity.png").read_bytes()[:4] == b"\x89PNG"
