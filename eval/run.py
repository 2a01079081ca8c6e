"""This module evaluates a model, with or without an adapter, on lm-eval tasks, and prints a table of the metrics.

    python -m eval.run smollm2 runs/quickstart/lorapre --tasks generated_problems --limit 24

The metrics have standard errors, and are also written as JSON. Completions are kept in the output folder as they come.
The same command, started again, repeats none of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.sources import SMOLLM2

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# lm_eval, torch and datasets are imported where they are used, as the process that compares expressions imports this
# module too.

TASKS = Path(__file__).parent / "tasks"
SAVED = "saved"  # This stands for a model's own dtype.


def evaluate(
    model: str,
    adapter: str | None = None,
    *,
    tasks: list[str],
    output_dir: str | Path,
    data: dict[str, str] | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    dtype: str = SAVED,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> dict[str, Any] | None:
    """Judge a model's answers to tasks, and return lm-eval's results with ``samples``.

    In several processes all but the first return None.

    Args:
        model: ``"smollm2"``, a local folder, or a hub id.
        adapter: folder or hub id of a PEFT adapter. If a tokenizer lies beside it, that is the one used.
        tasks: names of tasks of `eval/tasks`, or of any of lm-eval's own.
        output_dir: folder for ``results.json`` and for one ``samples_TASK.jsonl`` for each task, with every prompt,
            completion and verdict. Results of this model on other tasks stay there.
        data: by task, what to read instead of the hub: a JSONL file of test rows, or a folder with one file for each
            split.
        limit: number of problems for each task, the first ones. None stands for all.
        batch_size: number of problems at a time, or ``"auto"``.
        device: device of the model. None stands for a GPU if there is one.
        dtype: dtype of the weights, as `recipes.precision` names them. ``"auto"`` stands for the one that the device
            multiplies fast, and ``"saved"`` for the one in which they were saved.
        apply_chat_template: whether every prompt is written as a user's message, by the tokenizer's chat template.
        system_instruction: text before every prompt. With a chat template it is the system's message.

    Raises:
        SystemExit: an unknown task, a model or data that cannot be had, an adapter that does not fit the model, a
            tokenizer without the chat template, or a folder with other results.
    """
    import torch
    from lm_eval import simple_evaluate
    from safetensors import SafetensorError

    from eval.adapters import AdaptedLM, own_tokenizer
    from recipes.precision import AUTO, fast_dtype

    folder = Path(output_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_options(folder, device, dtype, batch_size, limit)
    if dtype == AUTO:
        dtype, reason = fast_dtype(device.partition(":")[0])
        print(f"dtype {dtype}: {reason}")
    options = dict(model=model, adapter=adapter, dtype=dtype)
    prompting = dict(apply_chat_template=apply_chat_template, system_instruction=system_instruction)
    options |= {name: value for name, value in prompting.items() if value}
    check_folder(folder, options)
    manager = task_manager(tasks)
    loaded = load_tasks(tasks, data or {}, manager)
    source = model_source(model) | {"dtype": "auto" if dtype == SAVED else dtype}
    if adapter:
        source |= {"peft": adapter} | ({"tokenizer": adapter} if own_tokenizer(adapter) else {})
    try:
        lm = AdaptedLM(**source, device=device, batch_size=batch_size)
    except (OSError, ValueError, SafetensorError) as error:  # PEFT raises ValueError for a missing adapter.
        named = f"model {model!r}" + (f" with adapter {adapter!r}" if adapter else "")
        raise SystemExit(
            f"{named} cannot be had: {error}\nTo work offline, give local folders, or the model {SMOLLM2!r}"
        ) from error
    if apply_chat_template and not lm.tokenizer.chat_template:
        raise SystemExit(
            f"the tokenizer {lm.tokenizer.name_or_path!r} has no chat template: leave out --apply_chat_template, or "
            "save the tokenizer of the training, with its template, beside the adapter"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = fingerprint(source, folder)
    completions = str(folder / f"completions_{weights}")
    results = simple_evaluate(lm, tasks=loaded, limit=limit, use_cache=completions, task_manager=manager, **prompting)
    if results is not None:
        write(results, folder, {"options": options, "fingerprint": weights}, data or {}, limit)
    return results


def check_options(folder: Path, device: str, dtype: str, batch_size: int | str, limit: int | None) -> None:
    """Raise SystemExit for an option of `evaluate` with which no model could be evaluated here."""
    import torch

    from recipes.precision import AUTO

    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--output_dir {folder} is a file: give a folder")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps") or (kind != "cpu" and not getattr(torch, kind).is_available()):
        raise SystemExit(f"--device {device} is not here: expected cpu, or cuda or mps where there is one")
    dtypes = (AUTO, SAVED, "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise SystemExit(f"--dtype {dtype}: expected one of {', '.join(dtypes)}")
    size = str(batch_size)
    if not (size == "auto" or size.startswith("auto:") or (size.isdecimal() and int(size) > 0)):
        raise SystemExit(f"--batch_size {size}: expected a whole number of at least 1, or auto")
    if limit is not None and limit < 1:
        raise SystemExit(f"--limit {limit}: expected a whole number of at least 1")


def check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Raise SystemExit if the folder's results are of another model or prompting. Tasks, data and limit may differ."""
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text())["options"] if path.exists() else options
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is damaged, or of another tool: delete it, or give another --output_dir") from error
    fixed = ("model", "adapter", "dtype", "apply_chat_template", "system_instruction")
    changed = [f"{name}={found.get(name)!r}" for name in fixed if found.get(name) != options.get(name)]
    if changed:
        raise SystemExit(f"{folder} holds the results of {', '.join(changed)}: give another --output_dir")


