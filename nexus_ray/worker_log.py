"""What workers tell the driver's log: warnings with their node and stage, and how far they are with starting.

Ray brings every line that a worker writes to the driver. Most of them are other libraries' and no business of a person
who reads the log of a job; those that count are marked here and picked out there.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

logger = logging.getLogger(__name__)
_MARK = ":nexus-ray:"
_LISTENER = "nexus_ray"
_OURS = ("nexus_ray", "serve")
_CORE_NOTICE = re.compile(r"\[[-\d]+ [:,\d]+ [DIW] \d+ \d+\] ")  # how a line of Ray's C++ core begins, errors aside
_ON_PURPOSE = ("was killed by `ray.kill`", "driver has exited", "owner has died")
_AGAIN_AFTER_SECONDS = 60.0  # until then the same words of another worker are not repeated

_STARTED, _READY = "started", "ready"
_heard = {"state": ""}  # how far the workers of the present stage are, by what one of them has said last


def speak_as(stage: str) -> None:
    """In a worker: send its warnings, and errors of any library, to the driver, and say that it has started."""
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _ToDriver)]
    root.addHandler(_ToDriver(stage))
    _send({"state": _STARTED})


def ready() -> None:
    """In a worker: say that it has loaded what it needs."""
    _send({"state": _READY})


def expect_workers() -> None:
    """In the driver: another stage begins, whose workers have not started."""
    _heard["state"] = ""


def are_ready() -> bool:
    """In the driver: whether workers have loaded what they need."""
    return _heard["state"] == _READY


def what_workers_do(needs: str) -> str:
    """In the driver: how far the workers are, in words.

    Args:
        needs: what a worker needs, for the time before one has started.
    """
    if not _heard["state"]:
        return f"no worker has started yet, {needs}"
    return "workers are at work" if are_ready() else "workers are loading"


def listen(*, everything: bool = False) -> None:
    """In the driver, after `ray.init(log_to_driver=True)`: log what workers and the autoscaler have to say.

    Args:
        everything: let Ray print all other lines of all workers too.
    """
    from ray._private import worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    printers = [handler for name, handler in dispatcher.handlers if name == "ray_print_logs"]
    for name in ("ray_print_logs", _LISTENER):
        dispatcher.remove_handler(name)
    listener = Listener(worker.filter_autoscaler_events, printers if everything else ())
    dispatcher.add_handler(_LISTENER, listener)
    # What nodes report (a worker that died) Ray would print with colours, to standard output, which is for results.
    worker.print_to_stdstream = lambda data, **_: listener(data)


class Listener:
    """Takes what Ray brings, a few lines of one process at a time.

    Args:
        autoscaler_events: picks what the autoscaler tells people out of its lines.
        printers: where all other lines go.
    """

    def __init__(
        self,
        autoscaler_events: Callable[[list[str]], Iterable[str]],
        printers: Iterable[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        self._events = autoscaler_events
        self._printers = tuple(printers)
        self._lock = threading.Lock()
        self._told: dict[tuple[int, str], float] = {}

    def __call__(self, data: dict[str, Any]) -> None:
        """Ray ends its thread at an exception, so there must be none."""
        try:
            self._take(data)
        except Exception:
            logger.debug("a worker's lines cannot be read", exc_info=True)

    def _take(self, data: dict[str, Any]) -> None:
        lines = data.get("lines", [])
        if data.get("pid") == "autoscaler":
            for event in self._events(lines):
                if not event.startswith("Tip:"):
                    logger.info("cluster: %s", event)
            return
        if data.get("pid") == "raylet":
            for line in lines:
                self._report(line)
            return
        for line in lines:
            if _MARK in line:
                self._hear(json.loads(line.partition(_MARK)[2]), str(data.get("ip")))
        others = [line for line in lines if _MARK not in line]
        if others:
            for printer in self._printers:
                printer({**data, "lines": others})

    def _report(self, event: str) -> None:
        """Tell what a node reports, unless it is what ended on purpose or a notice that no user can act on."""
        if _CORE_NOTICE.match(event):
            return
        if not any(words in event for words in _ON_PURPOSE) and not self._has_been_told(logging.WARNING, event):
            logger.warning("cluster: %s", event)

    def _hear(self, said: dict[str, Any], node: str) -> None:
        if "state" in said:
            _heard["state"] = said["state"]
        elif not self._has_been_told(said["level"], said["message"]):
            logger.log(said["level"], "%s, worker on %s: %s", said["stage"], node, said["message"])

    def _has_been_told(self, level: int, message: str) -> bool:
        now = monotonic()
        with self._lock:
            before = self._told.get((level, message))
            self._told[level, message] = now
        return before is not None and now - before < _AGAIN_AFTER_SECONDS


class _ToDriver(logging.Handler):
    """Writes records as marked lines."""

    def __init__(self, stage: str) -> None:
        super().__init__(logging.WARNING)
        self._stage = stage

    def filter(self, record: logging.LogRecord) -> bool:
        """Warnings of ours; of other libraries errors only."""
        return record.name.partition(".")[0] in _OURS or record.levelno >= logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        _send({"level": record.levelno, "stage": self._stage, "message": self.format(record)})


def _send(said: dict[str, Any]) -> None:
    sys.stderr.write(f"{_MARK}{json.dumps(said)}\n")
    sys.stderr.flush()
