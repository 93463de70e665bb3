"""What a command tells: how it was called, what happened, how it ended. The story begins with the run directory.

One command at a time tells in a process; `record` is for whoever has something to say, and says nothing without one.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nexus_ray.config import Section, flatten
from nexus_ray.errors import NexusError
from nexus_ray.observing import event_files
from nexus_ray.observing.events import EventFile, Loss
from nexus_ray.observing.metrics import add, labelled, present_labels
from nexus_ray.observing.secrets import SECRET_FIELDS, hiding
from nexus_ray.storage import Place, digest, is_remote

INTERRUPTED = 130  # what shells expect after Ctrl-C
_PACKAGES = ("nexus-ray", "ray", "torch", "transformers")
# A sign of life each 15 s, later each time another 2 % has gone by: a day has about 300.
_ALIVE_SECONDS, _ALIVE_SHARE, _ALIVE_SECONDS_MOST = 15.0, 0.02, 600.0


@dataclass
class _Telling:
    """The command that this process tells of, or works for."""

    directory: Place
    command: str
    file: EventFile
    secrets: tuple[str, ...]
    joined: Loss
    last_signal: int | None = None


@dataclass(frozen=True)
class Origin:
    """What a process elsewhere must know to tell its part of a command; travels to workers.

    Attributes:
        directory: of the run.
        command: its name.
        after: seconds from the start of the command to now.
        secrets: values to hide.
        labels: of its metrics.
    """

    directory: Place
    command: str
    after: float
    secrets: tuple[str, ...]
    labels: Mapping[str, str]


_current: _Telling | None = None


def record(event: str, **values: Any) -> None:
    """Add an event to the story of the command that runs in this process, if one does; never raises."""
    if _current is not None:
        _current.file.write(event, **values)


def record_signal(number: int) -> None:
    """Say that the command was told to stop; may be called from a signal handler."""
    if _current is not None:
        _current.last_signal = number
    record("stop_signal", signal=signal.Signals(number).name)


@contextmanager
def telling(directory: Place, config: Section | None = None) -> Iterator[None]:
    """Tell in a run directory what happens within the block: the command, its warnings, its end.

    A block within another one adds nothing of its own. Nothing of this ends a run: what cannot be written is
    warned of once.
    """
    global _current
    if _current is not None:
        yield
        return
    trackers = {name: value for name, value in _flat(config).items() if name.startswith(SECRET_FIELDS)}
    secrets = tuple(value for value in trackers.values() if isinstance(value, str) and "://" in value)
    telling = _current = _begin(directory, secrets)
    warnings = _Warnings(logging.WARNING)
    package = logging.getLogger("nexus_ray")
    package.addHandler(warnings)
    try:
        with labelled(run=directory.name), _signs_of_life(telling.file):
            record("command", **_how(), run=str(directory), config=_digest(config))
            yield
    except BaseException as error:
        _end(telling, error)
        raise
    else:
        _end(telling, None)
    finally:
        package.removeHandler(warnings)
        _current = None


@contextmanager
def _signs_of_life(file: EventFile) -> Iterator[None]:
    """Record now and then that the command lives: of one that is killed, that is how long it has."""
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(min(max(_ALIVE_SECONDS, _ALIVE_SHARE * file.offset), _ALIVE_SECONDS_MOST)):
            file.write("alive")

    thread = threading.Thread(target=live, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _begin(directory: Place, secrets: tuple[str, ...]) -> _Telling:
    loss = Loss(directory / event_files.JOINED)
    try:
        command = event_files.new_command(directory)
    except Exception as error:  # whatever a storage raises: work goes on
        loss.warn(error)
        command = event_files.name_command(event_files.UNKNOWN)
    file = EventFile(event_files.file_of_command(directory, command), {"command": command}, hiding(secrets))
    return _Telling(directory, command, file, secrets, loss)


def _end(telling: _Telling, error: BaseException | None) -> None:
    """Write how it ended, and join all event files."""
    if isinstance(error, KeyboardInterrupt) and telling.last_signal is None:
        record_signal(signal.SIGINT)
    told = {} if error is None else {"error": type(error).__name__, "message": str(error)}
    record("end", exit_code=exit_code(error), seconds=round(telling.file.offset, 3), **told)
    telling.file.close()
    _join(telling)


def exit_code(error: BaseException | None) -> int:
    """What the command line ends with after this: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    match error:
        case None:
            return 0
        case NexusError():
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case SystemExit():
            if error.code == signal.SIGTERM:
                return INTERRUPTED
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case _:
            return 1


def join_now() -> None:
    """Bring `events.jsonl` up to date, where that is cheap: in an object store only the end of the command does."""
    if _current is not None and not is_remote(_current.directory):
        _join(_current)


def _join(telling: _Telling) -> None:
    try:
        event_files.join(telling.directory)
    except Exception as error:  # whatever a storage raises: work goes on
        telling.joined.warn(error)


def _how() -> dict[str, Any]:
    """How this process was called, and where it runs."""
    return {
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flat(config: Section | None) -> dict[str, Any]:
    return {} if config is None else flatten(config)


def _digest(config: Section | None) -> str | None:
    """Identity of a configuration; where its trackers are is left out: a digest of little can be guessed."""
    public = {name: str(value) for name, value in _flat(config).items() if not name.startswith(SECRET_FIELDS)}
    return digest(public) if config is not None else None


class _Warnings(logging.Handler):
    """Makes events of what the package logs at WARNING and above."""

    def emit(self, log: logging.LogRecord) -> None:
        try:
            message = log.getMessage()
        except Exception:  # a defect in the call: logging itself reports it
            return
        record("warning", level=log.levelname, logger=log.name, message=message)
        add("nexus_ray_warnings", 1)


def origin() -> Origin | None:
    """What workers elsewhere must know to tell their part; None where no command tells."""
    if _current is None:
        return None
    after = round(_current.file.offset, 3)
    return Origin(_current.directory, _current.command, after, _current.secrets, present_labels())


@contextmanager
def telling_from(origin: Origin | None, process: str) -> Iterator[None]:
    """Let this process tell its part of a command within the block.

    Args:
        origin: of the command; None: nothing is told.
        process: what this one is, for people.
    """
    global _current
    if origin is None or _current is not None:
        yield
        return
    common = {"command": origin.command, "process": process, "after": origin.after}
    place = event_files.new_file_of_worker(origin.directory, origin.command)
    file = EventFile(place, common | {"host": socket.gethostname(), "pid": os.getpid()}, hiding(origin.secrets))
    _current = _Telling(origin.directory, origin.command, file, origin.secrets, Loss(place))
    try:
        with labelled(**origin.labels):
            yield
    finally:
        file.close()
        _current = None
