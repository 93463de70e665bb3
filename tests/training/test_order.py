"""The order of training data depends on seed and step alone, never on the number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nexus_ray.errors import DataError
from nexus_ray.training.feeding.order import Sequences, SourceOrder, micro_batches, share, worker_groups

# The sequences of step 0 of `order()`, written down once.
FIRST_BATCH = [45, 8, 16, 20, 28, 31]


def order(**changes: Any) -> SourceOrder:
    values = {"sequences": np.arange(50), "per_step": 6, "validation": 8, "seed": 0, "name": "play"}
    return SourceOrder(**(values | changes))


def stream(source: SourceOrder, steps: int) -> list[int]:
    return [sequence for step in range(steps) for sequence in source.of_step(step).tolist()]


class TestSplit:
    @pytest.mark.parametrize("validation", [0, 1, 8, 49])
    def test_validation_and_training_are_disjoint_and_together_everything(self, validation):
        source = order(validation=validation)
        held, trained = set(source.held_out().tolist()), set(stream(source, 60))
        assert len(held) == validation
        assert not held & trained
        assert held | trained == set(range(50))

    def test_numbers_that_start_anywhere_are_the_same_positions(self):
        """A source whose sequences come after another's in the target set has the same order of its own."""
        moved = order(sequences=np.arange(1000, 1050))
        assert (moved.of_step(3) == order().of_step(3) + 1000).all()
        assert (moved.held_out() == order().held_out() + 1000).all()

    def test_validation_is_spread_by_the_seed_not_taken_from_the_start(self):
        choices = {tuple(order(seed=seed).held_out().tolist()) for seed in range(5)}
        assert len(choices) == 5
        assert tuple(range(8)) not in choices

    def test_validation_is_in_file_order(self):
        held = order().held_out().tolist()
        assert held == sorted(held)

    @pytest.mark.parametrize(("count", "validation"), [(8, 8), (5, 8), (0, 0)])
    def test_nothing_left_to_train_on_is_refused(self, count, validation):
        with pytest.raises(DataError, match="'play'"):
            order(sequences=np.arange(count), validation=validation)


class TestEpochs:
    @pytest.mark.parametrize("per_step", [1, 6, 7, 42, 100])
    def test_each_epoch_holds_every_sequence_once(self, per_step):
        source = order(per_step=per_step)
        seen = stream(source, 3 * 42 // per_step + 1)
        epochs = [seen[start : start + 42] for start in (0, 42)]
        for epoch in epochs:
            assert len(set(epoch)) == 42
        assert epochs[0] != epochs[1], "each epoch is shuffled anew"

    def test_an_epoch_is_shuffled_once(self, monkeypatch):
        """However often its steps are asked for: what a step costs must not grow with the text."""
        shuffled, source = list[int](), order(per_step=6)
        monkeypatch.setattr(SourceOrder, "_shuffled", lambda _, epoch, sequences: shuffled.append(epoch) or sequences)
        for step in range(3 * 42 // 6):
            for again in (step, step, step + 1):
                source.of_step(again)
        assert shuffled == [-1, 0, 1, 2, 3]

    def test_a_batch_always_has_its_full_size(self):
        assert {len(order(per_step=9).of_step(step)) for step in range(40)} == {9}

    def test_the_stream_does_not_depend_on_the_batch_size(self):
        """Twice the batch is the same data in half the steps."""
        assert stream(order(per_step=3), 40) == stream(order(per_step=6), 20)


class TestPurity:
    def test_a_step_depends_on_seed_and_step_only(self):
        expected = [order().of_step(step) for step in range(20)]
        source = order()
        for step in reversed(range(20)):
            assert (source.of_step(step) == expected[step]).all()

    def test_another_seed_or_source_is_another_order(self):
        streams = [stream(order(**change), 7) for change in ({}, {"seed": 1}, {"name": "prose"})]
        assert streams[0] != streams[1]
        assert streams[0] != streams[2]

    def test_it_does_not_depend_on_the_process(self):
        """Nor on the version: a change here breaks resuming of runs that were started before."""
        assert stream(order(), 1) == FIRST_BATCH


class TestSharing:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("per_step", [1, 6, 7])
    def test_the_shares_together_are_the_global_batch(self, world_size, per_step):
        batch = order(per_step=per_step).of_step(3)
        shares = [share(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(sequence for part in shares for sequence in part.tolist()) == sorted(batch.tolist())
        sizes = [len(part) for part in shares]
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_micro_batches_are_the_share_in_order(self, size):
        batch = order(per_step=7).of_step(0)
        parts = micro_batches(batch, size)
        assert (np.concatenate(parts) == batch).all()
        assert all(len(part) == size for part in parts[:-1])
        assert 1 <= len(parts[-1]) <= size

    def test_an_empty_share_has_no_micro_batches(self):
        assert micro_batches(np.arange(0), 4) == []


class TestGroups:
    BATCH: dict[str, Sequences] = {"play": np.array([9, 3, 5]), "prose": np.array([20, 28])}  # noqa: RUF012

    def test_workers_take_turns_along_the_batch(self):
        assert worker_groups(self.BATCH, 0, 2, 8) == [(("play", (9, 5)), ("prose", (28,)))]
        assert worker_groups(self.BATCH, 1, 2, 8) == [(("play", (3,)), ("prose", (20,)))]

    def test_a_micro_batch_is_cut_without_regard_to_sources_and_lists_each_once(self):
        expected = [(("play", (9, 3)),), (("play", (5,)), ("prose", (20,))), (("prose", (28,)),)]
        assert worker_groups(self.BATCH, 0, 1, 2) == expected

    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [1, 2, 64])
    def test_all_groups_together_are_the_batch(self, world_size, size):
        groups = [group for rank in range(world_size) for group in worker_groups(self.BATCH, rank, world_size, size)]
        found = [(name, sequence) for group in groups for name, numbers in group for sequence in numbers]
        wanted = [(name, sequence) for name, numbers in self.BATCH.items() for sequence in numbers.tolist()]
        assert sorted(found) == sorted(wanted)
        assert all(sum(len(numbers) for _, numbers in group) <= size for group in groups)
