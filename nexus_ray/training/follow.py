"""Following a training from the driver: its progress bar and validation losses, read from `metrics.jsonl`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_ray.console import progress
from nexus_ray.training.metrics import read_metrics

logger = logging.getLogger(__name__)
_INTERVAL_SECONDS = 1.0


@contextmanager
def following(metrics: Path, steps: int, description: str) -> Iterator[None]:
    """Show progress of a training of `steps` steps while the block runs."""
    finished = threading.Event()
    with progress(description, total=steps) as advance:
        thread = threading.Thread(target=_follow, args=(metrics, advance, finished), daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


def _follow(metrics: Path, advance: Callable[[int], None], finished: threading.Event) -> None:
    done = last_validated = 0
    while True:
        is_last = finished.wait(_INTERVAL_SECONDS)
        for record in read_metrics(metrics):
            reached = record["step"] + 1
            if record["event"] == "step" and reached > done:
                advance(reached - done)
                done = reached
            if record["event"] == "validation" and reached > last_validated:
                logger.info("step %d: validation loss %.4f nats", reached, record["loss"])
                last_validated = reached
        if is_last:
            return
