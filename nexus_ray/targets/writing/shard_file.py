"""Writing a shard: rows come a batch at a time and leave a row group at a time; no more than that is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_ray.data.packing import Batch
from nexus_ray.storage import Place, atomic_file
from nexus_ray.targets.checksums import checksums
from nexus_ray.targets.format import ROW_GROUP_BYTES, Header, shard_schema

Columns = Mapping[str, NDArray[np.uint8]]
_ID_BYTES = 4
_WITH_STATISTICS = ["num_tokens", "num_targets"]


class ShardFile:
    """An open shard.

    Args:
        file: to write into.
        header: of the set.
        source: of the text.
        key: of the shard.
        output: whether it holds output targets.
        router: whether it holds router targets.

    Attributes:
        sequences: rows so far.
        tokens: of these rows.
        targets: tokens in their loss masks.
        bytes: of the file, known when it is written, as are its checksums.
        sha256: of the whole file.
        blocks: as `checksums` gives them.
    """

    bytes: int
    sha256: str
    blocks: str

    def __init__(self, file: BinaryIO, header: Header, source: str, key: str, *, output: bool, router: bool) -> None:
        self.sequences = self.tokens = self.targets = 0
        self._prefix = f"{source}/{key}"
        self._router = header.router if router else None
        self._schema = shard_schema(header, source, output=output, router=router)
        self._group_rows = rows_of_group(header, output=output, router=router)
        self._waiting: list[pa.Table] = []
        self._writer = pq.ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=_WITH_STATISTICS,
        )

    def add(self, batch: Batch, columns: Columns) -> None:
        """Add the rows of a batch.

        Args:
            batch: the sequences.
            columns: [positions, width] of each column of targets, the positions of all rows one after the other.
        """
        counts = {name: self._positions(name, batch) for name in columns}
        for start in range(0, len(batch.num_tokens), self._group_rows):
            rows = slice(start, start + self._group_rows)
            pieces = {name: _of_rows(column, counts[name], rows) for name, column in columns.items()}
            self._waiting.append(self._table(batch.rows(rows), pieces))
            self._write_full_groups()

    def close(self) -> None:
        """Write what is left and the end of the file."""
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=self._group_rows)
            self._waiting = []
        self._writer.close()

    def abandon(self) -> None:
        """Let go of a file that will not be kept."""
        with suppress(Exception):  # what it has to say was said before
            self._writer.close()

    def _positions(self, name: str, batch: Batch) -> NDArray[np.int64]:
        """[sequences] entries of a column in each row."""
        if self._router is not None and name in self._router.widths():
            return np.asarray([self._router.positions(int(tokens)) for tokens in batch.num_tokens], np.int64)
        return batch.is_target.sum(1, dtype=np.int64)

    def _table(self, batch: Batch, columns: Mapping[str, pa.Array]) -> pa.Table:
        valid, is_target = batch.valid, batch.is_target
        num_targets = is_target.sum(1, dtype=np.int32)
        arrays = {
            "sequence_id": pa.array([f"{self._prefix}/{self.sequences + row}" for row in range(len(valid))]),
            "num_tokens": pa.array(batch.num_tokens),
            "num_targets": pa.array(num_targets),
            "input_ids": _lists(batch.input_ids[valid], batch.num_tokens),
            "loss_mask": _lists(is_target[valid], batch.num_tokens),
            **columns,
        }
        self.sequences += len(valid)
        self.tokens += int(batch.num_tokens.sum())
        self.targets += int(num_targets.sum())
        return pa.table([arrays[name] for name in self._schema.names], schema=self._schema)

    def _write_full_groups(self) -> None:
        if sum(table.num_rows for table in self._waiting) >= self._group_rows:
            rows = pa.concat_tables(self._waiting)
            self._writer.write_table(rows.slice(0, self._group_rows), row_group_size=self._group_rows)
            rest = rows.slice(self._group_rows)
            self._waiting = [rest] if rest.num_rows else []


@contextmanager
def writing_shard(
    path: Place, header: Header, source: str, key: str, *, output: bool, router: bool
) -> Iterator[ShardFile]:
    """A shard that stands at `path` when the block has ended without an exception; arguments as `ShardFile`.

    Raises:
        StorageError: the file system refused; nothing is left of the file.
    """
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            shard = ShardFile(file, header, source, key, output=output, router=router)
            try:
                yield shard
                shard.close()
            except BaseException:
                shard.abandon()
                raise
        shard.bytes = temporary.stat().st_size
        shard.sha256, shard.blocks = checksums(temporary)  # of what was written, not of what can be read from there


def column_bytes(header: Header, *, output: bool, router: bool) -> dict[str, int]:
    """Bytes of a full row in its large columns, before compression."""
    length = header.sequence_length
    sizes = {"input_ids": length * _ID_BYTES}
    if output and header.output is not None:
        sizes |= {name: (length - 1) * width for name, width in header.output.widths().items()}
    if router and header.router is not None:
        positions = header.router.positions(length)
        sizes |= {name: positions * width for name, width in header.router.widths().items()}
    return sizes


def rows_of_group(header: Header, *, output: bool, router: bool) -> int:
    """Rows of a row group: as many full ones as `ROW_GROUP_BYTES` hold, at least one."""
    return max(1, ROW_GROUP_BYTES // sum(column_bytes(header, output=output, router=router).values()))


def _of_rows(column: NDArray[np.uint8], counts: NDArray[np.int64], rows: slice) -> pa.Array:
    """The entries of some rows as binary values, one a row, without a copy."""
    ends = np.concatenate([[0], counts.cumsum()])
    bounds = ends[rows.start : rows.stop + 1]
    offsets = ((bounds - bounds[0]) * column.shape[1]).astype(np.int32)
    data = np.ascontiguousarray(column[bounds[0] : bounds[-1]])
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _lists(values: NDArray[np.generic], counts: NDArray[np.int32]) -> pa.Array:
    """One list a row of values that stand one after the other."""
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
