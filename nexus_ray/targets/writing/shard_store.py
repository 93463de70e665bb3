"""The directory of a target set while it is made: which shards are done, and the commit.

A shard is done when its file has the size that its record says, or that the manifest says which lists it. The manifest
is replaced last and at once: until then an older one and all of its shards stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import make_directory, read_json, storage_error, write_json
from nexus_ray.targets.format import MANIFEST, Manifest, TargetFile

logger = logging.getLogger(__name__)
_HINT = "run the same command again"


@dataclass(frozen=True)
class ShardStore:
    """Shards and their records.

    Attributes:
        directory: of the target set.
    """

    directory: Path

    def begin(self) -> None:
        """Make the directory, and remove what killed workers left half-written.

        Raises:
            StorageError: the file system refused.
        """
        make_directory(self.directory)
        self._remove(self.directory.glob(".*.partial"))

    def path(self, name: str) -> Path:
        """Of a shard's file."""
        return self.directory / name

    def add(self, file: TargetFile) -> None:
        """Say that a shard is complete."""
        write_json(self._record(file.name), file.model_dump(mode="json"))

    def record(self, name: str) -> TargetFile:
        """Of a shard that was just made.

        Raises:
            ArtefactError: it is not there.
        """
        values = read_json(self._record(name), what="record of a shard", hint=_HINT)
        return TargetFile.model_validate(values)

    def done(self, names: Iterable[str]) -> dict[str, TargetFile]:
        """Records of those shards that need not be made."""
        listed = {file.name: file for file in self._listed()}
        found = {name: self._unlisted(name) or listed.get(name) for name in names}
        return {name: file for name, file in found.items() if file is not None and self._is_whole(file)}

    def commit(self, manifest: Manifest) -> None:
        """Make the shards that the manifest lists the target set, then remove all others and all records.

        Raises:
            StorageError: the file system refused.
        """
        write_json(self.directory / MANIFEST, manifest.model_dump(mode="json"))
        kept = {MANIFEST, *(file.name for file in manifest.files)}
        ours = (path for pattern in ("*.parquet", "*.json", ".*.partial") for path in self.directory.glob(pattern))
        self._remove(path for path in ours if path.name not in kept)

    def _record(self, name: str) -> Path:
        return self.path(name).with_suffix(".json")

    def _unlisted(self, name: str) -> TargetFile | None:
        """What a record says; a damaged one says nothing."""
        try:
            return self.record(name)
        except (ArtefactError, ValidationError):
            return None

    def _listed(self) -> tuple[TargetFile, ...]:
        """Shards of the manifest that stands here, none when it says nothing to this version."""
        path = self.directory / MANIFEST
        if not path.exists():
            return ()
        try:
            values: Any = read_json(path, what="target manifest", hint=_HINT)
            return Manifest.parse(values, str(path)).files
        except ArtefactError as error:
            logger.warning("%s: it will be replaced, and its shards with it", error.message)
            return ()

    def _is_whole(self, file: TargetFile) -> bool:
        path = self.path(file.name)
        return path.is_file() and path.stat().st_size == file.bytes

    def _remove(self, paths: Iterable[Path]) -> None:
        try:
            for path in list(paths):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.directory) from error
