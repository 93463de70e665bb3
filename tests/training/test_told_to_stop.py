"""A driver that is told to stop asks its workers for a checkpoint, and waits no longer than it may."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from nexus_ray import worker_log
from nexus_ray.training import stopping, trainer
from nexus_ray.training.messages import Box, Messages
from nexus_ray.training.stopping import checkpoint_before_stopping, seconds_for_checkpoint


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    worker_log.expect_workers()


class Wishes(Messages):
    """Messages without Ray: the driver and the first worker of one process."""

    def __init__(self) -> None:
        self.box = Box()

    def want_checkpoint(self, wanted: bool, seconds: float = 0) -> None:
        self.box.want_checkpoint(wanted)

    def is_checkpoint_wanted(self, seconds: float = 0) -> bool | None:
        return self.box.is_wanted()


class FirstWorker(threading.Thread):
    """Looks for the wish at each of its steps, and takes a moment to write its checkpoint."""

    def __init__(self, wishes: Wishes) -> None:
        super().__init__(daemon=True)
        self.wishes = wishes
        self.has_written = False

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while not self.wishes.is_checkpoint_wanted() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.has_written = True
        self.wishes.want_checkpoint(False)


def workers_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker_log._heard, "state", "ready")


def test_sigterm_waits_for_the_checkpoint_and_then_stops(monkeypatch):
    workers_are_ready(monkeypatch)
    wishes = Wishes()
    worker = FirstWorker(wishes)
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(wishes):  # noqa: PT012
        worker.start()
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError
    worker.join(60)
    assert worker.has_written


def test_without_an_answer_it_stops_when_its_time_is_up(monkeypatch):
    workers_are_ready(monkeypatch)
    monkeypatch.setattr(stopping, "seconds_for_checkpoint", lambda: 0.2)
    wishes = Wishes()
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(wishes):
        signal.raise_signal(signal.SIGTERM)
    assert not wishes.is_checkpoint_wanted(), "nothing is asked of the next attempt"


def test_a_wish_that_cannot_be_told_is_not_taken_for_a_checkpoint(monkeypatch, caplog):
    workers_are_ready(monkeypatch)
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    wishes = Wishes()
    monkeypatch.setattr(wishes, "is_checkpoint_wanted", lambda seconds=0: None)
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(wishes):
        signal.raise_signal(signal.SIGTERM)
    assert "no checkpoint in time" in caplog.text


def test_workers_that_are_still_loading_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(stopping, "wait_for_checkpoint", lambda *_: pytest.fail("nobody would answer"))
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(Wishes()):
        signal.raise_signal(signal.SIGTERM)


def test_a_worker_asks_once_a_second_at_most(monkeypatch):
    wishes = Wishes()
    monkeypatch.setattr(trainer, "_messages", wishes)
    monkeypatch.setattr(trainer, "_asked", 0.0)
    assert not trainer.is_checkpoint_wanted()
    wishes.want_checkpoint(True)
    assert not trainer.is_checkpoint_wanted()
    monkeypatch.setattr(trainer, "_asked", 0.0)
    assert trainer.is_checkpoint_wanted()
    trainer.checkpoint_is_written()
    assert not wishes.is_checkpoint_wanted()


@pytest.mark.parametrize(
    ("in_job", "wait", "seconds"), [(False, None, 20.0), (True, None, 1.0), (True, "60", 50.0), (True, "12", 4.0)]
)
def test_the_time_is_what_ray_leaves_a_job_less_what_it_takes_to_end(in_job, wait, seconds, monkeypatch):
    for name, value in (("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}" if in_job else None), ("RAY_JOB_STOP_WAIT_TIME_S", wait)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert seconds_for_checkpoint() == seconds
