"""What a pool of workers tells: how much is left, what each piece took, which workers died and came again.

A worker knows that it was started again, and Ray does not say so to the driver: it says so with its next result.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from nexus_ray.observing.command import record
from nexus_ray.observing.metrics import add, labelled, observe, present_labels, put
from nexus_ray.observing.stage import present_tally

_WORKER, _AGAIN = "_worker", "_worker_again"  # columns that a worker adds to its results


class WatchedWorker:
    """Runs the worker of a pool and counts what it does, in its own process.

    Args:
        make: makes the worker.
        arguments: of `make`.
        labels: of metrics.
    """

    def __init__(
        self,
        make: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]],
        arguments: Mapping[str, Any],
        labels: Mapping[str, str],
    ) -> None:
        self._labels = dict(labels)
        self._is_again = _was_started_again()  # until the driver has been told
        with labelled(**self._labels):
            if self._is_again:
                add("nexus_ray_stage_worker_restarts", 1)
            self._worker = make(**arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The worker's result, with what the driver wants to know of the worker."""
        source = _source(row)
        began = time.monotonic()
        with labelled(**self._labels):
            put("nexus_ray_stage_busy_workers", 1)
            try:
                result = self._worker(row)
            finally:
                put("nexus_ray_stage_busy_workers", 0)
            observe("nexus_ray_stage_item_seconds", time.monotonic() - began)
            if not result.get("error"):
                add("nexus_ray_stage_items", 1)
                add("nexus_ray_stage_tokens", float(result.get("tokens", 0)), source=source)
                add("nexus_ray_stage_written_bytes", float(result.get("bytes", 0)))
        again, self._is_again = self._is_again, False
        return {**result, _WORKER: f"{socket.gethostname()}:{os.getpid()}", _AGAIN: again}


def _was_started_again() -> bool:
    """Whether this process is an actor that takes the place of one that died."""
    import ray

    if not ray.is_initialized():  # asking would start it
        return False
    try:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
    except Exception:  # no actor, or its record cannot be had now: watching never ends the work that is watched
        return False


def _source(row: Mapping[str, Any]) -> str:
    """The source of text that a piece of work is about, "" where it is about several."""
    shard = row.get("shard")
    source = row.get("source") or (shard.get("source") if isinstance(shard, Mapping) else None)
    return str(source or "")


class PoolWatch:
    """A pool as its driver sees it; a context manager while it works.

    Args:
        description: what it does.
        items: pieces of work.

    Attributes:
        labels: of the metrics that its workers record.
    """

    def __init__(self, description: str, items: int) -> None:
        self.labels: dict[str, str] = present_labels()
        self._description = description
        self._left = items
        self._began = time.monotonic()
        self._tokens = 0
        self._workers: set[str] = set()

    def take(self, row: dict[str, Any]) -> None:
        """Count a result, and take out of it what its worker has added."""
        worker, again = str(row.pop(_WORKER, "")), bool(row.pop(_AGAIN, False))
        tally, tokens = present_tally(), int(row.get("tokens") or 0)
        self._left -= 1
        self._workers.add(worker)
        self._tokens += tokens
        tally.tokens += tokens
        tally.shards_bytes += int(row.get("bytes") or 0)
        if again:
            tally.restarts += 1
            record("worker_restarted", pool=self._description, worker=worker, left=self._left)
        put("nexus_ray_stage_queue_items", self._left)
        if self._tokens:
            put("nexus_ray_stage_tokens_per_second", self._tokens / max(time.monotonic() - self._began, 1e-9))

    def __enter__(self) -> Self:
        record("pool_started", pool=self._description, items=self._left)
        put("nexus_ray_stage_queue_items", self._left)
        return self

    def __exit__(self, *_: object) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        done = {"workers": len(self._workers), "left": self._left, "seconds": seconds}
        record("pool_ended", pool=self._description, **done, **({"tokens": self._tokens} if self._tokens else {}))
        put("nexus_ray_stage_queue_items", 0)
        put("nexus_ray_stage_tokens_per_second", 0)
