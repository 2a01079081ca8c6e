"""LoRAPreConfig beside PEFT's own configs, and create_lorapre_optimizer over every kind of adapter that it meets."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from lorapre_peft import LoRAPreAdamW, LoRAPreConfig, LoRAPreMuon, create_lorapre_optimizer

LORA_MATRICES = ("lora_A", "lora_B", "lora_embedding_B")
OWN_FIELDS = {"momentum_rank": 3, "momentum_rank_pattern": {"q_proj": 1}, "update_rule": "newton"}


def adapted(model, config_class=LoRAPreConfig, **options) -> PeftModel:
    return get_peft_model(model, config_class(**({"r": 8, "target_modules": "all-linear"} | options)))


def train(optimizer, loss_of, steps=6) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model, batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def ranks_by_name(optimizer) -> dict[str, int]:
    """Momentum rank that each parameter's state really has; 0 on the AdamW path. Needs a step before."""
    names = {p: name for g in optimizer.param_groups for p, name in zip(g["params"], g["param_names"])}
    return {
        name: state["m_A"].shape[0] if "m_A" in state else 0
        for p, name in names.items()
        for state in [optimizer.state[p]]
    }


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- LoRAPreConfig ------------------------------------------------------------------------------------------------


def test_config_is_a_lora_config():
    config = LoRAPreConfig(r=8)
    assert isinstance(config, LoraConfig)
    assert config.peft_type == PeftType.LORA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_rank": 0}, "momentum_rank=0: expected a whole number of at least 1"),
        ({"momentum_rank": -2}, "momentum_rank=-2: expected a whole number"),
        ({"momentum_rank": 2.0}, "momentum_rank=2.0: expected a whole number"),
        ({"momentum_rank": True}, "momentum_rank=True: expected a whole number"),
        ({"momentum_rank": "2"}, "momentum_rank='2': expected a whole number"),
        ({"momentum_rank": 8}, "momentum_rank=8 is not below the adapter's rank 8: .* use 1..7, or a larger r"),
        ({"r": 1, "momentum_rank": 1}, "momentum_rank=1 is not below the adapter's rank 1: .* use r=2 or more"),
        ({"momentum_rank_pattern": {"q_proj": 0}}, r"momentum_rank_pattern\['q_proj'\]=0: expected a whole number"),
        ({"momentum_rank_pattern": {"q_proj": None}}, r"momentum_rank_pattern\['q_proj'\]=None: expected a whole"),
        ({"momentum_rank_pattern": {"v": 2, "q": 9}}, r"momentum_rank_pattern\['q'\]=9 is not below .* rank 8"),
        ({"update_rule": "adam"}, "update_rule='adam': expected one of 'als', 'newton'"),
        ({"update_rule": None}, "update_rule=None: expected one of"),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAPreConfig(**({"r": 8} | options))


def test_largest_rank_of_the_pattern_bounds_the_momentum_rank():
    wide = {"r": 4, "rank_pattern": {"q_proj": 16}}
    assert LoRAPreConfig(**wide, momentum_rank_pattern={"q_proj": 15}).momentum_rank_pattern == {"q_proj": 15}
    with pytest.raises(ValueError, match="momentum_rank=16 is not below the adapter's rank 16"):
        LoRAPreConfig(**wide, momentum_rank=16)


@pytest.mark.parametrize(("r", "k"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (16, 4), (64, 16)])
def test_default_momentum_rank_is_a_quarter_of_the_modules_rank(r, k):
    assert LoRAPreConfig(r=8).module_momentum_rank("model.layers.0.self_attn.q_proj", r) == k


def test_momentum_rank_explicit_and_by_pattern():
    config = LoRAPreConfig(r=8, momentum_rank=5, momentum_rank_pattern={"q_proj": 3, r"layers\.1\..*v_proj": 1})
    layer = "base_model.model.model.layers.{}.self_attn.{}"
    found = {(i, name): config.module_momentum_rank(layer.format(i, name), 8) for i in (0, 1) for name in ("q_proj", "v_proj", "o_proj")}  # fmt: skip
    assert found == {
        (0, "q_proj"): 3,
        (1, "q_proj"): 3,
        (0, "v_proj"): 5,
        (1, "v_proj"): 1,
        (0, "o_proj"): 5,
        (1, "o_proj"): 5,
    }


# ---- saving and loading the config --------------------------------------------------------------------------------

