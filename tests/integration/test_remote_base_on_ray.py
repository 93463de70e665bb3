"""Stages on Ray with the base model in an object store make what they make from a local copy, fetching it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from object_store import BUCKET, ObjectStore

from nexus_ray.config import Config
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_pipeline
from nexus_ray.storage import place_of, sha256_file


@pytest.mark.slow
def test_statistics_and_targets_are_the_same_bytes(
    ray_session: None,
    object_store: ObjectStore,
    make_micro_config: Callable[..., Config],
    micro_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in micro_model.iterdir():
        object_store.client().put_object(Bucket=BUCKET, Key=f"bases/micro/{file.name}", Body=file.read_bytes())
    layouts = []
    for name, base in (("local", str(micro_model)), ("remote", f"s3://{BUCKET}/bases/micro")):
        config = make_micro_config(tmp_path / name)
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": place_of(base)})})
        object_store.requests.clear()
        run_pipeline(config, last="precompute")
        layouts.append(RunLayout(config.run.directory))
    local, remote = layouts
    for of in ("router_stats", "selection"):
        assert sha256_file(getattr(remote, of)) == sha256_file(getattr(local, of))
    targets = [{path.name: sha256_file(path) for path in layout.targets.glob("*.parquet")} for layout in layouts]
    assert targets[0] == targets[1]
    assert targets[0]
    # Only the weights of a copy are read from beginning to end in order; all else asks for ranges of tensors.
    whole = [
        one for one in object_store.requests if one.path.endswith("/generation_config.json") and one.method == "GET"
    ]
    assert len(whole) == 2  # of the driver's description and of the node's model
