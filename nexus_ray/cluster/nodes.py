"""The nodes of a cluster: what each of them has, which is the head, and how many workers they have room for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray.cluster.requests import bundle, in_words
from nexus_ray.config import ResourcesSection

_HEAD = "node:__internal_head__"  # the resource by which Ray marks the head
_NODE_LABEL = "ray.io/node-id"  # the label that every node has
_OURS_TO_SHOW = ("CPU", "GPU", "memory")
_ROUNDING = 1e-9
_MOST_SHOWN = 4  # nodes in a message


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: Ray's.
        address: for people.
        is_head: whether it is the head.
        resources: all that it has, free or not, as Ray names it.
    """

    id: str
    address: str
    is_head: bool
    resources: Mapping[str, float]

    def holds(self, request: Mapping[str, float]) -> int:
        """How many workers of this request it could hold if it did nothing else."""
        return min((self._holds(name, amount) for name, amount in request.items()), default=1)

    def _holds(self, name: str, amount: float) -> int:
        has = self.resources.get(name, 0.0)
        if name == "GPU" and amount < 1:  # a worker's share is of one GPU
            return int(has) * int(1 / amount + _ROUNDING) + int(has % 1 / amount + _ROUNDING)
        return int(has / amount + _ROUNDING)

    def __str__(self) -> str:
        shown = {name: amount for name, amount in self.resources.items() if _is_shown(name)}
        return f"{self.address}{' (head)' if self.is_head else ''}: {in_words(shown) or 'nothing'}"


def _is_shown(name: str) -> bool:
    return name in _OURS_TO_SHOW or not (name.startswith("node:") or name == "object_store_memory")


def nodes_of(table: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive, in a table as `ray.nodes()` gives it."""
    return [
        Node(str(row["NodeID"]), str(row["NodeManagerAddress"]), _HEAD in row["Resources"], dict(row["Resources"]))
        for row in table
        if row["Alive"]
    ]


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    import ray

    return nodes_of(ray.nodes())


def room(request: Mapping[str, float], nodes: Iterable[Node]) -> int:
    """How many workers of this request the nodes could hold together if they did nothing else."""
    return sum(node.holds(request) for node in nodes)


def allowed(nodes: Iterable[Node], selector: Mapping[str, str]) -> list[Node]:
    """The nodes that a label selector of `away_from_head` lets pass; all of them where it is empty."""
    return [node for node in nodes if not (selector and node.is_head)]


def away_from_head(nodes: Iterable[Node]) -> dict[str, str]:
    """The label selector of work that must not run on the head."""
    heads = [node.id for node in nodes if node.is_head]
    return {_NODE_LABEL: f"!{heads[0]}"} if heads else {}


def lacking(request: Mapping[str, float], nodes: Iterable[Node]) -> list[str]:
    """What of a request no node has enough of, as Ray names it; empty where no node has all of it together."""
    nodes = list(nodes)
    return [name for name, amount in request.items() if all(node.resources.get(name, 0.0) < amount for node in nodes)]


def listed(nodes: Sequence[Node]) -> str:
    """The nodes for people, the ones with most GPUs and CPUs first."""
    order = sorted(nodes, key=lambda node: (-node.resources.get("GPU", 0), -node.resources.get("CPU", 0), node.id))
    more = f"; and {len(order) - _MOST_SHOWN} more" if len(order) > _MOST_SHOWN else ""
    return "; ".join(str(node) for node in order[:_MOST_SHOWN]) + more


def needs(resources: ResourcesSection) -> str:
    """What a worker needs beside what is free in the cluster, in words."""
    import ray

    request, free = bundle(resources), ray.available_resources()
    there = in_words({name: free.get(name, 0.0) for name in request}) or "nothing"
    count = len(alive_nodes())
    return f"each needs {in_words(request)}; free on {count} node{'' if count == 1 else 's'}: {there}"