PEFT_OPTIONS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    "regex": {"target_modules": r".*\.q_proj", "exclude_modules": ["lm_head"], "bias": "lora_only"},
    "rslora": {"use_rslora": True, "modules_to_save": ["lm_head"]},
    "dora": {
        "use_dora": True,
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "target_modules": ["q_proj"],
    },
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5, tau=0.9)},
    "tokens": {"trainable_token_indices": {"embed_tokens": [0, 1]}, "init_lora_weights": "pissa_niter_4"},
}
peft_options = pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS.keys())


@peft_options
@pytest.mark.parametrize("own", [{}, OWN_FIELDS], ids=["defaults", "own"])
def test_config_round_trip_keeps_every_field(tmp_path, options, own):
    config = LoRAPreConfig(r=8, **options, **own)
    config.save_pretrained(tmp_path)
    loaded = LoRAPreConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoRAPreConfig
    assert loaded == config


@peft_options
def test_plain_peft_reads_the_config_as_its_own(tmp_path, options):
    LoRAPreConfig(r=8, **options, **OWN_FIELDS).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig
    assert loaded == LoraConfig(r=8, **options)


def test_own_fields_in_adapter_config_would_make_peft_warn(tmp_path):
    """Why they are saved in a file of their own."""
    LoraConfig(r=8).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN_FIELDS))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*momentum_rank"):
        PeftConfig.from_pretrained(tmp_path)


def test_plain_lora_adapter_takes_the_defaults_with_a_warning(tmp_path):
    LoraConfig(r=16, use_dora=True).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no lorapre_config.json .* take their defaults"):
        loaded = LoRAPreConfig.from_pretrained(tmp_path)
    assert loaded == LoRAPreConfig(r=16, use_dora=True)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        (
            {"momentum_rank": 2, "factor_dtype": "bf16"},
            r"unknown keys \['factor_dtype'\]: .* newer lorapre_peft; upgrade",
        ),
        ({"momentum_rank": 8}, "momentum_rank=8 is not below the adapter's rank 8"),
    ],
)
def test_bad_sidecar_is_an_error(tmp_path, sidecar, message):
    LoRAPreConfig(r=8).save_pretrained(tmp_path)
    (tmp_path / "lorapre_config.json").write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match=message):
        LoRAPreConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "other",
    [IA3Config(target_modules=["q_proj"], feedforward_modules=[]), AdaLoraConfig(total_step=10)],
    ids=["ia3", "adalora"],
)
def test_another_kind_of_adapter_is_an_error(tmp_path, other):
    """Its fields are not LoRA's: an AdaLoRA adapter must not come back as a LoRA one."""
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=other.peft_type.value):
        LoRAPreConfig.from_pretrained(tmp_path)


def test_config_from_a_subfolder(tmp_path):
    config = LoRAPreConfig(r=8, **OWN_FIELDS)
    config.save_pretrained(tmp_path / "adapter")
    assert LoRAPreConfig.from_pretrained(tmp_path, subfolder="adapter") == config


