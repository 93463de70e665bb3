"""What the workers of a training and its driver tell each other: records as they are written, the error that ends it,
and the driver's wish for a checkpoint before it stops.

They go through an actor beside the driver, and through no file: they arrive at once, whatever the storage of the run
does, also when it is what fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from nexus_ray.errors import NexusError, error_from_record, error_to_record

_WAITING = 10_000  # records that may wait for the driver; older ones are dropped, and metrics.jsonl has them
_DELIVERY_SECONDS = 30.0
_NODE = "ray.io/node-id"  # the label that Ray gives every node

Record = Mapping[str, Any]


class Box:
    """What was told and not yet taken; runs as a Ray actor."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=_WAITING)
        self._error: Mapping[str, str | None] | None = None
        self._wanted = False

    def add(self, record: Record) -> None:
        """Keep a record."""
        self._records.append(record)

    def take(self) -> list[Record]:
        """The records since the last call."""
        taken = list(self._records)
        self._records.clear()
        return taken

    def fail(self, error: Mapping[str, str | None]) -> None:
        """Keep the error that ends the training: the first one is the cause of the others."""
        self._error = self._error or error

    def error(self) -> Mapping[str, str | None] | None:
        """The error, if there is one."""
        return self._error

    def want_checkpoint(self, wanted: bool) -> None:
        """The driver wants one now; or it has been written, or comes too late."""
        self._wanted = wanted

    def is_wanted(self) -> bool:
        """Whether a checkpoint is wanted."""
        return self._wanted


class Messages:
    """The way from workers to the driver; may be sent to workers.

    Args:
        box: handle of an actor of class `Box`.
    """

    def __init__(self, box: Any) -> None:
        self._box = box

    @classmethod
    def open(cls) -> Self:
        """Start the actor on the node of this process, where it lives as long as something refers to it."""
        import ray

        here = {_NODE: ray.get_runtime_context().get_node_id()}
        return cls(ray.remote(num_cpus=0, label_selector=here)(Box).remote())

    def tell(self, record: Record) -> None:
        """Send a record; returns at once."""
        self._box.add.remote(dict(record))

    def delivered(self) -> None:
        """Wait until everything that this process told has arrived, but not for ever."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._box.error.remote(), timeout=_DELIVERY_SECONDS)

    def fail(self, error: NexusError) -> None:
        """Leave the error that ends the training for the driver."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._box.fail.remote(error_to_record(error)), timeout=_DELIVERY_SECONDS)

    def failure(self) -> NexusError | None:
        """The error that a worker left."""
        import ray

        with suppress(ray.exceptions.RayError):
            found = ray.get(self._box.error.remote(), timeout=_DELIVERY_SECONDS)
            return error_from_record(found) if found else None
        return None

    def want_checkpoint(self, wanted: bool, seconds: float = _DELIVERY_SECONDS) -> None:
        """Ask for a checkpoint, or take that back: it is written, or too late. Waits so many seconds at most."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._box.want_checkpoint.remote(wanted), timeout=seconds)

    def is_checkpoint_wanted(self, seconds: float = _DELIVERY_SECONDS) -> bool | None:
        """Whether one was asked for and not written yet; None when that is not to be learnt in so many seconds."""
        import ray

        with suppress(ray.exceptions.RayError):
            return bool(ray.get(self._box.is_wanted.remote(), timeout=seconds))
        return None

    def new_records(self) -> list[Record]:
        """Records since the last call; none when the actor cannot be reached."""
        import ray

        with suppress(ray.exceptions.RayError):
            records: list[Record] = ray.get(self._box.take.remote(), timeout=_DELIVERY_SECONDS)
            return records
        return []
