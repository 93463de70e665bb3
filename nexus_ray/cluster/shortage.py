"""What to say when there is no place for workers: what is missing, what there is, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nexus_ray.cluster.nodes import Node, lacking, listed, room
from nexus_ray.cluster.requests import in_words
from nexus_ray.errors import NexusError


def no_place(
    what: str,
    request: Mapping[str, float],
    workers: int,
    nodes: Sequence[Node],
    where: str = "",
    excluded: Sequence[Node] = (),
) -> NexusError:
    """The error for workers that the nodes can never hold.

    Args:
        what: the workers do.
        request: of each of them, as Ray names it.
        workers: how many there must be room for at once.
        nodes: those that they may be on.
        where: the name of the only node; "" on a cluster.
        excluded: nodes that they may not be on.
    """
    needed = f"{what}: {_each(workers)} {in_words(request)}"
    changes = "; ".join(_changes(request, workers, nodes))
    if where:
        return NexusError(f"{needed}; {where} has {_has(nodes, request)}", changes)
    there = f"the nodes: {listed(nodes)}" if nodes else "there is no node but the head"
    if excluded and room(request, [*nodes, *excluded]) >= workers:
        changes += f"{'; ' if changes else ''}resources.use_head=true lets the head work too"
    return NexusError(
        f"{needed}; {_missing(request, nodes)} ({there}), and no autoscaler adds one",
        f"{changes}; or start nodes that have it" if changes else "start nodes that have it",
    )


def waited_in_vain(what: str, request: Mapping[str, float], workers: int, seconds: float, reason: str) -> NexusError:
    """The error for nodes that were on their way and did not come.

    Args:
        what: the workers do.
        request: of each of them, as Ray names it.
        workers: how many there must be room for at once.
        seconds: that were waited.
        reason: why a node could not be started, as the autoscaler says; "" if it does not.
    """
    return NexusError(
        f"{what}: {_each(workers)} {in_words(request)}, and no node has come in {seconds / 60:.0f} minutes"
        + (f" ({reason})" if reason else ""),
        "`ray status` says what the autoscaler is doing; resources.max_wait_minutes=MINUTES waits longer; the same "
        "command continues",
    )


def _each(workers: int) -> str:
    return "a worker needs" if workers == 1 else f"{workers} workers at a time need, each,"


def _missing(request: Mapping[str, float], nodes: Sequence[Node]) -> str:
    """What the nodes do not have."""
    if names := lacking(request, nodes):
        return f"no node has {in_words({name: request[name] for name in names})}"
    held = room(request, nodes)
    return f"there is room for {held} only" if held else "no node has all of it"


def _has(nodes: Sequence[Node], request: Mapping[str, float]) -> str:
    """What nodes have, together, of what is asked for; a GPU that is not there is named too."""
    totals = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in {"CPU": 0, **request}}
    words = in_words({name: amount for name, amount in totals.items() if amount})
    return f"{words} and no GPU" if "GPU" in request and not totals["GPU"] else words


def _changes(request: Mapping[str, float], workers: int, nodes: Sequence[Node]) -> Iterator[str]:
    """Settings that ask for less."""
    for name in lacking(request, nodes):
        most = max((node.resources.get(name, 0.0) for node in nodes), default=0.0)
        if name == "GPU":
            yield f"resources.gpus_per_worker={most:g}" + ("" if most else " computes on CPUs")
        elif name == "CPU":
            if most >= 1:
                yield f"resources.cpus_per_worker={int(most)}"
        elif name == "memory":
            yield f"resources.memory_gib_per_worker={int(most / 2**30 * 10) / 10:g}"
        elif name.startswith("accelerator_type:"):
            yield "resources.accelerator_type names another kind of GPU"
        else:
            yield f"resources.custom_per_worker without {name}"
    held = room(request, nodes)
    if 0 < held < workers:
        yield f"resources.workers={held}, or resources.min_workers={held} to begin with fewer"