@pytest.mark.parametrize("subfolder", [None, "adapter"])
@pytest.mark.parametrize("sidecar", [True, False])
def test_config_from_the_hubs_cache(tmp_path, subfolder, sidecar):
    """As a repository name, which goes through hf_hub_download with the caller's cache_dir and revision."""
    revision = "0" * 40
    repo = tmp_path / "models--someone--adapter"
    config = (LoRAPreConfig if sidecar else LoraConfig)(r=8, **(OWN_FIELDS if sidecar else {}))
    config.save_pretrained(repo / "snapshots" / revision / (subfolder or ""))
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(revision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = LoRAPreConfig.from_pretrained("someone/adapter", subfolder, cache_dir=str(tmp_path), revision="v1")
    assert loaded == LoRAPreConfig(r=8, **(OWN_FIELDS if sidecar else {}))
    assert any("no lorapre_config.json" in str(w.message) for w in caught) is not sidecar


# ---- every kind of adapter: what is compressed, that it trains, that it survives -----------------------------------

# PEFT options, Llama options, and the trainable parameters (besides none) that take the AdamW path.
VARIANTS = {
    "lora": ({}, {}, ()),
    "newton": ({"update_rule": "newton"}, {}, ()),
    "plain LoraConfig": ({"config_class": LoraConfig}, {}, ()),
    "rslora": ({"use_rslora": True}, {}, ()),
    "dora": ({"use_dora": True}, {}, ("lora_magnitude_vector",)),
    "pissa": ({"init_lora_weights": "pissa"}, {}, ()),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}, ()),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4, "down_proj": 16}}, {}, ()),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, {}, ("lm_head", "norm")),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {}, ("lora_embedding_A",)),
    "bias all": ({"bias": "all"}, {"attention_bias": True}, ("bias",)),
    "lora_bias": (
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"attention_bias": True},
        ("lora_B.default.bias",),
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_variant_trains_and_survives_save_load_merge(make_llama, batch, tmp_path, variant):
    """Training lowers the loss and moves every parameter on the path it belongs to; saved, loaded and merged it is the same model."""
    peft_options, llama_options, adamw_path = variant
    model = adapted(make_llama(**llama_options), **peft_options)
    base_logits = logits(make_llama(**llama_options), batch)
    before = trainable(model)
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    model.train()
    losses = train(optimizer, lambda: model(**batch).loss)
    assert losses[-1] < losses[0] - 0.05
    assert not any(torch.equal(p, before[name]) for name, p in trainable(model).items())

    ranks = ranks_by_name(optimizer)
    assert ranks.keys() == before.keys()
    for name, k in ranks.items():
        on_adamw_path = any(part in name for part in adamw_path)
        assert k == (0 if on_adamw_path else max(1, min(before[name].shape) // 4)), name
    assert all(any(part in name for name in ranks) for part in adamw_path)

    trained = logits(model, batch)
    assert (trained - base_logits).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    config = None if peft_options.get("config_class") else LoRAPreConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(**llama_options), tmp_path, is_trainable=True, config=config)
    assert trainable(loaded).keys() == before.keys()
    torch.testing.assert_close(logits(loaded, batch), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), trained, rtol=1e-4, atol=1e-4)


def test_unload_gives_the_base_model_back(make_llama, batch):
    model = adapted(make_llama())
    train(create_lorapre_optimizer(model, lr=1e-2), lambda: model(**batch).loss, steps=2)
    torch.testing.assert_close(logits(model.unload(), batch), logits(make_llama(), batch), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"adamw_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}], ids=["", "adamw_lr"])
def test_muon_trains(make_llama, batch, options):
    model = adapted(make_llama(), modules_to_save=["norm"])
    optimizer = create_lorapre_optimizer(model, "muon", lr=0.1, **options)
    assert type(optimizer) is LoRAPreMuon
    losses = train(optimizer, lambda: model(**batch).loss)
    assert losses[-1] < losses[0] - 0.1


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.norm(self.second(self.first(x).relu()).relu().mean((-2, -1))))


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_are_compressed_as_flattened_matrices(use_dora):
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    options = {
        "r": 4,
        "target_modules": ["first", "second"],
        "modules_to_save": ["head", "norm"],
        "use_dora": use_dora,
    }
    model = adapted(ConvNet(), **options)
    optimizer = create_lorapre_optimizer(model, lr=2e-2)
    losses = train(optimizer, lambda: nn.functional.cross_entropy(model(x), y), steps=10)
    assert losses[-1] < losses[0] - 0.1
    for name, k in ranks_by_name(optimizer).items():
        assert k == (1 if any(part in name for part in ("lora_A", "lora_B")) else 0), name
    state = optimizer.state[model.base_model.model.second.lora_A["default"].weight]  # 4 × 16 × 3 × 3
    assert (state["m_B"].shape, state["m_A"].shape) == ((4, 1), (1, 144))
    trained = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_base(make_llama, batch, tmp_path, quant_type):
    """Hidden size 64: bitsandbytes' CPU kernels take whole blocks of 64 weights only."""
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
    )

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
        )

    model = adapted(prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False)).train()
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")).__name__ == "Linear4bit"
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    losses = train(optimizer, lambda: model(**batch).loss)
    assert losses[-1] < losses[0] - 0.1
    assert set(ranks_by_name(optimizer).values()) == {2}
    model.save_pretrained(tmp_path / "adapter")
    config = LoRAPreConfig.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True, config=config)
    # In training mode throughout: in evaluation bitsandbytes repacks the base on some CPUs, which rounds it anew.
    assert loaded.train()(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


# ---- more than one adapter ----------------------------------------------------------------------------------------


@pytest.fixture
def two_adapters(make_llama) -> PeftModel:
    """Adapter "default" with r=8 and k=2, adapter "second" with r=16 and k=5."""
    model = adapted(make_llama(), momentum_rank=2)
    model.add_adapter("second", LoRAPreConfig(r=16, target_modules=["q_proj", "v_proj"], momentum_rank=5))
    return model


def test_switching_adapters_trains_each_with_its_own_rank(two_adapters, batch):
    model = two_adapters
    for adapter, k in (("default", 2), ("second", 5), ("default", 2)):
        model.set_adapter(adapter)
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = create_lorapre_optimizer(model, lr=1e-2)
        losses = train(optimizer, lambda: model(**batch).loss)
        assert losses[-1] < losses[0] - 0.05
        ranks = ranks_by_name(optimizer)
        assert set(ranks.values()) == {k}
        assert all(f".{adapter}." in name for name in ranks)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_two_active_adapters_in_one_optimizer(two_adapters, batch):
    two_adapters.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2)
    losses = train(optimizer, lambda: two_adapters(**batch).loss)
    assert losses[-1] < losses[0] - 0.1
    ranks = ranks_by_name(optimizer)
    assert {name: k for name, k in ranks.items() if ".second." in name and k != 5} == {}
    assert {name: k for name, k in ranks.items() if ".default." in name and k != 2} == {}
    assert len(set(ranks.values())) == 2


