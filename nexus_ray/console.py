"""What a person sees: log lines and one progress bar a long operation.

On a terminal both are drawn by rich; in a job or a pipe they are plain lines with time stamps, and progress
becomes a line now and then.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nexus_ray.heartbeat import Heartbeat, doing

logger = logging.getLogger(__name__)
console = Console(stderr=True)
_PLAIN_INTERVAL_SECONDS = 15.0
_heartbeat = Heartbeat()


class _Lines(logging.StreamHandler[TextIO]):
    """Plain lines, with dates: a job may take days. Each is a sign of life."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        _heartbeat.line_written()


def setup_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Configure logging of the whole process: INFO, DEBUG with `verbose`, WARNING with `quiet`."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=verbose, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = _Lines()
        if not _heartbeat.is_alive():
            _heartbeat.start()
    package = logging.getLogger("nexus_ray")
    package.handlers = [handler]
    package.setLevel(level)
    package.propagate = False


def log_in_workers() -> None:
    """In a process of Ray's, which no verb has set up: log what takes long to its own log file."""
    ray = sys.modules.get("ray")
    if ray is None or logging.getLogger("nexus_ray").handlers or not ray.is_initialized():
        return
    if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        setup_logging()


class Advance(Protocol):
    """What takes progress further: by so many steps, of a total that has become another where it is given."""

    def __call__(self, steps: int, total: int | None = None) -> None:
        """Take `steps` steps."""
        ...


@contextmanager
def progress(description: str, total: int, unit: str = "", *, about: bool = False) -> Iterator[Advance]:
    """Yield `advance(steps)`; draw a bar on a terminal, log a line now and then elsewhere.

    Args:
        description: label.
        total: steps until the end.
        unit: what a step is, e.g. "tokens"; where there is one, the speed is shown too.
        about: the total is an estimate until the end.
    """
    if console.is_terminal and logger.isEnabledFor(logging.INFO):
        started = time.monotonic()
        with _bar(unit) as bar:
            task = bar.add_task(description, total=total, speed="", of=_of(0, total, about))

            def advance(steps: int, total: int | None = None) -> None:
                bar.update(task, advance=steps, total=total)
                now = bar.tasks[0]
                of = _of(now.completed, now.total or 0, about)
                bar.update(task, speed=_speed(now.completed, started, unit), of=of)

            yield advance
    else:
        with _plain_progress(description, total, unit, about) as advance:
            yield advance


def _bar(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("[progress.download]{task.fields[of]}"),
        *([TextColumn("{task.fields[speed]}")] if unit else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _of(done: float, total: float, about: bool) -> str:
    """How much is done of how much; in the end a total is no estimate."""
    return f"{done:,.0f} of about {total:,.0f}" if about and done < total else f"{done:,.0f}/{total:,.0f}"


def _speed(done: float, started: float, unit: str) -> str:
    return f"{done / max(time.monotonic() - started, 1e-9):,.0f} {unit}/s" if unit else ""


@contextmanager
def _plain_progress(description: str, expected: int, unit: str, about: bool) -> Iterator[Advance]:
    done, whole = 0, expected
    started = last = time.monotonic()

    def advance(steps: int, total: int | None = None) -> None:
        nonlocal done, whole, last
        done += steps
        whole = whole if total is None else total
        now = time.monotonic()
        if done >= whole or now - last >= _PLAIN_INTERVAL_SECONDS:
            last = now
            left = (now - started) / max(done, 1) * (whole - done)
            speed = f"{_speed(done, started, unit)}, " if unit else ""
            logger.info("%s, %s%.0f s left", so_far(), speed, left)

    def so_far() -> str:
        of = f"about {whole:,}" if about and done < whole else f"{whole:,}"
        return f"{description}: {done:,} of {of} {unit}".rstrip()

    with doing(so_far):
        yield advance
