"""Data order as a function of (seed, step): the same for every number of workers, and after a resume.

Each source is a stream of its sequences, shuffled anew each epoch; a global batch takes a fixed number of
sequences from each stream. Workers take turns along the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nexus_ray.errors import DataError

_EPOCHS_KEPT = 2
Sequences = NDArray[np.int64]
Group = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class SourceOrder:
    """The order in which one source's sequences are seen.

    Attributes:
        sequences: [n] numbers of all its sequences, as `TargetSet.sequences` gives them.
        per_step: sequences of this source in a global batch.
        validation: sequences kept out of training.
        seed: seed of the run.
        name: name of the source; sources are shuffled independently.
    """

    sequences: Sequences
    per_step: int
    validation: int
    seed: int
    name: str
    _epochs: dict[int, Sequences] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a source that validation would use up.

        Raises:
            DataError: no sequence is left for training.
        """
        if len(self.sequences) <= self.validation:
            raise DataError(
                f"source {self.name!r} has {len(self.sequences)} sequences; validation keeps out {self.validation}",
                "add text, or lower validation_sequences or data.sequence_length",
            )

    def _shuffled(self, epoch: int, sequences: Sequences) -> Sequences:
        key = hashlib.sha256(f"{self.seed}/{self.name}/{epoch}".encode()).digest()
        generator = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
        return sequences[generator.permutation(len(sequences))]

    @cached_property
    def _split(self) -> tuple[Sequences, Sequences]:
        """Validation and training sequences; the choice depends on the seed only."""
        is_held = np.isin(self.sequences, self._shuffled(-1, self.sequences)[: self.validation])
        return self.sequences[is_held], self.sequences[~is_held]

    def held_out(self) -> Sequences:
        """Sequences that training never sees, in file order."""
        return self._split[0]

    def of_step(self, step: int) -> Sequences:
        """The sequences of this source in the global batch of `step`."""
        positions = np.arange(step * self.per_step, (step + 1) * self.per_step)
        epochs, offsets = np.divmod(positions, len(self._split[1]))
        return np.concatenate([self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _epoch(self, number: int) -> Sequences:
        """The training sequences in an epoch's order; two are kept, since a step may end one and begin another."""
        shuffled = self._epochs.pop(number, None)
        if shuffled is None:
            shuffled = self._shuffled(number, self._split[1])
        self._epochs[number] = shuffled
        while len(self._epochs) > _EPOCHS_KEPT:
            self._epochs.pop(next(iter(self._epochs)))
        return shuffled


def share(sequences: Sequences, rank: int, world_size: int) -> Sequences:
    """The part of a global batch that one worker takes."""
    return sequences[rank::world_size]


def micro_batches(sequences: Sequences, size: int) -> list[Sequences]:
    """Cut one worker's part into micro-batches of at most `size` sequences."""
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


def worker_groups(batch: Mapping[str, Sequences], rank: int, world_size: int, size: int) -> list[Group]:
    """One worker's micro-batches of a global batch.

    Args:
        batch: sequences of each source.
        rank: of the worker.
        world_size: workers.
        size: sequences of a micro-batch at most.

    Returns:
        for each micro-batch its sources, with the sequences of each.
    """
    pairs = [(name, int(sequence)) for name, sequences in batch.items() for sequence in sequences]
    mine = pairs[rank::world_size]
    parts = [mine[start : start + size] for start in range(0, len(mine), size)]
    return [_by_source(part) for part in parts]


def _by_source(pairs: list[tuple[str, int]]) -> Group:
    names = dict.fromkeys(name for name, _ in pairs)
    return tuple((name, tuple(sequence for other, sequence in pairs if other == name)) for name in names)
