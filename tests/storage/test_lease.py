"""A run directory in an object store has one holder; who is gone is found out without a clock that machines share."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nexus_ray.errors import NexusError, StorageError
from nexus_ray.layout import RunLayout
from nexus_ray.run_lock import locked
from nexus_ray.storage import exists, read_json, write_json
from nexus_ray.storage.lease import STILL, HeldError, Lease


class Time:
    """A clock of one machine: it goes forward when somebody sleeps, and something may happen meanwhile."""

    def __init__(self, meanwhile=lambda: None) -> None:
        self.now, self.slept, self.meanwhile = 1e9, 0, meanwhile

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1
        self.meanwhile()


def lease(remote, name: str, time: Time | None = None) -> Lease:
    time = time or Time()
    return Lease(remote / ".lock", {"host": name}, interval=5.0, clock=time.clock, sleep=time.sleep)


def test_the_first_one_holds_it_and_gives_it_back(remote):
    first = lease(remote, "a")
    first.acquire()
    first.renew()
    first.check()
    first.release()
    assert not exists(remote / ".lock")
    lease(remote, "b").acquire()


def test_who_counts_is_alive_however_its_clock_jumps(remote):
    first = lease(remote, "a")
    first.acquire()
    second = lease(remote, "b", time := Time(meanwhile=first.renew))
    with pytest.raises(HeldError) as caught:
        second.acquire()
    assert caught.value.holder == {"host": "a"}
    assert time.slept == 1, "one count is enough to know"
    first.check()


def test_who_has_stopped_counting_for_long_is_followed(remote):
    first = lease(remote, "a")
    first.acquire()
    second = lease(remote, "b", time := Time())
    second.acquire()
    assert time.slept == STILL + 1
    second.check()
    with pytest.raises(StorageError, match=r"lock .*/\.lock is lost: host b has taken it over"):
        first.renew()
    assert first.lost
    first.release()
    second.renew()


def test_a_count_in_the_last_moment_keeps_it(remote):
    first = lease(remote, "a")
    first.acquire()

    def late() -> None:
        if time.slept == STILL:
            first.renew()

    time = Time(late)
    with pytest.raises(HeldError):
        lease(remote, "b", time).acquire()
    first.check()


def test_a_holder_that_was_waited_for_and_left_is_followed_at_once(remote):
    first = lease(remote, "a")
    first.acquire()
    second = lease(remote, "b", time := Time(first.release))
    second.acquire()
    assert time.slept == 1
    second.check()


def test_of_many_that_come_at_once_one_holds_it(remote):
    leases = [lease(remote, str(number)) for number in range(6)]
    together = threading.Barrier(len(leases))

    def take(one: Lease) -> bool:
        together.wait()
        try:
            one.acquire()
        except HeldError:
            return False
        return True

    # A holder that does not count is followed, so those that watch must see it count.
    for one in leases:
        one._sleep = lambda _: [other.renew() for other in leases if other._token == token(remote)]
    with ThreadPoolExecutor(len(leases)) as pool:
        assert sum(pool.map(take, leases)) == 1


def token(remote) -> str:
    return read_json(remote / ".lock", what="lock", hint="")["token"]


def test_of_two_that_follow_one_that_is_gone_one_wins(remote):
    lease(remote, "gone").acquire()
    together = threading.Barrier(2)
    followers = []
    for name in ("b", "c"):
        time = Time()
        followers.append(lease(remote, name, time))
        time.meanwhile = lambda time=time: together.wait(60) if time.slept == STILL else None

    def take(one: Lease) -> bool:
        try:
            one.acquire()
        except HeldError as error:
            assert error.holder["host"] in "bc"  # noqa: PT017
            return False
        one.check()
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(take, followers)) == 1


def test_a_store_that_does_not_answer_for_a_while_kills_nobody(remote, object_store, monkeypatch):
    first = lease(remote, "a")
    first.acquire()
    second = lease(remote, "b", time := Time())
    slow, real = iter(range(100)), second._read

    def read():
        if next(slow) == STILL - 1:
            time.now += 60  # that request was repeated for a minute
            time.meanwhile = lambda: first.renew() if time.slept == STILL + 2 else None
        return real()

    monkeypatch.setattr(second, "_read", read)
    with pytest.raises(HeldError):
        second.acquire()


def test_a_request_whose_answer_was_lost_is_not_mistaken_for_another_holder(remote, monkeypatch):
    import nexus_ray.storage.lease as module

    def twice(action):
        def call(*arguments):
            action(*arguments)
            raise FileExistsError

        return call

    first = lease(remote, "a")
    monkeypatch.setattr(module, "create_object", twice(module.create_object))
    first.acquire()
    monkeypatch.setattr(module, "replace_object", twice(module.replace_object))
    first.renew()
    first.renew()


class TestRunDirectories:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Lease.__init__
        monkeypatch.setattr(Lease, "__init__", lambda self, *a, **k: real(self, *a, **{"interval": 0.2} | k))

    def test_a_second_command_is_told_who_works_there(self, remote, monkeypatch):
        job = {"metadata": {"job_submission_id": "raysubmit_1"}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        said = rf"another nexus-ray is working in {remote}: process \d+ on \S+, Ray job raysubmit_1, since 2\d\d\d-"
        with locked(RunLayout(remote)), pytest.raises(NexusError, match=said), locked(RunLayout(remote)):
            pass
        with locked(RunLayout(remote)):
            pass
        assert not exists(remote / ".lock")

    def test_so_it_is_in_a_local_one(self, tmp_path):
        said = rf"working in {tmp_path}: process \d+ on \S+, since 2"
        with locked(RunLayout(tmp_path)), pytest.raises(NexusError, match=said), locked(RunLayout(tmp_path)):
            pass
        assert {path.name for path in tmp_path.iterdir()} <= {".lock"}

    def test_a_holder_that_lost_it_stops_before_it_writes_more(self, remote):
        with pytest.raises(StorageError, match=r"is lost: host other has taken it over"):
            lose_it(remote)

    def test_it_is_stopped_in_the_middle_of_its_work(self, remote):
        wait = threading.Event()
        with pytest.raises(StorageError, match="is lost"):
            lose_it(remote, then=lambda: wait.wait(60))


def lose_it(remote, then=None) -> None:
    with locked(RunLayout(remote)) as lock:
        write_json(remote / ".lock", {"token": "other", "count": 3, "holder": {"host": "other"}})
        if then:
            then()
        lock.check()


def test_a_store_that_does_not_answer_keeps_no_command_from_ending(remote, object_store, monkeypatch, caplog):
    """What the command has to say is not replaced by what the lock has: it is left, and nobody counts in it."""
    monkeypatch.setattr("nexus_ray.storage.lease.RELEASE_SECONDS", 0.2)
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    caplog.set_level(logging.INFO, logger="nexus_ray")
    with pytest.raises(KeyError, match="the cause"), object_store.refusing(lambda _: refuse):  # noqa: PT012
        refuse = False
        with locked(RunLayout(remote)):
            refuse = True
            raise KeyError("the cause")
    assert "stays" in caplog.text
    assert exists(remote / ".lock")
