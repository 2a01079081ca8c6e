"""`extract_lora` and plain PEFT: what PEFT makes of the adapter is what the report says, for modules that PEFT renames
or refuses too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from extraction import true_errors
from peft import LoraConfig, PeftModel
from roundoff import model_room
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    Zamba2Config,
    Zamba2ForCausalLM,
)
from versions import skip_before

from lorapre_peft.extract import adapter, lora
from lorapre_peft.extract.lora import extract_lora
from lorapre_peft.extract.selection import read_past

SIZES = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4, vocab_size=64)


def deepseek() -> nn.Module:
    """A dense MLP in layer 0; stacked experts and a shared expert, three linear modules, in layer 1."""
    heads = dict(num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8)
    heads |= dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(DeepseekV3Config(num_hidden_layers=2, **SIZES, **heads, **experts))


def qwen3_moe() -> nn.Module:
    """A dense MLP in layer 0, stacked experts alone in layer 1."""
    experts = dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0], **SIZES, **experts))


def low_rank(model: nn.Module):
    """A change of every linear module but the head: of rank 4, of every down_proj of rank 2."""
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head.weight"}

    def change(name, parameter, generator):
        if name in linear:
            (p, q), r = parameter.shape, 2 if "down_proj" in name else 4
            return 0.05 * torch.randn(p, r, generator=generator) @ torch.randn(r, q, generator=generator)

    return change


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


def opened(base: str, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


before_0_20 = skip_before("peft", "0.20", "takes the inputs of stacked experts for their outputs")


@before_0_20
@pytest.mark.parametrize("build", [deepseek, qwen3_moe])
@pytest.mark.parametrize("size", [dict(rank=4), dict(energy=1 - 1e-9)], ids=["one rank", "ranks by module"])
def test_modules_that_share_their_names_with_stacked_experts(tmp_path, checkpoint_pair, build, size):
    """PEFT takes "gate_proj" there for the experts: dense layers and shared experts are addressed by their weights
    instead.

    The whole model's output is compared, as it runs with the adapter and merged: it changes by order 1.
    """
    torch.manual_seed(0)
    model = build()
    base, tuned = checkpoint_pair(low_rank(model), model)
    report = extract_lora(base, tuned, tmp_path / "lora", **size)
    assert report.left_out == []
    assert report.kept_energy == pytest.approx(1, abs=1e-6)
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert {f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")} <= set(config.target_parameters)
    assert bool(config.rank_pattern) == ("energy" in size)

    before = logits(AutoModelForCausalLM.from_pretrained(base))
    want = logits(AutoModelForCausalLM.from_pretrained(tuned))
    assert (want - before).abs().max() > 0.1
    adapted = opened(base, tmp_path / "lora")
    room = 2 * model_room(adapted, logits)
    torch.testing.assert_close(logits(adapted), want, rtol=0, atol=room)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), want, rtol=0, atol=room)


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2))


def zamba() -> nn.Module:
    """Two blocks of attention, which share their weights."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=4, adapter_rank=4, use_shared_attention_adapter=False, num_mem_blocks=1)
    mixer = dict(mamba_d_state=8, mamba_d_conv=2, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8)
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    return Zamba2ForCausalLM(Zamba2Config(**sizes, **mixer, layers_block_type=kinds, use_mem_rope=False))


