"""The measurement of peak memory: on small models everywhere, and on 7B where there is a CUDA device."""

import pytest
import torch
from processes import run
from transformers import LlamaConfig

from eval import peak_memory
from lorapre_peft import create_lorapre_optimizer
from lorapre_peft.memory.models import find_config
from lorapre_peft.memory.peak import measure


def of_a_small_model(config):
    """Return bytes in use before, the peak and what it is of, the estimates of peak and state, and bytes and steps of
    the state.
    """
    built = []

    def build(*args, **options):
        built.append(create_lorapre_optimizer(*args, **options))
        return built[0]

    peak_memory.create_lorapre_optimizer = build  # in this process alone
    with measure("cpu") as before:
        pass
    measured, expected = peak_memory.measured_and_estimated(
        config, momentum_rank=8, batch=1, seq_len=4, steps=2, device=torch.device("cpu")
    )
    state = [value for held in built[0].state.values() for value in held.values()]
    steps = {float(held["step"]) for held in built[0].state.values()}
    return (
        before.peak_bytes, measured.peak_bytes, measured.what, expected.total, expected.state,
        sum(value.nbytes for value in state), steps,
    )  # fmt: skip


def test_small_model_on_the_cpu(tmp_path):
    """In a process of its own, so that no memory which others have freed is used again."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=4, vocab_size=128
    )
    [(before, peak, what, total, state, state_bytes, steps)] = run(1, tmp_path / "run", of_a_small_model, config)
    assert what.startswith("resident memory")
    assert total > 2 * 64e6  # the bfloat16 weights
    # Libraries are loaded on the way, and keep buffers of their own.
    assert total <= peak - before < 3 * total
    assert state_bytes == state
    assert steps == {2.0}


def test_an_unknown_model_ends_the_command_with_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["peak_memory", "no-such-model"])
    with pytest.raises(SystemExit):
        peak_memory.main()
    assert "'no-such-model' is no local folder or config.json and no built-in shape" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 18 GB free")
def test_7b_fits_18_gigabytes():
    measured, expected = peak_memory.measured_and_estimated(
        find_config("Llama-2-7b-hf")[0], momentum_rank=8, batch=1, seq_len=512, steps=2, device=torch.device("cuda")
    )
    assert measured.peak_bytes < 18e9
    assert measured.peak_bytes == pytest.approx(expected.total, rel=0.2)
