"""The directory of a target set while it is made: which shards are done, and the commit.

A shard is done when its file has the size that its record says, or that the manifest says which lists it. The manifest
is replaced last and at once: until then an older one and all of its shards stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from pydantic import ValidationError

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import (
    Place,
    exists,
    file_sizes,
    in_parallel,
    make_directory,
    read_json,
    remove,
    size_of,
    write_json,
)
from nexus_ray.targets.format import MANIFEST, Manifest, TargetFile

logger = logging.getLogger(__name__)
_HINT = "run the same command again"
_TEMPORARY = ".*.partial"
_OURS = ("*.parquet", "*.json", _TEMPORARY)


@dataclass(frozen=True)
class ShardStore:
    """Shards and their records.

    Attributes:
        directory: of the target set.
    """

    directory: Place

    def begin(self) -> None:
        """Make the directory, and remove what killed workers left half-written.

        Raises:
            StorageError: the file system refused.
        """
        make_directory(self.directory)
        self._remove(name for name in file_sizes(self.directory) if fnmatch(name, _TEMPORARY))

    def path(self, name: str) -> Place:
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

        def whole(name: str) -> TargetFile | None:
            file = self._unlisted(name) or listed.get(name)
            return file if file is not None and size_of(self.path(name)) == file.bytes else None

        wanted = list(names)
        found = zip(wanted, in_parallel(whole, wanted), strict=True)
        return {name: file for name, file in found if file is not None}

    def commit(self, manifest: Manifest) -> None:
        """Make the shards that the manifest lists the target set, then remove all others and all records.

        Raises:
            StorageError: the file system refused.
        """
        write_json(self.directory / MANIFEST, manifest.model_dump(mode="json"))
        kept = {MANIFEST, *(file.name for file in manifest.files)}
        others = (name for name in file_sizes(self.directory) if name not in kept)
        self._remove(name for name in others if any(fnmatch(name, pattern) for pattern in _OURS))

    def names(self) -> list[str]:
        """Of the manifest and of the shards that it lists; none without a manifest that this version reads."""
        files = self._listed()
        return [MANIFEST, *(file.name for file in files)] if files else []

    def _record(self, name: str) -> Place:
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
        if not exists(path):
            return ()
        try:
            values: Any = read_json(path, what="target manifest", hint=_HINT)
            return Manifest.parse(values, str(path)).files
        except ArtefactError as error:
            logger.warning("%s: it will be replaced, and its shards with it", error.message)
            return ()

    def _remove(self, names: Iterable[str]) -> None:
        in_parallel(remove, [self.path(name) for name in names if "/" not in name])
