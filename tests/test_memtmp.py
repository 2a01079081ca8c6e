"""The memory estimate: held against real training of small models, and against public numbers of large ones."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig

from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer
from lorapre_peft.memory import AllocationTracker, estimate, measure
from lorapre_peft.memory_models import SHAPES, find_config, meta_model
from lorapre_peft.memory_peers import main, peers

# Several matrices to a chunk, one matrix to a chunk and several tiles to a matrix all occur with these shapes and this bound.
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}
TEMPORARY_BYTES = 1_200_000
TOKENS = (2, 64)  # batch, seq_len
both_optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
both_rules = pytest.mark.parametrize("rule", ["als", "newton"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
both_modes = pytest.mark.parametrize("in_backward", [True, False], ids=["in_backward", "ordinary"])


def train(model, optimizer, in_backward, steps=2, **options):
    """Really train on the CPU; measured bytes of gradients, state and temporaries."""
    built = create_lorapre_optimizer(model, optimizer, lr=1e-3, update_in_backward=in_backward, **options)
    found = {"gradients": 0, "temporaries": 0}
    apply = built._apply

    def state_bytes():
        return sum(value.nbytes for state in built.state.values() for value in state.values())

    def watched(located):
        before = state_bytes()
        found["gradients"] = max(found["gradients"], sum(param.grad.nbytes for _, param, _ in located))
        with AllocationTracker() as tracker:
            apply(located)
        found["temporaries"] = max(found["temporaries"], tracker.peak_bytes - (state_bytes() - before))

    built._apply = watched
    tokens = torch.randint(0, 64, TOKENS)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        built.step()
        built.zero_grad()
    return found | {"state": state_bytes()}


def assert_close(estimated, measured):
    print("RATIO", {p: round(getattr(estimated,p)/v,4) for p,v in measured.items()}, measured)
    for part, value in measured.items():
        assert getattr(estimated, part) == pytest.approx(value, rel=0.05), part


@both_optimizers
@both_rules
@both_dtypes
@both_modes
def test_full_weights_as_trained(make_llama, optimizer, rule, dtype, in_backward):
    model = make_llama(dtype=dtype, **SIZES)
    options = dict(momentum_rank=4, update_rule=rule, temporary_bytes=TEMPORARY_BYTES)
    estimated = estimate(model, optimizer, in_backward=in_backward, batch=0, **options)
    assert_close(estimated, train(model, optimizer, in_backward, **options))


@both_optimizers
@both_modes
def test_adapters_as_trained(make_llama, optimizer, in_backward):
    model = get_peft_model(make_llama(**SIZES), LoRAPreConfig(r=16, target_modules="all-linear", bias="all"))
    estimated = estimate(model, optimizer, in_backward=in_backward, batch=0)
    # A third step: the factors of lora_A start in the second one, for its first gradients are zero.
    assert_close(estimated, train(model, optimizer, in_backward, steps=3))


@both_modes
def test_trained_embeddings_and_clipping_as_trained(make_llama, in_backward):
    model = make_llama(dtype=torch.bfloat16, vocab_size=5000, **SIZES)
    options = dict(embeddings="adamw", max_param_grad_norm=1e-6, temporary_bytes=TEMPORARY_BYTES, target_modules="mlp")
    options["target_modules"] = ["gate_proj", "down_proj"]
    estimated = estimate(model, in_backward=in_backward, batch=0, **options)
    assert_close(estimated, train(model, "adamw", in_backward, **options))


@both_dtypes
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_as_on_the_cpu(make_llama, dtype, checkpointing, kv_heads):
    # The CPU's attention is fused too, so nothing in this run is replaced by anything.
    model = make_llama(dtype=dtype, num_key_value_heads=kv_heads, vocab_size=512, **SIZES)
    batch, seq_len = 2, 128
    estimated = estimate(model, batch=batch, seq_len=seq_len, checkpointing=checkpointing)

    create_lorapre_optimizer(model)  # freezes what is not trained
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tracker = AllocationTracker()

    def free(param):
        tracker.leave_out(param.grad)
        param.grad = None

    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(free)
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    with tracker:
        model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    print(estimated.activations, tracker.peak_bytes)
    assert estimated.activations == pytest.approx(tracker.peak_bytes, rel=0.05)
