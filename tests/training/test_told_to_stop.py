"""A driver that is told to stop asks its workers for a checkpoint, and waits no longer than it may."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ray import worker_log
from nexus_ray.training import stopping
from nexus_ray.training.stopping import StopRequest, checkpoint_before_stopping, seconds_for_checkpoint


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    worker_log.expect_workers()


class FirstWorker(threading.Thread):
    """Looks for the request at each of its steps, and takes a moment to write its checkpoint."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.request = StopRequest(directory)
        self.has_written = False

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while not self.request.is_there() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.has_written = True
        self.request.answer()


def workers_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker_log._heard, "state", "ready")


def test_sigterm_waits_for_the_checkpoint_and_then_stops(tmp_path, monkeypatch):
    workers_are_ready(monkeypatch)
    monkeypatch.setattr(stopping, "_LOOK_EVERY_SECONDS", 0.0)
    worker = FirstWorker(tmp_path)
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(tmp_path):  # noqa: PT012
        worker.start()
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError
    worker.join(60)
    assert worker.has_written
    assert not list(tmp_path.iterdir())


def test_without_an_answer_it_stops_when_its_time_is_up(tmp_path, monkeypatch):
    workers_are_ready(monkeypatch)
    monkeypatch.setattr(stopping, "seconds_for_checkpoint", lambda: 0.2)
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(tmp_path):
        signal.raise_signal(signal.SIGTERM)
    assert not list(tmp_path.iterdir()), "no request is left for the next training"


def test_workers_that_are_still_loading_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "ask", lambda *_: pytest.fail("nobody would answer"))
    with pytest.raises(KeyboardInterrupt), checkpoint_before_stopping(tmp_path):
        signal.raise_signal(signal.SIGTERM)


def test_a_request_of_a_driver_that_was_killed_is_not_taken_for_one_of_this(tmp_path):
    (tmp_path / "stop").write_text("")
    with checkpoint_before_stopping(tmp_path):
        assert not StopRequest(tmp_path).is_there()


def test_a_worker_looks_once_a_second_at_most(tmp_path):
    request = StopRequest(tmp_path)
    assert not request.is_there()
    (tmp_path / "stop").write_text("")
    assert not request.is_there()


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
