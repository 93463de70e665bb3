"""Nodes that come and go: which are there, how many workers they can hold, and waiting for them with a bound."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nexus_ray.errors import NexusError

logger = logging.getLogger(__name__)
_NOTICED_SECONDS = 30.0  # within which Ray notices that a node is gone: 5 health checks, 3 s apart, and some more
_LOOK_SECONDS = 2.0
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 60.0, 300.0
_OUT_OF_MEMORY = ("OutOfMemoryError", "running low on memory", "OOM")
OUT_OF_MEMORY_HINT = (
    "`nexus-ray plan CONFIG` says what a worker needs; resources.memory_gib_per_worker keeps a node from getting more "
    "workers than it has memory for, fewer resources.workers or smaller batches need less"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a worker was ended because its node was short of memory (Ray's memory monitor says so in words only)."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in _OUT_OF_MEMORY)


def alive_nodes() -> dict[str, dict[str, float]]:
    """What each node that is there has in all, by its id."""
    import ray

    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def lost_since(before: Mapping[str, object], patience: float = _NOTICED_SECONDS) -> set[str]:
    """Nodes that were there `before` and are not any more.

    A worker of a lost node is missed sooner than the node itself: where there are others, it is waited for so long.
    """
    deadline = time.monotonic() + (patience if len(before) > 1 else 0)
    while True:
        lost = set(before) - set(alive_nodes())
        if lost or time.monotonic() >= deadline:
            return lost
        time.sleep(0.5)


def as_resources(options: Mapping[str, float]) -> dict[str, float]:
    """What nodes call the resources that the options of an actor ask for."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return {names.get(name, name): amount for name, amount in options.items() if amount}


def places(request: Mapping[str, float], nodes: Mapping[str, Mapping[str, float]]) -> int:
    """How many workers that each need `request` the nodes could hold, if they did nothing else."""
    return sum(
        min((int(has.get(name, 0.0) / amount) for name, amount in request.items()), default=1) for has in nodes.values()
    )


@contextmanager
def waiting_at_most(minutes: float, request: Mapping[str, float], workers: int, description: str) -> Iterator[None]:
    """Interrupt the block when for so long no nodes were there that could hold its workers: Ray waits for ever.

    Args:
        minutes: the bound.
        request: what each worker needs, as Ray names it (`CPU`, `GPU`, `memory`, ...).
        workers: how few of them the block can do with.
        description: of the block, for messages.

    Raises:
        NexusError: it was interrupted; says what is missing.
    """
    if threading.current_thread() is not threading.main_thread():  # nobody but the main thread can be interrupted
        yield
        return
    watch = _Watch(minutes * 60, request, workers, description)
    watch.start()
    try:
        yield
    except BaseException as error:
        if watch.gave_up:
            raise NexusError(
                f"{description}: for {minutes:g} minutes there was no place for {watch.needs}; {watch.there()}",
                "look why the cluster brings no node (`ray status`), or raise resources.max_wait_minutes; "
                "the same command continues",
            ) from error
        raise
    finally:
        watch.end()


class _Watch(threading.Thread):
    """Looks at the nodes; says that it waits, and interrupts the main thread when that takes too long."""

    def __init__(self, seconds: float, request: Mapping[str, float], workers: int, description: str) -> None:
        super().__init__(daemon=True, name="nodes")
        self.seconds = seconds
        self.request = request
        self.workers = workers
        self.description = description
        self.gave_up = False
        self._ended = threading.Event()
        self._nodes: Mapping[str, Mapping[str, float]] = {}

    @property
    def needs(self) -> str:
        """What is waited for, in words."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.request.items()) or "nothing"
        return f"{self.workers} worker{'s' if self.workers > 1 else ''} of {each}{' each' if self.workers > 1 else ''}"

    def there(self) -> str:
        """What is there, in words."""
        held = places(self.request, self._nodes)
        return f"the {len(self._nodes)} nodes of the cluster could hold {held}"

    def run(self) -> None:
        since, told = None, 0.0
        while not self._ended.wait(_LOOK_SECONDS):
            self._nodes = alive_nodes()
            now = time.monotonic()
            if places(self.request, self._nodes) >= self.workers:
                since, told = None, 0.0
                continue
            since = now if since is None else since
            if now - since >= self.seconds:
                self.gave_up = True
                _interrupt_main_thread()
                return
            if now - since >= told + (_NEXT_WORD_SECONDS if told else _FIRST_WORD_SECONDS):
                told = now - since
                logger.warning(
                    "%s waits for nodes: no place for %s; %s (waiting at most %.0f minutes, so far %.0f)",
                    self.description, self.needs, self.there(), self.seconds / 60, told / 60,
                )  # fmt: skip

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self.join()


def _interrupt_main_thread() -> None:
    """Do what Ctrl-C does; a signal also ends a wait for a lock, which `_thread.interrupt_main` does not."""
    handled = (number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number)))
    number = next(handled, None)
    if number is not None:
        signal.pthread_kill(threading.main_thread().ident or 0, number)
