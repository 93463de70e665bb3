"""A minimal configuration file, what it is read as with overrides, and what is said when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ray.config import Config, load_config
from nexus_ray.errors import ConfigError

_MINIMAL = """
run: {directory: runs/x}
model: {path: models/base}
data:
  sequence_length: 512
  sources:
    play: {train: play.jsonl}
    prose: {train: [a.txt, b.txt], role: retention}
train:
  sources:
    play: {sequences_per_step: 4, cross_entropy: 1.0}
"""


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """A function (*overrides) -> the minimal configuration with them."""
    path = tmp_path / "small.yaml"
    path.write_text(_MINIMAL)
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture
def refused(configured: Callable[..., Config]) -> Callable[..., str]:
    """A function (*overrides) -> the message that they are refused with."""

    def refuse(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            configured(*overrides)
        return str(caught.value)

    return refuse
