"""This module trains on streams with transformers' `Trainer`.

Rows are read as they are needed, and a run that goes on finds the row after its last one.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer, default_data_collator
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from recipes.training import write_atomically

STREAM_STATE = "stream_state_{rank}.json"
# A batch has this key beside its tensors. It holds the stream's state behind the batch's last row.
STATE = "stream_state"


class _Batches(torch.utils.data.IterableDataset):
    """Yields batches of a stream's rows, each with the stream's state behind it.

    rows: number of rows of a batch. length: number of batches that a run takes.
    """

    def __init__(self, stream: IterableDataset, rows: int, length: int) -> None:
        self._stream = stream
        self._rows = rows
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._stream)
        while batch := list(islice(rows, self._rows)):
            yield default_data_collator(batch) | {STATE: self._stream.state_dict()}


class StreamTrainer(Trainer):
    """Trains for ``max_steps`` steps on an endless `datasets.IterableDataset` of this process's own rows.

    A checkpoint holds the stream's state for each process, and resuming loads it. No row is then trained on twice,
    none is left out, and the weights equal those of a run that was never stopped in every bit. The number of processes
    must stay the same. Batches may be made ahead in one worker (``dataloader_num_workers=1``). Several workers would
    share out the stream in another order.

    Logs have ``perplexity`` beside each loss. Their ``epoch`` is the share of ``max_steps`` that is done.

    Raises:
        ValueError: more than one worker.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.dataloader_num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={self.args.dataloader_num_workers}: a stream is read by this process (0) or "
                "one worker (1). The tokenizer uses several cores by itself"
            )
        self.args.ignore_data_skip = True  # Otherwise Trainer reads all rows once more to find its place.
        self._stream_state: dict[str, Any] | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches.

        They bypass Accelerate's loader, which would read one batch ahead and deal out one process's rows to all.
        """
        batches = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(
            _Batches(self.train_dataset, self.args.train_batch_size, batches),
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            # A forked worker would inherit the locks of the tokenizer's threads, but not the threads.
            multiprocessing_context="spawn" if self.args.dataloader_num_workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            # The workers' seeds are drawn from this generator. A draw from the global one would be repeated when a run
            # goes on.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], *args: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step as `Trainer` does, and keep the stream's state behind the last one."""
        batches, items = super().get_batch_samples(epoch_iterator, *args)
        for batch in batches:
            self._stream_state = batch.pop(STATE)
        return batches, items

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, from a checkpoint if its path is given.

        Raises FileNotFoundError if the checkpoint does not hold the stream's state of as many processes as there are.
        """
        if resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint, STREAM_STATE.format(rank=self.args.process_index))
            written = len(list(path.parent.glob(STREAM_STATE.format(rank="*"))))
            if written != self.args.world_size:
                raise FileNotFoundError(
                    f"{path.parent} holds the place in the data of {written} process(es), expected "
                    f"{self.args.world_size}: go on with as many processes as the run began with"
                )
            self.train_dataset.load_state_dict(json.loads(path.read_text()))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the stream's state, and then Trainer's own, which says that a checkpoint is complete."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        os.makedirs(folder, exist_ok=True)
        path = folder / STREAM_STATE.format(rank=self.args.process_index)
        write_atomically(path, json.dumps(self._stream_state))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log as `Trainer` does, with the perplexity of each loss and the share of steps done as the epoch."""
        self.state.epoch = self.state.global_step / self.args.max_steps  # A stream has no epochs.
        for name in [name for name in logs if name in ("loss", "eval_loss")]:
            logs[name.replace("loss", "perplexity")] = perplexity(logs[name])
        super().log(logs, *args)


def perplexity(loss: float) -> float:
    """Return e to the power of a mean loss in nats per token, or infinity if no float is that large."""
    return float("inf") if loss > math.log(sys.float_info.max) else math.exp(loss)
