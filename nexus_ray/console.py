"""What a person sees: log lines and one progress bar a long operation.

On a terminal both are drawn by rich; in a job or a pipe they are plain lines with time stamps, and progress
becomes a line now and then.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)
console = Console(stderr=True)
_PLAIN_INTERVAL_SECONDS = 15.0


def setup_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Configure logging of the whole process: INFO, DEBUG with `verbose`, WARNING with `quiet`."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=verbose, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    package = logging.getLogger("nexus_ray")
    package.handlers = [handler]
    package.setLevel(level)
    package.propagate = False


@contextmanager
def progress(description: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yield `advance(steps)`; draw a bar on a terminal, log a line now and then elsewhere.

    Args:
        description: label.
        total: steps until the end.
        unit: what a step is, e.g. "tokens"; where there is one, the speed is shown too.
    """
    if console.is_terminal and logger.isEnabledFor(logging.INFO):
        started = time.monotonic()
        with _bar(unit) as bar:
            task = bar.add_task(description, total=total, speed="")

            def advance(steps: int) -> None:
                bar.advance(task, steps)
                bar.update(task, speed=_speed(bar.tasks[0].completed, started, unit))

            yield advance
    else:
        yield _plain_progress(description, total, unit)


def _bar(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[speed]}")] if unit else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _speed(done: float, started: float, unit: str) -> str:
    return f"{done / max(time.monotonic() - started, 1e-9):,.0f} {unit}/s" if unit else ""


def _plain_progress(description: str, total: int, unit: str) -> Callable[[int], None]:
    done = 0
    started = last = time.monotonic()
    end = f" {unit}, " if unit else ", "

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if done >= total or now - last >= _PLAIN_INTERVAL_SECONDS:
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            speed = f"{_speed(done, started, unit)}, " if unit else ""
            logger.info("%s: %s of %s%s%s%.0f s left", description, f"{done:,}", f"{total:,}", end, speed, left)

    return advance