def test_delete_adapter_leaves_the_other_trainable(two_adapters, batch):
    two_adapters.delete_adapter("default")
    two_adapters.set_adapter("second")
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2)
    train(optimizer, lambda: two_adapters(**batch).loss, steps=2)
    assert set(ranks_by_name(optimizer).values()) == {5}


def test_each_adapter_keeps_its_own_sidecar(two_adapters, tmp_path):
    two_adapters.save_pretrained(tmp_path)
    assert LoRAPreConfig.from_pretrained(tmp_path).momentum_rank == 2
    assert LoRAPreConfig.from_pretrained(tmp_path / "second").momentum_rank == 5


@pytest.mark.parametrize(
    "how", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 8}], ids=["cat", "svd"]
)
def test_combined_adapter_trains_on(two_adapters, batch, how):
    """PEFT makes the config of the new adapter from the first one's, with another r."""
    two_adapters.add_weighted_adapter(["second", "default"], [1.0, 1.0], "both", **how)
    assert type(two_adapters.peft_config["both"]) is LoRAPreConfig
    two_adapters.set_adapter("both")
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2)
    losses = train(optimizer, lambda: two_adapters(**batch).loss)
    assert losses[-1] < losses[0] - 0.1
    assert set(ranks_by_name(optimizer).values()) == {5}


def test_adapter_added_by_transformers(make_llama, batch, tmp_path):
    """PreTrainedModel.add_adapter holds the config on the model itself, without a PeftModel around it."""
    model = make_llama()
    model.add_adapter(LoRAPreConfig(r=8, target_modules=["q_proj"], momentum_rank=3))
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    train(optimizer, lambda: model(**batch).loss, steps=2)
    assert set(ranks_by_name(optimizer).values()) == {3}
    model.save_pretrained(tmp_path)
    assert LoRAPreConfig.from_pretrained(tmp_path).momentum_rank == 3


# ---- a saved adapter needs nothing of this package -----------------------------------------------------------------

PLAIN_PEFT = """
import json, logging, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorapre_peft":
            raise ImportError("lorapre_peft is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
for name in ("peft", "transformers", "huggingface_hub", "accelerate"):
    logging.getLogger(name).addHandler(handler)

def opened(base_path, adapter_path, results_path):
    messages.clear()
    expected = torch.load(results_path)
    base = AutoModelForCausalLM.from_pretrained(base_path)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter_path).eval()
        found = model(input_ids=expected["input_ids"]).logits
    return {
        "config": type(model.peft_config["default"]).__name__,
        "warnings": [str(w.message) for w in caught] + messages,
        "difference": (found - expected["logits"]).abs().max().item(),
    }

base_path, *rest = sys.argv[1:]
try:
    import lorapre_peft
except ImportError as error:
    blocked = str(error)
print(json.dumps({"blocked": blocked, "plain": opened(base_path, *rest[:2]), "ours": opened(base_path, *rest[2:])}))
"""


