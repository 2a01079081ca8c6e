"""Write what a pull request to PEFT takes from this project's code: python docs/upstream/make_peft.py [FOLDER]

FOLDER, by default ``docs/upstream/peft``, is shaped like PEFT's repository. Written here are the optimizer, whose rule
is taken function by function from `lorapre_peft.optim.reference` and whose class is ``lorapre.py.in`` beside this
script, and the entry of PEFT's method comparison. The test and ``existing_files.patch``, for files that PEFT has (at
commit 5d602fd; ``git apply --unidiff-zero``), are kept there.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapre_peft.optim import reference

HERE = Path(__file__).resolve().parent
MARK = "# GENERATED\n"
# Names that ``lorapre.py.in`` defines in its own, shorter way.
DEFINED = ("test_rows",)
# How the reference speaks of its own project, and how PEFT would.
WORDS = {"This project: ": "The package lorapre-peft: ", " (this project)": " of the package lorapre-peft"}
# As PEFT's own entries: the rank of its plain LoRA entry, and the rate and decay of its default_training_params.json.
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 32, "lora_alpha": 64}
TRAINING = {"optimizer_type": "lorapre", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}


def definitions(function: Callable[..., Any]) -> dict[str, str]:
    """Return the source of a function, after that of the functions of this project that it calls, by name."""
    sources: dict[str, str] = {}
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if inspect.isfunction(called) and called.__module__.startswith("lorapre_peft") and name not in DEFINED:
            sources |= definitions(called)
    return sources | {function.__name__: inspect.getsource(function)}


def optimizer_source() -> str:
    """Return ``src/peft/optimizers/lorapre.py``."""
    head, mark, tail = (HERE / "lorapre.py.in").read_text().partition(MARK)
    if not mark:
        raise ValueError(f"lorapre.py.in has no line {MARK!r}, in whose place the rule is written")
    functions = definitions(reference.no_momentum) | definitions(reference.als_adam)
    rule = "\n\n".join(functions.values())
    for ours, theirs in WORDS.items():
        rule = rule.replace(ours, theirs)
    return head + rule + tail


def write(folder: Path) -> None:
    """Write the optimizer and the entry of the method comparison."""
    experiment = "method_comparison/MetaMathQA/experiments/lora/llama-3.2-3B-rank32-lorapre"
    contents = {
        "src/peft/optimizers/lorapre.py": optimizer_source(),
        f"{experiment}/adapter_config.json": json.dumps(ADAPTER, indent=2) + "\n",
        f"{experiment}/training_params.json": json.dumps(TRAINING, indent=2) + "\n",
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "peft")
