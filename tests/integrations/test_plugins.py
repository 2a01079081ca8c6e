"""LoRA-Pre inside tools that are not installed here, each against the interface that it publishes.

What a fixture defines of a tool is what that tool's source does with a plugin or a class path. `tests/external/run.py`
runs those tools themselves where they can be installed.
"""

import ast
import importlib
import inspect
import sys
from types import ModuleType

import pytest
import torch
from pydantic import BaseModel, ValidationError
from trainers import ADAMW_LOGGED, arguments, inner, training_logs
from transformers import Trainer
from transformers.training_args import OptimizerNames

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon


def provide(monkeypatch, name: str, **members) -> None:
    """Have ``import name`` give a module of these members, within packages that hold nothing else."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def by_class_path(path: str):
    """Import a class as these tools do: the part before the last dot is a module."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---- axolotl 0.19.0 ------------------------------------------------------------------------------------------------


class AxolotlTrainer(Trainer):
    """A trainer whose optimizer is built as in axolotl's OptimizerMixin: the product gets its arguments too."""

    def create_optimizer(self, model=None):
        factory, options = self.optimizer_cls_and_kwargs
        self.optimizer = factory()(self.model if model is None else model, self.args, **options)
        return self.optimizer


@pytest.fixture
def plugin(monkeypatch):
    provide(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    monkeypatch.delitem(sys.modules, "lorapre_peft.integrations.axolotl", raising=False)
    return by_class_path("lorapre_peft.integrations.axolotl.LoRAPrePlugin")()


def merged(plugin, **keys) -> dict:
    """The config after axolotl has merged the plugin's model into its own and validated it."""

    class OwnKeys(BaseModel):
        optimizer: str | None = None
        optim_args: str | None = None

    model = type("AxolotlConfig", (OwnKeys, by_class_path(plugin.get_input_args())), {})
    return model(**keys).model_dump(exclude_none=True)


@pytest.mark.parametrize("trainer_class", [AxolotlTrainer, Trainer])
@pytest.mark.parametrize(("kind", "optimizer_class"), [("adamw", LoRAPreAdamW), ("muon", LoRAPreMuon)])
def test_axolotl_trains_with_the_plugin(tmp_path, peft_model, tokens, plugin, trainer_class, kind, optimizer_class):
    """Options come from the config's own keys and from `lorapre`; some trainers in axolotl build as Trainer does."""
    trainer = trainer_class(peft_model(), arguments(tmp_path, learning_rate=3e-3), train_dataset=tokens)
    plugin.post_trainer_create(merged(plugin, lorapre={"optimizer": kind, "momentum_rank": 3}), trainer)
    trainer.train()
    optimizer = inner(trainer.optimizer)
    assert type(optimizer) is optimizer_class
    assert {(group["momentum_rank"], group["initial_lr"]) for group in optimizer.param_groups} == {(3, 3e-3)}
    if kind == "adamw":
        assert training_logs(trainer)[0].keys() >= ADAMW_LOGGED


@pytest.mark.parametrize(
    "keys", [{}, {"optimizer": "adamw_bnb_8bit"}, {"optimizer": OptimizerNames.ADAMW_TORCH_FUSED}]
)
def test_axolotl_plugin_needs_no_options(tmp_path, peft_model, tokens, plugin, keys):
    """The key that chooses an AdamW may stay, which is axolotl's default too."""
    trainer = AxolotlTrainer(peft_model(), arguments(tmp_path), train_dataset=tokens)
    plugin.post_trainer_create(merged(plugin) | keys, trainer)
    assert type(inner(trainer.create_optimizer())) is LoRAPreAdamW


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 4}, "unknown rank: expected some of"), ({"optimizer": "adam"}, "optimizer='adam': expected one of")],
)
def test_axolotl_refuses_unknown_options_before_a_model_is_loaded(plugin, options, message):
    with pytest.raises(ValidationError, match=message):
        merged(plugin, lorapre=options)


