"""This module pre-trains Llamas: ``python -m recipes.pretrain --config recipes/configs/pretrain/NAME.yaml``.

It runs under ``accelerate launch`` too. It takes transformers' argument classes and trainer, and any method of
`eval.methods` that trains weights, except Sophia. Every key of a config can be given on the command line as well,
where it wins.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim import Optimizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from eval.methods import METHODS, Method, pretraining_optimizer
from eval.methods.lorapre import LORAPRE
from lorapre_peft import LoRAPreCallback
from recipes.arguments import dtype_field, parse_recipe
from recipes.corpus import CorpusArguments, run_tokenizer, special_tokens, write_corpus_manifest
from recipes.plots import plot_training
from recipes.precision import Precision
from recipes.stream_trainer import StreamTrainer
from recipes.training import Forecast, OptimizerTimer, Progress, from_model, held_bytes, start_run, train


@dataclass
class PretrainArguments(TrainingArguments):
    """Extends transformers' arguments by the batch size as pre-training states it.

    Raises:
        ValueError: there is no ``max_steps``, or ``total_batch_size`` does not fit the other arguments.
    """

    total_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimizer step over all processes; gradient_accumulation_steps follows from it, and "
            "cannot be given too."
        },
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Products in bfloat16, by autocast. Not given: as dtype 'auto' chooses."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in every step; a Llama has none."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Which tokens are counted.", "choices": ["non_padding", "all", "no"]}
    )

    def __post_init__(self) -> None:
        if self.max_steps <= 0:
            raise ValueError(f"max_steps={self.max_steps}: a stream has no end, so give the steps to train for")
        super().__post_init__()
        if self.total_batch_size is None:
            return
        rows = self.train_batch_size * self.world_size
        steps, rest = divmod(self.total_batch_size, rows)
        if rest or steps < 1:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} is no positive multiple of the {rows} rows that "
                f"{self.world_size} process(es) take at a time: change per_device_train_batch_size"
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"total_batch_size={self.total_batch_size} takes {steps} times {rows} rows, and "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: give one of them"
            )
        self.gradient_accumulation_steps = steps


@dataclass
class LlamaArguments:
    """Holds the shape of the Llama that is trained from random weights, and the dtype of its weights."""

    hidden_size: int = field(default=512, metadata={"help": "Width."})
    intermediate_size: int = field(default=1376, metadata={"help": "Width of the MLP."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=8, metadata={"help": "Attention heads."})
    max_position_embeddings: int = field(default=1024, metadata={"help": "Longest row that the model is for."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Such as 'flash_attention_2'. Not given: PyTorch's own."}
    )
    dtype: str = dtype_field("Of the weights.")

    def config(self, **options: Any) -> LlamaConfig:
        """Return the model's config. options: fields that are not part of its shape, such as ``vocab_size``."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            **options,
        )


def _takes(method: Method) -> bool:
    """Return whether this recipe can train by a method. It cannot if the method differentiates gradients."""
    return method.trains == "weights" and not method.second_order


@dataclass
class MethodArguments:
    """Holds the arguments that say how the weights are trained.

    Raises:
        ValueError: the method lacks an option in ``method_options``, or these are not options at all.
    """

    method: str = field(
        default="lorapre-adam-weights",
        metadata={
            "help": "What trains the matrices of attention and MLP, at learning_rate: a method of eval.methods.",
            "choices": sorted(name for name, method in METHODS.items() if _takes(method)),
        },
    )
    method_options: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of the method, such as '{momentum_rank: 128}' for LoRA-Pre; '{}' for its defaults."
        },
    )
    others_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Embeddings, head and norms are trained by AdamW at this rate. Not given: as the method's authors "
            "do, at learning_rate."
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in output_dir, with the same config."}
    )

    def __post_init__(self) -> None:
        given = yaml.safe_load(self.method_options) if isinstance(self.method_options, str) else self.method_options
        if not isinstance(given, dict | None):
            raise ValueError(f"method_options={self.method_options!r}: expected options as in '{{momentum_rank: 8}}'")
        try:
            self.method_options = METHODS[self.method].merged(given or {})
        except ValueError as error:  # Most likely a config has options of another method.
            raise ValueError(
                f"{error}. Give method_options for method={self.method}; '{{}}' are its defaults"
            ) from error