def own_tasks() -> list[str]:
    """Return the names of the tasks of `eval/tasks`, sorted."""
    return sorted(path.stem for path in TASKS.glob("[!_]*.yaml"))


def task_manager(names: list[str]) -> TaskManager:
    """Return lm-eval's task manager, which has `eval/tasks`, and lm-eval's own tasks only if one of them is named.

    There are thousands of the latter.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=not set(names) <= set(own_tasks()))


def load_tasks(names: list[str], data: dict[str, str], manager: TaskManager) -> list[Any]:
    """Return lm-eval's task objects, with ``data`` in place of their hub data. Groups and tags give several.

    Raises SystemExit for an unknown task, for data of a task that is not asked for, and for data that cannot be had.
    """
    from datasets.exceptions import DatasetsError

    own = own_tasks()
    if unknown := [name for name in names if name not in manager.task_index]:
        expected = f"{', '.join(own)}, or one that `lm-eval ls tasks` lists"
        raise SystemExit(f"no task {', '.join(unknown)}: expected {expected}")
    if unused := data.keys() - set(names):
        raise SystemExit(f"data given for {', '.join(unused)}, which is not among the tasks {', '.join(names)}")
    loaded = []
    for name in names:
        overrides: dict[str, Any] = {}
        if name in data:
            path = Path(data[name])
            if not path.exists():
                raise SystemExit(
                    f"no file or folder {path} for task {name}: expected a JSONL file or a folder of them"
                )
            overrides = {"dataset_name": None, "dataset_path": str(path)}
            if path.is_file():
                overrides |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        try:
            # The task is put into a group of one, as the harness overrides a registered task's fields only inside a
            # group.
            group = manager.load({"group": f"only_{name}", "task": [{"task": name, **overrides}]})
            found = list(group["tasks"].values())
            rows = [(task, row) for task in found if name in own for row in task.test_docs()]
        except (OSError, ValueError, KeyError, StopIteration, DatasetsError) as error:
            reason = str(error) or "there are no rows in it"
            raise SystemExit(
                f"the data of task {name} cannot be had ({reason}). To work offline, give a local copy, --data "
                f"{name}=FILE.jsonl, or take the task generated_problems"
            ) from error
        for number, (task, row) in enumerate(rows, start=1):
            try:  # A reference that nothing can be compared with is an error before hours of completions.
                task.process_results(row, [f"The answer is: {row.get('answer')}"])
            except (ValueError, KeyError) as error:
                raise SystemExit(f"row {number} of {data.get(name, name)}: {error.args[0]}") from error
        loaded += found
    return loaded


def model_source(model: str) -> dict[str, str]:
    """Return the arguments by which HFLM, lm-eval's model class, finds the weights."""
    if model != SMOLLM2:
        return {"pretrained": model}
    from recipes.models import SMOLLM2_FILE, smollm2_folder

    return {"pretrained": smollm2_folder(), "gguf_file": SMOLLM2_FILE}


