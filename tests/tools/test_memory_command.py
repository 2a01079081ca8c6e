"""The command that prints the memory estimate beside those of other methods: its figures, and what it refuses."""

import pytest
import torch

from lorapre_peft.memory.models import meta_model
from lorapre_peft.memory.peers import main, peers

SIZES = {"hidden_size": 128, "intermediate_size": 320}


def test_peers_of_a_small_model(make_llama):
    """By hand: one layer of q, o (128×128), k, v (64×128), gate, up, down (320×128), 3 norms; embeddings, head
    (64×128).
    """
    model = meta_model(make_llama(num_hidden_layers=1, **SIZES))
    square, narrow, wide, rest = 128 * 128, 64 * 128, 320 * 128, 3 * 128 + 2 * 64 * 128
    total = 2 * square + 2 * narrow + 3 * wide + rest
    compared = peers(model, 4, activations=7)
    assert [row.weights for row in compared.values()][:5] == [4 * total] + [2 * total] * 4
    assert [row.gradients for row in compared.values()][:5] == [4 * total] + [2 * total] * 4
    assert compared["AdamW, fp32"].state == 8 * total
    assert compared["AdamW, bf16"].state == 4 * total
    assert compared["8-bit AdamW, bf16"].state == 2 * (total - 384) * (1 + 4 / 256) + 8 * 384
    projected = 4 * (2 * (128 + 2 * 128) + 2 * (64 + 2 * 128) + 3 * (128 + 2 * 320))
    assert compared["GaLore r=4, bf16"].state == 2 * projected + 4 * rest
    adapters = 16 * (2 * 256 + 2 * 192 + 3 * 448)
    lora = compared["LoRA r=16, bf16 base"]
    assert (lora.weights, lora.gradients, lora.state) == (2 * total + 4 * adapters, 4 * adapters, 8 * adapters)
    assert all(row.temporaries is None and row.activations == 7 for row in compared.values())
    assert lora.total == 2 * total + 16 * adapters + 7


def test_peers_train_what_is_not_frozen(make_llama):
    model = meta_model(make_llama())
    everything = peers(model, 4, 0)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    for name, row in peers(model, 4, 0).items():
        size = 0 if name.startswith("LoRA") else frozen.numel() * (4 if name == "AdamW, fp32" else 2)
        assert row.weights == everything[name].weights
        assert row.gradients == everything[name].gradients - size
        assert row.state < everything[name].state or not size


def test_bitsandbytes_state_is_as_counted(make_llama):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_llama(num_hidden_layers=1, **SIZES)
    eight_bit = bitsandbytes.optim.AdamW8bit(model.parameters())
    held = 0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
        eight_bit.init_state(eight_bit.param_groups[0], param, 0, 0)
        state = eight_bit.state[param]
        held += sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2") if name in state)
    assert peers(meta_model(model), 4, 0)["8-bit AdamW, bf16"].state == held


def test_command_line_with_a_built_in_shape(capsys):
    main(["HuggingFaceTB/SmolLM2-135M", "--momentum-rank", "8", "--no-in-backward", "--batch", "0"])
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert "built-in shape" in heading
    assert "134,515,008 parameters" in heading
    assert columns.split() == ["weights", "gradients", "state", "temporaries", "activations", "total"]
    assert rows[0].startswith("LoRA-Pre AdamW, als k=8 ")
    # Gradients of all but the embeddings, which are the head too; factors of 7 matrices in each of 30 layers, and the
    # norms' moments.
    sides = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    state = 30 * sides * (8 + 1) * 4 + 61 * 576 * 2 * 4
    assert rows[0].split()[6:10] == [f"{2 * (134_515_008 - 49152 * 576) / 1e6:.2f}", "MB", f"{state / 1e6:.2f}", "MB"]
    names = ["AdamW, fp32 ", "AdamW, bf16 ", "8-bit AdamW,", "GaLore r=128", "GaLore r=8, ", "LoRA r=16, b"]
    assert [row[:12] for row in rows[1:7]] == names
    assert all("–" in row for row in rows[1:7])
    assert {len(row) for row in rows[:7]} == {len(columns)}
    assert "embeddings and head frozen" in rows[7]


def test_command_line_with_a_folder_and_every_option(llama_path, capsys):
    argv = [
        str(llama_path),
        "--optimizer",
        "muon",
        "--momentum-rank",
        "2",
        "--update-rule",
        "newton",
        "--dtype",
        "float32",
    ]
    main([*argv, "--batch", "2", "--seq-len", "16", "--no-checkpointing", "--embeddings", "adamw"])
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert "local config" in heading
    assert "float32, batch 2 × 16 tokens, without gradient checkpointing" in heading
    assert rows[0].startswith("LoRA-Pre Muon, newton k=2, in backward ")
    assert rows[1].startswith("LoRA-Pre Muon, newton k=2 ")


def test_command_line_says_what_is_wrong(capsys):
    wrong = {
        ("nobody/nothing",): "no local folder",
        ("Llama-2-7b-hf", "--seq-len", "0"): "seq_len=0",
        (
            "Llama-2-7b-hf",
            "--lora-r",
            "8",
            "--batch",
            "4",
            "--no-checkpointing",
        ): "on --batch, --no-checkpointing: leave",
    }
    for argv, message in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_adapter_states_as_the_readme_has_them(capsys):
    """Llama-2-7B: per layer 4 square matrices, gate, up and down; A and B of r = 4 and 8, float32 moments of ranks k
    and 1.
    """
    main(["meta-llama/Llama-2-7b-hf", "--lora-r", "4", "8"])
    smallest, small = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("r ="))
    sides = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert small[3] == f"{32 * 8 * sides:,}"
    assert small[4:6] == f"{2 * 4 * 32 * 8 * sides / 1e6:.2f} MB".split()
    for column, k in (6, 4), (8, 2), (10, 1):
        factors = (
            4 * (k + 1) * 32 * (sides + 2 * 7 * 8)
        )  # a p×r and an r×q matrix: (k + 1) (p + r) and (k + 1) (r + q)
        assert float(small[column]) == pytest.approx(factors / 1e6, rel=0.01)
    assert smallest[-1] == "–"  # k = r/8 would be 0
