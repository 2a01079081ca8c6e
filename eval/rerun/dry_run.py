"""This module makes the plan of a suite with estimated memory and time, before anything is trained."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from lorapre_peft.integrations.summary import format_bytes
from lorapre_peft.memory.models import meta_model
from lorapre_peft.memory.peak import AllocationTracker, MemoryEstimate, activation_bytes, estimate
from recipes.corpus import CorpusArguments
from recipes.training import describe, held_bytes, sft_config

from .models import base_config
from .plan import Cell, Records


def plan_table(cells: list[Cell], records: Records, skipped: Mapping[str, str]) -> str:
    """Return a line of text for each cell: runs finished and expected, memory of a step, time left, and rates.

    skipped: by method, why it does not run here.
    """
    configs: dict[str, PretrainedConfig] = {}
    activations: dict[tuple, int] = {}
    memory: dict[tuple, MemoryEstimate | None] = {}
    unestimated: dict[str, list[str]] = {}  # This maps errors to the labels of rows.
    lines = [f"{'model':20}{'protocol':10}{'method':34}{'runs':>9}{'memory':>12}{'time left':>12}  rates"]
    total, unknown = 0.0, 0
    for cell in tqdm(cells, desc="plan"):
        head = f"{Path(cell.model).name[:19]:20}{cell.protocol:10}{cell.entry.label[:33]:34}"
        if cell.entry.method in skipped:
            lines.append(f"{head}  not run: {skipped[cell.entry.method]}")
            continue
        if cell.model not in configs:
            configs[cell.model] = base_config(cell.model)
            if cell.suite.pretrains:
                configs[cell.model].vocab_size = cell.suite.data.get("vocab_size", CorpusArguments.vocab_size)
        expected = cell.expected_runs(records)
        done = cell.done(records)
        seconds = seconds_per_run(cell, records)
        total += (expected - done) * (seconds or 0)
        unknown += seconds is None and expected > done
        left = "–" if seconds is None else _duration((expected - done) * seconds)
        key = (cell.model, cell.entry.label)  # The memory is the same under every protocol.
        if key not in memory:
            try:
                memory[key] = memory_estimate(cell, configs[cell.model], activations)
            except Exception as error:  # A package may read values, which meta tensors lack.
                memory[key] = None
                unestimated.setdefault(describe(error), []).append(cell.entry.label)
        taken = "–" if memory[key] is None else format_bytes(memory[key].total)
        rates = ", ".join(f"{lr:g}" for lr in cell.rates(records)) or f"{cell.best_rate(records):g}"
        lines.append(f"{head}{f'{done}/{expected}':>9}{taken:>12}{left:>12}  {rates}")
    note = f", and {unknown} rows of which no time is known" if unknown else ""
    lines.append(f"time left in one process, without extensions of grids: {_duration(total)}{note}")
    lines.append(
        "memory: weights, gradients, optimizer state, its step's temporaries and activations of sequences of full "
        "length"
    )
    lines += [f"no estimate of memory for {'; '.join(labels)}: {error}" for error, labels in unestimated.items()]
    return "\n".join(lines)


def seconds_per_run(cell: Cell, records: Records) -> float | None:
    """Return the seconds that a run of the cell takes, or None if nothing is known.

    They are the median of the cell's finished runs, of those that answered problems if there are any. Without a
    finished run they are the number of steps times the seconds that the suite expects of a step, by method or by kind.
    """
    own = cell.finished(records)
    own = [record for record in own if record["run"]["answers"]] or own
    if own:
        return statistics.median(record["total_seconds"] for record in own)
    step = cell.suite.step_seconds.get(cell.entry.method, cell.suite.step_seconds.get(cell.method.trains))
    return None if step is None else step * cell.suite.training.steps


def memory_estimate(cell: Cell, config: PretrainedConfig, activations: dict[tuple, int]) -> MemoryEstimate:
    """Return the bytes of a training step, by a step of the real optimizer on the meta device.

    It raises whatever the optimizer raises there. config: config of the cell's model. activations: bytes of the
    activations of models that have been seen before, to which missing ones are added.
    """
    method, training = cell.method, cell.suite.training
    dtype = getattr(torch, training.adapter_dtype if method.trains == "adapter" else training.weights_dtype)
    model = meta_model(config, dtype)
    # The adapter starts plainly. Starts that decompose weights or gradients need data, and take no other memory later.
    adapter = method.adapter_config(training.rank, cell.entry.options, model)
    if adapter is not None:
        adapter.init_lora_weights = True
    model = method.attach(model, adapter)
    key = (cell.model, method.trains, method.lora.get("use_dora"))
    if key not in activations:
        shape = (training.micro_batch, training.max_length, training.gradient_checkpointing)
        activations[key] = activation_bytes(meta_model(model, dtype), *shape)
    with tempfile.TemporaryDirectory() as folder:
        args = sft_config(Path(folder), lr=1e-4, steps=1, batch_size=1, seed=0)
    optimizer = method.build(model, args, cell.entry.options)
    params = [param for param in model.parameters() if param.requires_grad]
    if hasattr(optimizer, "param_state_bytes"):  # LoRA-Pre reads norms, which meta tensors do not have.
        names = ("momentum_rank", "second_momentum_rank", "update_rule", "optimizer")
        rule = {name: cell.entry.options[name] for name in names if name in cell.entry.options}
        found = estimate(model, batch=0, in_backward=False, **rule)
        state, temporaries = found.state, found.temporaries
    else:
        for param in params:
            param.grad = torch.empty_like(param)
        with torch.no_grad(), AllocationTracker() as tracker:
            optimizer.step()
        state = held_bytes(optimizer)
        temporaries = max(0, tracker.peak_bytes - state)
    # In pre-training AdamW trains the rest beside them. The authors' own ways to do that are not considered.
    others = (
        sum(param.nbytes for param in model.parameters() if not param.requires_grad) if cell.suite.pretrains else 0
    )
    return MemoryEstimate(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=sum(param.nbytes for param in params) + others,
        state=state + 2 * others,
        temporaries=temporaries,
        activations=activations[key],
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"