def fingerprint(source: dict[str, str], output: Path) -> str:
    """Return a hash of the model's arguments and of the files in local folders, by which stale completions are known.

    Files in ``output`` are left out, as it may lie in the model's folder and changes with every evaluation.
    """
    own = output.resolve()
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for folder in source.values()
        if Path(folder).is_dir()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and own not in path.resolve().parents
    ]
    return hashlib.sha256(json.dumps([source, files]).encode()).hexdigest()[:12]


def write(
    results: dict[str, Any], folder: Path, model: dict[str, Any], data: dict[str, str], limit: int | None
) -> None:
    """Write ``results.json``: the model, the surroundings, and each task's data, problems and metrics.

    The metrics come with standard errors. Tasks that an earlier call has written there stay if they are of the same
    weights.

    Args:
        results: what lm-eval returned.
        folder: folder of the results.
        model: what the file says of the model: its options and its fingerprint.
        data, limit: as in `evaluate`.
    """
    from recipes.training import environment, write_atomically

    surroundings = environment()
    surroundings["versions"] |= {name: version(name) for name in ("lm-eval", "math-verify")}
    path = folder / "results.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    tasks = earlier["tasks"] if earlier.get("fingerprint") == model["fingerprint"] else {}
    for name, samples in results["samples"].items():
        found = {key.removesuffix(",none"): value for key, value in results["results"][name].items()}
        stderr = {key: key.replace(",", "_stderr,") if "," in key else f"{key}_stderr" for key in found}
        asked = {"data": data.get(name), "limit": limit, "problems": results["n-samples"][name]["effective"]}
        if name in tasks and tasks[name]["problems"] > asked["problems"]:
            print(f"{name}: results of {asked['problems']} problems replace those of {tasks[name]['problems']}")
        tasks[name] = asked | {
            key: {"value": found[key], "stderr": found[stderr[key]]} for key in found if stderr[key] in found
        }
        with (folder / f"samples_{name}.jsonl").open("w") as file:
            for sample in samples:
                record = {
                    "prompt": sample["arguments"][0][0],
                    "completion": sample["resps"][0][0],
                    "reference": sample["target"],
                    "filter": sample["filter"],
                }
                # Perplexities are pairs here, which make a number only over all samples.
                verdicts = {
                    name: float(sample[name]) for name in sample["metrics"] if not isinstance(sample[name], tuple)
                }
                file.write(json.dumps(record | verdicts) + "\n")
    record = model | {"environment": surroundings, "tasks": tasks}
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{SMOLLM2!r} (from a package), a local folder, or a hub id")
    parser.add_argument("adapter", nargs="?", help="folder or hub id of a PEFT adapter")
    parser.add_argument("--tasks", nargs="+", required=True, help="of eval/tasks, or any of lm-eval's own")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="TASK=PATH", help="local JSONL file or folder instead of the hub"
    )
    parser.add_argument("--limit", type=int, help="problems per task, the first ones")
    parser.add_argument("--batch_size", default="8", help="problems at a time, or 'auto'")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        default=SAVED,
        help="of the weights; 'auto': the one that this machine multiplies fast; default: as saved",
    )
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="write every prompt as a user's message, by the tokenizer's chat template",
    )
    parser.add_argument("--system_instruction", help="text before every prompt, or the system's message of the chat")
    parser.add_argument("--output_dir", help="where results and completions go; default: runs/eval/MODEL_ADAPTER")
    args = vars(parser.parse_args())
    names = [Path(name).name for name in (args["model"], args["adapter"]) if name]
    args["output_dir"] = args["output_dir"] or str(Path("runs/eval", "_".join(names)))
    if wrong := [pair for pair in args["data"] if "=" not in pair]:
        parser.error(f"--data {wrong[0]}: expected TASK=PATH")
    args["data"] = dict(pair.split("=", 1) for pair in args["data"])
    results = evaluate(**args)
    if results is not None:
        from lm_eval.utils import make_table

        print(make_table(results))
        print(f"written to {args['output_dir']}")


if __name__ == "__main__":
    main()
