"""The latest checkpoints of a training, for continuing after anything: written while the training goes on.

In an object store a listing may lag behind: it shows what is gone, and not what is new. So an object at a known name
says which checkpoints are kept; those that only a listing shows are candidates too, and each is asked whether it is
published. An older checkpoint ends in the same weights: a stale answer costs time, and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import TypeVar

from upath import UPath

from nexus_ray.errors import ArtefactError
from nexus_ray.observing.trainings import watch_checkpoint
from nexus_ray.storage import Place, is_remote, make_directory, read_bytes, remove, write_json
from nexus_ray.storage.objects import listed
from nexus_ray.storage.published import is_published
from nexus_ray.training.checkpointing import Snapshot, read_state, write_snapshot

_NAME = re.compile(r"step-(\d{8})")
_KEPT = "kept.json"
Result = TypeVar("Result")


class RecoveryPoints:
    """Writes the checkpoints of one training and keeps the newest few; used by one worker.

    One thread writes, in the order of the calls: what a checkpoint speaks of stands before it does.

    Args:
        directory: of the checkpoints, each `step-N` after N finished steps.
        keep: how many stay.
    """

    def __init__(self, directory: Place, keep: int) -> None:
        self.directory = make_directory(directory)
        self.keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[int] | None = None
        self._writing_best: Future[None] | None = None
        self._failed = False
        self._kept: list[int] = []  # of what this one has written or looked at
        remove_leftovers(directory)

    def write(self, snapshot: Snapshot, before: Callable[[], None] = lambda: None) -> None:
        """Write a snapshot in the background; call `finished(wait=True)` before it is taken, so that there is one.

        Args:
            snapshot: what to write.
            before: done first, in the background too.
        """
        assert self._writing is None
        self._writing = self._writer.submit(self._write, snapshot, before, self._writing_best)

    def write_best(self, directory: Place, take: Callable[[], Snapshot]) -> None:
        """Replace the best weights in the background, once those before them are written.

        Args:
            directory: of the best weights.
            take: takes the snapshot, before this returns.

        Raises:
            StorageError: those before could not be written.
        """
        if self._writing_best is not None:
            self._result(self._writing_best)
        self._writing_best = self._writer.submit(write_snapshot, directory, take())

    def finished(self, *, wait: bool = False) -> list[int]:
        """Steps of the checkpoints that were written since the last call.

        Args:
            wait: for the checkpoint that is being written.

        Raises:
            StorageError: one could not be written, or best weights could not.
        """
        if self._writing_best is not None and self._writing_best.done():
            best, self._writing_best = self._writing_best, None
            self._result(best)
        if self._writing is None or not (wait or self._writing.done()):
            return []
        writing, self._writing = self._writing, None
        return [self._result(writing)]

    def all_finished(self) -> list[int]:
        """The same at the end of a training: waits for everything.

        Raises:
            StorageError: something could not be written.
        """
        if self._writing_best is not None:
            wait_for([self._writing_best])
        return self.finished(wait=True)

    def close(self) -> None:
        """Let the last writes end, whatever they have to say; after one that failed none is begun."""
        self._writer.shutdown(wait=True, cancel_futures=self._failed)

    def _result(self, writing: Future[Result]) -> Result:
        self._failed = True
        result = writing.result()
        self._failed = False
        return result

    def _write(self, snapshot: Snapshot, before: Callable[[], None], best: Future[None] | None) -> int:
        step = int(snapshot.state["step"])
        if best is not None:  # it has ended; where it failed nothing may speak of the weights that are not there
            best.result()
        before()
        began = time.monotonic()
        write_snapshot(_place(self.directory, step), snapshot)
        watch_checkpoint(time.monotonic() - began, sum(tensor.nbytes for tensor in snapshot.tensors.values()))
        self._kept.append(step)
        known = {*_steps(self.directory), step}
        # Later ones are damaged, or they would have been continued.
        whole = [number for number in sorted(known) if number <= step and self._is_whole(number)]
        self._kept = whole[-self.keep :]
        if is_remote(self.directory):
            write_json(self.directory / _KEPT, {"steps": self._kept})
        for number in known.difference(self._kept):
            _remove(_place(self.directory, number))
        return step

    def _is_whole(self, step: int) -> bool:
        return step in self._kept or _is_there(_place(self.directory, step))


def remove_leftovers(directory: Place) -> None:
    """Remove what a killed process left of checkpoints it was writing in a directory.

    Whole ones stay when it was killed between moving the old one aside and putting the new one in its place. In an
    object store nothing reads what was not published; the next checkpoint removes it.
    """
    if is_remote(directory):
        return
    for leftover in (path for path in directory.glob(".*.partial") if path.is_dir()):
        place = directory / leftover.name[1:].split(".")[0]
        with suppress(ArtefactError, OSError):
            read_state(leftover)
            if not place.exists():
                leftover.rename(place)
        shutil.rmtree(leftover, ignore_errors=True)


def newest(directory: Place) -> tuple[Place | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones, which are passed over.

    Raises:
        StorageError: the file system or the object store would not let one be read now.
    """
    damaged: list[str] = []
    for _, place in _newest_first(directory):
        try:
            read_state(place)
        except ArtefactError as error:
            damaged.append(error.message)
            continue
        return place, damaged
    return None, damaged


def steps_reached(directory: Place) -> int:
    """Finished steps of the newest checkpoint; 0 without one. No tensor is read.

    Raises:
        StorageError: the object store does not answer or refuses.
    """
    return next((step for step, _ in _newest_first(directory)), 0)


def _newest_first(directory: Place) -> Iterator[tuple[int, Place]]:
    for step in sorted(_steps(directory), reverse=True):
        place = _place(directory, step)
        if _is_there(place):
            yield step, place


def _place(directory: Place, step: int) -> Place:
    return directory / f"step-{step:08d}"


def _steps(directory: Place) -> set[int]:
    """Of all checkpoints that there may be."""
    if not is_remote(directory):
        return {int(match[1]) for path in directory.glob("*") if (match := _NAME.fullmatch(path.name))}
    names = {name.split("/")[0] for name in listed(directory)}
    return {int(match[1]) for match in map(_NAME.fullmatch, names) if match} | _kept(directory)


def _kept(directory: UPath) -> set[int]:
    """What the last writer has kept, by its own word."""
    try:
        return {int(step) for step in json.loads(read_bytes(directory / _KEPT))["steps"]}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return set()


def _is_there(place: Place) -> bool:
    """Whether it was written to the end; locally nothing else has its name."""
    return not is_remote(place) or is_published(place)


def _remove(place: Place) -> None:
    if is_remote(place):
        remove(place)
    else:
        shutil.rmtree(place, ignore_errors=True)
