"""A tracker in a thread of its own: a slow network does not hold training up, and what fails is given up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

_WAITING = 10_000  # records that may wait for a slow tracker; later ones are dropped
_CLOSING_SECONDS = 30.0


class Tracker(Protocol):
    """Where records go besides `metrics.jsonl`. It may raise anything."""

    def write(self, event: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Take a record: its numbers and texts by tag."""
        ...

    def close(self, *, failed: bool) -> None:
        """Nothing more will come."""
        ...


class Background:
    """Gives records to a tracker that is made in, and used by, one thread.

    Args:
        name: of the tracker, for messages.
        make: makes it.

    Attributes:
        lost: why it gets no more records; None while it does.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self.lost: str | None = None
        self._make = make
        self._records: queue.Queue[Callable[[Tracker], None]] = queue.Queue(_WAITING)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, event: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Leave a record for the tracker; returns at once and never raises."""
        if self.lost:
            return
        try:
            self._records.put_nowait(lambda tracker: tracker.write(event, step, numbers, texts))
        except queue.Full:
            self._lose(f"it is {_WAITING:,} records behind")

    def close(self, *, failed: bool, seconds: float = _CLOSING_SECONDS) -> None:
        """Let the tracker finish what waits, but no longer than so many seconds."""

        def end(tracker: Tracker) -> None:
            self._closing = True
            tracker.close(failed=failed)

        try:
            self._records.put_nowait(end)
        except queue.Full:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._lose(f"it did not finish within {seconds:g} s")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while not self._closing:
                self._records.get()(tracker)
        except Exception as error:  # whatever a tracker raises: training goes on
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, reason: str) -> None:
        self.lost = self.lost or reason
