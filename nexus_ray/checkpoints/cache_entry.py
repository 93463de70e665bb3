"""One entry of a node's cache of base models: its files, the record of them, its locks.

models/NAME/files/           a Hugging Face directory
models/NAME/partial/         files that are being fetched
models/NAME/entry.json       source, and of each file size, version, SHA-256 and how it looked when last checked
models/NAME.fetching         held by the process that fetches or checks
models/NAME.lock             shared by all processes that use the files, for as long as they live
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nexus_ray.checkpoints.fetching import boot_id
from nexus_ray.errors import StorageError
from nexus_ray.storage import write_json
from nexus_ray.storage.cache_root import VARIABLE, cache_root
from nexus_ray.storage.scratch import Use, room

MODELS = "models"
RECORD = "entry.json"
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's
_held: dict[Path, Use] = {}  # by this process


@dataclass(frozen=True)
class CachedFile:
    """What is known of a file that is whole.

    Attributes:
        size: bytes.
        sha256: hexadecimal, of all of them.
        looks: how the file system described it when its bytes were last checked, see `looks_of`.
    """

    size: int
    sha256: str
    looks: tuple[int | str, ...] = ()


def looks_of(path: Path) -> tuple[int | str, ...]:
    """What changes when a file is written to or replaced, or the machine was restarted since."""
    status = path.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ino, boot_id())


def models_directory() -> Path:
    """Where the entries of this node are; it may not exist yet."""
    return cache_root() / MODELS


class Entry:
    """A model in the cache of this node, whole or not.

    Args:
        name: of its directory.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = models_directory() / name
        self.files = self.directory / "files"
        self.partial = self.directory / "partial"
        self.fetching = self.directory.with_name(f"{name}.fetching")

    def create(self) -> None:
        """Make its directories.

        Raises:
            StorageError: the file system refused.
        """
        for directory in (self.files, self.partial):
            room(directory.relative_to(cache_root()).as_posix())

    def read(self) -> dict[str, CachedFile]:
        """What is known of its whole files; nothing where the record is missing or damaged."""
        try:
            rows = _read_json(self.directory / RECORD)["files"].items()
            return {name: CachedFile(row["size"], row["sha256"], tuple(row["looks"])) for name, row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    @property
    def source(self) -> str:
        """Where it came from; empty where the record is missing or damaged."""
        try:
            return str(_read_json(self.directory / RECORD)["source"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def write(self, source: str, total: int, files: Mapping[str, CachedFile]) -> None:
        """Record its source, the bytes that it has when it is whole, and its whole files."""
        rows = {name: asdict(file) for name, file in sorted(files.items())}
        write_json(self.directory / RECORD, {"source": source, "bytes": total, "files": rows})

    @property
    def is_whole(self) -> bool:
        """Whether all of its files have been fetched."""
        try:
            record = _read_json(self.directory / RECORD)
            return bool(record["bytes"] == sum(file.size for file in self.read().values()))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def touch(self) -> None:
        """It is used now."""
        os.utime(self.files)

    @property
    def last_used(self) -> datetime:
        """When it was opened last."""
        place = self.files if self.files.exists() else self.directory
        return datetime.fromtimestamp(place.stat().st_mtime, UTC)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the disk that it takes, unfinished files included."""
        total = 0
        for path in self.directory.rglob("*"):
            with suppress(FileNotFoundError):  # renamed meanwhile by who fetches it
                total += path.stat().st_blocks * _BLOCK_BYTES if path.is_file() else 0
        return total

    def hold(self) -> None:
        """Keep it from being cleared until this process ends.

        Raises:
            StorageError: the file system refused.
        """
        room(MODELS)
        if self.directory not in _held:
            use = Use(self.directory)
            use.share()
            _held[self.directory] = use


def entries() -> list[Entry]:
    """The entries of this node, used most recently first."""
    directory = models_directory()
    found = [Entry(path.name) for path in directory.iterdir() if path.is_dir()] if directory.exists() else []
    return sorted(found, key=lambda entry: entry.last_used, reverse=True)


def cache_error(error: OSError) -> StorageError:
    """A failure to write to the cache, for people."""
    return StorageError(
        f"cannot write to the node's cache {cache_root()}: {error.strerror or error}",
        f"point {VARIABLE} at a directory that can be written to, on a disk of this node",
    )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
