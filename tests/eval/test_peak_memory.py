"""The measurement of peak memory: on small models everywhere, and on 7B where there is a CUDA device."""

import pytest
import torch
from transformers import LlamaConfig

from eval.peak_memory import measured_and_estimated
from lorapre_peft import create_lorapre_optimizer


def test_small_model_on_the_cpu(tmp_path, monkeypatch):
    """Resident memory holds the interpreter and libraries too, so it can only bound the estimate from above."""
    built = []

    def build(*args, **options):
        built.append(create_lorapre_optimizer(*args, **options))
        return built[0]

    monkeypatch.setattr("eval.peak_memory.create_lorapre_optimizer", build)
    LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=4, vocab_size=128
    ).save_pretrained(tmp_path)
    measured, expected = measured_and_estimated(
        str(tmp_path), momentum_rank=8, batch=1, seq_len=32, steps=2, device=torch.device("cpu")
    )
    assert measured.what.startswith("resident memory")
    assert measured.peak_bytes > expected.total > 2 * 64e6  # the bfloat16 weights
    state = built[0].state.values()
    assert {float(held["step"]) for held in state} == {2.0}
    assert sum(value.nbytes for held in state for value in held.values()) == expected.state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 18 GB free")
def test_7b_fits_18_gigabytes():
    measured, expected = measured_and_estimated(
        "meta-llama/Llama-2-7b-hf", momentum_rank=8, batch=1, seq_len=512, steps=2, device=torch.device("cuda")
    )
    assert measured.peak_bytes < 18e9
    assert measured.peak_bytes == pytest.approx(expected.total, rel=0.2)
