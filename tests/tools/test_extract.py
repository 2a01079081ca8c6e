"""`extract_lora`: what the adapter holds is what its report says, and what it does not hold is said."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from extraction import LINEAR, damage, decaying, everything, full, merged, rank_4, true_errors, weights
from peft import PeftModel
from roundoff import error_room, extraction_room, gamma
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorapre_peft.extract import lora as extract
from lorapre_peft.extract.lora import extract_lora
from lorapre_peft.integrations.checkpoint import Checkpoint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_low_rank_change_merges_back(tmp_path, checkpoint_pair, tied, shard):
    """A change of rank 4 comes back whole: the adapter is the tuned model, to float32 round-off."""
    base, tuned = checkpoint_pair(rank_4, tie_word_embeddings=tied, max_shard_size=shard)
    assert (len(list(Path(base).glob("*.safetensors"))) > 1) == (shard != "5GB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out, so nothing is warned about
        report = extract_lora(base, tuned, tmp_path / "lora", rank=4)
    assert {m.rank for m in report.modules} == {4}
    assert len(report.modules) == 14
    assert report.left_out == []
    before, got, want = weights(base), merged(base, tmp_path / "lora"), weights(tuned)
    changes = {name: want[name] - before[name] for name in want}
    rooms = {name: extraction_room(changes[name], want[name]) for name in want}
    relative = [rooms[f"{m.name}.weight"] / changes[f"{m.name}.weight"].square().mean().sqrt() for m in report.modules]
    assert report.relative_error < max(relative)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=rooms[name])
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(LINEAR)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", base)


def test_reported_error_is_the_merge_error(tmp_path, checkpoint_pair):
    """A change of full rank, cut: the stated error of every module is the one that a merge by PEFT has, and the
    optimum.
    """
    base, tuned = checkpoint_pair(full)
    report = extract_lora(base, tuned, tmp_path / "lora", rank=5)
    true = true_errors(base, tuned, tmp_path / "lora", report)
    before, after = weights(base), weights(tuned)
    for m in report.modules:
        room = error_room(after[f"{m.name}.weight"] - before[f"{m.name}.weight"], after[f"{m.name}.weight"])
        assert m.relative_error == pytest.approx(true[m.name], rel=0, abs=room)
        assert m.merged_error == pytest.approx(true[m.name], rel=0, abs=room)
        S = torch.linalg.svdvals(after[f"{m.name}.weight"].double() - before[f"{m.name}.weight"].double())
        # An SVD in float32 is that of a change as far away as the error is; the energy is its square's complement.
        assert m.kept_energy == pytest.approx(float(S[:5].square().sum() / S.square().sum()), abs=2 * room)
        assert 0.05 < m.relative_error < 0.9
    assert report.kept_energy == pytest.approx(1 - report.relative_error**2)


@pytest.mark.parametrize("hidden", [32, 320])  # an exact SVD, and subspace iteration
def test_energy_takes_the_smallest_rank(tmp_path, checkpoint_pair, hidden):
    base, tuned = checkpoint_pair(full, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1)
    report = extract_lora(base, tuned, tmp_path / "lora", energy=0.9)
    before, after = weights(base), weights(tuned)
    ranks = {}
    for m in report.modules:
        S = torch.linalg.svdvals(after[f"{m.name}.weight"].double() - before[f"{m.name}.weight"].double()).square()
        smallest = int((S.cumsum(0) / S.sum() < 0.9).sum()) + 1
        assert m.kept_energy >= 0.9
        assert m.rank == smallest
        ranks[m.name] = m.rank
    assert len(set(ranks.values())) > 1
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    for name, rank in ranks.items():
        module = model.get_submodule(f"base_model.model.{name}")
        assert (module.r["default"], module.scaling["default"]) == (rank, 1.0)
    true = true_errors(base, tuned, tmp_path / "lora", report)
    for m in report.modules:
        room = error_room(after[f"{m.name}.weight"] - before[f"{m.name}.weight"], after[f"{m.name}.weight"])
        assert m.relative_error == pytest.approx(true[m.name], rel=0, abs=room)
    bounded = extract_lora(base, tuned, tmp_path / "bounded", energy=0.9, max_rank=3)
    assert {m.rank for m in bounded.modules} == {3}


def test_energy_search_doubles(monkeypatch):
    """Large matrices: the search starts below the rank that it needs, and ends at it without a full SVD."""
    torch.manual_seed(0)
    widths = []
    monkeypatch.setattr(extract, "FIRST_RANK", 4)
    monkeypatch.setattr(extract, "best_factors", None)
    top = extract.top_factors
    monkeypatch.setattr(extract, "top_factors", lambda *args: widths.append(args[1]) or top(*args))
    U, _ = torch.linalg.qr(torch.randn(400, 300))
    V, _ = torch.linalg.qr(torch.randn(500, 300))
    S = 0.9 ** torch.arange(300.0)
    smallest = int((S.square().cumsum(0) / S.square().sum() < 0.95).sum()) + 1
    B, A = extract._factors(U * S @ V.mT, None, 0.95, None)
    assert smallest == 15
    assert widths == [4, 8, 16]
    assert (B.shape, A.shape) == ((400, 15), (15, 500))


def test_all_energy_keeps_the_whole_change(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(full)
    report = extract_lora(base, tuned, tmp_path / "lora", energy=1.0)
    assert all(m.rank == min(m.shape) for m in report.modules)
    assert report.relative_error < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_what_cannot_be_expressed_is_reported(tmp_path, checkpoint_pair, tied):
    base, tuned = checkpoint_pair(everything, tie_word_embeddings=tied, attention_bias=True)
    with pytest.warns(UserWarning, match=r"of the change ‖tuned − base‖² is not in the adapter") as caught:
        report = extract_lora(base, tuned, tmp_path / "lora", rank=8, target_modules=["q_proj", "up_proj"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    reasons = {entry.name: entry.reason for entry in report.left_out}
    assert reasons["model.embed_tokens.weight"] == "Embedding"
    assert reasons["model.norm.weight"] == "LlamaRMSNorm"
    assert reasons["model.layers.0.self_attn.q_proj.bias"] == "bias"
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "not in target_modules"
    assert reasons.get("lm_head.weight") == (None if tied else "output head")
    assert {m.name for m in report.modules} == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    before, after = load_file(Path(base, "model.safetensors")), load_file(Path(tuned, "model.safetensors"))
    energy = {name: float((after[name].double() - before[name].double()).square().sum()) for name in before}
    total = sum(energy.values())
    assert reasons.keys() == energy.keys() - {f"{m.name}.weight" for m in report.modules}
    for entry in report.left_out:
        # Each entry of a change is rounded once to float32; a share is a quotient of two sums of their squares.
        assert entry.share == pytest.approx(energy[entry.name] / total, rel=gamma(4))
    assert report.change == pytest.approx(math.sqrt(total), rel=gamma(1))
    # The total counts what was left out: it is the error of the whole merged model.
    got = merged(base, tmp_path / "lora")
    missed = sum(float((got[name].double() - after[name].double()).square().sum()) for name in after)
    room = max(error_room(after[name] - before[name], after[name]) for name in after)
    assert report.relative_error == pytest.approx(math.sqrt(missed / total), rel=0, abs=room)
    written = json.loads((tmp_path / "lora" / "extraction_report.json").read_text())
    assert written == json.loads(report.to_json())
    assert len(written["left_out"]) == len(report.left_out)
    assert written["relative_error"] == report.relative_error
    table = str(report)
    assert "left out: " in table
    assert "LlamaRMSNorm ×5" in table
    assert "model.layers.1.mlp.up_proj" in table


def test_only_some_modules_changed(tmp_path, checkpoint_pair):
    """Layers that did not change get no adapter: then the config names the modules in full."""

    def one_layer(name, parameter, generator):
        return rank_4(name, parameter, generator) if name.startswith("model.layers.1.self_attn") else None

    base, tuned = checkpoint_pair(one_layer)
    report = extract_lora(base, tuned, tmp_path / "lora", rank=4)
    assert len(report.modules) == 4
    assert report.unchanged == 21 - 4
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(m.name for m in report.modules)
    before, want = weights(base), weights(tuned)
    for name, got in merged(base, tmp_path / "lora").items():
        room = extraction_room(want[name] - before[name], want[name])
        torch.testing.assert_close(got, want[name], rtol=0, atol=room)


def test_a_folder_keeps_no_options_of_an_earlier_adapter(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(full)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "lorapre_config.json").write_text('{"momentum_rank": 3}')
    with pytest.warns(UserWarning, match="target_modules: 'vproj' names no module"):
        extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules=["q_proj", "vproj"])
    assert not (tmp_path / "lora" / "lorapre_config.json").exists()
    with pytest.raises(ValueError, match=r"target_modules='\[' is no regular expression"):
        extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules="[")


def test_target_modules_of_every_form(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(everything)

    def extracted(target_modules) -> set[str]:
        with pytest.warns(UserWarning, match="is not in the adapter"):
            report = extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules=target_modules)
        with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
            keys = set(file.keys())
        names = {m.name for m in report.modules}
        assert keys == {f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"}
        assert merged(base, tmp_path / "lora")
        return names

    assert extracted(r".*layers\.1.*\.[qk]_proj") == {f"model.layers.1.self_attn.{x}_proj" for x in "qk"}
    assert extracted(("layers.0.mlp.up_proj",)) == {"model.layers.0.mlp.up_proj"}
    assert extracted(["lm_head"]) == {"lm_head"}  # not part of all-linear, but an untied head can be asked for


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_bfloat16_checkpoints(tmp_path, checkpoint_pair, dtype):
    """The stated errors are those of the factors as stored, and of a merge into bfloat16 weights."""
    base, tuned = checkpoint_pair(full, dtype=torch.bfloat16)
    report = extract_lora(base, tuned, tmp_path / "lora", rank=30, dtype=dtype)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {f.dtype for f in factors.values()} == {torch.float32 if dtype else torch.bfloat16}
    true = true_errors(base, tuned, tmp_path / "lora", report)
    before, after = weights(base), weights(tuned)
    assert before["lm_head.weight"].dtype == torch.bfloat16
    for m in report.modules:
        B, A = (factors[f"base_model.model.{m.name}.lora_{x}.weight"].float() for x in "BA")
        delta = after[f"{m.name}.weight"].float() - before[f"{m.name}.weight"].float()
        room = error_room(delta, after[f"{m.name}.weight"])
        assert m.relative_error == pytest.approx(float((delta - B @ A).norm() / delta.norm()), rel=0, abs=room)
        assert m.merged_error == pytest.approx(true[m.name], rel=0, abs=room)
    rounded = extract_lora(base, tuned, tmp_path / "exact", energy=1.0, dtype=dtype)
    if dtype:
        assert rounded.relative_error < 1e-5
        assert all(m.merged_error < 1e-5 for m in rounded.modules)  # rounding gives the tuned weights back
    else:
        assert 1e-4 < rounded.relative_error < 1e-2


def test_gpt2_transposed_weights_and_hub_names(tmp_path, checkpoint_pair):
    """GPT-2's layers hold [in, out] matrices, and its published checkpoint lacks the prefix of the model's names."""

    def matrices(name, parameter, generator):
        return decaying(parameter, generator) if ".h." in name and parameter.ndim == 2 else None

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=1, n_head=2))
    base, tuned = checkpoint_pair(matrices, model)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    damage(base, strip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also PEFT's about fan_in_fan_out
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        report = extract_lora(base, tuned, tmp_path / "lora", rank=6)
        true = true_errors(base, tuned, tmp_path / "lora", report)
    assert {m.name.removeprefix("transformer.h.0."): m.shape for m in report.modules} == {
        "attn.c_attn": (72, 24),
        "attn.c_proj": (24, 24),
        "mlp.c_fc": (96, 24),
        "mlp.c_proj": (24, 96),
    }
    before, after = weights(base), weights(tuned)
    for m in report.modules:
        new = after[f"{m.name}.weight"]
        room = error_room(new - before[f"{m.name}.weight"], new)
        assert m.relative_error == pytest.approx(true[m.name], rel=0, abs=room)


def test_tied_weights_under_other_names(tmp_path, checkpoint_pair):
    """A head that tuning untied, and a tied pair that is stored under the head's name."""
    base, tuned = checkpoint_pair(rank_4, tie_word_embeddings=True)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1

    damage(tuned, untie)
    with pytest.warns(UserWarning, match="output head ×1"):
        report = extract_lora(base, tuned, tmp_path / "lora", rank=4)
    assert [entry.name for entry in report.left_out] == ["lm_head.weight"]
    damage(tuned, lambda tensors: tensors.pop("lm_head.weight"))
    damage(base, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert extract_lora(base, tuned, tmp_path / "lora", rank=4).left_out == []


def test_tensors_that_models_pass_over(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(rank_4)
    damage(base, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert extract_lora(base, tuned, tmp_path / "lora", rank=4).left_out == []


PLAIN_PEFT = """
import sys, warnings
sys.modules["lorapre_peft"] = None  # importing it raises ImportError
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
warnings.simplefilter("error")
# PEFT 0.21.2's own, under transformers 5.23.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
base, tuned, one_rank, many_ranks = sys.argv[1:]
want = AutoModelForCausalLM.from_pretrained(tuned).state_dict()
for model in (PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one_rank),
              PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), many_ranks),
              AutoPeftModelForCausalLM.from_pretrained(many_ranks)):
    for name, got in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-6)
"""


def test_opens_where_this_package_is_not(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(full)
    extract_lora(base, tuned, tmp_path / "one", rank=32)
    report = extract_lora(base, tuned, tmp_path / "many", energy=1 - 1e-9)
    assert len({m.rank for m in report.modules}) > 1
    command = [sys.executable, "-c", PLAIN_PEFT, base, tuned, str(tmp_path / "one"), str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_holds_one_layer_at_a_time(tmp_path, checkpoint_pair, monkeypatch, shard):
    """No more than the two tensors of one name are alive whenever one is read."""
    base, tuned = checkpoint_pair(full, max_shard_size=shard)
    alive = weakref.WeakSet()
    counts = []
    read = Checkpoint.tensor

    def spy(checkpoint, name):
        tensor = read(checkpoint, name)
        alive.add(tensor)
        counts.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", spy)
    extract_lora(base, tuned, tmp_path / "lora", rank=4)
    assert len(counts) == 2 * 21
    assert max(counts) == 2
