"""A worker's micro-batches: which they are, and that the next are read while one is worked on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.training.feeding.feed import READ_AHEAD, Feed

SOURCES = {
    "play": {"sequences_per_step": 3, "cross_entropy": 1.0},
    "prose": {"sequences_per_step": 3, "output_kl": 2.0, "router_kl": 1.0},
}


class Numbers:
    """A target set whose sequences are their own number, twice; it records what is read, and in which thread."""

    def __init__(self) -> None:
        self.read_by: dict[int, str] = {}
        self.with_teacher: dict[int, bool] = {}
        self.arrived = threading.Condition()
        self.damaged: int | None = None

    def sequences(self, source: str) -> np.ndarray:
        return np.arange(20) + (0 if source == "play" else 100)

    def num_tokens(self, sequences: Sequence[int]) -> np.ndarray:
        return np.full(len(sequences), 12)

    def num_targets(self, sequences: Sequence[int]) -> np.ndarray:
        return np.full(len(sequences), 7)

    def num_router_positions(self, sequences: Sequence[int]) -> np.ndarray:
        return np.full(len(sequences), 4)

    def read(self, sequences: np.ndarray, *, teacher: bool = True) -> TargetBatch:
        with self.arrived:
            for number in sequences.tolist():
                if number == self.damaged:
                    raise ArtefactError(f"sequence {number} is damaged")
                self.read_by[number] = threading.current_thread().name
                self.with_teacher[number] = teacher
            self.arrived.notify_all()
        ids = torch.from_numpy(sequences)[:, None].expand(-1, 2)
        return TargetBatch(ids, torch.full((len(ids),), 2), torch.ones_like(ids, dtype=torch.bool))

    def wait_for(self, number: int) -> bool:
        with self.arrived:
            return self.arrived.wait_for(lambda: number in self.read_by, timeout=10)


@pytest.fixture
def make_feed(make_micro_config: Callable[..., Config], tmp_path: Path) -> Iterator[Callable[..., Feed]]:
    """A function (numbers, world=(rank, size), **overrides) -> Feed."""
    made: list[Feed] = []

    def make(numbers: Numbers, world: tuple[int, int] = (0, 1), **overrides: object) -> Feed:
        settings = {"train.sources": SOURCES, "train.micro_batch_sequences": 2, "train.steps": 3}
        made.append(Feed(numbers, make_micro_config(tmp_path, **(settings | overrides)), *world))
        return made[-1]

    yield make
    for feed in made:
        feed.close()


def numbers_of(parts: list) -> dict[str, list[int]]:
    return {part.source: part.batch.input_ids[:, 0].tolist() for part in parts}


def test_the_micro_batches_of_a_step_are_its_global_batch_by_source(make_feed):
    feed = make_feed(Numbers())
    batch = {name: numbers.tolist() for name, numbers in feed.training(1).items()}
    found = list(feed.step(1))
    assert [numbers_of(parts) for parts, _ in found] == [
        {"play": batch["play"][:2]},
        {"play": batch["play"][2:], "prose": batch["prose"][:1]},
        {"prose": batch["prose"][1:]},
    ]
    assert [last for _, last in found] == [False, False, True]


def test_the_next_are_read_in_the_background_while_one_is_worked_on(make_feed):
    numbers = Numbers()
    feed = make_feed(numbers)
    own = threading.current_thread().name
    for step in range(3):
        order = [number for parts in feed.training(step).values() for number in parts.tolist()]
        groups = iter(feed.step(step))
        for start in range(0, len(order), 2):
            next(groups)
            announced = order[start + 2 : start + 2 + 2 * READ_AHEAD]
            assert all(numbers.wait_for(number) for number in announced), "before they are asked for"
    assert sum(thread == own for thread in numbers.read_by.values()) <= 2, "only what was first asked for"


def test_the_first_of_the_next_step_are_read_while_the_last_are_worked_on(make_feed):
    numbers = Numbers()
    feed = make_feed(numbers)
    list(feed.step(0))
    assert all(numbers.wait_for(number) for number in feed.training(1)["play"][:2].tolist())


def test_nothing_is_read_beyond_the_last_step(make_feed):
    numbers = Numbers()
    feed = make_feed(numbers)
    list(feed.step(2))
    feed.close()
    assert len(numbers.read_by) == 6


def test_damage_is_raised_by_the_micro_batch_that_has_it(make_feed):
    numbers = Numbers()
    feed = make_feed(numbers)
    numbers.damaged = int(feed.training(0)["prose"][-1])
    groups = feed.step(0)
    next(groups)
    next(groups)
    with pytest.raises(ArtefactError, match="is damaged"):
        next(groups)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_targets_are_decoded_only_where_a_loss_needs_them(make_feed, mode):
    numbers = Numbers()
    feed = make_feed(numbers, **{"train.mode": mode})
    for _ in feed.step(0):
        pass
    feed.close()
    assert {number: taught for number, taught in numbers.with_teacher.items() if number < 100 and taught} == {}
    assert all(taught == (mode == "offline") for number, taught in numbers.with_teacher.items() if number >= 100)


@pytest.mark.parametrize(("mode", "positions"), [("offline", 4), ("online", 12)])
def test_counts_are_of_the_global_batch_whatever_the_worker_does(make_feed, mode, positions):
    """An online teacher speaks about the routers of every position, a stored one of those that are stored."""
    for world in ((0, 1), (2, 3)):
        feed = make_feed(Numbers(), world, **{"train.mode": mode})
        counts = feed.counts(feed.training(0))
        known = {"cross_entropy": 3 * 7, "output_kl": 3 * 7, "router_kl": 3 * positions}
        assert counts == {"hidden_mse": 0, "load_balancing": 0, "router_z": 0} | known


def test_losses_on_routers_alone_count_every_token_and_need_no_targets(make_feed):
    numbers = Numbers()
    sources = SOURCES | {"play": {"tokens_per_step": 130, "load_balancing": 0.1}}  # of 64 tokens a sequence
    feed = make_feed(numbers, **{"train.sources": sources, "train.routers.train": "all"})
    batch = feed.training(0)
    assert feed.counts(batch)["load_balancing"] == 3 * 12
    list(feed.step(0))
    assert not any(numbers.with_teacher[number] for number in batch["play"].tolist())


def test_hidden_state_matching_counts_predicted_tokens_and_reads_targets(make_feed):
    numbers = Numbers()
    sources = SOURCES | {"play": {"sequences_per_step": 3, "hidden_mse": 1.0}}
    feed = make_feed(numbers, **{"train.sources": sources, "targets.mode": "hidden"})
    batch = feed.training(0)
    assert feed.counts(batch)["hidden_mse"] == 3 * 7
    list(feed.step(0))
    assert all(numbers.with_teacher[number] for number in batch["play"].tolist())


def test_the_counts_of_a_step_do_not_depend_on_what_its_weights_are_now(make_feed):
    sources = {name: section | {"router_kl": [[0.5, 0.0], [1.0, 1.0]]} for name, section in SOURCES.items()}
    feed = make_feed(Numbers(), **{"train.sources": sources})
    assert [feed.counts(feed.training(step))["router_kl"] for step in range(3)] == [6 * 4] * 3


def test_validation_sequences_are_never_trained_on(make_feed):
    feed = make_feed(Numbers())
    held = {name: set(numbers.tolist()) for name, numbers in feed.validation().items()}
    assert [len(numbers) for numbers in held.values()] == [4, 4]
    found = [numbers_of(parts) for parts in feed.held_out()]
    for name, numbers in held.items():
        assert {number for parts in found for number in parts.get(name, [])} == numbers
        assert not numbers & {number for step in range(3) for number in feed.training(step)[name].tolist()}
