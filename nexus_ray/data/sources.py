"""Text sources: files are cut into shards, shards are read as documents.

A shard is the unit of parallel, resumable work: a whole .txt file, or the lines of a .jsonl file (row groups of
a .parquet file) that start inside a byte (row group) range. Its content depends only on the files and
`shard_bytes`, never on how many workers read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from nexus_ray.config import DataSection, SourceSection
from nexus_ray.errors import DataError
from nexus_ray.storage import sha256_file

Split = Literal["train", "heldout"]
_SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text, or one conversation for the chat template."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Shard:
    """A part of one file of one source.

    Attributes:
        index: position among all shards of the call that listed it; results are merged in this order.
        source: name of the source in `data.sources`.
        path: the file, a path or a URI.
        start: first byte (.jsonl) or row group (.parquet); 0 for .txt.
        stop: one past the last.
        text_field: field of a row that holds the text.
    """

    index: int
    source: str
    path: str
    start: int
    stop: int
    text_field: str = "text"

    def as_row(self) -> dict[str, Any]:
        """The shard as a Ray Data row."""
        return asdict(self)


def list_shards(data: DataSection, split: Split, names: tuple[str, ...] | None = None) -> list[Shard]:
    """Cut the files of the named sources (default: all) into shards, in a fixed order.

    Raises:
        DataError: a pattern matches nothing, a file is empty, damaged or of an unknown kind, or held out and
            trained on at once.
    """
    _refuse_overlap(data)
    shards: list[Shard] = []
    for name in names if names is not None else tuple(data.sources):
        source = data.sources[name]
        for path in _expand(name, source, split):
            for start, stop in _ranges(path, data.shard_bytes):
                shards.append(Shard(len(shards), name, path, start, stop, source.text_field))
    return shards


def describe_files(data: DataSection, split: Split) -> list[list[str | int]]:
    """[source, file name, bytes, digest] of every file of a split: equal when the text is the same.

    Local files are hashed whole; for remote ones the store's own checksum stands in.
    """
    described: list[list[str | int]] = []
    for name, source in data.sources.items():
        for path in _expand(name, source, split):
            filesystem, plain = fsspec.core.url_to_fs(path)
            is_local = isinstance(filesystem, LocalFileSystem)
            identity = sha256_file(Path(plain)) if is_local else str(filesystem.checksum(plain))
            described.append([name, PurePosixPath(path).name, filesystem.size(plain), identity])
    return described


def read_documents(shard: Shard) -> Iterator[Document]:
    """Read the documents of a shard in file order.

    Raises:
        DataError: a row is not JSON, or holds neither the text field nor `messages`, or a file is not UTF-8 text;
            names the file and the place in it.
    """
    if shard.path.endswith(".txt"):
        yield Document(text=_read_text(shard.path))
    elif shard.path.endswith(".parquet"):
        yield from _parquet_documents(shard)
    else:
        yield from _jsonl_documents(shard)


def _refuse_overlap(data: DataSection) -> None:
    """A file that is trained on cannot measure what was learned, whichever source it is held out for."""
    trained = {path for source in data.sources.values() for pattern in source.train for path in _glob(pattern)}
    for name, source in data.sources.items():
        for path in (path for pattern in source.heldout for path in _glob(pattern)):
            if path in trained:
                raise DataError(
                    f"data.sources.{name}.heldout: {path} is also a training file",
                    "keep held-out text out of every source's train patterns",
                )


def _glob(pattern: str) -> list[str]:
    """Sorted paths (local files) or URIs that match a pattern."""
    filesystem, _ = fsspec.core.url_to_fs(pattern)
    found = sorted(filesystem.glob(pattern))
    is_local = filesystem.protocol == "file" or "file" in filesystem.protocol
    return found if is_local else [filesystem.unstrip_protocol(path) for path in found]


def _expand(name: str, source: SourceSection, split: Split) -> list[str]:
    patterns = source.train if split == "train" else source.heldout
    paths: list[str] = []
    for pattern in patterns:
        found = _glob(pattern)
        if not found:
            raise DataError(
                f"data.sources.{name}.{split}: nothing matches {pattern!r}",
                "check the path; relative paths start at the working directory",
            )
        paths += [path for path in found if path not in paths]
    for path in paths:
        if not path.endswith(_SUFFIXES):
            kind = PurePosixPath(path).suffix or "no suffix"
            raise DataError(
                f"data.sources.{name}.{split}: {path} has an unknown kind ({kind})",
                f"use {', '.join(_SUFFIXES)}",
            )
    return paths


def _ranges(path: str, shard_bytes: int) -> list[tuple[int, int]]:
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


def _read_text(path: str) -> str:
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return str(file.read())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", "convert it to UTF-8") from error


def _jsonl_documents(shard: Shard) -> Iterator[Document]:
    """Lines that start in [start, stop): a line belongs to the shard its first byte is in."""
    with fsspec.open(shard.path, "rb") as file:
        if shard.start:
            file.seek(shard.start - 1)
            file.readline()
        while (position := file.tell()) < shard.stop and (line := file.readline()):
            if line.strip():
                yield _parse_row(line, f"{shard.path}, byte {position}", shard.text_field)


def _parse_row(line: bytes, place: str, text_field: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not a JSON line: {error}", "each line must be one JSON object") from error
    return _document(row, place, text_field)


def _parquet_documents(shard: Shard) -> Iterator[Document]:
    with fsspec.open(shard.path, "rb") as file:
        parquet = pq.ParquetFile(file)
        for group in range(shard.start, shard.stop):
            for number, row in enumerate(parquet.read_row_group(group).to_pylist()):
                yield _document(row, f"{shard.path}, row group {group}, row {number}", shard.text_field)


def _document(row: Any, place: str, text_field: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return Document(messages=tuple(row["messages"]))
        if isinstance(row.get(text_field), str):
            return Document(text=row[text_field])
    raise DataError(
        f"{place}: the row has neither {text_field!r} (text) nor 'messages' (a conversation)",
        "set data.sources.NAME.text_field to the field that holds the text",
    )
