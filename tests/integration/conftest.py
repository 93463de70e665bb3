"""One finished run of the whole pipeline, for all tests that look at one or go on from one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ray.config import Config
from nexus_ray.pipeline import run_pipeline
from nexus_ray.storage import sha256_file

MakeConfig = Callable[..., Config]


def _hashes(directory: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(directory.iterdir())}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, make_micro_config: MakeConfig, ray_session: None) -> Config:
    """A finished run on this disk; nothing may be changed in it."""
    config = make_micro_config(tmp_path_factory.mktemp("runs") / "micro")
    before = _hashes(config.model.path)
    run_pipeline(config)
    assert _hashes(config.model.path) == before, "a stage wrote to the base"
    return config


@pytest.fixture
def copy_of_finished(finished: Config, make_micro_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """A function (**overrides) -> Config of a copy of the finished run, for tests that change it."""

    def copy(**overrides: object) -> Config:
        directory = tmp_path / "copy"
        shutil.copytree(finished.run.directory, directory)
        return make_micro_config(directory, **overrides)

    return copy
