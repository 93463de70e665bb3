"""Signs of life in a log: after a minute without a line, one says what is being done and what it waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic  # a name of its own: tests that turn console.py's clock leave this one alone

logger = logging.getLogger(__name__)
INTERVAL_SECONDS = 60.0
_doing: list[Callable[[], str]] = []  # the outermost first


@contextmanager
def doing(what: str | Callable[[], str]) -> Iterator[None]:
    """Say `what` in the signs of life that come while the block runs, after what the blocks around it say."""

    def say() -> str:
        return what if isinstance(what, str) else what()

    _doing.append(say)
    try:
        yield
    finally:
        _doing.remove(say)


class Heartbeat(threading.Thread):
    """Logs a line whenever `interval` seconds have passed without one.

    Args:
        interval: seconds.
    """

    def __init__(self, interval: float = INTERVAL_SECONDS) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._interval = interval
        self._silent_since = monotonic()
        self._ended = threading.Event()

    def line_written(self) -> None:
        """The log has had a line."""
        self._silent_since = monotonic()

    def end(self) -> None:
        """Stop."""
        self._ended.set()

    def run(self) -> None:
        """Wait until a line is due, again and again."""
        while not self._ended.wait(max(0.01, self._silent_since + self._interval - monotonic())):
            now = monotonic()
            if now - self._silent_since >= self._interval:
                self._beat()
                self._silent_since = now

    def _beat(self) -> None:
        try:
            said = "; ".join(filter(None, [say() for say in list(_doing)]))
        except Exception:  # what it asks may be gone by now; a sign of life must not end what it is of
            said = ""
        if said:
            logger.info("still at %s", said)
