"""This module fine-tunes a model with LoRA-Pre: ``python -m recipes.sft --config recipes/configs/NAME.yaml``.

It takes TRL's argument classes and trainer. Every key of a config can be given on the command line as well, where it
wins.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from peft import PeftConfig
from transformers import TrainerCallback
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
    is_conversational,
    is_conversational_from_value,
)

from lorapre_peft import LoRAPreCallback, LoRAPreConfig, lorapre_optimizer
from lorapre_peft.integrations.targets import freeze_others, weight_targets
from lorapre_peft.lowrank.rules import RULES
from lorapre_peft.optim.options import RULE_OPTIONS
from recipes.arguments import dtype_field, parse_recipe
from recipes.data import DataArguments, write_manifest
from recipes.models import load_model
from recipes.precision import Precision
from recipes.training import start_run, train

# An adapter's config holds these options. With full weights they are the optimizer's.
RANK_KEYS = ("momentum_rank", *RULE_OPTIONS)
# These options concern an adapter alone. Of full weights lora_target_modules names those that are compressed.
ADAPTER_KEYS = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name.startswith(("lora_", "use_dora", "use_rslora")) and f.name != "lora_target_modules"
)


@dataclass
class LoRAPreArguments:
    """Holds the optimizer's arguments. Those that are not given have the defaults of `create_lorapre_optimizer`."""

    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "'adamw' or 'muon': LoRA-Pre. 'trainer': the one that `optim` names, on the same weights.",
            "choices": ["adamw", "muon", "trainer"],
        },
    )
    momentum_rank: int | None = field(
        default=None, metadata={"help": "Rank of the momenta. Not given: a quarter of lora_r, or 8 for full weights."}
    )
    second_momentum_rank: int | None = field(
        default=None, metadata={"help": "Rank of AdamW's second moment with 'als'. Not given: 1."}
    )
    update_rule: str | None = field(
        default=None, metadata={"help": "'als' or 'newton'. Not given: 'als'.", "choices": list(RULES)}
    )
    residual_weight: float | None = field(
        default=None,
        metadata={"help": "ρ of 'als': weight of the gradient outside the momentum's subspace. Not given: 1."},
    )
    adjust_lr_fn: str | None = field(
        default=None,
        metadata={
            "help": "Muon: 'original' or 'match_rms_adamw' (AdamW's rates carry over), as in torch.optim.Muon.",
            "choices": ["original", "match_rms_adamw"],
        },
    )
    update_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Update each matrix as soon as its gradient exists; needs max_grad_norm 0, no accumulation."
        },
    )
    others: str | None = field(
        default=None,
        metadata={
            "help": "Full weights: norms and biases 'adamw' or 'frozen'. Not given: 'adamw'.",
            "choices": ["adamw", "frozen"],
        },
    )
    embeddings: str | None = field(
        default=None,
        metadata={
            "help": "Full weights: embeddings and head 'adamw' or 'frozen'. Not given: 'frozen'.",
            "choices": ["adamw", "frozen"],
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in output_dir, with the same config."}
    )


@dataclass
class ModelArguments(ModelConfig):
    """Gives TRL's arguments of the model another default for ``dtype``."""

    dtype: str = dtype_field("Of the model's weights, those of the base model under an adapter.")


@dataclass
class Recipe:
    """Holds one run: its arguments by class, its dtypes with their reason, and the keys that are not the defaults.

    The keys are in ``config``.
    """

    sft: SFTConfig
    model: ModelArguments
    lorapre: LoRAPreArguments
    data: DataArguments
    precision: Precision
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.sft.output_dir)

    def load_data(self) -> DatasetDict:
        """Return the run's data as `recipes.data.load_data` does."""
        return self.data.load(self.sft.seed, self.sft.dataset_text_field)

    def unused(self) -> list[str]:
        """Return sentences that name the keys which are given and mean nothing in this run."""
        ignored: dict[str, tuple[str, ...]] = {}
        if self.lorapre.optimizer == "trainer":
            ignored["optimizer: trainer"] = (*RANK_KEYS, "adjust_lr_fn", "update_in_backward")
            if self.model.use_peft:  # LoRA-Pre refuses these for an adapter.
                ignored["optimizer: trainer"] += ("others", "embeddings")
        if not self.model.use_peft:
            ignored["use_peft: false"] = ADAPTER_KEYS
        given = {reason: [key for key in keys if key in self.config] for reason, keys in ignored.items()}
        return [f"{reason} does not use {', '.join(keys)}" for reason, keys in given.items() if keys]


def parse(argv: Sequence[str], *more: type) -> tuple[Any, ...]:
    """Parse a command line into a `Recipe`, followed by an instance of each of the ``more`` argument classes.

    Exits if no model is given, or if its dtype is given twice.
    """
    parser, parsed, config = parse_recipe(argv, [SFTConfig, ModelArguments, LoRAPreArguments, DataArguments, *more])
    if not parsed[1].model_name_or_path:
        parser.error("no model: give --config recipes/configs/NAME.yaml, or --model_name_or_path")
    if twice := {"dtype", "torch_dtype"} & (parsed[0].model_init_kwargs or {}).keys():
        parser.error(f"model_init_kwargs has {twice.pop()}: give it as --dtype, the recipe's own option")
    return Recipe(*parsed[:4], parser.precision, config), *parsed[4:]


