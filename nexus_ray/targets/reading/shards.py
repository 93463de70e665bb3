"""One Parquet file of a target set: opened when first needed, checked against the manifest, read by row group."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_ray.errors import ArtefactError
from nexus_ray.targets.checksums import MAKE_AGAIN, CheckedBytes, VerifiedFile, block_digits
from nexus_ray.targets.format import METADATA_KEY, REMAKE, Manifest, TargetFile, shard_schema
from nexus_ray.targets.reading.target_directory import TargetDirectory

TOKEN_COLUMNS = ("sequence_id", "num_tokens", "num_targets", "input_ids", "loss_mask")
_COUNTS = ("num_tokens", "num_targets")
_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # of a Parquet file: the length of its footer and the magic number
_SHOWN = 40  # characters of a value in a message


class Shard:
    """A shard of a target set. It holds no open file, only the footer of its Parquet file, until `close`.

    Args:
        place: of the set.
        manifest: of the set.
        file: the shard.

    Attributes:
        file: the shard.
        path: where it is, for messages.
        content: its bytes, checked.
    """

    def __init__(self, place: TargetDirectory, manifest: Manifest, file: TargetFile) -> None:
        self.file = file
        self.path = place.path(file.name)
        self.content = CheckedBytes(self.path, partial(place.read, file.name), file.bytes, file.blocks)
        self._place = place
        self._schema = shard_schema(manifest.header, file.source, output=file.output, router=file.router)
        self._parquet: pq.ParquetFile | None = None
        self._starts: NDArray[np.int64] | None = None
        self._counts = np.zeros((0, len(_COUNTS)), dtype=np.int32)  # of each row; -1 where not known yet

    def check_listed(self, listed: Mapping[str, int]) -> None:
        """Compare what the directory lists, bytes by file name, with the manifest.

        Raises:
            ArtefactError: the shard is missing, of another size or run, or the manifest contradicts itself.
        """
        if "/" in self.file.name or len(self.file.blocks) != block_digits(self.file.bytes):
            raise ArtefactError(f"the manifest of {self._place} describes no shard: {self.file.name!r}", REMAKE)
        size = listed.get(self.file.name)
        if size != self.file.bytes:  # a listing may be an old one
            size = self._place.size(self.file.name)
        if size is None:
            raise ArtefactError(f"{self.path} is missing", f"{REMAKE}: only this shard is made again")
        if size != self.file.bytes:
            difference, wrong_size = self._unchecked_difference(), f"has {size:,} bytes, not {self.file.bytes:,}"
            found = f"is of another run than the manifest: {difference}" if difference else wrong_size
            raise ArtefactError(f"{self.path} {found}", MAKE_AGAIN)

    @property
    def parquet(self) -> pq.ParquetFile:
        """The file; opened, and its own description compared with the manifest, when first asked for.

        Raises:
            ArtefactError: it is damaged, or of another run.
            StorageError: it cannot be read.
        """
        if self._parquet is None:
            self._parquet = self._open()
        if self._starts is None:
            metadata = self._parquet.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts = np.cumsum([0, *sizes], dtype=np.int64)
            self._counts = np.full((metadata.num_rows, len(_COUNTS)), -1, dtype=np.int32)
        return self._parquet

    def close(self) -> None:
        """Forget the footer; the shard may be used again."""
        self._parquet = None

    def place_of(self, row: int) -> tuple[int, int]:
        """The row group of a row, and its number there."""
        starts = self._row_groups()
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return group, row - int(starts[group])

    def read(self, group: int, *, teacher: bool) -> pa.Table:
        """A row group; without its target columns unless `teacher`.

        Raises:
            ArtefactError: it is damaged.
            StorageError: it cannot be read.
        """
        return self._columns(group, self._schema.names if teacher else list(TOKEN_COLUMNS))

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n, 2]: tokens, and targets, of the sequences in `rows` [n].

        A row group whose statistics say that all its sequences are alike is not read.
        """
        starts = self._row_groups()
        unknown = rows[self._counts[rows, 0] < 0]
        for group in np.unique(np.searchsorted(starts, unknown, side="right") - 1):
            self._counts[starts[group] : starts[group + 1]] = self._counts_of(int(group))
        return self._counts[rows].astype(np.int64)

    def _counts_of(self, group: int) -> NDArray[np.int64]:
        known = [_constant(self.parquet.metadata.row_group(group), name) for name in _COUNTS]
        if None not in known:
            return np.asarray([known])
        table = self._columns(group, list(_COUNTS))
        return np.stack([table[name].to_numpy() for name in _COUNTS], axis=1)

    def _columns(self, group: int, columns: list[str]) -> pa.Table:
        try:
            return self.parquet.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._not_parquet(error) from error

    def _row_groups(self) -> NDArray[np.int64]:
        """First row of each row group, and the number of rows."""
        if self._starts is None:
            _ = self.parquet
        assert self._starts is not None
        return self._starts

    def _open(self) -> pq.ParquetFile:
        try:
            parquet = pq.ParquetFile(VerifiedFile(self.content), pre_buffer=True)
        except ArtefactError as damage:
            difference = self._unchecked_difference()
            other = f"; or it is of another run than the manifest: {difference}" if difference else ""
            raise ArtefactError(damage.message + other, damage.hint) from damage
        except (pa.ArrowException, OSError) as error:
            raise self._not_parquet(error) from error
        found = parquet.schema_arrow
        self._check_description((found.metadata or {}).get(METADATA_KEY))
        if [(field.name, field.type) for field in found] != [(field.name, field.type) for field in self._schema]:
            raise ArtefactError(f"{self.path} has the columns {_types(found)}, not {_types(self._schema)}", MAKE_AGAIN)
        if parquet.metadata.num_rows != self.file.sequences:
            rows = f"{parquet.metadata.num_rows:,} sequences, the manifest says {self.file.sequences:,}"
            raise ArtefactError(f"{self.path} has {rows}", MAKE_AGAIN)
        return parquet

    def _check_description(self, found: bytes | None) -> None:
        difference = self._difference(found)
        if difference:
            raise ArtefactError(f"{self.path} is of another run than the manifest: {difference}", MAKE_AGAIN)

    def _difference(self, found: bytes | None) -> str | None:
        if found is None:
            return "it does not describe itself"
        return first_difference(json.loads(found), json.loads(self._schema.metadata[METADATA_KEY]))

    def _unchecked_difference(self) -> str | None:
        """How the description in the unchecked footer differs, where there is one to read."""
        try:
            found = _read_description(self._place, self.file.name)
            return self._difference(found) if found else None
        except (pa.ArrowException, OSError, ValueError):
            return None

    def _not_parquet(self, error: Exception) -> ArtefactError:
        return ArtefactError(f"{self.path} is no Parquet file of targets: {error}", MAKE_AGAIN)


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first field in which two descriptions differ, with both values; None where they are equal."""
    here, there = dict(_leaves(found)), dict(_leaves(expected))
    names = dict.fromkeys([*there, *here])
    for name in sorted(names, key=lambda name: not name.endswith(".mode")):  # other fields follow from the mode
        if here.get(name) != there.get(name) or (name in here) != (name in there):
            return f"{name} is {_shown(here, name)}, the manifest says {_shown(there, name)}"
    return None


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name]) if name in values else "absent"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read_description(place: TargetDirectory, name: str) -> bytes | None:
    """What a file of any size says about itself, from its footer alone, unchecked."""
    size = place.size(name) or 0
    tail = place.read(name, max(0, size - _TAIL_BYTES), size)
    length = int.from_bytes(tail[:4], "little") + _TAIL_BYTES
    footer = place.read(name, max(0, size - length), size)
    metadata = pq.read_metadata(io.BytesIO(_MAGIC + footer)).metadata or {}
    found: bytes | None = metadata.get(METADATA_KEY)
    return found


def _constant(group: Any, name: str) -> int | None:
    """The value that all rows of a row group have in a column, where its statistics say so."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == name:
            statistics = column.statistics
            if statistics is None or not statistics.has_min_max or statistics.min != statistics.max:
                return None
            return int(statistics.min)
    return None


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
