"""Which modules of a plain model are embeddings and output heads, and so neither compressed nor trained by default."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, MusicgenDecoderConfig, MusicgenForCausalLM

from lorapre_peft import create_lorapre_optimizer
from lorapre_peft.extract.selection import reason
from lorapre_peft.integrations.targets import output_heads


class GPT(nn.Module):
    """Modules named and made as nanoGPT does: none of transformers' methods."""

    def __init__(self, vocabulary=512, positions=128, width=64, tied=False):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(positions, width),
                "h": nn.ModuleList(
                    nn.ModuleDict(
                        {
                            "ln": nn.LayerNorm(width),
                            "c_attn": nn.Linear(width, 3 * width),
                            "c_proj": nn.Linear(width, width),
                            "c_fc": nn.Linear(width, 4 * width),
                            "mlp_proj": nn.Linear(4 * width, width),
                        }
                    )
                    for _ in range(2)
                ),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight


class Wrapped(nn.Module):
    """A transformers backbone without a head, and a head of its own."""

    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
        self.backbone = BertModel(BertConfig(vocab_size=300, max_position_embeddings=64, **sizes))
        self.predict = nn.Linear(64, 300)


class Classifier(nn.Module):
    """Token types and classes are both two, positions and width both 64: no layer here is a head over a vocabulary."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.types = nn.Embedding(500, 64), nn.Embedding(64, 64), nn.Embedding(2, 64)
        self.hidden = nn.Linear(64, 64)
        self.classes = nn.Linear(64, 2)


class Encoder(nn.Module):
    """Ends in a square layer of width 64, for 64 positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(500, 64), nn.Embedding(64, 64)
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 64)


class Translator(nn.Module):
    """Two vocabularies; the head is the second one's, which is neither the first nor the largest."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(600, 64), nn.Embedding(400, 64)
        self.mix = nn.Linear(64, 64)
        self.predict = nn.Linear(64, 400)


MODELS = {
    "untied": (GPT(), {"lm_head"}),
    "tied": (GPT(tied=True), {"lm_head"}),
    "characters: fewer tokens than positions": (GPT(vocabulary=65, positions=256, width=96), {"lm_head"}),
    "bytes: as many tokens as the width": (GPT(vocabulary=256, positions=128, width=256), {"lm_head"}),
    "bytes, tied": (GPT(vocabulary=256, width=256, tied=True), {"lm_head"}),
    "as many positions as the width": (GPT(positions=64, width=64), {"lm_head"}),
    "as many positions as the MLP is wide": (GPT(positions=256, width=64), {"lm_head"}),
    "its own head on a transformers backbone": (Wrapped(), {"predict"}),
    "two vocabularies": (Translator(), {"predict"}),
    "a classifier": (Classifier(), set()),
    "an encoder": (Encoder(), set()),
    "no embedding": (nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64)), set()),
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS)
def test_heads_of_plain_models(model, expected):
    names = {module: name for name, module in model.named_modules()}
    assert {names[head] for head in output_heads(model)} == expected


def test_each_of_several_heads_is_one():
    config = MusicgenDecoderConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=99, num_codebooks=3
    )
    with torch.device("meta"):
        model = MusicgenForCausalLM(config)
    assert output_heads(model) == list(model.lm_heads)
    assert reason(model, "lm_heads.2", "weight") == "output head"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding_and_head_stay_as_they_are_unless_asked_for(tied, capsys):
    """As for transformers' models: frozen by default, trained by AdamW if told so, compressed only where they are
    named.
    """
    own = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    hidden = {f"transformer.h.{i}.{x}.weight" for i in (0, 1) for x in ("c_attn", "c_proj", "c_fc", "mlp_proj")}

    def trained(**options):
        model = GPT(tied=tied)
        optimizer = create_lorapre_optimizer(model, **options)
        ranks = {id(p): g["momentum_rank"] for g in optimizer.param_groups for p in g["params"]}
        return {name: ranks[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}

    ranks = trained()
    assert {name for name, k in ranks.items() if k} == hidden
    assert not own & ranks.keys()
    assert "embeddings and head, frozen" in capsys.readouterr().out
    ranks = trained(embeddings="adamw")
    assert {name: ranks[name] for name in own} == dict.fromkeys(own, 0)
    assert {name for name, k in trained(target_modules=["lm_head"]).items() if k} == (
        {"lm_head.weight", "transformer.wte.weight"} if tied else {"lm_head.weight"}
    )
