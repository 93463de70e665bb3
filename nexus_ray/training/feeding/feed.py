"""What one worker trains on: its micro-batches of each step, the next ones read while the present one is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from nexus_ray.config import Config
from nexus_ray.targets.reading.prefetch import ReadAhead
from nexus_ray.targets.reading.reader import TargetBatch, TargetSet
from nexus_ray.training.feeding.order import Group, Sequences, SourceOrder, worker_groups
from nexus_ray.training.losses.objective import MicroBatch, objective_at, term_counts

READ_AHEAD = 2  # micro-batches; the first of the next step are read while the last of this one are computed


class Feed:
    """Micro-batches in the memory of this machine, decoded.

    Args:
        targets: the run's target set.
        config: of the run.
        rank: of this worker.
        world_size: workers.

    Raises:
        DataError: validation leaves no sequence of a source.
    """

    def __init__(self, targets: TargetSet, config: Config, rank: int, world_size: int) -> None:
        self.targets = targets
        self.train = config.train
        self.place = (rank, world_size)
        self.orders = {
            name: SourceOrder(
                targets.sequences(name),
                per_step,
                config.train.validation_sequences,
                config.run.seed,
                name,
            )
            for name, per_step in config.sequences_per_step().items()
        }
        self._weights = objective_at(config.train, 1.0).weights
        self._ahead: ReadAhead[Group, list[MicroBatch]] = ReadAhead(self._read, READ_AHEAD)

    def training(self, step: int) -> dict[str, Sequences]:
        """The global batch of a step: sequences of each source."""
        return {name: order.of_step(step) for name, order in self.orders.items()}

    def validation(self) -> dict[str, Sequences]:
        """The validation sequences of each source."""
        return {name: order.held_out() for name, order in self.orders.items()}

    def num_targets(self, batch: Mapping[str, Sequences]) -> dict[str, int]:
        """Tokens in loss masks of each source of a global batch."""
        return {name: int(self.targets.num_targets(part).sum()) for name, part in batch.items()}

    def num_tokens(self, batch: Mapping[str, Sequences]) -> dict[str, int]:
        """Tokens of each source of a global batch, padding aside."""
        return {name: int(self.targets.num_tokens(part).sum()) for name, part in batch.items()}

    def counts(self, batch: Mapping[str, Sequences]) -> dict[str, int]:
        """Positions that each term is a mean over; an online teacher speaks about every position's routers."""
        of = self.targets.num_tokens if self.train.mode == "online" else self.targets.num_router_positions
        routed = {name: int(of(part).sum()) for name, part in batch.items() if self.train.sources[name].router_kl}
        weights = self._weights
        return term_counts(weights, self.num_targets(batch), dict.fromkeys(batch, 0) | routed, self.num_tokens(batch))

    def step(self, step: int) -> Iterator[tuple[list[MicroBatch], bool]]:
        """This worker's micro-batches of a step, each as its parts by source, and whether it is the last."""
        groups = self._groups(self.training(step))
        following = self._groups(self.training(step + 1)) if step + 1 < self.train.steps else []
        for number, parts in enumerate(self._stream(groups, following), 1):
            yield parts, number == len(groups)

    def mine(self, step: int) -> list[tuple[str, int]]:
        """(source, sequence) of everything that this worker reads at a step."""
        groups = self._groups(self.training(step))
        return [(name, sequence) for group in groups for name, sequences in group for sequence in sequences]

    def read(self, source: str, sequences: tuple[int, ...]) -> MicroBatch:
        """Some sequences of a source, out of turn."""
        return MicroBatch(source, self._batch(source, sequences))

    def held_out(self) -> Iterator[list[MicroBatch]]:
        """This worker's micro-batches of validation sequences, each as its parts by source."""
        return self._stream(self._groups(self.validation()), [])

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()

    def _groups(self, batch: Mapping[str, Sequences]) -> list[Group]:
        return worker_groups(batch, *self.place, self.train.micro_batch_sequences)

    def _stream(self, groups: list[Group], following: list[Group]) -> Iterator[list[MicroBatch]]:
        everything = [*groups, *following]
        for index, group in enumerate(groups):
            yield self._ahead.get(group, everything[index + 1 : index + 1 + READ_AHEAD])

    def _read(self, group: Group) -> list[MicroBatch]:
        return [self.read(name, sequences) for name, sequences in group]

    def _batch(self, name: str, sequences: tuple[int, ...]) -> TargetBatch:
        section = self.train.sources[name]
        teacher = self.train.mode == "offline" and bool(section.needs_output or section.router_kl)
        return self.targets.read(np.asarray(sequences, dtype=np.int64), teacher=teacher)
