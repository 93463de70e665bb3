"""Finding a place for workers before they are asked for: Ray itself would wait for ever, and say nothing.

On a cluster a placement group tries it: it is ready when there is room, and while it waits the autoscaler sees it, and
says of it whether it has nodes to start. Work keeps away from the head where there are other nodes or can be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from nexus_ray.cluster.autoscaler import Outlook, is_reporting, outlook
from nexus_ray.cluster.nodes import Node, alive_nodes, allowed, away_from_head, room
from nexus_ray.cluster.requests import bundle, in_words
from nexus_ray.cluster.session import ensure_ray, on_cluster
from nexus_ray.cluster.shortage import no_place, waited_in_vain
from nexus_ray.config import ResourcesSection

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 30.0  # for nodes that are about to join, and for the autoscaler to look at what is asked of it
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 15.0, 60.0


class Reservation(Protocol):
    """Room that is asked for."""

    def ready(self, seconds: float) -> bool:
        """Whether there is room, now or within so many seconds."""
        ...

    def outlook(self) -> tuple[Outlook, str]:
        """What the autoscaler makes of it."""
        ...


Reserve = Callable[[dict[str, str]], AbstractContextManager[Reservation]]


def find_place(what: str, resources: ResourcesSection, workers: int = 1) -> dict[str, str]:
    """Wait until there is room for workers, and say where they may be.

    Args:
        what: they do, for messages.
        resources: what each of them gets.
        workers: how many there must be room for at once.

    Returns:
        The label selector that Ray is to place them by; empty where they may be anywhere.

    Raises:
        NexusError: there is no such place and none comes, within a minute; or it takes longer than
            `resources.max_wait_minutes`.
    """
    ensure_ray()
    search = Search(what, resources, workers)
    if not on_cluster():
        search.require_room(alive_nodes(), "this machine")
        return {}
    nodes = alive_nodes()
    if resources.use_head or not away_from_head(nodes):
        return search.wait({})
    if all(node.is_head for node in nodes) and not is_reporting():
        return search.on_the_only_node()
    return search.wait(away_from_head(nodes))


class Search:
    """The search for room for workers of one kind.

    Args:
        what: they do, for messages.
        resources: what each of them gets.
        workers: how many there must be room for at once.
        look: gives the nodes.
        reserve: asks for room on nodes that a label selector lets pass, for a block.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        resources: ResourcesSection,
        workers: int,
        look: Callable[[], list[Node]] = alive_nodes,
        reserve: Reserve | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = what
        self.resources = resources
        self.workers = workers
        self.request = bundle(resources)
        self._look = look
        self._reserve = reserve or self._placement_group
        self._clock = clock
        self._told: float | None = None

    def require_room(self, nodes: Sequence[Node], where: str) -> None:
        """Refuse what these nodes cannot hold, whatever else they do.

        Raises:
            NexusError: they cannot; names what is missing.
        """
        if room(self.request, nodes) < self.workers:
            raise no_place(self.what, self.request, self.workers, nodes, where)

    def on_the_only_node(self) -> dict[str, str]:
        """Wait for room on a cluster that has nothing but its head."""
        logger.info("%s: the cluster has one node and nothing to add others, so its head does the work", self.what)
        return self.wait({})

    def wait(self, selector: dict[str, str]) -> dict[str, str]:
        """Wait for room on the nodes that `selector` lets pass, or on the head where there turn out to be no others.

        Raises:
            NexusError: as `find_place`.
        """
        with self._reserve(selector) as reserved:
            begin = lacking_since = hopeless_since = self._clock()
            while not reserved.ready(_LOOK_SECONDS):
                now, nodes = self._clock(), self._look()
                usable = allowed(nodes, selector)
                if room(self.request, usable) >= self.workers:
                    lacking_since = hopeless_since = now
                    self._tell(now - begin, "the nodes that have it are busy")
                    continue
                expected, reason = reserved.outlook()
                hopeless_since = now if expected is Outlook.COMING else hopeless_since
                is_late = now - hopeless_since >= _GRACE_SECONDS
                if not usable and room(self.request, nodes) >= self.workers and (is_late or expected is Outlook.NEVER):
                    break
                if is_late:
                    raise no_place(
                        self.what,
                        self.request,
                        self.workers,
                        usable,
                        excluded=[node for node in nodes if node not in usable],
                    )
                if now - lacking_since >= self.resources.max_wait_minutes * 60:
                    raise waited_in_vain(self.what, self.request, self.workers, now - lacking_since, reason)
                self._tell(now - begin, reason or expected.value)
            else:
                return selector
        return self.on_the_only_node()

    def _tell(self, waited: float, why: str) -> None:
        """Say now and then what is waited for."""
        if waited >= (_FIRST_WORD_SECONDS if self._told is None else self._told + _NEXT_WORD_SECONDS):
            self._told = waited
            for_whom = "a worker" if self.workers == 1 else f"{self.workers} workers, each"
            needs = in_words(self.request)
            logger.info("%s: waiting %s for room for %s with %s: %s", self.what, _long(waited), for_whom, needs, why)

    @contextmanager
    def _placement_group(self, selector: dict[str, str]) -> Iterator[Reservation]:
        from ray.util.placement_group import placement_group, remove_placement_group

        bundles = [dict(self.request) for _ in range(self.workers)]
        group = placement_group(
            bundles,
            strategy=self.resources.placement or "PACK",
            bundle_label_selector=[dict(selector) for _ in bundles] if selector else None,
        )
        try:
            yield _Group(group)
        finally:
            remove_placement_group(group)


class _Group:
    """A placement group as a reservation."""

    def __init__(self, group: PlacementGroup) -> None:
        self._group = group

    def ready(self, seconds: float) -> bool:
        return bool(self._group.wait(seconds))

    def outlook(self) -> tuple[Outlook, str]:
        return outlook(self._group.id.hex())


def _long(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
