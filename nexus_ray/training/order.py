"""Data order as a function of (seed, step): the same for every number of workers, and after a resume.

Each source is a stream of its sequences, shuffled anew each epoch; a global batch takes a fixed number of
sequences from each stream. Workers take turns along the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus_ray.errors import DataError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SourceOrder:
    """The order in which one source's sequences are seen.

    Attributes:
        rows: [n, 2] all its sequences, as `TargetSet.rows` gives them.
        per_step: sequences of this source in a global batch.
        validation: sequences kept out of training.
        seed: seed of the run.
        name: name of the source; sources are shuffled independently.
    """

    rows: Rows
    per_step: int
    validation: int
    seed: int
    name: str

    def __post_init__(self) -> None:
        """Refuse a source that validation would use up.

        Raises:
            DataError: no sequence is left for training.
        """
        if len(self.rows) <= self.validation:
            raise DataError(
                f"source {self.name!r} has {len(self.rows)} sequences; validation keeps out {self.validation}",
                "add text, or lower validation_sequences or data.sequence_length",
            )

    def _shuffled(self, epoch: int, rows: Rows) -> Rows:
        key = hashlib.sha256(f"{self.seed}/{self.name}/{epoch}".encode()).digest()
        generator = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
        return rows[generator.permutation(len(rows))]

    def _split(self) -> tuple[Rows, Rows]:
        """Validation and training rows; the choice depends on the seed only."""
        held = self._shuffled(-1, self.rows)[: self.validation]
        is_held = np.isin(self.rows @ _ROW_KEY, held @ _ROW_KEY)
        return self.rows[is_held], self.rows[~is_held]

    def validation_rows(self) -> Rows:
        """Sequences that training never sees, in file order."""
        return self._split()[0]

    def training_rows(self, step: int) -> Rows:
        """The sequences of this source in the global batch of `step`."""
        _, rows = self._split()
        positions = np.arange(step * self.per_step, (step + 1) * self.per_step)
        epochs, offsets = np.divmod(positions, len(rows))
        shuffled = {int(epoch): self._shuffled(int(epoch), rows) for epoch in np.unique(epochs)}
        return np.stack([shuffled[int(epoch)][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


_ROW_KEY = np.asarray([1 << 32, 1], dtype=np.int64)


def share(rows: Rows, rank: int, world_size: int) -> Rows:
    """The part of a global batch that one worker takes."""
    return rows[rank::world_size]


def micro_batches(rows: Rows, size: int) -> list[Rows]:
    """Cut one worker's part into micro-batches of at most `size` sequences."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
