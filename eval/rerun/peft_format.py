"""This module writes finished adapters in the format of PEFT's ``method_comparison/MetaMathQA``.

They can then be entered there. Each run gets ``experiments/lora/NAME/`` with adapter_config.json (and
lorapre_config.json) and training_params.json, and ``results/lora--NAME.json`` with the fields that PEFT's
``utils.log_results`` writes and its ``processing.py`` reads.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.methods import METHODS, adam_options
from recipes.training import sft_config, write_atomically

from .plan import Cell, Records

# These are PEFT's names of what it can build itself. Anything else needs its `get_optimizer_and_scheduler` extended.
_OPTIMIZERS = {"lora+": "lora+", "lora-fa": "lora-fa"}
# The optimizers of these methods do not take these arguments of Adam.
_NOT_TAKEN = {
    "shampoo": {"eps"},
    "sophia": {"betas", "eps"},
    "lora-rite": {"eps"},
    "riemannion": {"betas", "eps"},
    "oplora": {"betas", "eps", "weight_decay"},
    "lorapre-muon": {"betas", "eps"},
}
_ACCURACIES = ("gsm8k", "accuracy")  # PEFT's test accuracy is that on GSM8K.
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_peft_results(cells: list[Cell], records: Records, folder: Path) -> int:
    """Write every finished final run of an adapter that answered problems, and return how many there were."""
    written = 0
    for cell in cells:
        if cell.method.trains != "adapter":
            continue
        for run in cell.final_runs(records):
            record = records.get(run.name)
            accuracies = record and [record["metrics"][name] for name in _ACCURACIES if name in record["metrics"]]
            if accuracies and record["status"] == "finished":
                _write(run.name, record, accuracies[0], folder)
                written += 1
    return written


def _write(run_name: str, record: Mapping[str, Any], accuracy: float, folder: Path) -> None:
    run = record["run"]
    name = f"{Path(run['model']).name}-rank{run['training']['rank']}-{run_name}"
    experiment = folder / "experiments" / "lora" / name
    experiment.mkdir(parents=True, exist_ok=True)
    config = METHODS[run["method"]].adapter_config(run["training"]["rank"], run["options"])
    config.base_model_name_or_path = run["model"]
    config.save_pretrained(str(experiment))
    train_config = _train_config(run, record)
    write_atomically(experiment / "training_params.json", json.dumps(train_config, indent=2))
    steps, batch_size = run["training"]["steps"], run["training"]["batch_size"]
    result = {
        "run_info": {
            "created_at": record["created_at"],
            "total_time": record["total_seconds"],
            "experiment_name": f"lora/{name}",
            "peft_branch": None,
            "train_config": train_config,
            "peft_config": json.loads((experiment / "adapter_config.json").read_text()),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": record["memory"]["mean"],
            "accelerator_memory_max": record["memory"]["max"],
            "accelerator_memory_reserved_99th": record["memory"]["percentile_99"],
            "train_time": record["train_seconds"],
            "file_size": record["adapter_bytes"],  # This is the size in the dtype of training.
            "num_trainable_params": record["trained_parameters"],
            "num_total_params": record["parameters"],
            "status": "success",
            "metrics": [
                {
                    "step": steps,
                    "test accuracy": accuracy,
                    "train loss": record["log"]["loss"][-1],
                    "train samples": steps * batch_size,
                    "train total tokens": record["tokens"],
                }
            ],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {f"{package}-version": _version(package, record) for package in _PACKAGES},
            "system_info": {"system": platform.system(), "accelerator": record["environment"].get("device")},
            "pytorch_info": "",
        },
    }
    results = folder / "results"
    results.mkdir(exist_ok=True)
    write_atomically(results / f"lora--{name}.json", json.dumps(result, indent=2))


def _train_config(run: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of PEFT's ``TrainConfig`` that say how the run trained."""
    training = run["training"]
    return {
        "model_id": run["model"],
        "dtype": training["adapter_dtype"],
        "max_seq_length": training["max_length"],
        "batch_size": training["batch_size"],
        "max_steps": training["steps"],
        "compile": False,
        "use_gc": training["gradient_checkpointing"],
        "seed": run["seed"],
        "grad_norm_clip": 1.0,
        "optimizer_type": _OPTIMIZERS.get(run["method"], record["optimizer"]),
        "optimizer_kwargs": optimizer_kwargs(run),
        "lr_scheduler": "cosine",
        "use_amp": training["bf16"],
        "autocast_adapter_dtype": True,
    }


def optimizer_kwargs(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PEFT's ``get_optimizer_and_scheduler`` passes on to the optimizer.

    For what it builds itself these are all arguments that it needs. run: declaration of the run.
    """
    options = {name: value for name, value in run["options"].items() if value is not None}
    rank, steps, batch_size = (run["training"][name] for name in ("rank", "steps", "batch_size"))
    adam = adam_options(sft_config(Path("unused"), lr=run["lr"], steps=steps, batch_size=batch_size, seed=run["seed"]))
    if run["method"] == "lora-fa":  # Its factory takes no betas. The run's were set later.
        return {"lr": run["lr"], "r": rank, "lora_alpha": 2 * rank}
    if run["method"] == "lora+":
        return adam | {"loraplus_lr_ratio": options["lr_ratio"]}
    return {name: value for name, value in adam.items() if name not in _NOT_TAKEN.get(run["method"], ())} | options


def _version(package: str, record: Mapping[str, Any]) -> str:
    return record["environment"].get("versions", {}).get(package) or version(package)
