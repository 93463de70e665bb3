"""Events as they happen: one JSON line each, in a file of its own for every process that tells some.

Nobody else writes to a process's file, so concurrent and killed commands cannot damage each other's record, on shared
file systems and in object stores either; `merged.py` joins the files. An event carries the UTC time, the seconds since
its process began by a clock that nobody sets, and a number: the last two keep the order when the time jumps.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from upath import UPath

from nexus_ray.storage import Place, is_remote
from nexus_ray.storage.objects import write_object_soon

logger = logging.getLogger(__name__)
_UPLOAD_SECONDS = 5.0  # between two writes of a whole file to an object store
_POLL_SECONDS = 0.2
_LONGEST = 4000  # characters of a text in an event


class EventFile:
    """The events of one process. Nothing here raises: what cannot be written is warned of once, and work goes on.

    A signal handler may write too, whatever it has interrupted: no lock is held.

    Args:
        place: of the file; made when the first event is written.
        common: values that every line carries.
        hide: takes secrets out of values.
    """

    def __init__(self, place: Place, common: dict[str, Any], hide: Callable[[Any], Any]) -> None:
        self.place = place
        self._common = common
        self._hide = hide
        self._numbers = itertools.count()
        self._began = time.monotonic()
        self._lines: _Lines = _Uploaded(place) if is_remote(place) else _Appended(Path(str(place)))

    @property
    def offset(self) -> float:
        """Seconds since the process began to tell."""
        return time.monotonic() - self._began

    def write(self, event: str, **values: Any) -> None:
        """Append an event."""
        stamp = {
            "seq": next(self._numbers),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "offset": round(self.offset, 3),
        }
        told = self._hide({name: _short(value) for name, value in values.items()})
        line = json.dumps({**self._common, **stamp, "event": event, **told}, default=str)
        self._lines.add(line.encode() + b"\n")

    def close(self) -> None:
        """Nothing more will come; waits until everything is written."""
        self._lines.close()


class _Lines(Protocol):
    def add(self, line: bytes) -> None: ...

    def close(self) -> None: ...


class _Appended:
    """A local file: each line is one system call, so that a killed process leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._is_cut = False
        self._loss = Loss(path)

    def add(self, line: bytes) -> None:
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            whole = b"\n" + line if self._is_cut else line
            written = os.write(self._descriptor, whole)
            self._is_cut = written < len(whole)
            if self._is_cut:
                raise OSError("the disk is full")  # noqa: TRY301
        except OSError as error:
            self._loss.warn(error)

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


class _Uploaded:
    """An object: one cannot append to it, so a thread writes all of it again, at most every few seconds."""

    def __init__(self, place: UPath) -> None:
        self._place = place
        self._lines: list[bytes] = []
        self._written = 0
        self._loss = Loss(place)
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="events", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._is_closing = True
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._is_closing:
            self._upload()
            due = time.monotonic() + _UPLOAD_SECONDS
            while time.monotonic() < due and not self._is_closing:
                time.sleep(_POLL_SECONDS)
        self._upload(write=partial(write_object_soon, self._place))

    def _upload(self, write: Callable[[bytes], object] | None = None) -> None:
        count = len(self._lines)
        if count == self._written:
            return
        try:
            (write or self._place.write_bytes)(b"".join(self._lines[:count]))
            self._written = count
        except Exception as error:  # whatever a storage raises: work goes on
            self._loss.warn(error)


class Loss:
    """Says once that events cannot be written to a place."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._is_told = False

    def warn(self, error: Exception) -> None:
        """Log the first of these errors."""
        if not self._is_told:
            self._is_told = True  # first: the warning is an event too
            reason = getattr(error, "strerror", None) or error
            logger.warning("events cannot be written to %s: %s; the run goes on without", self._place, reason)


def _short(value: Any) -> Any:
    """A value that is not too long and that JSON has: it knows no NaN and no infinity."""
    if isinstance(value, str) and len(value) > _LONGEST:
        return value[: _LONGEST - 1] + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
