"""A worker that trains alone, without Ray Train, and the settings of a small training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import STEPS

from nexus_ray.config import OptimiserSection, ScheduleSection
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place
from nexus_ray.training import trainer
from nexus_ray.training.settings import LoopSettings


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker asks Ray Train about, answered for a single one on a CPU."""
    monkeypatch.setattr(trainer, "world", lambda: (0, 1))
    monkeypatch.setattr(trainer, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(trainer, "data_parallel", lambda module: module)
    monkeypatch.setattr(trainer, "from_first_worker", lambda value: value)
    monkeypatch.setattr(trainer, "node_is_leaving", lambda: False)
    monkeypatch.setattr(trainer, "tell_ray", lambda metrics: None)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., LoopSettings]:
    def make(name: str = "run", **changes: Any) -> LoopSettings:
        schedule = ScheduleSection(warmup=0.5, decay=0.25)
        values = {
            "steps": STEPS,
            "optimiser": OptimiserSection(learning_rate=0.05, weight_decay=0.1, schedule=schedule),
            "validate_every": 5,
            "checkpoint_every": 3,
            "keep_checkpoints": 2,
            "layout": RunLayout(tmp_path / name),
        }
        return LoopSettings(**{**values, **changes})

    return make


@pytest.fixture
def stored(
    remote: Place, settings: Callable[..., LoopSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LoopSettings]:
    """The same, with the run directory in an object store, on a node that has no copies of anything yet."""
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path / "cache"))

    def make(name: str = "run", **changes: Any) -> LoopSettings:
        return settings(name, **{"layout": RunLayout(remote / name), **changes})

    return make
