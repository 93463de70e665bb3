"""A lease on a name in an object store: one holder at a time, without a clock that machines share.

The lease is an object that is created only where there is none. Its holder counts in it as long as it lives. Who finds
one watches the count on a clock of its own that only goes forward: while it moves the lease is held; when it has stood
still long enough the holder is gone, and the object is replaced on condition that it is still the one that was watched,
so that of two who come at once one wins. A holder that finds another's object has lost the lease and must stop.

Stores that ignore conditions are served by the same steps, with a gap: two can hold it until the next count of one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from upath import UPath

from nexus_ray.errors import NexusError, StorageError
from nexus_ray.storage.objects import create_object, information, read_object, remove_object, replace_object
from nexus_ray.storage.retries import for_at_most

logger = logging.getLogger(__name__)
INTERVAL = 5.0  # seconds between two counts
RELEASE_SECONDS = 10.0  # for giving it back: the next command needs no more than STILL intervals to find it left
STILL = 6  # intervals without a count after which the holder is gone: longer than a request waits to be repeated


class HeldError(Exception):
    """Somebody else holds the lease.

    Attributes:
        holder: what they have said of themselves.
    """

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__(holder)
        self.holder = holder


@dataclass(frozen=True)
class _Seen:
    """The lease object as it was read."""

    token: str
    count: int
    holder: dict[str, Any]
    version: str | None


class Lease:
    """A lease that this process holds, or wants.

    Args:
        place: of the object.
        holder: what others are told of this one.
        interval: seconds between two counts.
        clock: seconds, only forward.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        place: UPath,
        holder: dict[str, Any],
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.place = place
        self.lost = False
        self._holder = holder
        self._interval, self._clock, self._sleep = interval, clock, sleep
        self._token = uuid.uuid4().hex
        self._count = 0
        self._requests = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; waits for as long as it takes to see whether one that is there is still held.

        Raises:
            HeldError: it is.
            StorageError: the store refused or failed.
        """
        seen = self._create()
        if seen is not None:
            if self._is_alive(seen):
                raise HeldError(seen.holder)
            self._take_over(seen)

    def renew(self) -> None:
        """Count once.

        Raises:
            StorageError: the lease is lost, or the store refused or failed.
        """
        with self._requests:
            seen = self._check()
            self._count += 1
            try:
                replace_object(self.place, self._content(), seen.version)
            except FileExistsError:
                self._check()  # an answer that was lost: the count was written

    def check(self) -> None:
        """Make sure that the lease is still held: before something is written that another holder must not find.

        Raises:
            StorageError: it is lost, or the store refused or failed.
        """
        with self._requests:
            self._check()

    def keep(self, when_lost: Callable[[], None] = lambda: None) -> None:
        """Count in a thread until `release`.

        Args:
            when_lost: called there, once, when the lease is found lost.
        """
        self._thread = threading.Thread(target=self._keep, args=(when_lost,), name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop counting and give the lease back; one that is lost stays with its holder.

        Where the store does not answer now the lease is left: nobody counts in it any more.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join(RELEASE_SECONDS)
        if not self._requests.acquire(timeout=RELEASE_SECONDS):
            logger.info("%s stays: the store does not answer", self.place)
            return
        try:
            with for_at_most(RELEASE_SECONDS):
                seen = self._read()
                if seen is not None and seen.token == self._token:
                    remove_object(self.place)
        except NexusError as error:
            logger.info("%s stays: %s", self.place, error.message)
        finally:
            self._requests.release()

    def _keep(self, when_lost: Callable[[], None]) -> None:
        while not self._ended.wait(self._interval):
            try:
                self.renew()
            except NexusError as error:
                if self.lost:
                    logger.error("%s", error.message)  # noqa: TRY400  # no defect: a traceback would say nothing
                    when_lost()
                    return
                logger.warning("%s; still trying", error.message)

    def _create(self) -> _Seen | None:
        """Create the object; what is there, if something is."""
        while True:
            try:
                create_object(self.place, self._content())
            except FileExistsError:
                seen = self._read()
                if seen is None:
                    continue  # given back meanwhile
                return None if seen.token == self._token else seen
            return None

    def _is_alive(self, seen: _Seen) -> bool:
        """Watch the count; False when it has stood still, or the object is gone, long enough for its holder to be."""
        logger.info("%s is held by %s: watching whether it still is", self.place, _words(seen.holder))
        watched = 0.0
        while watched < STILL * self._interval:
            before = self._clock()
            self._sleep(self._interval)
            asked = self._clock()
            now = self._read()
            if now is None:
                return False
            if (now.token, now.count) != (seen.token, seen.count):
                return True
            # While the store does not answer, nobody can count: that time says nothing.
            watched = watched + asked - before if self._clock() - asked < self._interval else 0.0
        return False

    def _take_over(self, seen: _Seen) -> None:
        logger.warning("%s was held by %s, which has gone: taking it over", self.place, _words(seen.holder))
        now = self._read()
        if now is None:
            now = self._create()
            if now is not None:
                raise HeldError(now.holder)
            return
        if (now.token, now.count) != (seen.token, seen.count):
            raise HeldError(now.holder)
        with suppress(FileExistsError):  # by another, or by this one in a request whose answer was lost
            replace_object(self.place, self._content(), now.version)
        self._sleep(self._interval)  # for a store that knows no conditions: another may have come at the same time
        after = self._read()
        if after is None or after.token != self._token:
            raise HeldError(after.holder if after else seen.holder)

    def _check(self) -> _Seen:
        seen = None if self.lost else self._read()
        if seen is None or seen.token != self._token:
            self.lost = True
            by = f"{_words(seen.holder)} has taken it over" if seen else "it was removed"
            raise StorageError(
                f"the lock {self.place} is lost: {by}",
                "this process stood still for too long, or somebody removed the lock; see who works there now",
            )
        return seen

    def _read(self) -> _Seen | None:
        found = information(self.place)
        if found is None:
            return None
        try:
            values = json.loads(read_object(self.place))
            version = str(found["ETag"]) if found.get("ETag") else None
            return _Seen(str(values["token"]), int(values["count"]), dict(values["holder"]), version)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.place} is no lock: {error}", "remove it if nothing works there") from error

    def _content(self) -> bytes:
        return json.dumps({"token": self._token, "count": self._count, "holder": self._holder}).encode()


def _words(holder: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in holder.items() if value) or "somebody"
