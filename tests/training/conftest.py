"""A worker that trains alone, without Ray Train."""

from __future__ import annotations

import pytest
import torch

from nexus_ray.training import trainer


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker asks Ray Train about, answered for a single one on a CPU."""
    monkeypatch.setattr(trainer, "world", lambda: (0, 1))
    monkeypatch.setattr(trainer, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(trainer, "data_parallel", lambda module: module)
    monkeypatch.setattr(trainer, "from_first_worker", lambda value: value)
    monkeypatch.setattr(trainer, "node_is_leaving", lambda: False)
    monkeypatch.setattr(trainer, "tell_ray", lambda metrics: None)
