"""Reading a shard: its rows one by one, each as a document, with the place of every row that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from nexus_ray.data import hub_datasets
from nexus_ray.data.references import is_reference
from nexus_ray.data.row_forms import Document, document_of
from nexus_ray.data.sources import Shard
from nexus_ray.errors import DataError

OnUnreadable = Callable[[DataError], None]
_Row = tuple[str, Callable[[], Any]]  # its place, and what decodes it
_BATCH_ROWS = 1024


def read_documents(shard: Shard, on_unreadable: OnUnreadable | None = None) -> Iterator[Document]:
    """Read the documents of a shard in the order of the file.

    Args:
        shard: what to read.
        on_unreadable: called with an error that names the place, for each row that is not JSON, not UTF-8 or of no
            known form; the row is passed over. Without it the first such error is raised.

    Raises:
        DataError: a row as above; or the file is missing, damaged or, a .txt file, not UTF-8, whatever
            `on_unreadable` is.
    """
    report = on_unreadable or refuse
    if shard.path.endswith(".txt"):
        yield Document(text=_read_text(shard.path), place=shard.path)
        return
    for place, decode in _rows(shard):
        try:
            document = document_of(decode(), shard.text_field, place)
        except DataError as error:
            report(DataError(f"{place}: {error.message}", error.hint))
            continue
        yield document


def refuse(error: DataError) -> None:
    """Raise the error: what `on_unreadable` is by default."""
    raise error


def _rows(shard: Shard) -> Iterator[_Row]:
    if is_reference(shard.path):
        return _dataset_rows(shard)
    return _parquet_rows(shard) if shard.path.endswith(".parquet") else _json_lines(shard)


def _read_text(path: str) -> str:
    try:
        with _opened(path) as file:
            return str(file.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", "convert it to UTF-8") from error


def _json_lines(shard: Shard) -> Iterator[_Row]:
    """Lines that start in [start, stop): a line belongs to the shard its first byte is in."""
    with _opened(shard.path) as file:
        if shard.start:
            file.seek(shard.start - 1)
            file.readline()
        while (position := file.tell()) < shard.stop and (line := file.readline()):
            if line.strip():
                yield f"{shard.path}, byte {position}", partial(_parse_line, line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON line: {error}", "each line must be one JSON object in UTF-8") from error


def _parquet_rows(shard: Shard) -> Iterator[_Row]:
    with _opened(shard.path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(shard.start, shard.stop):
            first = 0
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group]):
                for row in range(batch.num_rows):
                    place = f"{shard.path}, row group {group}, row {first + row}"
                    yield place, partial(_decode, partial(_batch_row, batch, row))
                first += batch.num_rows


def _batch_row(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    return {name: batch.column(index)[row].as_py() for index, name in enumerate(batch.schema.names)}


def _dataset_rows(shard: Shard) -> Iterator[_Row]:
    for row, read in hub_datasets.read_rows(shard.path, shard.start, shard.stop):
        yield f"{shard.path}, row {row}", partial(_decode, read)


def _decode(read: Callable[[], Any]) -> Any:
    """A row of a table as plain values; a library may raise anything at a value that it cannot decode."""
    try:
        return read()
    except Exception as error:
        raise DataError(f"the row cannot be decoded: {error}", "write it again, text as UTF-8") from error


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A file of bytes; what its store or its format says while it is read becomes an error that names it."""
    try:
        with fsspec.open(path, "rb") as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}", "check that it is there and whole") from error
