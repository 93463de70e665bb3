"""From rows of a shard to tensors: tokens side by side, targets one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.errors import ArtefactError
from nexus_ray.targets.encoding.encodings import OutputEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.format import REMAKE
from nexus_ray.targets.teacher import OutputTargets, RouterTargets


class StoredRow(NamedTuple):
    """One sequence: a row of a row group.

    Attributes:
        path: of its file, for messages.
        table: the row group.
        row: its number there.
    """

    path: str
    table: pa.Table
    row: int

    def number(self, column: str) -> int:
        """Its value in a column of integers."""
        return int(self.table[column][self.row].as_py())

    def values(self, column: str) -> NDArray[Any]:
        """Its values in a column of lists."""
        return np.asarray(self.table[column][self.row].values.to_numpy(zero_copy_only=False))

    def content(self, column: str) -> NDArray[np.uint8]:
        """Its bytes in a binary column, which stay where they are."""
        content = self.table[column][self.row].as_buffer()
        return np.frombuffer(content, dtype=np.uint8) if content else np.zeros(0, dtype=np.uint8)


def tokens_of(rows: Sequence[StoredRow], length: int, separator: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [rows, length] int64 padded with `separator`, tokens [rows] int64 and loss masks [rows, length]."""
    input_ids = np.full((len(rows), length), separator, dtype=np.int64)
    loss_mask = np.zeros((len(rows), length), dtype=np.bool_)
    num_tokens = np.asarray([row.number("num_tokens") for row in rows], dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : num_tokens[index]] = row.values("input_ids")
        loss_mask[index, : num_tokens[index]] = row.values("loss_mask")
    return torch.from_numpy(input_ids), torch.from_numpy(num_tokens), torch.from_numpy(loss_mask)


def output_of(rows: Sequence[StoredRow], encoding: OutputEncoding) -> OutputTargets:
    """The teacher's distributions at the positions before each token of the loss masks.

    Raises:
        ArtefactError: a row holds targets of another number of positions.
    """
    positions = [row.number("num_targets") for row in rows]
    return encoding.decode({name: _stacked(rows, name, positions, width) for name, width in encoding.widths().items()})


def router_of(rows: Sequence[StoredRow], encoding: RouterEncoding) -> RouterTargets:
    """The teacher's routers at the stored positions.

    Raises:
        ArtefactError: a row holds targets of another number of positions.
    """
    positions = [encoding.positions(row.number("num_tokens")) for row in rows]
    return encoding.decode({name: _stacked(rows, name, positions, width) for name, width in encoding.widths().items()})


def _stacked(rows: Sequence[StoredRow], name: str, positions: Sequence[int], width: int) -> Tensor:
    """[positions, width] uint8 of a column, of all rows."""
    parts = [row.content(name) for row in rows]
    for row, part, expected in zip(rows, parts, positions, strict=True):
        if len(part) != expected * width:
            found = f"{len(part):,} bytes of {name}, not {width} for each of {expected:,} positions"
            sequence = row.table["sequence_id"][row.row].as_py()
            raise ArtefactError(f"{row.path}: sequence {sequence} has {found}", f"delete it and {REMAKE}")
    return torch.from_numpy(np.concatenate(parts)).view(-1, width)
