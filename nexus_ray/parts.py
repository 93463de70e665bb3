"""Partial results of a stage, one a piece of its work: what lets a killed stage continue where it stopped.

A directory of parts belongs to one recipe, the digest of everything that decides their bytes. Parts of another
recipe, and temporary files that a killed worker left, are discarded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from nexus_ray.storage import Place, exists, is_remote, make_directory, read_json, remove, sizes_of, write_json

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

    directory: Place
    suffix: str
    prefix: str = "shard"

    def path(self, work: Work) -> Place:
        """The file whose presence says that `work` is done; it must be written atomically and last."""
        return self.directory / f"{self.prefix}-{work.index:05d}{self.suffix}"

    def begin(self, recipe: str) -> None:
        """Start empty, unless the directory was begun with the same recipe.

        Raises:
            StorageError: the file system refused.
        """
        marker = self.directory / _RECIPE
        if not (exists(marker) and read_json(marker, what="recipe", hint="delete it") == recipe):
            self.discard()
            make_directory(self.directory)
            write_json(marker, recipe)
        self._remove_temporaries()

    def missing(self, work: Sequence[WorkT]) -> list[WorkT]:
        """Those of `work` that are not done yet."""
        sizes = sizes_of(self.path(item) for item in work)
        missing = [item for item, size in zip(work, sizes, strict=True) if size is None]
        if len(missing) < len(work):
            logger.info("continuing: %d of %d shards are done", len(work) - len(missing), len(work))
        return missing

    def discard(self) -> None:
        """Remove the directory and everything in it.

        Raises:
            StorageError: the file system refused.
        """
        remove(self.directory)

    def _remove_temporaries(self) -> None:
        if not is_remote(self.directory):  # in an object store nothing has a temporary name
            for leftover in self.directory.glob(".*.partial"):
                leftover.unlink(missing_ok=True)
