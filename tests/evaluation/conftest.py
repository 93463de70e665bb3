"""Runs whose student is there, scored in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config import Config
from nexus_ray.evaluation.evaluate import Evaluation, merge
from nexus_ray.evaluation.scorer import PairedScorer
from nexus_ray.evaluation.work import plan_scoring
from nexus_ray.layout import RunLayout

Scored = Callable[..., Evaluation]


@pytest.fixture
def trained(micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path) -> Callable[..., Config]:
    """A function (**overrides) -> config of a run whose student is the random overlay."""

    def make(**overrides: object) -> Config:
        (tmp_path / "run").mkdir(exist_ok=True)
        if not (tmp_path / "run" / "overlay").exists():
            (tmp_path / "run" / "overlay").symlink_to(micro_overlay)
        return micro_config(tmp_path / "run", **overrides)

    return make


@pytest.fixture
def scored(trained: Callable[..., Config]) -> Scored:
    """A function (**overrides) -> evaluation of that run, without Ray, last shard first."""

    def run(**overrides: object) -> Evaluation:
        config = trained(**overrides)
        scorer = PairedScorer(config, RunLayout(config.run.directory).overlay)
        shards, items = plan_scoring(config)
        return merge(shards, [scorer(item) for item in reversed(items)], config)

    return run


@pytest.fixture
def heldout(tmp_path: Path) -> Callable[[Sequence[dict[str, Any]]], dict[str, object]]:
    """A function from rows to the overrides that make them the held-out text of `play`, alone."""

    def write(rows: Sequence[dict[str, Any]]) -> dict[str, object]:
        path = tmp_path / "heldout.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data.sources.play.heldout": str(path), "data.sources.prose.heldout": [], "data.shard_bytes": 1 << 20}

    return write
