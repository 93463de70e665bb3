"""An S3 server with the micro model, and a cache of this test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints.object_store import ObjectStore


@pytest.fixture(scope="session")
def _running_store() -> Iterator[ObjectStore]:
    with ObjectStore().running() as store:
        yield store


@pytest.fixture
def store(_running_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    """An S3 server that this process and its children use, and NEXUS_RAY_CACHE in this test's directory."""
    for name, value in _running_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path / "cache"))
    _running_store.behave()
    return _running_store


@pytest.fixture
def remote_model(store: ObjectStore, micro_model: Path, request: pytest.FixtureRequest) -> str:
    """The URI of the micro model in a place of this test's own."""
    return store.put(micro_model, f"{request.node.name}/micro")
