"""This module finds the checkpoint from which a run can resume whose process may have been killed while saving."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the path of the newest checkpoint-N in a Trainer's ``output_dir`` that was written to its end, or None.

    It is meant for ``trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))``. Trainer writes
    straight into checkpoint-N, and ``resume_from_checkpoint=True`` takes the highest N, even if the process was killed
    while writing. Such a run fails, or in the worst case starts without its optimizer state. A warning names every
    folder that is passed over.
    """
    folder = Path(folder)
    found = {path: CHECKPOINT.fullmatch(path.name) for path in folder.glob("*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        broken = _broken_file(path)
        if broken is None:
            return str(path)
        warnings.warn(f"{path} is not complete ({broken}): it is passed over, and may be deleted", stacklevel=2)
    return None


def _broken_file(checkpoint: Path) -> str | None:
    """Return the name of a file of the checkpoint that is missing or was not written to its end, or None.

    Trainer writes its own state last. A folder that is written again still has the old state, so the files of JSON,
    safetensors, `torch.save` and `torch.distributed.checkpoint` are checked as well.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return TRAINER_STATE_NAME
    paths = sorted(checkpoint.glob("**/*"))
    for path in paths:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return path.name  # The zip files of torch.save end with their index.
        except (OSError, ValueError, SafetensorError):
            return path.name
    folders = sorted({path.parent for path in paths if path.suffix == ".distcp"})
    return next(filter(None, map(_broken_shard, folders)), None)


def _broken_shard(folder: Path) -> str | None:
    """Return the name of a file of `torch.distributed.checkpoint` that is missing or too short, or None.

    The index, which is written last, says where in its file each part of the state lies.
    """
    try:
        index = FileSystemReader(folder).read_metadata().storage_data
    except (OSError, EOFError, pickle.UnpicklingError):
        return ".metadata"
    for part in (index or {}).values():
        path = folder / part.relative_path
        if not path.is_file() or path.stat().st_size < part.offset + part.length:
            return path.name
    return None
