"""The log of a training: every record goes to `metrics.jsonl`, to the trackers, and to those who watch for trouble."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from nexus_ray.config import TrackersSection, WarningsSection
from nexus_ray.layout import RunLayout
from nexus_ray.training.local import local_only
from nexus_ray.training.watching.background import Background
from nexus_ray.training.watching.metrics import MetricsLog, read_metrics
from nexus_ray.training.watching.tags import numbers_of, texts_of
from nexus_ray.training.watching.trackers import start_trackers
from nexus_ray.training.watching.warnings import Warnings

_SECRET = "train.trackers."  # addresses of trackers may hold passwords


def open_log(
    layout: RunLayout,
    first_step: int,
    *,
    trackers: TrackersSection | None = None,
    warnings: WarningsSection | None = None,
    roles: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> RunLog:
    """Open the log of a training that begins or goes on with `first_step`; one worker does.

    Args:
        layout: of the run.
        first_step: what is known about this step and later ones is dropped: they are taken again.
        trackers: where metrics go besides metrics.jsonl and TensorBoard.
        warnings: from where on to warn.
        roles: of each source.
        parameters: the configuration by dotted name, for trackers; it is shown without the trackers' own section.

    Raises:
        StorageError: the file system refused.
    """
    metrics = MetricsLog(local_only(layout.metrics), first_step)
    watch = Warnings(warnings or WarningsSection(), roles or {})
    for record in read_metrics(layout.metrics):
        watch.see(record)
    public = {name: value for name, value in (parameters or {}).items() if not name.startswith(_SECRET)}
    return RunLog(metrics, watch, start_trackers(trackers or TrackersSection(), layout, first_step, public))


class RunLog:
    """Where a training writes its records; a context manager that closes itself."""

    def __init__(self, metrics: MetricsLog, watch: Warnings, trackers: list[Background]) -> None:
        self._metrics = metrics
        self._watch = watch
        self._trackers = trackers
        self._lost: set[str] = set()
        self._last_step = 0

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append a record, give it to all trackers, and append a `warning` for what it shows to be wrong.

        Raises:
            StorageError: the file system refused `metrics.jsonl`; trackers never raise.
        """
        self._metrics.write(event, step, **values)
        record = {"event": event, "step": step, **values}
        numbers, texts = numbers_of(record), texts_of(record)
        for tracker in self._trackers:
            tracker.write(event, step, numbers, texts)
        self._last_step = step
        self._tell_lost()
        for warning in self._watch.see(record):
            self.write("warning", step, **warning)

    def close(self, *, failed: bool = False) -> None:
        """Let the trackers finish, and tell them whether training failed."""
        for tracker in self._trackers:
            tracker.close(failed=failed)
        self._tell_lost()

    def _tell_lost(self) -> None:
        """Warn once of each tracker that gets no more records."""
        for tracker in self._trackers:
            if tracker.lost and tracker.name not in self._lost:
                self._lost.add(tracker.name)
                warning = {
                    "kind": f"tracker/{tracker.name}",
                    "message": f"{tracker.name} gets no more records: {tracker.lost}",
                    "hint": "training goes on; metrics.jsonl has everything",
                }
                self._metrics.write("warning", self._last_step, **warning)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)
