"""Finding a place for workers: waiting for what can come, refusing what cannot, keeping away from the head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nexus_ray.cluster.autoscaler import Outlook
from nexus_ray.cluster.nodes import Node, away_from_head, nodes_of, room
from nexus_ray.cluster.placement import Search
from nexus_ray.cluster.requests import actor_options, bundle, in_words
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError

GPU = {"gpus_per_worker": 1, "cpus_per_worker": 8}


def node(name: str, **resources: float) -> Node:
    return Node(name, name, name == "head", resources)


HEAD = node("head", CPU=4)


class Cluster:
    """A cluster that changes as the clock goes on: every look at whether there is room takes a second.

    Args:
        nodes: those that are there, by the second.
        says: what the autoscaler says, by the second.
        busy_until: the second before which nothing is free.
    """

    def __init__(
        self,
        nodes: Callable[[float], list[Node]],
        says: Callable[[float], Outlook] = lambda now: Outlook.UNKNOWN,
        busy_until: float = 0,
    ) -> None:
        self.now = 0.0
        self.nodes, self.says, self.busy_until = nodes, says, busy_until
        self.reserved: list[dict[str, str]] = []

    def search(self, workers: int = 1, **resources: object) -> Search:
        self.resources = ResourcesSection.model_validate(resources)
        self.workers = workers
        look = lambda: self.nodes(self.now)  # noqa: E731
        return Search("collect", self.resources, workers, look, self.reserve, lambda: self.now)

    @contextmanager
    def reserve(self, selector: dict[str, str]) -> Iterator[Cluster]:
        self.selector = selector
        self.reserved.append(selector)
        yield self

    def ready(self, seconds: float) -> bool:
        self.now += seconds
        allowed = [node for node in self.nodes(self.now) if not (self.selector and node.is_head)]
        return self.now > self.busy_until and room(bundle(self.resources), allowed) >= self.workers

    def outlook(self) -> tuple[Outlook, str]:
        return self.says(self.now), ""


AWAY = away_from_head([HEAD])


def refusal(cluster: Cluster, workers: int = 1, **resources: object) -> str:
    with pytest.raises(NexusError) as caught:
        cluster.search(workers, **resources).wait(AWAY)
    return str(caught.value)


class TestRefusals:
    @pytest.mark.parametrize("says", [Outlook.NEVER, Outlook.UNKNOWN])
    def test_what_cannot_be_placed_is_refused_within_a_minute_by_name(self, says):
        cluster = Cluster(lambda now: [HEAD, node("a", CPU=4), node("b", CPU=2)], lambda now: says)
        said = refusal(cluster, **GPU, accelerator_type="L40S")
        assert cluster.now <= 60
        assert said.startswith("collect: a worker needs 8 CPUs, 1 GPU (L40S); no node has 8 CPUs, 1 GPU (L40S)")
        assert "(the nodes: a: 4 CPUs; b: 2 CPUs), and no autoscaler adds one" in said
        assert "resources.cpus_per_worker=4; resources.gpus_per_worker=0 computes on CPUs" in said

    def test_a_kind_of_gpu_that_is_not_there_is_told_from_a_gpu_that_is_not(self):
        has = {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}
        cluster = Cluster(lambda now: [HEAD, Node("a", "a", False, has)])
        said = refusal(cluster, **GPU, accelerator_type="L40S")
        assert "no node has accelerator (L40S) (the nodes: a: 8 CPUs, 1 GPU (A10G))" in said
        assert "gpus_per_worker=0" not in said

    def test_what_only_different_nodes_have_is_no_place(self):
        cluster = Cluster(lambda now: [HEAD, node("a", CPU=8), node("b", CPU=2, GPU=1)])
        assert "no node has all of it" in refusal(cluster, **GPU)

    def test_workers_that_must_run_together_are_counted(self):
        cluster = Cluster(lambda now: [HEAD, node("a", CPU=8, GPU=1), node("b", CPU=16, GPU=1)])
        said = refusal(cluster, 4, **GPU)
        assert "4 workers at a time need, each, 8 CPUs, 1 GPU; there is room for 2 only" in said
        assert "resources.workers=2, or resources.min_workers=2" in said

    def test_the_head_is_named_where_it_would_do(self):
        cluster = Cluster(lambda now: [node("head", CPU=8, GPU=1), node("a", CPU=8)])
        assert "resources.use_head=true lets the head work too" in refusal(cluster, **GPU)

    def test_one_machine_refuses_at_once(self):
        search = Cluster(lambda now: []).search(gpus_per_worker=1)
        with pytest.raises(NexusError, match="needs 1 CPU, 1 GPU; this machine has 4 CPUs and no GPU") as caught:
            search.require_room([HEAD], "this machine")
        assert caught.value.hint == "resources.gpus_per_worker=0 computes on CPUs"


class TestWaiting:
    def test_a_node_that_comes_is_waited_for(self, caplog, monkeypatch):
        slow = 900
        cluster = Cluster(lambda now: [HEAD] + [node("a", CPU=8, GPU=1)] * (now > slow), lambda now: Outlook.COMING)
        with caplog.at_level(logging.INFO, "nexus_ray"):
            monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
            assert cluster.search(**GPU).wait(AWAY) == AWAY
        assert slow < cluster.now < slow + 5
        said = {record.getMessage() for record in caplog.records}
        assert "collect: waiting 15 s for room for a worker with 8 CPUs, 1 GPU: a node is on its way" in said
        assert 10 <= len(said) <= 20

    def test_a_node_that_does_not_come_is_waited_for_as_long_as_is_said(self):
        cluster = Cluster(lambda now: [HEAD], lambda now: Outlook.COMING)
        said = refusal(cluster, **GPU, max_wait_minutes=3)
        assert 180 <= cluster.now < 190
        assert "no node has come in 3 minutes" in said
        assert "resources.max_wait_minutes" in said

    def test_busy_nodes_are_waited_for_without_an_end(self):
        cluster = Cluster(lambda now: [HEAD, node("a", CPU=8, GPU=1)], busy_until=7200)
        assert cluster.search(**GPU, max_wait_minutes=1).wait(AWAY) == AWAY
        assert cluster.now > 7200

    def test_nodes_that_are_just_joining_are_given_time(self):
        cluster = Cluster(lambda now: [HEAD] + [node("a", CPU=8, GPU=1)] * (now > 20), lambda now: Outlook.NEVER)
        assert cluster.search(**GPU).wait(AWAY) == AWAY

    def test_an_autoscaler_that_finds_no_more_nodes_ends_the_wait(self):
        cluster = Cluster(lambda now: [HEAD], lambda now: Outlook.COMING if now < 100 else Outlook.NEVER)
        assert "no autoscaler adds one" in refusal(cluster, **GPU)
        assert 100 < cluster.now < 160


class TestHead:
    def test_work_keeps_away_from_it(self):
        assert away_from_head([node("a", CPU=1), HEAD]) == {"ray.io/node-id": "!head"}
        cluster = Cluster(lambda now: [HEAD, node("a", CPU=8)])
        assert cluster.search(cpus_per_worker=2).wait(AWAY) == AWAY

    def test_the_only_node_does_the_work_where_no_other_can_come(self):
        cluster = Cluster(lambda now: [HEAD], lambda now: Outlook.NEVER)
        assert cluster.search(cpus_per_worker=2).wait(AWAY) == {}
        assert cluster.reserved == [AWAY, {}]
        assert cluster.now < 60

    def test_it_does_not_where_others_can_come(self):
        cluster = Cluster(lambda now: [HEAD] + [node("a", CPU=8)] * (now > 200), lambda now: Outlook.COMING)
        assert cluster.search(cpus_per_worker=2).wait(AWAY) == AWAY
        assert cluster.now > 200


def test_a_request_is_the_same_for_actors_and_for_placement_groups():
    own = {"memory_gib_per_worker": 2, "accelerator_type": "H100", "custom_per_worker": {"spot": 0.5}}
    resources = ResourcesSection.model_validate({**GPU, **own})
    assert actor_options(resources) == {
        "num_cpus": 8,
        "num_gpus": 1,
        "memory": 2 << 30,
        "accelerator_type": "H100",
        "resources": {"spot": 0.5},
    }
    assert bundle(resources) == {"CPU": 8, "GPU": 1, "memory": 2 << 30, "accelerator_type:H100": 0.001, "spot": 0.5}
    assert in_words(bundle(resources)) == "8 CPUs, 1 GPU (H100), 2 GiB of memory, 0.5 spot"
    assert bundle(ResourcesSection()) == {"CPU": 1}


def test_dead_nodes_do_not_count():
    row = {"NodeID": "x", "NodeManagerAddress": "1.2.3.4", "Resources": {"CPU": 2.0, "node:__internal_head__": 1.0}}
    [alive] = nodes_of([row | {"Alive": True}, row | {"Alive": False}])
    assert alive.is_head
    assert str(alive) == "1.2.3.4 (head): 2 CPUs"


def test_a_share_of_a_gpu_is_of_one_gpu():
    assert [node("a", GPU=2).holds({"GPU": share}) for share in (0.6, 0.5, 0.3, 1, 2)] == [2, 4, 6, 2, 1]


@pytest.mark.parametrize(("has", "held"), [({"CPU": 7, "GPU": 4}, 3), ({"CPU": 7, "GPU": 0.6}, 1), ({"CPU": 7}, 0)])
def test_the_scarcest_resource_decides_how_many_workers_a_node_holds(has, held):
    assert node("a", **has).holds({"CPU": 2, "GPU": 0.5}) == held
