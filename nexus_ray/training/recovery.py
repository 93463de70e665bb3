"""The latest checkpoints of a training, for continuing after anything: written while the training goes on."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nexus_ray.errors import ArtefactError
from nexus_ray.observing.trainings import watch_checkpoint
from nexus_ray.storage import make_directory
from nexus_ray.training.checkpointing import Snapshot, read_state, write_snapshot

_NAME = re.compile(r"step-(\d{8})")


class RecoveryPoints:
    """Writes the checkpoints of one training and keeps the newest few; used by one worker.

    Args:
        directory: of the checkpoints, each `step-N` after N finished steps.
        keep: how many stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = make_directory(directory)
        self.keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[int] | None = None
        remove_leftovers(directory)

    def write(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the background; call `finished(wait=True)` before it is taken, so that there is one."""
        assert self._writing is None
        self._writing = self._writer.submit(self._write, snapshot)

    def finished(self, *, wait: bool = False) -> list[int]:
        """Steps of the checkpoints that were written since the last call.

        Raises:
            StorageError: one could not be written.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return []
        writing, self._writing = self._writing, None
        return [writing.result()]

    def close(self) -> None:
        """Let the last write end, whatever it has to say."""
        self._writer.shutdown(wait=True)

    def _write(self, snapshot: Snapshot) -> int:
        step = int(snapshot.state["step"])
        began, place = time.monotonic(), self.directory / f"step-{step:08d}"
        write_snapshot(place, snapshot)
        watch_checkpoint(time.monotonic() - began, sum(file.stat().st_size for file in place.iterdir()))
        found = list(_newest_first(self.directory))
        later = [path for number, path in found if number > step]  # damaged ones, or they would have been continued
        older = [path for number, path in found if number <= step][self.keep :]
        for path in later + older:
            shutil.rmtree(path, ignore_errors=True)
        return step


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left of checkpoints it was writing in a directory.

    Whole ones stay when it was killed between moving the old one aside and putting the new one in its place.
    """
    for leftover in (path for path in directory.glob(".*.partial") if path.is_dir()):
        place = directory / leftover.name[1:].split(".")[0]
        with suppress(ArtefactError, OSError):
            read_state(leftover)
            if not place.exists():
                leftover.rename(place)
        shutil.rmtree(leftover, ignore_errors=True)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones, which are passed over.

    Raises:
        StorageError: the file system would not let one be read now.
    """
    damaged: list[str] = []
    for _, path in _newest_first(directory):
        try:
            read_state(path)
        except ArtefactError as error:
            damaged.append(error.message)
            continue
        return path, damaged
    return None, damaged


def steps_reached(directory: Path) -> int:
    """Finished steps of the newest checkpoint; 0 without one. Nothing is read."""
    return next((step for step, _ in _newest_first(directory)), 0)


def _newest_first(directory: Path) -> Iterator[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in directory.glob("*") if (match := _NAME.fullmatch(path.name))]
    return iter(sorted(found, reverse=True))
