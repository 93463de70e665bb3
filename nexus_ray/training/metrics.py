"""The metrics of a run: one JSON line a record, in `metrics.jsonl`.

Records carry `event` (`step`, `validation`, `checkpoint`, `resume`, `best`) and `step`. A resumed run drops the
records of steps it will take again, so that each step stands once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus_ray.errors import ArtefactError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import make_directory, storage_error, write_text


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; none when it does not exist. A cut last line is ignored."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def read_runs(directories: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
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
