"""The metrics of a run: one JSON line a record, in `metrics.jsonl`.

Records carry `event` (`step`, `validation`, `best`, `checkpoint`, `resume`, `merge`, `bias_frozen`, `skipped`,
`early_stop`, `warning`, `sample`, `stopped`) and `step`. A resumed run drops the records of steps it will take again,
so that each step stands once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus_ray.errors import ArtefactError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place, make_directory, read_text, storage_error, write_text


class MetricsLog:
    """Appends records to `metrics.jsonl`."""

    def __init__(self, path: Path, first_step: int) -> None:
        make_directory(path.parent)
        kept = [record for record in read_metrics(path) if record["step"] < first_step or record["event"] == "resume"]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path = path

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one record and flush it.

        Raises:
            StorageError: the file system refused.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        except OSError as error:
            raise storage_error(error, self._path) from error


def read_metrics(path: Place) -> list[dict[str, Any]]:
    """All complete records of a metrics file; none when it does not exist. A cut last line is ignored."""
    try:
        return _parse(read_text(path))
    except FileNotFoundError:
        return []


def _parse(text: str) -> list[dict[str, Any]]:
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class MetricsTail:
    """Reads a metrics file while it is being written, each record once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = 0
        self._read = 0

    def new_records(self) -> list[dict[str, Any]]:
        """Complete records since the last call; all of them again when a resumed run has put another file there."""
        try:
            with self._path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                self._read = self._read if number == self._file else 0
                self._file = number
                file.seek(self._read)
                complete = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self._read += len(complete) + 1 if complete else 0
        return _parse(complete.decode("utf-8"))


def read_runs(directories: Sequence[Place]) -> dict[str, list[dict[str, Any]]]:
    """Metrics of several runs by directory name (by path where two names are equal).

    Raises:
        ArtefactError: a run has no metrics.
    """
    names = [directory.resolve().name for directory in directories]
    runs = {}
    for directory, name in zip(directories, names, strict=True):
        records = read_metrics(RunLayout(directory).metrics)
        if not records:
            raise ArtefactError(f"{directory} has no metrics.jsonl", "name a run directory, e.g. runs/demo")
        runs[name if names.count(name) == 1 else str(directory)] = records
    return runs