@pytest.mark.parametrize(
    ("build", "reason", "kinds"),
    [
        (mamba, "its weight is read past the module", {"x_proj", "dt_proj", "out_proj"}),
        (
            zamba,
            "shared by several modules",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "0", "1"},
        ),
    ],
)
def test_modules_in_which_an_adapter_would_have_no_effect_are_left_out(
    tmp_path, checkpoint_pair, build, reason, kinds
):
    """PEFT would take them, and merge them rightly. As it runs, the adapter is what it is merged."""
    model = build()
    base, tuned = checkpoint_pair(low_rank(model), model)
    with pytest.warns(UserWarning, match=reason):
        report = extract_lora(base, tuned, tmp_path / "lora", rank=4)
    assert {entry.name.split(".")[-2] for entry in report.left_out if entry.reason.startswith(reason)} == kinds
    assert report.modules
    adapted = opened(base, tmp_path / "lora")
    found, merged = logits(adapted), logits(adapted.merge_and_unload())
    assert (merged - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    torch.testing.assert_close(found, merged, rtol=0, atol=4 * model_room(adapted, logits))


def test_attention_of_torch_reads_its_output_projection_itself():
    model = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    (found,) = read_past(model, linear)
    assert found.endswith("head.attention.out_proj")


def test_what_is_no_reading_of_a_weight():
    """T5 looks at a weight's dtype, and Bloom slices weights for another order of sums."""
    sizes = dict(vocab_size=64, n_head=2, hidden_size=16, n_layer=1)
    t5 = T5Config(vocab_size=64, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
    for model in (BloomForCausalLM(BloomConfig(**sizes)), T5ForConditionalGeneration(t5)):
        assert read_past(model, [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]) == set()


def test_a_module_that_peft_refuses_is_left_out(tmp_path, checkpoint_pair, monkeypatch):
    """Mamba's fused kernels read out_proj's weight past the module, so PEFT refuses it."""
    monkeypatch.setattr(adapter, "read_past", lambda model, names: set())
    model = mamba()
    base, tuned = checkpoint_pair(low_rank(model), model)
    with pytest.warns(UserWarning, match="refused by PEFT: .*'out_proj' is incompatible with Mamba"):
        report = extract_lora(base, tuned, tmp_path / "lora", rank=4)
    assert {m.name.rpartition(".")[2] for m in report.modules} == {"in_proj", "x_proj", "dt_proj"}
    assert {entry.name.split(".")[-2] for entry in report.left_out} == {"out_proj"}
    assert 0.05 < sum(entry.share for entry in report.left_out) == pytest.approx(1 - report.kept_energy, rel=1e-4)
    assert max(true_errors(base, tuned, tmp_path / "lora", report).values()) < 1e-5
    with pytest.raises(
        ValueError, match=r"nothing that changed can be put into the adapter .*'out_proj' is incompatible"
    ):
        extract_lora(base, tuned, tmp_path / "other", rank=4, target_modules=["out_proj"])
    assert not (tmp_path / "other").exists()


@before_0_20
def test_an_adapter_that_peft_would_misread_is_not_written(tmp_path, checkpoint_pair, monkeypatch):
    """As with a PEFT that changes the meaning of a name: the earlier files in the folder stay, and no new ones
    come.
    """
    torch.manual_seed(0)
    model = deepseek()
    base, tuned = checkpoint_pair(low_rank(model), model)
    monkeypatch.setattr(lora, "addressable", lambda model, names: (set(), {}))
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(
        RuntimeError, match=r"opens the adapter otherwise than it was meant in \d+ modules such as model"
    ):
        extract_lora(base, tuned, folder, rank=4)
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "lora"}


@pytest.mark.parametrize("fault", ["scaling", "factors", "name", "extra"])
def test_every_kind_of_misreading_is_found(tmp_path, make_llama, fault):
    """The check itself: one module of a sound adapter goes wrong, and that one is named."""
    model = make_llama().to("meta")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (torch.randn(32, 2, generator=generator), torch.randn(2, 32, generator=generator)) for name in names
    }
    config = adapter.adapter_config(model, dict.fromkeys(names, 2), (), "base")
    written = dict(factors)
    bad = names[1]
    if fault == "scaling":
        config.alpha_pattern = {f"^{bad}": 4}
    elif fault == "factors":
        written[bad] = (factors[bad][0] * 1.5, factors[bad][1])
    elif fault == "name":
        written[f"{bad}.weight"] = written.pop(bad)
    else:
        del written[bad], factors[bad]  # the config asks for a module that is not in the file
    adapter.write(tmp_path, config, written, model)
    assert adapter.misread(tmp_path, model, factors) == {bad}


def test_a_sound_adapter_is_read_as_meant_and_leaves_the_model_alone(tmp_path, make_llama):
    model = make_llama().to("meta")
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    before = {name: type(module) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    assert adapter.addressable(model, names) == (set(), {})
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(param.is_meta for param in model.parameters())