@dataclass
class Recipe:
    """Holds one run: its arguments by class, its dtypes with their reason, and the keys that are not the defaults.

    The keys are in ``config``.
    """

    training: PretrainArguments
    llama: LlamaArguments
    method: MethodArguments
    corpus: CorpusArguments
    precision: Precision
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.training.output_dir)

    @property
    def data_seed(self) -> int:
        """Return the seed of the order of the data."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed


def parse(argv: Sequence[str]) -> Recipe:
    """Parse a command line into a `Recipe`. Raises ValueError if its rows are longer than its model is for."""
    parser, parsed, config = parse_recipe(argv, [PretrainArguments, LlamaArguments, MethodArguments, CorpusArguments])
    training, llama, _, corpus = parsed
    if corpus.max_length > llama.max_position_embeddings:
        raise ValueError(
            f"max_length={corpus.max_length} and max_position_embeddings={llama.max_position_embeddings}: the model's "
            f"config would not allow its own rows; give max_position_embeddings={corpus.max_length}, or shorter rows"
        )
    if corpus.packing and training.include_num_input_tokens_seen == "non_padding":
        training.include_num_input_tokens_seen = "all"  # Trainer would not count end tokens that are also the padding.
    return Recipe(*parsed, parser.precision, config)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a Llama of the recipe's shape, whose random weights are drawn by the recipe's seed."""
    llama = recipe.llama
    config = llama.config(vocab_size=recipe.corpus.vocab_size, use_cache=False, **special_tokens(tokenizer))
    set_seed(recipe.training.seed)
    options = {"attn_implementation": llama.attn_implementation} if llama.attn_implementation else {}
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, llama.dtype), **options)
    model.generation_config.use_cache = True  # Generation uses the cache, unlike training.
    return model


def build_trainer(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[dict[str, Any]],
    callbacks: Sequence[TrainerCallback] = (),
) -> StreamTrainer:
    """Return the trainer of a recipe.

    held_out: rows for the held-out loss. Without any, it is not measured.
    """
    training = recipe.training
    train_rows = recipe.corpus.train_stream(tokenizer, recipe.data_seed, training.process_index, training.world_size)
    options = {
        "method": METHODS[recipe.method.method],
        "args": training,
        "options": recipe.method.method_options,
        "others_lr": recipe.method.others_learning_rate,
    }
    return StreamTrainer(
        build_model(recipe, tokenizer),
        training,
        train_dataset=train_rows,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(from_model(_optimizer), options),
        callbacks=[*callbacks, *([LoRAPreCallback()] if recipe.method.method in LORAPRE else [])],
    )


def _optimizer(model: LlamaForCausalLM, method: Method, **options: Any) -> Optimizer:
    return pretraining_optimizer(method, model, **options)


def forecast(seconds: float, steps: int) -> str:
    """Return text that says when training ends. seconds: time of a step. steps: number of steps that are left."""
    end = time.localtime(time.time() + seconds * steps)
    return f"{seconds:.2f} s a step: training ends about {time.strftime('%A, %d %B, %H:%M', end)}"


def measure_optimizer(trainer: StreamTrainer, timer: OptimizerTimer) -> dict[str, float]:
    """Return the bytes of this process's optimizer state, of the matrices and of all, and the seconds of a step.

    The seconds are missing if no step was made.
    """
    optimizer = trainer.optimizer.optimizer
    measured = {
        "optimizer_matrix_state_bytes": held_bytes(optimizer.optimizers[0]),
        "optimizer_state_bytes": held_bytes(optimizer),
    }
    seconds = timer.per_step()
    return measured if seconds is None else measured | {"optimizer_seconds_per_step": seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. argv: its arguments. None stands for the process's own."""
    recipe = parse(sys.argv[1:] if argv is None else argv)
    training, corpus = recipe.training, recipe.corpus
    is_main = training.process_index == 0
    if is_main:
        start_run(recipe.folder, recipe.config, recipe.precision, resume=recipe.method.resume)
        if training.use_cpu and "use_cpu" not in recipe.config:
            print("no CUDA device found: training on the CPU")
    with training.main_process_first(local=False, desc="preparing the tokenizer"):
        tokenizer = run_tokenizer(corpus, recipe.folder / "tokenizer")
    held_out = corpus.eval_rows(tokenizer)
    if is_main:
        train_rows = corpus.train_stream(tokenizer, recipe.data_seed)
        write_corpus_manifest(corpus, tokenizer, train_rows, held_out, recipe.folder / "manifest.json")
    timer = OptimizerTimer()
    trainer = build_trainer(recipe, tokenizer, held_out, [timer, *([Forecast(forecast)] if is_main else [])])
    Progress.replace(trainer)
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    trainer.accelerator.print(
        f"{trainer.model.num_parameters() / 1e6:.1f}M parameters; {rows} rows of {corpus.max_length} tokens per "
        f"optimizer step on {training.world_size} process(es)"
    )
    metrics = train(trainer, resume=recipe.method.resume)
    if is_main:
        measured = measure_optimizer(trainer, timer)
        trainer.save_metrics("optimizer", measured)
        trainer.log_metrics("run", metrics | measured)
        plot_training(trainer.state.log_history, recipe.folder.name, recipe.folder / "training.png")
        print(f"model, config.yaml, manifest.json, metrics, log and training.png: {recipe.folder}")


if __name__ == "__main__":
    main()