def test_saved_adapter_opens_in_plain_peft(llama_path, batch, tmp_path):
    """In a process that cannot import lorapre_peft: the same outputs, and no warning that a plain LoRA adapter does not give."""
    arguments = [llama_path]
    for config_class, own in ((LoraConfig, {}), (LoRAPreConfig, OWN_FIELDS)):
        base = AutoModelForCausalLM.from_pretrained(llama_path)
        options = {"use_dora": True, "rank_pattern": {"q_proj": 4}, "modules_to_save": ["lm_head"]}
        model = adapted(base, config_class, **options, **own)
        train(create_lorapre_optimizer(model, lr=1e-2), lambda model=model: model(**batch).loss, steps=3)
        folder = tmp_path / config_class.__name__
        model.save_pretrained(folder)
        torch.save({"input_ids": batch["input_ids"], "logits": logits(model, batch)}, folder / "results.pt")
        arguments += [folder, folder / "results.pt"]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["blocked"] == "lorapre_peft is blocked"
    assert found["ours"]["config"] == "LoraConfig"
    assert found["ours"]["warnings"] == found["plain"]["warnings"]
    assert found["ours"]["difference"] < 1e-5


# ---- create_lorapre_optimizer -------------------------------------------------------------------------------------


def test_weight_decay_is_split_as_trainer_does(make_llama):
    model = adapted(
        nn.ModuleDict({"llama": make_llama(attention_bias=True), "conv": ConvNet()}),
        target_modules=["q_proj", "v_proj", "embed_tokens", "second"],
        modules_to_save=["lm_head", "norm", "head", "input_layernorm"],
        bias="all",
    )
    optimizer = create_lorapre_optimizer(model, lr=1e-2, weight_decay=0.1)
    decayed = {name for g in optimizer.param_groups if g["weight_decay"] == 0.1 for name in g["param_names"]}
    others = {name for g in optimizer.param_groups if g["weight_decay"] == 0.0 for name in g["param_names"]}
    expected = set(Trainer.get_decay_parameter_names(None, model)) & trainable(model).keys()
    assert decayed == expected
    assert others == trainable(model).keys() - expected
    assert len(others) > 5


def test_every_trainable_parameter_is_held_once(make_llama):
    model = adapted(make_llama(tie_word_embeddings=True), modules_to_save=["norm"], use_dora=True)
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})


def kilobytes(count: int) -> str:
    return f"{count / 1e3:.2f} kB"


