"""This module does one run of a pre-training suite, by the recipe's parts.

The run trains a Llama from random weights on a stream of text.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from eval.methods import METHODS, pretraining_optimizer
from lorapre_peft.memory.peak import measure
from recipes.corpus import CorpusArguments, run_tokenizer, special_tokens
from recipes.stream_trainer import StreamTrainer
from recipes.training import OptimizerTimer, Progress, from_model, held_bytes

from .models import base_config
from .suite import Pretraining, Run
from .training import MemoryLog, Runner, SecondOrder, measurements


class SecondOrderStreamTrainer(SecondOrder, StreamTrainer):
    """Extends `StreamTrainer` to optimizers that differentiate gradients."""


class PretrainingRunner(Runner):
    """Trains runs one after another, and keeps the tokenizer and the held-out rows.

    All runs on the same text share them. surroundings, shares_memory: as in `Runner`.
    """

    def __init__(self, surroundings: dict[str, Any], shares_memory: bool = False) -> None:
        super().__init__(surroundings, shares_memory)
        self._texts: dict[str, tuple[CorpusArguments, PreTrainedTokenizerBase, dict[str, list[Any]]]] = {}

    def _ready(self, run: Run) -> None:
        self._text(run)
        base_config(run.model)

    def _text(self, run: Run) -> tuple[CorpusArguments, PreTrainedTokenizerBase, dict[str, list[Any]]]:
        """Return the corpus, its tokenizer, and the held-out rows.

        Every second held-out row is for validation, and the others are for the test.
        """
        key = f"{run.data} {run.training.max_length}"
        if key not in self._texts:
            options = {name: value for name, value in run.data.items() if name != "source"}
            corpus = CorpusArguments(dataset_name=run.data["source"], max_length=run.training.max_length, **options)
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = run_tokenizer(corpus, Path(folder) / "tokenizer")
            rows = corpus.eval_rows(tokenizer)
            self._texts[key] = corpus, tokenizer, {"validation": rows[::2], "test": rows[1::2]}
        return self._texts[key]

    def _train(self, run: Run) -> dict[str, Any]:
        training = run.training
        timer, memory_log = OptimizerTimer(), MemoryLog()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(run, folder, [timer, memory_log])
            start = time.perf_counter()
            with measure() as memory:
                trainer.train()
            seconds = time.perf_counter() - start
            losses = trainer.evaluate()
        optimizer = trainer.optimizer.optimizer
        return measurements(trainer, optimizer.optimizers[0], losses, timer, memory_log, seconds) | {
            "all_state_bytes": held_bytes(optimizer),
            "peak_bytes": memory.peak_bytes,
            "peak_of": memory.what,
            "tokens": training.steps * training.batch_size * training.max_length,
        }

    def trainer(self, run: Run, folder: str, callbacks: list[TrainerCallback]) -> StreamTrainer:
        """Return the trainer of a run, with the model from random weights, the rows and the optimizer.

        folder: Trainer's folder.
        """
        assert isinstance(run.training, Pretraining)
        corpus, tokenizer, held_out = self._text(run)
        set_seed(run.seed)
        config = base_config(run.model)
        config.update({"vocab_size": corpus.vocab_size, "use_cache": False} | special_tokens(tokenizer))
        args = _arguments(run, folder)
        trainer = (SecondOrderStreamTrainer if METHODS[run.method].second_order else StreamTrainer)(
            LlamaForCausalLM(config),
            args,
            train_dataset=corpus.train_stream(tokenizer, run.seed),
            eval_dataset=held_out,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(from_model(_optimizer), {"run": run, "args": args}),
            callbacks=callbacks,
        )
        Progress.replace(trainer)
        return trainer


def _arguments(run: Run, folder: str) -> TrainingArguments:
    training = run.training
    assert isinstance(training, Pretraining)
    return TrainingArguments(
        output_dir=folder,
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch,
        per_device_eval_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.batch_size // training.micro_batch,
        learning_rate=run.lr,
        adam_beta2=training.adam_beta2,
        weight_decay=0.0,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.min_lr_rate},
        warmup_steps=training.warmup,
        bf16=training.bf16,
        seed=run.seed,
        logging_steps=max(1, training.steps // 60),
        logging_nan_inf_filter=False,  # Otherwise a diverged run would have a finite loss.
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def _optimizer(model: LlamaForCausalLM, run: Run, args: TrainingArguments) -> Optimizer:
    training = run.training
    assert isinstance(training, Pretraining)
    return pretraining_optimizer(METHODS[run.method], model, args, run.options, others_lr=training.others_lr)
