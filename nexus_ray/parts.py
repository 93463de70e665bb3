"""Partial results of a stage, one a shard of text: what lets a killed stage continue where it stopped.

A directory of parts belongs to one recipe, the digest of everything that decides their bytes. Parts of another
recipe, and temporary files that a killed worker left, are discarded.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_ray.data.sources import Shard
from nexus_ray.storage import make_directory, read_json, write_json

logger = logging.getLogger(__name__)
_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Parts:
    """The parts of one stage.

    Attributes:
        directory: where they are kept while the stage runs.
        suffix: of the file, one a shard, whose presence says that the shard is done.
    """

    directory: Path
    suffix: str

    def path(self, shard: Shard) -> Path:
        """The file whose presence says that `shard` is done; it must be written atomically and last."""
        return self.directory / f"shard-{shard.index:05d}{self.suffix}"

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

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of `shards` that are not done yet."""
        missing = [shard for shard in shards if not self.path(shard).exists()]
        if len(missing) < len(shards):
            logger.info("continuing: %d of %d shards are done", len(shards) - len(missing), len(shards))
        return missing

    def finish(self) -> None:
        """Remove the marker and leftovers of killed workers; the parts stay, as the files of the artefact."""
        (self.directory / _RECIPE).unlink(missing_ok=True)
        self._remove_temporaries()

    def discard(self) -> None:
        """Remove the directory and everything in it."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_temporaries(self) -> None:
        for leftover in self.directory.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
