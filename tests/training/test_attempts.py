"""Between two attempts at a training the driver is its own master again: it can be stopped, and asks nobody."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train import TrainingFailedError

from nexus_ray import worker_log
from nexus_ray.training import trainer
from nexus_ray.training.restarts import Attempts


@pytest.fixture(autouse=True)
def ctrl_c_as_before() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    worker_log.expect_workers()


class Silent:
    """Messages of workers that have left none."""

    def failure(self) -> None:
        return None


class Failing:
    """A trainer that takes Ctrl-C to itself, as Ray Train's does, and fails."""

    def fit(self) -> None:
        signal.signal(signal.SIGINT, lambda *_: None)
        worker_log._heard["state"] = "ready"
        raise TrainingFailedError("a worker died")


def test_ctrl_c_and_a_stop_count_while_it_is_found_out_what_became_of_an_attempt(monkeypatch, tmp_path: Path) -> None:
    def lost_since(*_: Any) -> set[str]:
        assert not worker_log.are_ready(), "a checkpoint would be waited for that nobody writes"
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it was swallowed")

    monkeypatch.setattr(trainer, "alive_nodes", list)
    monkeypatch.setattr(trainer, "lost_since", lost_since)
    with pytest.raises(KeyboardInterrupt):
        trainer._attempt(Failing(), Silent(), Attempts(2, 1), tmp_path)