@pytest.mark.parametrize(
    ("keys", "chosen", "message"),
    [
        ({"optimizer": "lion_8bit"}, None, "optimizer: lion_8bit beside LoRAPrePlugin"),
        ({"optimizer": "muon"}, (object, {}), "optimizer: muon beside LoRAPrePlugin"),
        ({"optim_args": "eps=1e-6"}, None, "the config sets optim_args, which LoRAPrePlugin does not read"),
    ],
)
def test_axolotl_keys_that_nothing_would_read_are_refused(tmp_path, peft_model, tokens, plugin, keys, chosen, message):
    trainer = AxolotlTrainer(peft_model(), arguments(tmp_path), train_dataset=tokens)
    trainer.optimizer_cls_and_kwargs = chosen  # as axolotl sets it for its own optimizers
    with pytest.raises(ValueError, match=message):
        plugin.post_trainer_create(merged(plugin, **keys), trainer)


# ---- LLaMA-Factory, version 1 --------------------------------------------------------------------------------------


@pytest.fixture(params=["optimizer", "optimizers.optimizer"], ids=["0.9.5", "ff6d4d1"])
def registry(monkeypatch, request) -> dict:
    """What importing the module registers, with the plugin class where each version of LLaMA-Factory has it."""
    registered = {}

    class OptimizerPlugin:
        def __init__(self, name):
            self.name = name

        def register(self):
            return lambda function: registered.setdefault(self.name, function)

    where = f"llamafactory.v1.plugins.trainer_plugins.{request.param}"
    provide(monkeypatch, where, OptimizerPlugin=OptimizerPlugin)
    monkeypatch.delitem(sys.modules, "lorapre_peft.integrations.llamafactory", raising=False)
    importlib.import_module("lorapre_peft.integrations.llamafactory")
    return registered


def test_llamafactory_registers_the_optimizer_by_an_import(peft_model, registry):
    optimizer = registry["lorapre"](peft_model(), {"name": "lorapre", "lr": 1e-3, "momentum_rank": 3})
    assert type(optimizer) is LoRAPreAdamW
    assert {(group["lr"], group["momentum_rank"]) for group in optimizer.param_groups} == {(1e-3, 3)}


def test_llamafactory_needs_a_learning_rate(make_llama, registry):
    """Full weights have a default rate, which must not replace the config's unnoticed."""
    with pytest.raises(ValueError, match="optim_config has no lr"):
        registry["lorapre"](make_llama(), {"name": "lorapre"})


# ---- a dotted class path -------------------------------------------------------------------------------------------

PATH = "lorapre_peft.LoRAPreAdamW"


def litgpt(parameters, optimizer):
    """`litgpt.utils.instantiate_torch_optimizer` of 0.5.13, with what `litgpt pretrain` adds."""
    path = optimizer if isinstance(optimizer, str) else optimizer["class_path"]
    given = {} if isinstance(optimizer, str) else optimizer["init_args"]
    cls = by_class_path(path)
    extra = {name: value for name, value in {"fused": False}.items() if name in inspect.signature(cls).parameters}
    return cls(parameters, **given, **extra)


def kohya(parameters, optimizer_type, optimizer_args):
    """`library.train_util.get_optimizer` of sd-scripts at 48d368f: groups with rates, and Python literals."""
    options = {name: ast.literal_eval(value) for name, value in (text.split("=") for text in optimizer_args)}
    return by_class_path(optimizer_type)([{"params": list(parameters), "lr": 1e-3}], lr=1e-3, **options)


@pytest.mark.parametrize(
    ("tool", "how"),
    [
        (litgpt, {"optimizer": PATH}),
        (litgpt, {"optimizer": {"class_path": PATH, "init_args": {"lr": 1e-3, "momentum_rank": 2}}}),
        (kohya, {"optimizer_type": PATH, "optimizer_args": ["momentum_rank=2", "betas=(0.9,0.98)"]}),
    ],
    ids=["litgpt-name", "litgpt-options", "kohya"],
)
def test_a_dotted_class_path_trains_an_adapter(peft_model, batch, tool, how):
    """These tools hand over bare parameters, here those of an adapter."""
    model = peft_model()
    optimizer = tool((param for param in model.parameters() if param.requires_grad), **how)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert type(optimizer) is LoRAPreAdamW
    assert {state["m_A"].shape[0] for state in optimizer.state.values()} == {2}  # k, or by default r/4
    assert losses[-1] < losses[0]
    assert torch.tensor(losses).isfinite().all()