def build_trainer(recipe: Recipe, data: DatasetDict, callbacks: Sequence[TrainerCallback] = ()) -> SFTTrainer:
    """Return TRL's trainer of a recipe, on the splits ``train`` and, if there is one, ``eval``.

    Raises ValueError if the rows are conversations and there is no chat template for them.
    """
    lorapre, model_args = recipe.lorapre, recipe.model
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": recipe.sft.trust_remote_code,
        "quantization_config": get_quantization_config(model_args),
        **(recipe.sft.model_init_kwargs or {}),
    }
    options = {name: value for name, value in options.items() if value is not None}
    model, tokenizer = load_model(model_args.model_name_or_path, getattr(torch, model_args.dtype), **options)
    example = data["train"][0]
    conversation = is_conversational(example) or is_conversational_from_value(example)
    if conversation and not tokenizer.chat_template and not recipe.sft.chat_template_path:
        raise ValueError(
            f"the rows of {recipe.data.dataset_name} are conversations, and the tokenizer of "
            f"{model_args.model_name_or_path} has no chat template: give chat_template_path, a .jinja file or a model "
            "whose template is to be used, or rows of prompt and completion"
        )
    extra: dict[str, Any] = {"callbacks": list(callbacks)}
    if lorapre.optimizer == "trainer":
        if not model_args.use_peft:  # LoRA-Pre trains the same weights.
            targets = weight_targets(model, model_args.lora_target_modules or "all-linear", None, None)
            freeze_others(model, targets, lorapre.others, lorapre.embeddings)
    else:
        extra["optimizer_cls_and_kwargs"] = lorapre_optimizer(
            lorapre.optimizer, recipe.sft, **_optimizer_options(recipe)
        )
        extra["callbacks"] += [LoRAPreCallback()]
    args = copy.copy(recipe.sft)
    args.model_init_kwargs = None  # They are used above. SFTTrainer would warn that it ignores them.
    return SFTTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        peft_config=_peft_config(recipe),
        **extra,
    )


def _peft_config(recipe: Recipe) -> PeftConfig | None:
    """Return TRL's LoraConfig, as a `LoRAPreConfig` if LoRA-Pre trains it, or None for full weights."""
    lora = get_peft_config(recipe.model)
    if lora is None or recipe.lorapre.optimizer == "trainer":
        return lora
    own = {name: getattr(recipe.lorapre, name) for name in RANK_KEYS}
    options = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora) if f.init}
    return LoRAPreConfig(**options, **{name: value for name, value in own.items() if value is not None})


def _optimizer_options(recipe: Recipe) -> dict[str, Any]:
    """Return options of `create_lorapre_optimizer`. The rank and the rule of an adapter are in its own config."""
    # Full weights may be bfloat16. In SFTTrainer QLoRA's adapters are bfloat16 as well. At fine-tuning rates most
    # updates are smaller than the spacing of its numbers.
    options: dict[str, Any] = {"bf16_rounding": "stochastic"}
    if recipe.lorapre.adjust_lr_fn is not None:
        options["adjust_lr_fn"] = recipe.lorapre.adjust_lr_fn
    options |= {"others": recipe.lorapre.others, "embeddings": recipe.lorapre.embeddings}
    if not recipe.model.use_peft:
        options |= {name: getattr(recipe.lorapre, name) for name in RANK_KEYS}
        options["target_modules"] = recipe.model.lora_target_modules
    return options | {"update_in_backward": recipe.lorapre.update_in_backward}


def main() -> None:
    """Run the command line."""
    (recipe,) = parse(sys.argv[1:])
    is_main = recipe.sft.process_index == 0
    if is_main:
        start_run(recipe.folder, recipe.config, recipe.precision, resume=recipe.lorapre.resume)
        if recipe.sft.use_cpu and "use_cpu" not in recipe.config:
            print("no CUDA device found: training on the CPU")
    with recipe.sft.main_process_first(desc="preparing data"):
        data = recipe.load_data()
    if is_main:
        write_manifest(data, recipe.data.dataset_name, recipe.folder / "manifest.json")
    trainer = build_trainer(recipe, data)
    for sentence in recipe.unused():
        trainer.accelerator.print(sentence)
    rows = recipe.sft.train_batch_size * recipe.sft.gradient_accumulation_steps * recipe.sft.world_size
    trainer.accelerator.print(f"{rows} rows per optimizer step on {recipe.sft.world_size} process(es)")
    metrics = train(trainer, resume=recipe.lorapre.resume)
    trainer.log_metrics("run", metrics)
    if is_main:
        print(f"model, config.yaml, manifest.json, metrics and log: {recipe.folder}")


if __name__ == "__main__":
    main()
