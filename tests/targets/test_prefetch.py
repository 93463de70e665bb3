"""Reading ahead: what was announced is read in the background, and nothing else is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from nexus_ray.targets.reading.prefetch import ReadAhead

MAIN = threading.get_ident()


class Source:
    """Values that remember which thread read them."""

    def __init__(self) -> None:
        self.read: list[tuple[int, bool]] = []
        self.changed = threading.Condition()

    def __call__(self, key: int) -> int:
        if key < 0:
            raise ValueError(f"no {key}")
        with self.changed:
            self.read.append((key, threading.get_ident() == MAIN))
            self.changed.notify_all()
        return key * key

    def wait(self, until: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(until, timeout=10)

    def wait_for(self, *keys: int) -> None:
        self.wait(lambda: set(keys) <= {key for key, _ in self.read})


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def ahead(source: Source) -> Iterator[ReadAhead[int, int]]:
    made = ReadAhead(source, 2)
    yield made
    made.close()


def test_announced_values_are_read_once_in_the_background(ahead, source):
    assert ahead.get(1, [2, 3]) == 1
    source.wait_for(2, 3)
    assert [ahead.get(2, [3]), ahead.get(3)] == [4, 9]
    assert sorted(source.read) == [(1, True), (2, False), (3, False)]


def test_a_value_that_was_not_announced_is_read_directly(ahead, source):
    ahead.get(1, [2])
    assert ahead.get(7) == 49
    assert (7, True) in source.read


def test_no_more_than_the_depth_is_read_ahead(ahead, source):
    ahead.get(1, [2, 3, 4, 5])
    source.wait_for(2, 3)
    ahead.close()
    assert [key for key, _ in source.read if key > 3] == []


def test_what_is_no_longer_wanted_is_dropped(ahead, source):
    for start in range(0, 1000, 10):
        ahead.get(start, [start + 1, start + 2])
    assert len(ahead._ahead) == 2, "values that nobody asks for do not pile up"
    ahead.get(5, [])
    assert ahead.get(992) == 992**2
    assert source.read[-1] == (992, True), "it was dropped, so it is read again"


def test_an_error_is_raised_where_its_value_is_asked_for(ahead):
    assert ahead.get(1, [-1, 2]) == 1
    assert ahead.get(2, [-1]) == 4
    with pytest.raises(ValueError, match="no -1"):
        ahead.get(-1, [3])
    assert ahead.get(3) == 9, "and the next value is there"


def test_an_error_of_a_direct_read_is_raised_too(ahead):
    with pytest.raises(ValueError, match="no -5"):
        ahead.get(-5)


def test_a_key_may_follow_itself(ahead, source):
    ahead.get(1, [1])
    assert ahead.get(1, [1]) == 1
    assert ahead.get(1) == 1
    assert len(source.read) == 3


def test_closing_ends_the_thread_and_drops_what_waits():
    started, finish = threading.Event(), threading.Event()
    before = set(threading.enumerate())

    def slow(key: int) -> int:
        if key:
            started.set()
            assert finish.wait(10)
        return key

    ahead = ReadAhead(slow, 5)
    ahead.get(0, [1, 2, 3])
    assert started.wait(10)
    threading.Timer(0.05, finish.set).start()
    ahead.close()
    assert not [thread for thread in set(threading.enumerate()) - before if "read-ahead" in thread.name]


def test_without_depth_everything_is_read_directly(source):
    ahead = ReadAhead(source, 0)
    assert [ahead.get(1, [2]), ahead.get(2, [3])] == [1, 4]
    assert all(main for _, main in source.read)
    ahead.close()
