"""A stage waits for nodes and for its workers, but not for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nexus_ray.cluster import deaths, patience
from nexus_ray.cluster.deaths import lost_since, seconds_to_notice
from nexus_ray.cluster.nodes import Node
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError


class Cluster:
    """What Ray would say of its nodes and of workers that died."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, float]] = {}
        self.dead: dict[bytes, bool] = {}

    def alive(self) -> list[Node]:
        return [Node(name, name, name == "head", has) for name, has in self.nodes.items()]


def wanted(minutes: float, cpus: int = 1) -> ResourcesSection:
    return ResourcesSection(cpus_per_worker=cpus, max_wait_minutes=minutes)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    for module in (deaths, patience):
        monkeypatch.setattr(module, "alive_nodes", found.alive)
        monkeypatch.setattr(module, "dead_workers", lambda: dict(found.dead))
    monkeypatch.setattr(patience, "_LOOK_SECONDS", 0.01)
    return found


@pytest.fixture(autouse=True)
def interrupted_by_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for_ever(after: Callable[[], object] = lambda: None) -> None:
    after()
    threading.Event().wait(30)
    raise AssertionError("nobody interrupted it")


def test_a_node_that_is_noticed_late_counts_as_lost(cluster: Cluster) -> None:
    cluster.nodes = {"head": {}, "worker": {}}
    before = cluster.alive()
    threading.Timer(0.2, cluster.nodes.pop, ["worker"]).start()
    assert lost_since(before, patience=20) == {"worker"}


def test_what_a_node_has_told_itself_is_waited_for_less_long() -> None:
    told = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")
    missed = RuntimeError("[gloo] Connection closed by peer")
    assert seconds_to_notice(told) < seconds_to_notice(missed)


def test_without_other_nodes_nothing_is_waited_for(cluster: Cluster) -> None:
    cluster.nodes = {"only": {}}
    began = time.monotonic()
    assert lost_since(cluster.alive(), patience=20) == set()
    assert time.monotonic() - began < 10


def test_a_stage_without_a_node_for_its_workers_ends_and_says_what_is_missing(cluster: Cluster) -> None:
    cluster.nodes = {"head": {"CPU": 0.0}, "small": {"CPU": 1.0}}
    with (
        pytest.raises(
            NexusError, match=r"collect: for 0.001 minutes there was no place for a worker of 2 CPU"
        ) as caught,
        patience.patience("collect", wanted(0.001, cpus=2), 1, {}),
    ):
        wait_for_ever()
    assert "the nodes could hold 0 (small: 1 CPU; head (head): nothing)" in caught.value.message
    assert "resources.max_wait_minutes" in str(caught.value.hint)


def test_training_needs_places_for_all_of_its_workers(cluster: Cluster) -> None:
    cluster.nodes = {"one": {"CPU": 1.0}}
    with (
        pytest.raises(NexusError, match="no place for 2 workers of 1 CPU each; the nodes could hold 1 "),
        patience.patience("training", wanted(0.001), 2, {}),
    ):
        wait_for_ever()


def test_a_head_that_may_not_work_is_no_place(cluster: Cluster) -> None:
    cluster.nodes = {"head": {"CPU": 8.0}}
    away = {"ray.io/node-id": "!head"}
    with (
        pytest.raises(NexusError, match="no place for a worker of 1 CPU; the nodes are gone"),
        patience.patience("training", wanted(0.001), 1, away),
    ):
        wait_for_ever()
    assert patience.Patience("training", wanted(0.001), 1, {})._without_place() is None


def test_waiting_starts_anew_when_a_node_comes(cluster: Cluster) -> None:
    watch = patience.Patience("collect", wanted(1), 1, {})
    assert watch._without_place() is None
    watch._waiting_since = time.monotonic() - 59
    cluster.nodes = {"new": {"CPU": 1.0}}
    assert watch._without_place() is None
    cluster.nodes = {}
    assert watch._without_place() is None
    watch._waiting_since = time.monotonic() - 61
    assert watch._without_place() is not None


def test_workers_that_die_before_they_have_done_anything_end_the_stage(cluster: Cluster) -> None:
    cluster.nodes = {"one": {"CPU": 1.0}}
    cluster.dead = {b"of an earlier stage": True}
    dying = threading.Timer(0.2, cluster.dead.update, [{bytes([number]): False for number in range(3)}])
    with (
        pytest.raises(NexusError, match="collect: 3 workers died, and none has finished anything since"),
        patience.patience("collect", wanted(10), 1, {}) as watch,
    ):
        wait_for_ever(after=lambda: (watch.may_die(3), dying.start()))


def test_those_that_run_out_of_memory_are_told_from_others(cluster: Cluster) -> None:
    cluster.nodes = {"one": {"CPU": 1.0}}
    watch = patience.Patience("collect", wanted(10), 1, {})
    watch.may_die(2)
    assert watch._without_progress() is None
    cluster.dead = {b"a": True, b"b": True}
    verdict = watch._without_progress()
    assert verdict is not None
    assert "2 workers ran out of memory" in verdict.message
    assert "nexus-ray plan" in str(verdict.hint)
    assert "resources.memory_gib_per_worker" in str(verdict.hint)


def test_progress_forgives_the_deaths_before_it(cluster: Cluster) -> None:
    watch = patience.Patience("collect", wanted(10), 1, {})
    for number in range(6):
        cluster.dead[bytes([number])] = True
        watch.may_die(2)
        assert watch._without_progress() is None
        assert watch._without_progress() is None


def test_where_nobody_counts_any_number_may_die(cluster: Cluster) -> None:
    watch = patience.Patience("training", wanted(10), 1, {})
    cluster.dead = {bytes([number]): True for number in range(100)}
    assert watch._without_progress() is None


def test_a_stage_that_ends_well_is_left_alone(cluster: Cluster) -> None:
    cluster.nodes = {"one": {"CPU": 1.0}}
    with patience.patience("collect", wanted(0.001), 1, {}):
        time.sleep(0.2)
