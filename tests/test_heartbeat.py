"""After a while without a line, the log says what is being done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from nexus_ray.heartbeat import Heartbeat, doing

INTERVAL = 0.05


class Lines(logging.Handler):
    """Keeps what is logged; the heartbeat hears of it, as the real log's lines."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        super().__init__()
        self.heartbeat = heartbeat
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())
        self.heartbeat.line_written()


@pytest.fixture
def lines() -> Iterator[Lines]:
    heartbeat, package = Heartbeat(INTERVAL), logging.getLogger("nexus_ray")
    handler, level = Lines(heartbeat), package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    heartbeat.start()
    yield handler
    heartbeat.end()
    heartbeat.join()
    package.removeHandler(handler)
    package.setLevel(level)


def wait_for(lines: Lines, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(lines.seen) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_it_says_what_is_done_from_the_outside_in(lines):
    with doing("collect"), doing(lambda: "3 of 9 tokens"):
        wait_for(lines, 2)
    assert lines.seen[:2] == ["still at collect; 3 of 9 tokens"] * 2


def test_nothing_is_said_where_nothing_is_done(lines):
    with doing("collect"):
        wait_for(lines, 1)
    before = len(lines.seen)
    time.sleep(5 * INTERVAL)
    assert len(lines.seen) <= before + 1  # one may have been on its way


def test_what_cannot_say_how_far_it_is_does_no_harm(lines):
    def fail() -> str:
        raise ConnectionError

    with doing(fail):
        time.sleep(3 * INTERVAL)
    with doing("select"):
        wait_for(lines, 1)
    assert lines.seen[0] == "still at select"


def test_a_log_that_has_lines_has_no_signs_of_life():
    heartbeat = Heartbeat(3600)
    handler = Lines(heartbeat)
    heartbeat.start()
    with doing("collect"):
        time.sleep(0.1)
    heartbeat.end()
    heartbeat.join(60)
    assert handler.seen == []
    assert not heartbeat.is_alive(), "it ends at once when it is told to"
