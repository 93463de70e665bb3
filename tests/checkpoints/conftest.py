"""An S3 server with the micro model, and a cache of this test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints.counting_store import CountingStore
from s3fs import S3FileSystem


@pytest.fixture(scope="session")
def _running_store() -> Iterator[CountingStore]:
    with CountingStore().running() as store:
        yield store


@pytest.fixture
def store(_running_store: CountingStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CountingStore]:
    """An S3 server that this process and its children use, and NEXUS_RAY_CACHE in this test's directory."""
    for name, value in _running_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nexus_ray.storage.retries.LONGEST_WAIT", 0.2)
    _running_store.behave()
    S3FileSystem.clear_instance_cache()  # of those that know another server
    yield _running_store
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def remote_model(store: CountingStore, micro_model: Path, request: pytest.FixtureRequest) -> str:
    """The URI of the micro model in a place of this test's own."""
    return store.put(micro_model, f"{request.node.name}/micro")
