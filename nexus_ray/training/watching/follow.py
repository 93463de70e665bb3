"""Following a training from the driver: its progress bar, validation losses and warnings, from what workers tell."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nexus_ray.console import progress

logger = logging.getLogger(__name__)
_INTERVAL_SECONDS = 1.0


Records = Callable[[], Sequence[Mapping[str, Any]]]


@contextmanager
def following(new_records: Records, steps: int, description: str) -> Iterator[None]:
    """Show progress of a training of `steps` steps while the block runs.

    Args:
        new_records: what the training has recorded since the last call; called now and then, and once at the end.
        steps: of the whole training.
        description: label of the progress bar.
    """
    finished = threading.Event()
    with progress(description, total=steps) as advance:
        thread = threading.Thread(target=_follow, args=(new_records, advance, finished), daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


def _follow(new_records: Records, advance: Callable[[int], None], finished: threading.Event) -> None:
    teller, done = Teller(), 0
    while True:
        is_last = finished.wait(_INTERVAL_SECONDS)
        for record in new_records():
            reached = _steps_finished(record)
            if reached > done:
                advance(reached - done)
                done = reached
            teller.tell(record)
        if is_last:
            return


def _steps_finished(record: Mapping[str, Any]) -> int:
    """How many steps are over, by a record that says so; a resumed training begins with those taken before."""
    match record["event"]:
        case "step":
            return int(record["step"]) + 1
        case "resume":
            return int(record["step"])
        case _:
            return 0


class Teller:
    """Puts into words what a person wants to hear of, once each, although a resumed run writes it again."""

    def __init__(self) -> None:
        self._told: set[tuple[str, int, str]] = set()

    def tell(self, record: Mapping[str, Any]) -> None:
        """Log a line about a record, if it is worth one."""
        line = _line(record)
        key = (record["event"], record["step"], str(record.get("kind", "")) + str(record.get("prompt", "")))
        if line is None or key in self._told:
            return
        self._told.add(key)
        loud = record["event"] in ("warning", "skipped", "merge_skipped")
        logger.log(logging.WARNING if loud else logging.INFO, "step %d: %s", record["step"] + 1, line)


def _line(record: Mapping[str, Any]) -> str | None:
    """What a record says; None where it says nothing that is not in the progress bar."""
    match record["event"]:
        case "validation":
            return f"validation loss {record['loss']:.4f} nats{_by_source(record.get('losses', {}))}"
        case "warning":
            return f"{record['message']}\n  -> {record['hint']}"
        case "skipped":
            return f"skipped, its loss or gradient is not finite: {', '.join(record.get('sequences', ())) or 'all'}"
        case "merge_skipped":
            return f"not merged: {record.get('reason', '')}"
        case "early_stop":
            return f"stopped: {record.get('validations_without_gain', 'several')} validations without a better one"
        case "sample":
            return f"{record['prompt']!r} goes on {record['text']!r}"
        case _:
            return None


def _by_source(losses: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())})" if len(losses) > 1 else ""
