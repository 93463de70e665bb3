"""The metrics of a run: one JSON line a record, in `metrics.jsonl`.

Records carry `event` (`step`, `validation`, `best`, `checkpoint`, `resume`, `merge`, `bias_frozen`, `skipped`,
`early_stop`, `warning`, `sample`, `stopped`) and `step`. A resumed run drops the records of steps it will take again,
so that each step stands once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus_ray.errors import ArtefactError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place, is_remote, make_directory, read_text, storage_error, write_text
from nexus_ray.training.watching.stored_lines import StoredLines


class MetricsLog:
    """Writes records to `metrics.jsonl`: to a file each at once, to an object store all of them now and then.

    Args:
        path: of the file or object.
        first_step: records of this step and later ones are dropped: they are taken again.

    Raises:
        StorageError: the file system or the object store refused.
    """

    def __init__(self, path: Place, first_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] < first_step or record["event"] == "resume"]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        self._lines = StoredLines(path, text) if is_remote(path) else _File(path, text)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one record.

        Raises:
            StorageError: the file system refused.
        """
        self._lines.append(json.dumps({"event": event, "step": step, **values}))

    def store(self) -> None:
        """Return when every record so far is where others see it.

        Raises:
            StorageError: the object store does not answer or refuses.
        """
        self._lines.store()

    def close(self, *, failed: bool = False) -> None:
        """Nothing more will come; says whether the training failed.

        Raises:
            StorageError: the object store does not take the last records of a training that has not failed.
        """
        self._lines.close(failed=failed)


class _File:
    """Lines appended to a file on a disk, each flushed."""

    def __init__(self, path: Path, text: str) -> None:
        make_directory(path.parent)
        write_text(path, text)
        self._path = path

    def append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise storage_error(error, self._path) from error

    def store(self) -> None:
        """Nothing: it is there."""

    def close(self, *, failed: bool) -> None:
        """Nothing: it is there."""


def read_metrics(path: Place) -> list[dict[str, Any]]:
    """All complete records of a metrics file; none when it does not exist. A cut last line is ignored.

    Raises:
        StorageError: the object store does not answer or refuses.
    """
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


def read_runs(directories: Sequence[Place]) -> dict[str, list[dict[str, Any]]]:
    """Metrics of several runs by directory name (by path where two names are equal).

    Raises:
        ArtefactError: a run has no metrics.
    """
    names = [directory.name if is_remote(directory) else directory.resolve().name for directory in directories]
    runs = {}
    for directory, name in zip(directories, names, strict=True):
        records = read_metrics(RunLayout(directory).metrics)
        if not records:
            raise ArtefactError(f"{directory} has no metrics.jsonl", "name a run directory, e.g. runs/demo")
        runs[name if names.count(name) == 1 else str(directory)] = records
    return runs
