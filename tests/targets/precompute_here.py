"""Precompute without Ray, and reading what it wrote with pyarrow alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from nexus_ray.config import Config, ResourcesSection
from nexus_ray.targets.format import MANIFEST, Manifest
from nexus_ray.targets.writing import precompute as module
from nexus_ray.targets.writing.job import job_of_run


def run_workers_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let workers run in this process, last item first; returns the keys of the shards of each round, as it grows."""
    rounds: list[list[str]] = []

    def run(worker: type, arguments: dict[str, Any], items: Sequence[dict[str, Any]], *_: Any) -> Iterator[Any]:
        call = worker(**arguments)
        rounds.append([item["key"] for item in items])
        for item in reversed(items):
            yield call(item)

    monkeypatch.setattr(module, "map_over_pool", run)
    return rounds


def precompute_here(config: Config, directory: Path) -> Manifest:
    """The target set of a run, made in this process at `directory`."""
    return module.precompute(job_of_run(config), directory, ResourcesSection())


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones among them."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def times(directory: Path) -> dict[str, int]:
    """When each shard was last written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.parquet")}


def manifest_of(directory: Path) -> Manifest:
    """What is committed."""
    return Manifest.parse(json.loads((directory / MANIFEST).read_text()), str(directory))


def rows_of(directory: Path, source: str) -> list[dict[str, Any]]:
    """All rows of a source, in order."""
    files = [file.name for file in manifest_of(directory).files if file.source == source]
    return [row for name in files for row in pq.read_table(directory / name).to_pylist()]


def decoded(row: dict[str, Any], encoding: Any) -> Any:
    """The targets of a row that an encoding reads."""
    columns = {
        name: torch.from_numpy(np.frombuffer(row[name], np.uint8).reshape(-1, width).copy())
        for name, width in encoding.widths().items()
    }
    return encoding.decode(columns)
