"""The event files of a run: what they are called, how they are read, in which order, and the one file that joins them.

`events/` is the record: a file for every process. `events.jsonl` is all of them in order, written anew when a stage or
a command ends; it may be deleted, or be older than the record after a kill.
"""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nexus_ray.storage import Place, atomic_file, is_remote
from nexus_ray.storage.objects import write_object_soon

DIRECTORY, JOINED = "events", "events.jsonl"
UNKNOWN = 9999  # number of a command that could not see which ones were before it
_NAME = re.compile(r"(\d{4,})-.*\.jsonl")

Event = dict[str, Any]


def new_command(directory: Place) -> str:
    """A name for a command that begins in a run directory.

    The number is one more than the highest there: it keeps the order of commands when the clock is set back.

    Raises:
        OSError: the storage refused.
    """
    events = directory / DIRECTORY
    names = [path.name for path in _files(events)]
    return name_command(1 + max((int(match[1]) for match in map(_NAME.fullmatch, names) if match), default=0))


def name_command(number: int) -> str:
    """`0003-20261122T190000Z-HOST-PID-RANDOM`."""
    return f"{number:04d}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{_process()}"


def file_of_command(directory: Place, command: str) -> Place:
    """Where the process that runs a command tells its events."""
    return directory / DIRECTORY / f"{command}.jsonl"


def new_file_of_worker(directory: Place, command: str) -> Place:
    """Where another process that works for a command tells its own."""
    return directory / DIRECTORY / f"{command}+{_process()}.jsonl"


def _process() -> str:
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


def read_events(directory: Place) -> list[Event]:
    """All events of a run in order; none where nothing was recorded. A line that a kill has cut is left out.

    Raises:
        OSError: the storage refused.
    """
    files = sorted(_files(directory / DIRECTORY), key=lambda path: path.name)
    if not files and (directory / JOINED).exists():
        return parse((directory / JOINED).read_bytes())
    return in_order([parse(path.read_bytes()) for path in files])


def _files(events: Place) -> list[Place]:
    if not events.exists():
        return []
    found: list[Place] = list(events.iterdir())
    return [path for path in found if _NAME.fullmatch(path.name)]


def parse(text: bytes) -> list[Event]:
    """The complete events of a file."""
    found: list[Event] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"command", "seq", "time", "offset", "event"} <= value.keys():
            found.append(value)
    return found


def in_order(processes: Iterable[Sequence[Event]]) -> list[Event]:
    """Events of several processes as they happened: commands by their numbers, within one by `moment_of`."""
    by_command: dict[str, list[Sequence[Event]]] = {}
    for events in processes:
        if events:
            by_command.setdefault(str(events[0]["command"]), []).append(events)
    ordered = []
    for command in sorted(by_command, key=lambda name: (int(name.split("-")[0]), name)):
        ordered += _of_command(by_command[command])
    return ordered


def _of_command(processes: Sequence[Sequence[Event]]) -> list[Event]:
    """The events of the process that ran a command and of its workers."""
    main = next((events for events in processes if "process" not in events[0]), ())
    placed: list[tuple[float, int, int, Event]] = []
    for number, events in enumerate(processes):
        start = 0.0 if events is main else _start(events, main)
        at = start
        for event in sorted(events, key=lambda event: int(event["seq"])):
            at = max(at, start + event["offset"])  # a signal may come between a number and the look at the clock
            placed.append((at, number, event["seq"], event))
    return [event | {"moment": round(moment, 3)} for moment, _, _, event in sorted(placed, key=lambda item: item[:3])]


def _start(worker: Sequence[Event], main: Sequence[Event]) -> float:
    """Seconds from the start of a command to that of one of its workers.

    By their clocks, which two machines may have set differently, but not before the moment at which the worker was
    asked for (`after`), and not so late that its events would come after the command's end.
    """
    if not main:
        return 0.0
    apart = _seconds(worker[0]["time"]) - worker[0]["offset"] - (_seconds(main[0]["time"]) - main[0]["offset"])
    ended = main[-1]["event"] == "end"
    latest = main[-1]["offset"] - worker[-1]["offset"] if ended else float("inf")
    return max(min(apart, latest), float(worker[0].get("after", 0.0)))


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def join(directory: Place) -> None:
    """Write `events.jsonl`: all events in order, each with its `moment`, the seconds since its command began.

    Raises:
        OSError, StorageError: the storage refused.
    """
    lines = b"".join(json.dumps(event).encode() + b"\n" for event in read_events(directory))
    place: Place = directory / JOINED
    if is_remote(place):
        write_object_soon(place, lines)
    else:
        with atomic_file(Path(str(place))) as temporary:
            temporary.write_bytes(lines)
