"""Which ends of an attempt at a training lead to another one, and which are the last."""

from __future__ import annotations

import time

import pytest

from nexus_ray.errors import NexusError
from nexus_ray.training.restarts import MOST_LOST_IN_A_ROW, Attempts, cause_of


class WorkerGroupStartupTimeoutError(Exception):
    """As Ray Train names it."""


class ControllerError(Exception):
    """As Ray Train wraps what its controller meets."""

    def __init__(self, controller_failure: Exception) -> None:
        super().__init__(str(controller_failure))
        self.controller_failure = controller_failure


CRASH = RuntimeError("SIGKILL")
OUT_OF_MEMORY = RuntimeError("1 worker(s) were killed due to the node running low on memory.")
NO_PLACE = ControllerError(WorkerGroupStartupTimeoutError())


def test_a_crash_at_the_same_place_ends_it_after_max_failures() -> None:
    attempts = Attempts(max_failures=2, max_wait_minutes=1)
    for _ in range(2):
        attempts.after(CRASH, lost=(), reached=10)
    with pytest.raises(NexusError, match="training failed: SIGKILL"):
        attempts.after(CRASH, lost=(), reached=10)


def test_a_new_checkpoint_shows_that_it_gets_on_and_crashes_are_counted_anew() -> None:
    attempts = Attempts(max_failures=1, max_wait_minutes=1)
    for step in range(10, 100, 10):
        attempts.after(CRASH, lost=(), reached=step)
    with pytest.raises(NexusError):
        attempts.after(CRASH, lost=(), reached=90)


def test_without_failures_allowed_the_first_crash_is_the_last() -> None:
    with pytest.raises(NexusError):
        Attempts(max_failures=0, max_wait_minutes=1).after(CRASH, lost=(), reached=10)


def test_lost_nodes_do_not_count() -> None:
    attempts = Attempts(max_failures=0, max_wait_minutes=1)
    for _ in range(MOST_LOST_IN_A_ROW):
        attempts.after(CRASH, lost={"node"}, reached=0)


def test_nodes_lost_for_ever_without_a_checkpoint_end_it() -> None:
    attempts = Attempts(max_failures=0, max_wait_minutes=1)
    for _ in range(MOST_LOST_IN_A_ROW):
        attempts.after(CRASH, lost={"node"}, reached=0)
    with pytest.raises(NexusError, match="lost a node") as caught:
        attempts.after(CRASH, lost={"node"}, reached=0)
    assert "train.checkpoint_every" in str(caught.value.hint)


def test_a_worker_out_of_memory_is_tried_again_and_then_told_with_what_to_set() -> None:
    attempts = Attempts(max_failures=1, max_wait_minutes=1)
    attempts.after(OUT_OF_MEMORY, lost=(), reached=0)
    with pytest.raises(NexusError, match="ran out of memory") as caught:
        attempts.after(OUT_OF_MEMORY, lost=(), reached=0)
    for setting in ("nexus-ray plan", "resources.memory_gib_per_worker", "train.micro_batch_sequences"):
        assert setting in str(caught.value.hint)


def test_waiting_for_a_place_is_no_failure_but_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("nexus_ray.training.restarts.time.monotonic", lambda: now)
    attempts = Attempts(max_failures=0, max_wait_minutes=10)
    for _ in range(9):
        attempts.after(NO_PLACE, lost=(), reached=0)
        now += 60
    now += 120
    with pytest.raises(NexusError, match="for 10 minutes there was no place"):
        attempts.after(NO_PLACE, lost=(), reached=0)


@pytest.mark.parametrize(
    ("error", "lost", "cause"),
    [
        (CRASH, (), "worker"),
        (OUT_OF_MEMORY, (), "memory"),
        (NO_PLACE, (), "place"),
        (CRASH, {"node"}, "node"),
        (ControllerError(CRASH), (), "worker"),
    ],
)
def test_what_ended_an_attempt_is_told_apart(error: Exception, lost: set[str], cause: str) -> None:
    assert cause_of(error, lost) == cause


class PreemptionError(RuntimeError):
    """As Ray Train names it."""


def test_a_node_that_was_to_be_taken_away_costs_no_try() -> None:
    Attempts(max_failures=0, max_wait_minutes=1).after(PreemptionError("drained"), lost=(), reached=0)


def test_a_training_that_got_on_waits_anew_for_a_place() -> None:
    attempts = Attempts(max_failures=0, max_wait_minutes=1)
    attempts.after(NO_PLACE, lost=(), reached=0)
    attempts._waiting_since = time.monotonic() - 3600  # an hour ago, and it has trained since
    attempts.after(NO_PLACE, lost=(), reached=500)
