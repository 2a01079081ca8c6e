"""LoRAPreConfig, saved and loaded, with and without this package."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from adapting import adapted, logits, train
from peft import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
)
from transformers import AutoModelForCausalLM
from versions import skip_before

from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer

OWN_FIELDS = {"momentum_rank": 3, "momentum_rank_pattern": {"q_proj": 1}, "update_rule": "newton"}


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
        ({"momentum_rank_pattern": {"q_proj": 0}}, r"momentum_rank_pattern\['q_proj'\]=0: expected a whole number"),
        ({"momentum_rank_pattern": ["q_proj"]}, r"momentum_rank_pattern=\['q_proj'\]: expected ranks by module"),
        ({"momentum_rank_pattern": {"q_proj": None}}, r"momentum_rank_pattern\['q_proj'\]=None: expected a whole"),
        (
            {"momentum_rank": 2, "second_momentum_rank": 6},
            "second_momentum_rank=6 is above momentum_rank=2: expected at most that",
        ),
        ({"update_rule": "adam"}, "update_rule='adam': expected one of 'als', 'newton'"),
        ({"update_rule": None}, "update_rule=None: expected one of"),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAPreConfig(**({"r": 8} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_rank": 8}, "momentum_rank=8 is not below the adapter's rank 8, .* use 1..7, or a larger r"),
        ({"r": 1, "momentum_rank": 1}, "momentum_rank=1 is not below the adapter's rank 1, .* use r=2 or more"),
        ({"momentum_rank_pattern": {"v": 2, "q": 9}}, r"momentum_rank_pattern\['q'\]=9 is not below .* rank 8"),
    ],
)
def test_config_warns_of_a_rank_that_cannot_be_trained(options, message):
    """It is no error yet, as PEFT makes configs of a lower r for adapters that are only merged."""
    with pytest.warns(UserWarning, match=message):
        LoRAPreConfig(**({"r": 8} | options))


def test_a_pattern_of_null_is_none():
    assert LoRAPreConfig(r=8, momentum_rank_pattern=None).module_momentum_rank("q_proj", 8) == 2


def test_largest_rank_of_the_pattern_bounds_the_momentum_rank():
    wide = {"r": 4, "rank_pattern": {"q_proj": 16}}
    assert LoRAPreConfig(**wide, momentum_rank_pattern={"q_proj": 15}).momentum_rank_pattern == {"q_proj": 15}
    with pytest.warns(UserWarning, match="momentum_rank=16 is not below the adapter's rank 16"):
        LoRAPreConfig(**wide, momentum_rank=16)


@pytest.mark.parametrize(("r", "k"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (16, 4), (64, 16)])
def test_default_momentum_rank_is_a_quarter_of_the_modules_rank(r, k):
    assert LoRAPreConfig(r=8).module_momentum_rank("model.layers.0.self_attn.q_proj", r) == k


def test_momentum_rank_explicit_and_by_pattern():
    config = LoRAPreConfig(r=8, momentum_rank=5, momentum_rank_pattern={"q_proj": 3, r"layers\.1\..*v_proj": 1})
    layer = "base_model.model.model.layers.{}.self_attn.{}"
    found = {
        (i, name): config.module_momentum_rank(layer.format(i, name), 8)
        for i in (0, 1)
        for name in ("q_proj", "v_proj", "o_proj")
    }
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
reads_eva = skip_before("peft", "0.21", "reads an EvaConfig back as a dict, in a LoraConfig too")
peft_options = pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=[reads_eva] * (name == "eva")) for name, options in PEFT_OPTIONS.items()],
)


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
        ({"momentum_rank": 0}, "momentum_rank=0: expected a whole number of at least 1"),
    ],
)
def test_bad_sidecar_is_an_error(tmp_path, sidecar, message):
    LoRAPreConfig(r=8).save_pretrained(tmp_path)
    (tmp_path / "lorapre_config.json").write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match=message):
        LoRAPreConfig.from_pretrained(tmp_path)


def test_keys_of_a_newer_peft_are_named_with_the_class_that_was_read(tmp_path):
    """What PEFT's own tests ask of every configuration class; PEFT's table of classes is as it was afterwards."""
    config = LoRAPreConfig(r=8, **OWN_FIELDS)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spam": 1, "foo": "bar"}))
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['foo', 'spam'\] for class LoRAPreConfig, these"
    ):
        assert LoRAPreConfig.from_pretrained(tmp_path) == config
    with pytest.warns(UserWarning, match=r"for class LoraConfig, these"):
        assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig


def test_a_file_that_is_no_adapters_is_named_with_the_class_that_was_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(
        TypeError, match="The LoRAPreConfig config that is trying to be loaded is missing required keys"
    ):
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
    """In a process that cannot import lorapre_peft: the same outputs, and no warning that a plain LoRA adapter does
    not give.
    """
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
    done = subprocess.run([sys.executable, "-c", PLAIN_PEFT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["blocked"] == "lorapre_peft is blocked"
    assert found["ours"]["config"] == "LoraConfig"
    assert found["ours"]["warnings"] == found["plain"]["warnings"]
    assert found["ours"]["difference"] == 0
