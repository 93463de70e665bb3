"""Waiting for workers with a bound: Ray waits for nodes for ever, and restarts for ever what dies as it starts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nexus_ray.cluster.deaths import OUT_OF_MEMORY_HINT, dead_workers
from nexus_ray.cluster.nodes import alive_nodes, allowed, listed, room
from nexus_ray.cluster.requests import bundle, in_words
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError
from nexus_ray.interrupting import interrupt_main_thread

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 60.0, 300.0
_CONTINUES = "the same command continues"


class Patience(threading.Thread):
    """Looks after the workers of a stage, says when it waits, and interrupts the main thread when that is in vain.

    Args:
        description: of the stage, for messages.
        resources: what each worker gets, and how long there may be no place for them.
        workers: how few of them the stage can do with.
        selector: label selector of the nodes they may be on, as `find_place` returns it.
    """

    def __init__(
        self, description: str, resources: ResourcesSection, workers: int, selector: Mapping[str, str]
    ) -> None:
        super().__init__(daemon=True, name="patience")
        self.description = description
        self.request = bundle(resources)
        self.workers = workers
        self.selector = selector
        self.minutes = resources.max_wait_minutes
        self.verdict: NexusError | None = None
        self._ended = threading.Event()
        self._waiting_since: float | None = None
        self._told = 0.0
        self._most_deaths: int | None = None
        self._forgiven = dead_workers()
        self._progress = threading.Event()

    def may_die(self, most: int) -> None:
        """Say that something has been finished: until the next time no more than so many workers may die."""
        self._most_deaths = most
        self._progress.set()

    def run(self) -> None:
        """Look until it ends, or until there is a verdict."""
        while not self._ended.wait(_LOOK_SECONDS):
            self.verdict = self._without_place() or self._without_progress()
            if self.verdict is not None:
                interrupt_main_thread()
                return

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self.join()

    def _without_place(self) -> NexusError | None:
        """The verdict on the nodes that are there."""
        nodes, now = allowed(alive_nodes(), self.selector), time.monotonic()
        held = room(self.request, nodes)
        if held >= self.workers:
            self._waiting_since, self._told = None, 0.0
            return None
        self._waiting_since = self._waiting_since or now
        waited = now - self._waiting_since
        there = f"could hold {held} ({listed(nodes)})" if nodes else "are gone"
        what = f"no place for {_needs(self.workers, self.request)}; the nodes {there}"
        if waited >= self.minutes * 60:
            return NexusError(
                f"{self.description}: for {self.minutes:g} minutes there was {what}",
                "look why the cluster brings no node (`ray status`), ask for less with `resources`, or raise "
                f"resources.max_wait_minutes; {_CONTINUES}",
            )
        if waited >= self._told + (_NEXT_WORD_SECONDS if self._told else _FIRST_WORD_SECONDS):
            self._told = waited
            logger.warning(
                "%s waits for nodes: %s (it waits %g minutes at most, so far %.0f)",
                self.description, what, self.minutes, waited / 60,
            )  # fmt: skip
        return None

    def _without_progress(self) -> NexusError | None:
        """The verdict on workers that die before they have done anything."""
        if self._most_deaths is None:
            return None
        if self._progress.is_set():
            self._progress.clear()
            self._forgiven = dead_workers()
            return None
        deaths = [is_memory for worker, is_memory in dead_workers().items() if worker not in self._forgiven]
        if len(deaths) < max(1, self._most_deaths):
            return None
        if any(deaths):
            what = f"{sum(deaths)} workers ran out of memory, and none has finished anything since"
            return NexusError(f"{self.description}: {what}", f"{OUT_OF_MEMORY_HINT}; {_CONTINUES}")
        return NexusError(
            f"{self.description}: {len(deaths)} workers died, and none has finished anything since",
            f"their logs, in Ray's session directory on the nodes, say why (`ray logs`); {_CONTINUES}",
        )


@contextmanager
def patience(
    description: str, resources: ResourcesSection, workers: int, selector: Mapping[str, str]
) -> Iterator[Patience]:
    """A `Patience` for the block; only the main thread can be interrupted, so elsewhere it does not look.

    Raises:
        NexusError: the wait was in vain; says for what.
    """
    watch = Patience(description, resources, workers, selector)
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    watch.start()
    try:
        yield watch
    except BaseException as error:
        if watch.verdict is not None:
            raise watch.verdict from error
        raise
    finally:
        watch.end()


def _needs(workers: int, request: Mapping[str, float]) -> str:
    """What is waited for, in words."""
    each = in_words(request) or "nothing"
    return f"{workers} workers of {each} each" if workers > 1 else f"a worker of {each}"
