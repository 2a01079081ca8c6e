"""`extract_lora`: the options and checkpoints that it takes and refuses, and its command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from extraction import damage, full, rank_4, weights
from transformers import AutoModelForCausalLM

from lorapre_peft.extract.lora import extract_lora, main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "rank=None, energy=None: give exactly one of the two"),
        (dict(rank=4, energy=0.9), "rank=4, energy=0.9: give exactly one of the two"),
        (dict(rank=0), "rank=0: expected a whole number of at least 1"),
        (dict(rank=True), "rank=True: expected a whole number of at least 1"),
        (dict(rank=2.5), "rank=2.5: expected a whole number of at least 1"),
        (dict(energy=0.0), "energy=0.0: expected a share above 0 and up to 1"),
        (dict(energy=1.5), "energy=1.5: expected a share above 0 and up to 1"),
        (dict(energy=float("nan")), "energy=nan: expected a share above 0 and up to 1"),
        (dict(energy=0.9, max_rank=0), "max_rank=0: expected a whole number of at least 1"),
        (dict(rank=4, max_rank=8), "max_rank=8 bounds the ranks that energy chooses: leave it out beside rank=4"),
        (dict(rank=4, dtype="int8"), "dtype='int8': expected float32, bfloat16, float16, or None"),
        (dict(rank=4, dtype="nonsense"), "dtype='nonsense': expected float32, bfloat16, float16, or None"),
    ],
)
def test_invalid_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract_lora(tmp_path, tmp_path, tmp_path / "lora", **options)


def test_unsuitable_checkpoints(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(rank_4)
    lora = tmp_path / "lora"

    def fails(message, *, base=base, output_dir=lora, edit=None, edited="model.safetensors", **options):
        """The error that comes of an edited copy of ``tuned``; nothing is written then."""
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tuned, bad)
        if edit and edited.endswith("json"):
            config = json.loads((bad / edited).read_text())
            edit(config)
            (bad / edited).write_text(json.dumps(config))
        elif edit:
            damage(bad, edit)
        with pytest.raises(ValueError, match=message):
            extract_lora(bad if base is None else base, bad, output_dir, **(dict(rank=4) | options))
        assert not lora.exists()

    q_proj = "model.layers.1.self_attn.q_proj.weight"
    fails("hold the same weights: there is no change to extract", base=None)
    fails(
        "bad lacks 1 tensors of the other checkpoint, such as model.layers.1.self_attn.q_proj",
        edit=lambda t: t.pop(q_proj),
    )
    fails(
        "base lacks 1 tensors of the other checkpoint, such as extra.bias",
        edit=lambda t: t.update({"extra.bias": torch.ones(3)}),
    )
    fails(
        r"q_proj.weight is \[32, 32\] in .*base and \[32, 31\] in .*bad",
        edit=lambda t: t.update({q_proj: t[q_proj][:, 1:].clone()}),
    )
    fails("q_proj.weight has values that are not finite", edit=lambda t: t[q_proj].fill_(math.nan))
    fails(
        r"target_modules=\['nothing'\] selects no linear module: the model has down_proj, gate_proj",
        target_modules=["nothing"],
    )
    fails(
        "nothing that changed can be put into the adapter .not in target_modules ×14: 100.00%",
        target_modules=["lm_head"],
    )
    fails("is one of the checkpoints: give the adapter a folder of its own", output_dir=base)
    fails("is a file: give the adapter a folder of its own", output_dir=f"{base}/config.json")
    fails("cannot be written: .*(Not a directory|File exists)", output_dir=f"{base}/config.json/lora")
    fails("device='warp' cannot be used here", device="warp")
    fails("nowhere/at-all is neither a folder nor a model in the local hub cache", base="nowhere/at-all")
    fails("neither a folder nor a model in the local hub cache", base=tmp_path / "no" / "such" / "folder")
    fails("has neither model.safetensors nor model.safetensors.index.json: write the model again", base=tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    fails("give a checkpoint in it, such as checkpoint-3", base=tmp_path)
    (tmp_path / "adapter_config.json").touch()
    fails("it holds an adapter; give the folder of a whole model", base=tmp_path)
    quantised = dict(
        edit=lambda c: c.update(quantization_config={"quant_method": "fp8"}), edited="config.json", base=None
    )
    fails("is quantised, and its codes cannot be compared", **quantised)
    fails(
        "is of the architecture 'Own'", base=None, edit=lambda c: c.update(architectures=["Own"]), edited="config.json"
    )
    Path(base, "config.json").unlink()
    fails("base has no config.json")


def test_missing_shard(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(rank_4, max_shard_size="8KB")
    shard = sorted(Path(tuned).glob("*.safetensors"))[3]
    shard.unlink()
    with pytest.raises(ValueError, match=f"tuned lacks {shard.name}, which its index names"):
        extract_lora(base, tuned, tmp_path / "lora", rank=4)


def test_a_shard_that_was_not_copied_whole(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(rank_4, max_shard_size="8KB")
    shard = sorted(Path(tuned).glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"tuned/{shard.name} cannot be read .*: copy or download it again"):
        extract_lora(base, tuned, tmp_path / "lora", rank=4)


@pytest.mark.parametrize("shards_stay", [False, True])
def test_one_file_counts_more_than_an_older_index(tmp_path, checkpoint_pair, shards_stay):
    """As for from_pretrained; save_pretrained leaves the index where it replaces shards by one file."""
    base, tuned = checkpoint_pair(rank_4, max_shard_size="8KB")
    shards = [shutil.copy(path, tmp_path) for path in Path(tuned).glob("*-of-*")]
    model = AutoModelForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tuned)
    assert Path(tuned, "model.safetensors.index.json").exists()
    if shards_stay:
        for path in shards:
            shutil.copy(path, tuned)
    report = extract_lora(base, tuned, tmp_path / "lora", rank=4)
    change = next(m.change for m in report.modules if m.name == "model.layers.0.mlp.up_proj")
    assert change == pytest.approx(weights(base)["model.layers.0.mlp.up_proj.weight"].norm().item())


def test_cached_hub_model(tmp_path, checkpoint_pair, monkeypatch):
    """A hub id is looked up in the cache alone."""
    base, tuned = checkpoint_pair(rank_4)
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    report = extract_lora("org/name", tuned, tmp_path / "lora", rank=4)
    assert report.relative_error < 1e-6
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"


def test_same_files_twice(tmp_path, checkpoint_pair):
    """Two runs write the same bytes."""
    base, tuned = checkpoint_pair(full)
    for name in ("one", "two"):
        extract_lora(base, tuned, tmp_path / name, energy=0.8)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    # In every process: PEFT itself would write a set, in whose order the strings' hashes show.
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 7
    assert targets == sorted(targets)


def test_command_line(tmp_path, checkpoint_pair, capsys):
    base, tuned = checkpoint_pair(rank_4)
    main([base, tuned, str(tmp_path / "lora"), "--rank", "4"])
    assert "left out: nothing; unchanged: 7 tensors" in capsys.readouterr().out
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    with pytest.warns(UserWarning, match="not in target_modules ×12"):
        main([base, tuned, str(tmp_path / "one"), "--energy", "0.99", "--max-rank", "9", "--target-modules", "q_proj"])
    with pytest.warns(UserWarning, match="not in target_modules ×13"):
        main(
            [
                base,
                tuned,
                str(tmp_path / "one"),
                "--rank",
                "4",
                "--target-modules",
                r".*0.*q_proj",
                "--dtype",
                "float16",
            ]
        )
    assert capsys.readouterr().out.count("model.layers.0.self_attn.q_proj") == 2
    with pytest.raises(SystemExit):
        main([base, tuned, str(tmp_path / "one")])
    assert "give exactly one of the two" in capsys.readouterr().err