def test_printed_table_is_what_the_state_takes(make_llama, batch, capsys):
    model = adapted(make_llama(), use_dora=True, modules_to_save=["lm_head"], momentum_rank_pattern={"q_proj": 3})
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    train(optimizer, lambda: model(**batch).loss, steps=1)

    rows = {"compressed, k=2, als": [], "compressed, k=3, als": [], "AdamW path": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            k = 0 if not any(part in name for part in LORA_MATRICES) else 3 if "q_proj" in name else 2
            rows[f"compressed, k={k}, als" if k else "AdamW path"].append(p)
    rows["trained"] = [p for row in rows.values() for p in row]

    def row_of(params):
        state = sum(t.numel() * t.element_size() for p in params for t in optimizer.state[p].values())
        adamw = sum(8 * p.numel() + 4 for p in params)
        return [f"{len(params):,}", f"{sum(p.numel() for p in params):,}", kilobytes(state), kilobytes(adamw)]

    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert lines == [
        ["LoRAPreAdamW", "tensors", "parameters", "state", "AdamW, fp32"],
        *([name, *row_of(params)] for name, params in rows.items()),
        ["frozen", str(len(frozen)), f"{sum(p.numel() for p in frozen):,}", "–", "–"],
    ]


def test_table_is_printed_by_the_first_process_only(make_llama, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, printed in ((0, True), (1, False)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        create_lorapre_optimizer(adapted(make_llama()), lr=1e-2)
        assert bool(capsys.readouterr().out) is printed


def test_overrides_win_over_the_config(make_llama, batch):
    model = adapted(make_llama(), momentum_rank=2, momentum_rank_pattern={"q_proj": 1})
    optimizer = create_lorapre_optimizer(model, lr=1e-2, momentum_rank=3, update_rule="newton", betas=(0.8, 0.9))
    train(optimizer, lambda: model(**batch).loss, steps=1)
    assert set(ranks_by_name(optimizer).values()) == {3}
    assert {(g["update_rule"], g["betas"]) for g in optimizer.param_groups} == {("newton", (0.8, 0.9))}


def test_config_is_found_inside_a_larger_module(make_llama, batch):
    model = nn.ModuleDict({"policy": adapted(make_llama(), momentum_rank=3), "value": nn.Linear(4, 4)})
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    assert {g["momentum_rank"] for g in optimizer.param_groups} == {3, 0}


def test_two_peft_models_keep_their_own_configs(make_llama):
    """Both adapters are called "default": each layer's config is that of the model it is in."""
    model = nn.ModuleDict(
        {"policy": adapted(make_llama(), momentum_rank=3), "value": adapted(make_llama(), momentum_rank=1)}
    )
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    found = {(name.split(".")[0], g["momentum_rank"]) for g in optimizer.param_groups for name in g["param_names"]}
    assert found == {("policy", 3), ("value", 1)}


@pytest.mark.parametrize(
    ("peft_options", "options", "message"),
    [
        ({}, {"optimizer": "sgd"}, "optimizer='sgd': expected one of 'adamw', 'muon'"),
        ({"inference_mode": True}, {}, "no trainable parameter: .*is_trainable=True"),
        ({"r": 1}, {}, r"nothing to compress among trainable parameters of shapes \[\(1, 32\).*torch.optim.AdamW"),
        ({}, {"momentum_rank": 8}, "nothing (to compress|would be compressed)"),
        ({}, {"momentum_rank": -1}, "momentum_rank=-1: expected a whole number"),
        ({}, {"update_rule": "adam"}, "update_rule='adam': expected one of 'als', 'newton'"),
        ({}, {"lr": -1.0}, "lr=-1.0: expected a number of at least 0"),
        ({}, {"betas": (0.99, 0.9)}, r"update_rule='als' needs betas\[0\]² < betas\[1\]"),
        ({}, {"residual_weight": 1.5}, r"residual_weight=1.5: expected a number in \[0, 1\]"),
        (
            {"rank_pattern": {"q_proj": 4}, "momentum_rank_pattern": {"q_proj": 4}},
            {},
            r"momentum_rank_pattern\['q_proj'\]=4 is not below r=4 of .*q_proj",
        ),
    ],
)
def test_create_rejects(make_llama, peft_options, options, message):
    model = adapted(make_llama(), **peft_options)
    with pytest.raises(ValueError, match=message):
        create_lorapre_optimizer(model, **({"lr": 1e-2} | options))


def test_momentum_rank_too_large_for_one_module_is_an_error(make_llama):
    """It would put that module on the AdamW path without a word."""
    model = adapted(make_llama(), rank_pattern={"q_proj": 2}, momentum_rank=4)
    with pytest.raises(ValueError, match=r"momentum_rank=4 is not below r=2 of .*q_proj"):
        create_lorapre_optimizer(model, lr=1e-2)


def test_option_of_the_other_optimizer_is_a_type_error(make_llama):
    with pytest.raises(TypeError, match="nesterov"):
        create_lorapre_optimizer(adapted(make_llama()), lr=1e-2, nesterov=True)


# ---- residual_weight: an option of `als` alone ---------------------------------------------------------------------


def test_residual_weight_reaches_the_als_groups_only(two_adapters):
    two_adapters.peft_config["second"].update_rule = "newton"
    two_adapters.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2, residual_weight=0.25)
    assert {(g["update_rule"], g["residual_weight"]) for g in optimizer.param_groups} == {
        ("als", 0.25),
        ("newton", None),
    }


def test_residual_weight_changes_the_update(make_llama, batch):
    """Not only stored: two weights give two results."""
    results = []
    for residual_weight in (None, 0.0, 1.0):
        model = adapted(make_llama())
        optimizer = create_lorapre_optimizer(model, lr=1e-2, residual_weight=residual_weight)
        results.append(train(optimizer, lambda model=model: model(**batch).loss, steps=4)[-1])
    assert len(set(results)) == 3


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_residual_weight_without_als_is_an_error(make_llama, use_dora):
    """With DoRA too, whose magnitudes make a group without momenta to compress."""
    model = adapted(make_llama(), update_rule="newton", use_dora=use_dora)
    with pytest.raises(ValueError, match=r"residual_weight=0.25 is an option of update_rule='als', and no "):
        create_lorapre_optimizer(model, lr=1e-2, residual_weight=0.25)


def test_adamw_is_the_default(make_llama):
    assert type(create_lorapre_optimizer(adapted(make_llama()), lr=1e-2)) is LoRAPreAdamW
