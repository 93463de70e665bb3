"""Identity of the text that a shard holds: what makes a shard of a file that has grown, or moved, the same one.

The place of a file is no part of it. Of a local .jsonl file only the lines of the shard count, so text that is appended
leaves the earlier shards what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nexus_ray.data import hub_datasets
from nexus_ray.data.references import is_reference
from nexus_ray.data.sources import Shard
from nexus_ray.errors import DataError
from nexus_ray.storage import sha256_file

_PIECE_BYTES = 1 << 20


def text_identities(shards: Sequence[Shard]) -> list[list[str | int]]:
    """For each shard plain values that are equal when the text and the way it is read are the same.

    Raises:
        DataError: a file cannot be read.
    """
    whole_file = lru_cache(maxsize=None)(_whole_file)
    identities: list[list[str | int]] = []
    for shard in shards:
        kind = "dataset" if is_reference(shard.path) else PurePosixPath(shard.path).suffix
        local = None if is_reference(shard.path) else _local(shard.path)
        if kind == ".jsonl" and local is not None:
            text: list[str | int] = [_sha256_of_lines(local, shard.start, shard.stop)]
        else:
            text = [*whole_file(shard.path), shard.start, shard.stop]
        identities.append([kind, shard.text_field or "", *text])
    return identities


def _whole_file(path: str) -> tuple[str | int, ...]:
    """Digest of a local file; the store's own checksum of a remote one; rows and fingerprint of a dataset."""
    if is_reference(path):
        return tuple(hub_datasets.identity(path)[1:])
    local = _local(path)
    if local is not None:
        return (sha256_file(local),)
    filesystem, plain = fsspec.core.url_to_fs(path)
    return (str(filesystem.checksum(plain)),)


def _local(path: str) -> Path | None:
    filesystem, plain = fsspec.core.url_to_fs(path)
    return Path(plain) if isinstance(filesystem, LocalFileSystem) else None


def _sha256_of_lines(path: Path, start: int, stop: int) -> str:
    """Digest of the lines that start in [start, stop): those that `read_documents` reads of such a shard."""
    hasher = hashlib.sha256()
    try:
        with path.open("rb") as file:
            first, end = _line_start(file, start), _line_start(file, stop)
            for piece in _pieces(file, first, end):
                hasher.update(piece)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", "check that it is there and whole") from error
    return hasher.hexdigest()


def _line_start(file: BinaryIO, position: int) -> int:
    """Where the first line starts that starts at `position` or after it."""
    if position:
        file.seek(position - 1)
        file.readline()
        return file.tell()
    return 0


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (piece := file.read(min(_PIECE_BYTES, stop - start))):
        start += len(piece)
        yield piece
