"""Text sources: where their text is, cut into shards.

A shard is the unit of parallel, resumable work: a whole .txt file, the lines of a .jsonl file that start inside a
range of bytes, a row group of a .parquet file, or a range of rows of a dataset. What it holds depends only on the text
and `shard_bytes`, never on how many workers read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from nexus_ray.config import DataSection, SourceSection
from nexus_ray.data import hub_datasets
from nexus_ray.data.references import SCHEME, Reference, is_reference
from nexus_ray.errors import DataError
from nexus_ray.storage import sha256_file

Split = Literal["train", "heldout"]
_SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Shard:
    """A part of one file, or of one dataset, of one source.

    Attributes:
        index: position among all shards of the call that listed it; results are merged in this order.
        source: name of the source in `data.sources`.
        path: the file, a path or a URI; or the reference of a dataset with its split.
        start: first byte (.jsonl), row group (.parquet) or row (dataset); 0 for .txt.
        stop: one past the last.
        text_field: field of a row that holds the text, when the source names one.
    """

    index: int
    source: str
    path: str
    start: int
    stop: int
    text_field: str | None = None

    def as_row(self) -> dict[str, Any]:
        """The shard as a Ray Data row."""
        return asdict(self)


def list_shards(data: DataSection, split: Split, names: tuple[str, ...] | None = None) -> list[Shard]:
    """Cut the files and datasets of the named sources (default: all) into shards, in a fixed order.

    Raises:
        DataError: a pattern matches nothing, a file is empty, damaged or of an unknown kind, a dataset cannot be had,
            or text is held out and trained on at once.
    """
    _refuse_overlap(data)
    shards: list[Shard] = []
    for name in names if names is not None else tuple(data.sources):
        source = data.sources[name]
        for path in _expand(name, source, split):
            for start, stop in _ranges(path, data.shard_bytes):
                shards.append(Shard(len(shards), name, path, start, stop, source.text_field))
    return shards


def describe_files(data: DataSection, split: Split, names: Collection[str] | None = None) -> list[list[str | int]]:
    """[source, text field, name, size, digest] of every file and dataset of a split: equal when the text is the same.

    Of the named sources, by default all.

    Local files are hashed whole; for remote ones the store's own checksum stands in, for datasets their fingerprint.
    """
    described: list[list[str | int]] = []
    for name in names if names is not None else data.sources:
        source = data.sources[name]
        for path in _expand(name, source, split):
            described.append([name, source.text_field or "", *_identity(path)])
    return described


def is_on_the_hub(source: SourceSection) -> bool:
    """Whether a source's training text has to be downloaded before it can be listed."""
    return any(pattern.startswith(SCHEME) for pattern in source.train)


def text_size(path: str) -> int:
    """Bytes of the file of a shard, or of the rows of a dataset in memory."""
    if is_reference(path):
        return hub_datasets.size(path)
    filesystem, plain = fsspec.core.url_to_fs(path)
    return int(filesystem.size(plain) or 0)


def _identity(path: str) -> list[str | int]:
    if is_reference(path):
        return hub_datasets.identity(path)
    filesystem, plain = fsspec.core.url_to_fs(path)
    is_local = isinstance(filesystem, LocalFileSystem)
    digest = sha256_file(Path(plain)) if is_local else str(filesystem.checksum(plain))
    return [PurePosixPath(path).name, filesystem.size(plain), digest]


def _refuse_overlap(data: DataSection) -> None:
    """Text that is trained on cannot measure what was learned, whichever source it is held out for."""
    trained = {path for source in data.sources.values() for pattern in source.train for path in _matches(pattern)}
    for name, source in data.sources.items():
        for path in (path for pattern in source.heldout for path in _matches(pattern)):
            if path in trained or any(_share_rows(path, other) for other in trained):
                raise DataError(
                    f"data.sources.{name}.heldout: {path} is also trained on",
                    "keep held-out text out of every source's train patterns",
                )


def _share_rows(path: str, other: str) -> bool:
    return is_reference(path) and is_reference(other) and hub_datasets.overlap(path, other)


def _matches(pattern: str) -> list[str]:
    """Sorted paths (local files), URIs and references that a pattern stands for; splits are as the pattern has them."""
    if not is_reference(pattern):
        return [f"{path}?split=" if _is_saved_dataset(path) else path for path in _glob(pattern)]
    reference = Reference.parse(pattern)
    if not reference.saved:
        return [str(reference)]
    return [str(replace(reference, place=path)) for path in _glob(reference.place)]


def _is_saved_dataset(path: str) -> bool:
    return not path.endswith(_SUFFIXES) and hub_datasets.is_saved(path)


def _glob(pattern: str) -> list[str]:
    filesystem, _ = fsspec.core.url_to_fs(pattern)
    found = sorted(filesystem.glob(pattern))
    is_local = filesystem.protocol == "file" or "file" in filesystem.protocol
    return found if is_local else [filesystem.unstrip_protocol(path) for path in found]


def _expand(name: str, source: SourceSection, split: Split) -> list[str]:
    patterns = source.train if split == "train" else source.heldout
    paths: list[str] = []
    for pattern in patterns:
        found = _matches(pattern)
        if not found:
            raise DataError(
                f"data.sources.{name}.{split}: nothing matches {pattern!r}",
                "check the path; relative paths start at the working directory",
            )
        found = [hub_datasets.resolve(path) if is_reference(path) else path for path in found]
        paths += [path for path in found if path not in paths]
    for path in paths:
        if not (is_reference(path) or path.endswith(_SUFFIXES)):
            kind = PurePosixPath(path).suffix or "no suffix"
            raise DataError(
                f"data.sources.{name}.{split}: {path} has an unknown kind ({kind})",
                f"use {', '.join(_SUFFIXES)}, a directory of save_to_disk, or {SCHEME}NAME?split=SPLIT",
            )
    return paths


def _ranges(path: str, shard_bytes: int) -> list[tuple[int, int]]:
    if is_reference(path):
        return hub_datasets.row_ranges(path, shard_bytes)
    filesystem, plain = fsspec.core.url_to_fs(path)
    size = filesystem.size(plain)
    if not size:
        raise DataError(f"{path} is empty", "remove it from data.sources or fill it")
    if path.endswith(".txt"):
        return [(0, size)]
    if path.endswith(".parquet"):
        return [(group, group + 1) for group in range(_count_row_groups(path))]
    return [(start, min(start + shard_bytes, size)) for start in range(0, size, shard_bytes)]


def _count_row_groups(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        try:
            metadata = pq.ParquetFile(file).metadata
        except pa.ArrowException as error:
            raise DataError(f"{path} is not a Parquet file: {error}", "write it again or fix its suffix") from error
    if not metadata.num_rows:
        raise DataError(f"{path} is empty", "remove it from data.sources or fill it")
    return int(metadata.num_row_groups)
