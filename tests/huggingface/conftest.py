"""Fixtures: an export of the micro model, and token ids to run it on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nexus_ray.huggingface.export import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, micro_model: Path, micro_overlay: Path) -> Path:
    """The micro model with the random overlay as one directory."""
    return export(micro_model, micro_overlay, tmp_path_factory.mktemp("exports") / "micro").directory


@pytest.fixture(scope="session")
def input_ids() -> torch.Tensor:
    """[2, 24] token ids."""
    return torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
