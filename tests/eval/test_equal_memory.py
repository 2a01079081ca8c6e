"""Which rank a budget of memory affords."""

import functools

import pytest
from transformers import LlamaConfig

from eval import equal_memory
from eval.equal_memory import largest_rank
from lorapre_peft.memory.peak import estimate


def test_the_largest_rank_is_within_the_budget_and_the_next_is_not(make_llama, monkeypatch):
    model = make_llama(hidden_size=16, intermediate_size=20, num_hidden_layers=1).to("meta")
    options = {"update_rule": "als"}

    @functools.cache
    def estimated(k):
        return estimate(model, momentum_rank=k, in_backward=False, batch=0, **options)

    def peak(k):
        return estimated(k).total

    monkeypatch.setattr(equal_memory, "estimate", lambda model, momentum_rank, **options: estimated(momentum_rank))
    assert largest_rank(model, peak(4), options) == (4, peak(4))
    assert largest_rank(model, peak(4) - 1, options) == (3, peak(3))
    assert largest_rank(model, peak(1) - 1, options) == (0, peak(1))


@pytest.mark.slow
def test_a_models_row_holds_its_budget(monkeypatch, capsys):
    """Of one layer of width 64, by hand: GaLore's peak at r = 16, and what AdamW takes beyond it, both in bfloat16."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    monkeypatch.setattr(equal_memory, "base_config", lambda name: LlamaConfig(**shape))
    monkeypatch.setitem(equal_memory.RANKS, "llama-60m", 16)
    equal_memory.main(["--models", "llama-60m"])
    line = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    matrices = [(64, 64)] * 4 + [(64, 96)] * 3
    galore = sum(2 * 16 * (min(shape) + 2 * max(shape)) for shape in matrices)
    entries = sum(p * q for p, q in matrices)
    norms = 3 * 64
    total = 2 * (entries + 2 * 99 * 64 + norms) + 2 * (entries + norms) + galore + 4 * norms
    assert cells[1] == f"r = 16, {total / 1e3:.2f} kB"
    assert cells[2] == f"{(4 * entries - galore) / 1e3:.2f} kB more"
