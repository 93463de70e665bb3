"""The order of training data depends on seed and step alone, never on the number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nexus_ray.errors import DataError
from nexus_ray.training.order import Rows, SourceOrder, micro_batches, share

# The rows of step 0 of `order()`, written down once.
FIRST_BATCH = [(2, 11), (0, 8), (0, 16), (1, 3), (1, 11), (1, 14)]


def rows_of(count: int, files: int = 3) -> Rows:
    """[count, 2] rows spread over files, as `TargetSet.rows` gives them."""
    return np.array(sorted((i % files, i // files) for i in range(count)), dtype=np.int64)


def order(**changes: Any) -> SourceOrder:
    values = {"rows": rows_of(50), "per_step": 6, "validation": 8, "seed": 0, "name": "play"}
    return SourceOrder(**(values | changes))


def as_set(rows: Rows) -> set[tuple[int, int]]:
    return {(int(file), int(row)) for file, row in rows}


def stream(source: SourceOrder, steps: int) -> list[tuple[int, int]]:
    return [(int(file), int(row)) for step in range(steps) for file, row in source.training_rows(step)]


class TestSplit:
    @pytest.mark.parametrize("validation", [0, 1, 8, 49])
    def test_validation_and_training_are_disjoint_and_together_everything(self, validation):
        source = order(validation=validation)
        held, trained = as_set(source.validation_rows()), set(stream(source, 60))
        assert len(held) == validation
        assert not held & trained
        assert held | trained == as_set(source.rows)

    def test_files_with_the_same_row_numbers_are_told_apart(self):
        """Row 0 of file 0 held out must not hold out row 0 of file 1."""
        source = order(rows=np.array([[file, 0] for file in range(10)]), validation=3, per_step=1)
        assert len(set(stream(source, 7))) == 7

    def test_validation_is_spread_by_the_seed_not_taken_from_the_start(self):
        choices = {tuple(map(tuple, order(seed=seed).validation_rows().tolist())) for seed in range(5)}
        assert len(choices) == 5
        assert tuple(map(tuple, rows_of(50)[:8].tolist())) not in choices

    def test_validation_is_in_file_order(self):
        held = order().validation_rows().tolist()
        assert held == sorted(held)

    @pytest.mark.parametrize(("count", "validation"), [(8, 8), (5, 8), (0, 0)])
    def test_nothing_left_to_train_on_is_refused(self, count, validation):
        with pytest.raises(DataError, match="'play'"):
            order(rows=rows_of(count).reshape(-1, 2), validation=validation)


class TestEpochs:
    @pytest.mark.parametrize("per_step", [1, 6, 7, 42, 100])
    def test_each_epoch_holds_every_row_once(self, per_step):
        source = order(per_step=per_step)
        seen = stream(source, 3 * 42 // per_step + 1)
        epochs = [seen[start : start + 42] for start in (0, 42)]
        for epoch in epochs:
            assert len(set(epoch)) == 42
        assert epochs[0] != epochs[1], "each epoch is shuffled anew"

    def test_a_batch_always_has_its_full_size(self):
        assert {len(order(per_step=9).training_rows(step)) for step in range(40)} == {9}

    def test_the_stream_does_not_depend_on_the_batch_size(self):
        """Twice the batch is the same data in half the steps."""
        assert stream(order(per_step=3), 40) == stream(order(per_step=6), 20)


class TestPurity:
    def test_a_step_depends_on_seed_and_step_only(self):
        expected = [order().training_rows(step) for step in range(20)]
        source = order()
        for step in reversed(range(20)):
            assert (source.training_rows(step) == expected[step]).all()

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
        batch = order(per_step=per_step).training_rows(3)
        shares = [share(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(row for part in shares for row in part.tolist()) == sorted(batch.tolist())
        sizes = [len(part) for part in shares]
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_micro_batches_are_the_share_in_order(self, size):
        batch = order(per_step=7).training_rows(0)
        parts = micro_batches(batch, size)
        assert (np.concatenate(parts) == batch).all()
        assert all(len(part) == size for part in parts[:-1])
        assert 1 <= len(parts[-1]) <= size

    def test_an_empty_share_has_no_micro_batches(self):
        assert micro_batches(rows_of(0).reshape(-1, 2), 4) == []
