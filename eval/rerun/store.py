"""This module keeps results on disk: one JSON file for each run, written whole or not at all.

It also keeps claims, so that no two processes do the same run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.training import write_atomically

from .suite import Run

HEARTBEAT_SECONDS = 30
STALE_SECONDS = 600  # This is twenty heartbeats, as a machine that swaps may miss several.


class Store:
    """Holds the results of a suite in a folder, which machines may share.

    ``records/NAME.json`` are the finished runs, failed ones included. Whoever finds one there does not repeat it, so
    that files from another machine or from git can be put there. ``claims/`` holds a file for each run in progress. A
    claim counts as abandoned when its process is gone, if that was on this host and in this container. It also counts
    as abandoned when nobody has touched it for ten minutes by the file system's own clock, because a container that
    starts again gives old process numbers to new processes.

    folder: folder of the suite. others: folders of other suites, whose records are read and never written.
    """

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._others = [other / "records" for other in others]
        self.records = folder / "records"
        self.claims = folder / "claims"
        for path in (self.records, self.claims):
            path.mkdir(parents=True, exist_ok=True)
        for path in self.claims.iterdir():
            if self._finished(path.name.removeprefix(".").removesuffix(".begun")):
                path.unlink(missing_ok=True)  # Its process was killed between record and claim.

    @property
    def _read_from(self) -> list[Path]:
        """Return the folders of records, this suite's own last, since its records win."""
        return [*self._others, self.records]

    def load(self) -> dict[str, dict[str, Any]]:
        """Return all finished runs by name. Raises ValueError for a file that was not copied whole."""
        return {path.stem: _read(path) for folder in self._read_from for path in sorted(folder.glob("*.json"))}

    def done(self, run: Run) -> bool:
        """Return whether the run has a record."""
        return self._finished(run.name)

    def _finished(self, name: str) -> bool:
        return any((folder / f"{name}.json").exists() for folder in self._read_from)

    def save(self, run: Run, record: dict[str, Any]) -> None:
        """Write the run's record, and forget that it was begun."""
        write_atomically(self.records / f"{run.name}.json", json.dumps(record, indent=1, allow_nan=False))
        self._begun(run).unlink(missing_ok=True)

    def begun(self, run: Run) -> bool:
        """Return whether a process has claimed the run and not finished it."""
        return self._begun(run).exists()

    def _begun(self, run: Run) -> Path:
        return self.claims / f".{run.name}.begun"

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Claim the run for as long as a ``with`` block lasts, and yield whether it is this process's to do."""
        path = self.claims / run.name
        if not (self._take(path) or (self._abandoned(path) and self._release(path) and self._take(path))):
            yield False
            return
        finished = threading.Event()
        threading.Thread(target=_beat, args=(path, finished), daemon=True).start()
        try:
            mine = not self.done(run)  # It may have finished between the look and the claim.
            if mine:
                self._begun(run).touch()
            yield mine
        finally:
            finished.set()
            with contextlib.suppress(OSError):
                if path.read_text() == _owner():  # Otherwise it was taken over while this process stood still.
                    path.unlink()

    def _take(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(_owner())
        return True

    def _abandoned(self, path: Path) -> bool:
        try:
            host, _, pid = path.read_text().partition(" ")
            age = self._now() - path.stat().st_mtime
        except OSError:
            return False  # Its owner has just finished, or a network file system cannot say now.
        gone = host == _place() and pid.isdigit() and not _alive(int(pid))
        return gone or age > STALE_SECONDS

    def _now(self) -> float:
        """Return the file system's time. The clocks of several machines need not agree with it."""
        probe = self.claims / f".{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _release(self, path: Path) -> bool:
        """Remove an abandoned claim, and return False if another process was faster.

        The claim is renamed, which only one process can do. If the other process has claimed the run anew in the
        meantime, both do it, and write the same result.
        """
        grave = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.rename(grave)
        except FileNotFoundError:
            return False
        grave.unlink()
        return True


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no whole record ({error}): copy it again, or delete it to repeat the run"
        ) from error


def _owner() -> str:
    """Return what a claim of this process says."""
    return f"{_place()} {os.getpid()}"


def _place() -> str:
    """Return the name of the place where a process number means something.

    This is the host and, in a container, the container's own numbers.
    """
    try:
        return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # This is not Linux.
        return socket.gethostname()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, finished: threading.Event) -> None:
    while not finished.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # A network file system may fail for once.
            os.utime(path)
