"""A text of lines in an object store, where nothing can be appended: it is written whole, now and then, by a thread.

What is written waits in memory and costs whoever writes it nothing. A store that refuses for a while is asked again
later; only who needs the lines to be there (`store`, `close`) waits for it, and is told when it does not answer.
"""

from __future__ import annotations

import logging
import threading
import time

from upath import UPath

from nexus_ray.errors import StorageError
from nexus_ray.storage.objects import write_object

logger = logging.getLogger(__name__)
_INTERVAL_SECONDS = 5.0
_SHARE = 20  # the whole object goes over the network each time: for one second of it, so many without
_CLOSING_SECONDS = 30.0


class StoredLines:
    """Lines that end up in one object.

    Args:
        place: of the object; what is there is replaced at once.
        text: what it begins with.

    Raises:
        StorageError: the store does not answer or refuses.
    """

    def __init__(self, place: UPath, text: str) -> None:
        self._place = place
        self._content = bytearray(text.encode())
        self._stored = -1  # bytes in the store
        self._writing = threading.Lock()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: StorageError | None = None
        self._failures = 0
        self._took_seconds = 0.0
        self.store()
        self._thread = threading.Thread(target=self._work, name=f"lines of {place.name}", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        """Add a line; returns at once."""
        with self._changed:
            self._content += line.encode() + b"\n"
            self._changed.notify()

    def store(self) -> None:
        """Return when all lines so far are in the store.

        Raises:
            StorageError: it does not answer or refuses.
        """
        failures = self._failures
        with self._writing:
            if self._failure is not None and self._failures > failures:
                raise self._failure  # the other thread has asked for as long as it makes sense, while this one waited
            with self._changed:
                content = bytes(self._content)
            if len(content) == self._stored:
                return
            began = time.monotonic()
            try:
                write_object(self._place, content)
            except StorageError as error:
                self._failure, self._failures = error, self._failures + 1
                raise
            self._failure = None
            self._stored, self._took_seconds = len(content), time.monotonic() - began

    def close(self, *, failed: bool = False) -> None:
        """Write what is left and end the thread; of a training that failed, only if the store takes it soon.

        Raises:
            StorageError: the store does not answer or refuses; not of a training that failed, which has an error.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSING_SECONDS if failed else None)
        if self._failure is not None and not failed:
            raise self._failure

    def _work(self) -> None:
        while not self._closing:
            self._try()
            self._wait(max(_INTERVAL_SECONDS, _SHARE * self._took_seconds))
        self._try()

    def _try(self) -> None:
        """Go on when it goes wrong: the lines are written with the next ones, and only at the end it counts."""
        try:
            self.store()
        except StorageError as error:
            if not self._closing:
                logger.warning("%s; it is tried again with the next lines", error.message)

    def _wait(self, seconds: float) -> None:
        """For the time, and then for something to write."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._changed.wait_for(lambda: self._closing or len(self._content) != self._stored)
