"""Partial results of a stage, one a piece of its work: what lets a killed stage continue where it stopped.

A directory of parts belongs to one recipe, the digest of everything that decides their bytes. Parts of another
recipe, and temporary files that a killed worker left, are discarded.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from nexus_ray.storage import make_directory, read_json, storage_error, write_json

logger = logging.getLogger(__name__)
_RECIPE = "recipe.json"


class Work(Protocol):
    """A piece of work with a number of its own, such as a shard of text."""

    @property
    def index(self) -> int:
        """Its number."""
        ...


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True)
class Parts:
    """The parts of one stage.

    Attributes:
        directory: where they are kept while the stage runs.
        suffix: of the file, one a piece of work, whose presence says that it is done.
        prefix: of the file; a recipe in it keeps a worker of another job, still dying, from passing for this one.
    """

    directory: Path
    suffix: str
    prefix: str = "shard"

    def path(self, work: Work) -> Path:
        """The file whose presence says that `work` is done; it must be written atomically and last."""
        return self.directory / f"{self.prefix}-{work.index:05d}{self.suffix}"

    def begin(self, recipe: str) -> None:
        """Start empty, unless the directory was begun with the same recipe.

        Raises:
            StorageError: the file system refused.
        """
        marker = self.directory / _RECIPE
        if not (marker.exists() and read_json(marker, what="recipe", hint="delete it") == recipe):
            self.discard()
            make_directory(self.directory)
            write_json(marker, recipe)
        self._remove_temporaries()

    def missing(self, work: Sequence[WorkT]) -> list[WorkT]:
        """Those of `work` that are not done yet."""
        missing = [item for item in work if not self.path(item).exists()]
        if len(missing) < len(work):
            logger.info("continuing: %d of %d shards are done", len(work) - len(missing), len(work))
        return missing

    def discard(self) -> None:
        """Remove the directory and everything in it.

        Raises:
            StorageError: the file system refused.
        """
        if self.directory.exists():
            try:
                shutil.rmtree(self.directory)
            except OSError as error:
                raise storage_error(error, self.directory) from error

    def _remove_temporaries(self) -> None:
        for leftover in self.directory.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
